"""Augmentation: any callable as an augmentation, with random numbers seeded by the example.

A collator runs ahead of the training, in this process or in workers, and a resumed run starts it at another point, so
the state of a generator cannot be reproduced, but a key for each example or batch can.
"""

from __future__ import annotations

import contextlib
import hashlib
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, Protocol, get_args

import numpy as np
import torch

from hf_distill._types import Example
from hf_distill.errors import SettingError


@contextlib.contextmanager
def generators_kept() -> Iterator[None]:
    """Inside this context the CPU generators of torch, numpy and `random` may be used; their states are restored."""
    python, of_numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(of_numpy)


@contextlib.contextmanager
def seeded(*key: object) -> Iterator[None]:
    """Inside this context the CPU generators start from the key; their states are restored.

    >>> with seeded(0, "a"):
    ...     first = torch.rand(3)
    >>> with seeded(0, "a"):
    ...     bool((torch.rand(3) == first).all())
    True
    """
    seed = int.from_bytes(digest(key)[:8], "little")
    with generators_kept():
        torch.default_generator.manual_seed(seed)
        np.random.seed(seed % 2**32)
        random.seed(seed)
        yield


def digest(value: object) -> bytes:
    """Return a hash of nested lists, mappings, arrays, numbers and strings that is the same in every process.

    Other objects (a decoder, an image) contribute only their type.
    """
    state = hashlib.blake2b(digest_size=16)
    _feed(state, value)
    return state.digest()


def _feed(state: hashlib.blake2b, value: object) -> None:
    match value:
        case Mapping():
            state.update(b"{")
            for name in value:
                _feed(state, name)
                _feed(state, value[name])
        case str():
            _feed(state, value.encode())
        case bytes():
            state.update(b"s%d:" % len(value) + value)
        case torch.Tensor():
            state.update(f"t{value.dtype}{tuple(value.shape)}".encode())
            state.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
        case np.ndarray() if value.dtype != object:
            state.update(f"a{value.dtype.str}{value.shape}".encode())
            state.update(np.ascontiguousarray(value).tobytes())
        case None | bool() | int() | float() | np.generic():
            state.update(f"n{value!r}".encode())
        case Sequence() | np.ndarray():
            _feed_sequence(state, value)
        case _:
            state.update(f"o{type(value).__qualname__}".encode())


def _feed_sequence(state: hashlib.blake2b, value: Sequence[Any] | np.ndarray) -> None:
    """Hash a list of numbers at once, since a waveform has some hundred thousand."""
    state.update(b"[%d" % len(value))
    kinds = {type(item) for item in value}
    if kinds == {float}:
        _feed(state, np.asarray(value, dtype=np.float64))
    elif kinds <= {int, bool}:
        state.update(repr(list(value)).encode())
    else:
        for item in value:
            _feed(state, item)


ActsOn = Literal["example", "examples", "batch"]


class AnyAugmentation(Protocol):
    """An `Augmentation`, or any callable object with these attributes."""

    @property
    def moves_positions(self) -> bool: ...

    @property
    def acts_on(self) -> str: ...

    def __call__(self, inputs: Any, /) -> Any: ...


class Augmentation:
    """Any callable as an augmentation, which returns a new example and does not change its argument.

    It may draw from the generators of torch (on the CPU), numpy and `random`, which are seeded before each call and
    restored afterwards. A callable object with these attributes need not be wrapped.

    Args:
        function: takes and returns an example; with `acts_on="examples"` a list of examples (to batch a model's
            forward), with "batch" a collated batch.
        moves_positions: whether tokens or frames may move (speed, crop, time warp, inserted words); then student and
            teacher must get the same input.
        acts_on: "example", "examples" or "batch".
        changes_tokens: whether a token may become another word.

    Raises:
        SettingError: if `function` is not callable, or `acts_on` is unknown.

    >>> louder = Augmentation(lambda example: {**example, "gain": 2 * example["gain"]}, moves_positions=False)
    >>> louder({"gain": 1.0})
    {'gain': 2.0}
    """

    def __init__(
        self,
        function: Callable[[Any], Any],
        *,
        moves_positions: bool,
        acts_on: ActsOn = "example",
        changes_tokens: bool = False,
    ) -> None:
        self.function = function
        self.moves_positions = moves_positions
        self.acts_on = acts_on
        self.changes_tokens = changes_tokens
        checked(self)
        if not callable(function):
            raise SettingError(f"Augmentation needs a callable, not a {type(function).__name__}.")

    def __repr__(self) -> str:
        return f"Augmentation({name_of(self)}, moves_positions={self.moves_positions}, acts_on={self.acts_on!r})"

    def __call__(self, inputs: Any) -> Any:
        return self.function(inputs)


def checked(augmentation: AnyAugmentation) -> AnyAugmentation:
    """Return the augmentation if it is valid.

    Raises:
        SettingError: if it is not callable, or an attribute is missing or has a value that is not allowed.
    """
    name = name_of(augmentation)
    missing = [known for known in ("moves_positions", "acts_on") if not hasattr(augmentation, known)]
    if not callable(augmentation) or missing:
        lacks = " and ".join(missing) or "a way to call it"
        raise SettingError(
            f"{name} is no augmentation: it lacks {lacks}. Wrap a function: "
            "hf_distill.augment.Augmentation(function, moves_positions=False)."
        )
    allowed = get_args(ActsOn)
    if augmentation.acts_on not in allowed:
        raise SettingError(f"{name}: acts_on={augmentation.acts_on!r}. It may be {', '.join(allowed)}.")
    return augmentation


def name_of(augmentation: AnyAugmentation) -> str:
    function = getattr(augmentation, "function", augmentation)
    return getattr(function, "__name__", type(function).__name__)


def before_collation(augmentations: Sequence[AnyAugmentation], examples: list[Example]) -> list[Example]:
    """Apply the augmentations that act on examples, in order."""
    for augmentation in augmentations:
        if augmentation.acts_on == "example":
            examples = [augmentation(example) for example in examples]
        elif augmentation.acts_on == "examples":
            examples = augmentation(examples)
    return examples


def after_collation(augmentations: Sequence[AnyAugmentation], batch: Any) -> Any:
    """Apply the augmentations that act on a batch, in order."""
    for augmentation in augmentations:
        if augmentation.acts_on == "batch":
            batch = augmentation(batch)
    return batch


def like(original: object, changed: Any) -> Any:
    """Return new values with the type and dtype of the original: a tensor, an array or a list."""
    match original:
        case torch.Tensor():
            return torch.as_tensor(changed, dtype=original.dtype, device=original.device)
        case np.ndarray():
            return np.asarray(changed, dtype=original.dtype)
    return changed.tolist() if isinstance(changed, (torch.Tensor, np.ndarray)) else list(changed)
