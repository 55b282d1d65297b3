"""Random numbers that follow from what is augmented, not from how often one has drawn. No augmentation here.

A collator runs ahead of the training, in this process or in workers, and a resumed run starts it at another place: what
it draws from a running generator cannot be had again. A key can.
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
    """The CPU generators of torch, numpy and `random`, as they were before."""
    python, of_numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(of_numpy)


@contextlib.contextmanager
def seeded(*key: Any) -> Iterator[None]:
    """Inside, the CPU generators start from the key; afterwards they are as they were.

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
    """A hash of what is in nested lists, mappings, arrays, numbers and strings: the same in every process.

    Of other objects (a decoder, an image) only the type is seen.
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
    """Lists of numbers in one go: a waveform is a list of some hundred thousand."""
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
    """Any callable as an augmentation; it returns a new example and leaves the one it is given as it is.

    It may draw from the generators of torch (on the CPU), numpy and `random`: whoever applies it seeds them, and puts
    them back. An object that has the two attributes itself need not be wrapped.

    Args:
        function: an example to an example; with `acts_on` "examples" a list of them to a list (to batch a model's
            forward), with "batch" a collated batch to a batch.
        moves_positions: a token or a frame may stand elsewhere afterwards (speed, crop, time warp, inserted words).
            Then student and teacher must be shown the same.
        acts_on: "example", "examples" or "batch".
        changes_tokens: a token may be another word afterwards.

    Raises:
        SettingError: not callable, or an unknown `acts_on`.

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

    def __call__(self, shown: Any) -> Any:
        return self.function(shown)


def checked(augmentation: Any) -> Any:
    """The augmentation, if it is one.

    Raises:
        SettingError: not callable, or an attribute is missing or has another value than is allowed.
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
    """The examples after those augmentations that act on examples, in their order."""
    for augmentation in augmentations:
        if augmentation.acts_on == "example":
            examples = [augmentation(example) for example in examples]
        elif augmentation.acts_on == "examples":
            examples = augmentation(examples)
    return examples


def after_collation(augmentations: list[Any], batch: Any) -> Any:
    """The batch after those augmentations that act on a batch, in their order."""
    for augmentation in augmentations:
        if augmentation.acts_on == "batch":
            batch = augmentation(batch)
    return batch


def like(original: Any, changed: Any) -> Any:
    """New numbers as what the old ones were: a tensor, an array or a list, of the same type of number."""
    if isinstance(original, torch.Tensor):
        return torch.as_tensor(changed, dtype=original.dtype, device=original.device)
    if isinstance(original, np.ndarray):
        return np.asarray(changed, dtype=original.dtype)
    return changed.tolist() if isinstance(changed, (torch.Tensor, np.ndarray)) else list(changed)
