"""Augmentation: any callable as an augmentation, with random numbers that follow from the example.

A collator runs ahead of the training, in this process or in workers, and a resumed run starts it at another point, so
the state of a generator could not be reproduced. A key for each example or batch can.
"""

from __future__ import annotations

import contextlib
import hashlib
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, get_args

import numpy as np
import torch

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
def seeded(*key: Any) -> Iterator[None]:
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


def digest(value: Any) -> bytes:
    """Return a hash of nested lists, mappings, arrays, numbers and strings that is the same in every process.

    Other objects (a decoder, an image) contribute only their type.
    """
    found = hashlib.blake2b(digest_size=16)
    _feed(found, value)
    return found.digest()


def _feed(found: Any, value: Any) -> None:
    if isinstance(value, Mapping):
        found.update(b"{")
        for name in value:
            _feed(found, name)
            _feed(found, value[name])
    elif isinstance(value, (str, bytes)):
        data = value.encode() if isinstance(value, str) else value
        found.update(b"s%d:" % len(data) + data)
    elif isinstance(value, torch.Tensor):
        found.update(f"t{value.dtype}{tuple(value.shape)}".encode())
        found.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    elif isinstance(value, np.ndarray) and value.dtype != object:
        found.update(f"a{value.dtype.str}{value.shape}".encode())
        found.update(np.ascontiguousarray(value).tobytes())
    elif value is None or isinstance(value, (bool, int, float, np.generic)):
        found.update(f"n{value!r}".encode())
    elif isinstance(value, (Sequence, np.ndarray)):
        _feed_sequence(found, value)
    else:
        found.update(f"o{type(value).__qualname__}".encode())


def _feed_sequence(found: Any, value: Any) -> None:
    """Hash a list of numbers at once: a waveform has some hundred thousand."""
    found.update(b"[%d" % len(value))
    kinds = {type(item) for item in value}
    if kinds == {float}:
        _feed(found, np.asarray(value, dtype=np.float64))
    elif kinds <= {int, bool}:
        found.update(repr(list(value)).encode())
    else:
        for item in value:
            _feed(found, item)


ActsOn = Literal["example", "examples", "batch"]
ACTS_ON: tuple[str, ...] = get_args(ActsOn)
Example = dict[str, Any]


class Augmentation:
    """Any callable as an augmentation; it returns a new example and does not change its argument.

    It may draw from the generators of torch (on the CPU), numpy and `random`: they are seeded before each call and
    restored afterwards. An object that has the attributes itself need not be wrapped.

    Args:
        function: takes and returns an example. With `acts_on="examples"` a list of examples (to batch a model's
            forward), with "batch" a collated batch.
        moves_positions: whether tokens or frames may move (speed, crop, time warp, inserted words). Then student and
            teacher must get the same input.
        acts_on: "example", "examples" or "batch".
        changes_tokens: whether a token may become another word.

    Raises:
        SettingError: if it is not callable, or for an unknown `acts_on`.

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

    def __call__(self, shown: Any) -> Any:
        return self.function(shown)


def checked(augmentation: Any) -> Any:
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
    if augmentation.acts_on not in ACTS_ON:
        raise SettingError(f"{name}: acts_on={augmentation.acts_on!r}. It may be {', '.join(ACTS_ON)}.")
    return augmentation


def name_of(augmentation: Any) -> str:
    function = getattr(augmentation, "function", augmentation)
    return getattr(function, "__name__", type(function).__name__)


def before_collation(augmentations: list[Any], examples: list[Example]) -> list[Example]:
    """Apply the augmentations that act on examples, in order."""
    for augmentation in augmentations:
        if augmentation.acts_on == "example":
            examples = [augmentation(example) for example in examples]
        elif augmentation.acts_on == "examples":
            examples = augmentation(examples)
    return examples


def after_collation(augmentations: list[Any], batch: Any) -> Any:
    """Apply the augmentations that act on a batch, in order."""
    for augmentation in augmentations:
        if augmentation.acts_on == "batch":
            batch = augmentation(batch)
    return batch


def like(original: Any, changed: Any) -> Any:
    """Convert new values to the type of the old ones: a tensor, an array or a list, with the same dtype."""
    if isinstance(original, torch.Tensor):
        return torch.as_tensor(changed, dtype=original.dtype, device=original.device)
    if isinstance(original, np.ndarray):
        return np.asarray(changed, dtype=original.dtype)
    return changed.tolist() if isinstance(changed, (torch.Tensor, np.ndarray)) else list(changed)
