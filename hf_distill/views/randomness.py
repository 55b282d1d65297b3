"""Random numbers that follow from what is augmented, not from how often one has drawn. No augmentation here.

A collator runs ahead of the training, in this process or in workers, and a resumed run starts it at another place: what
it draws from a running generator cannot be had again. A key can.
"""

from __future__ import annotations

import contextlib
import hashlib
import random
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch


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
