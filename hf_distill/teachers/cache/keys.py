"""Keys of examples by content.

A key is a hash of what the teacher reads of one row of a batch, without its padding. So neither padding, batching,
order nor the number of workers matters.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

from hf_distill._types import Batch
from hf_distill.errors import DataError
from hf_distill.tasks.base import IGNORED, TEACHER_PREFIX

CACHED_PREFIX = f"{TEACHER_PREFIX}cached_"
MASK = "attention_mask"
DECODER_MASK = "decoder_attention_mask"
_SIZE = 16  # bytes of a key
_NO_CONTENT = (MASK, DECODER_MASK)


def read_by_teacher(batch: Batch, main: str) -> Batch:
    """Return the columns that the teacher reads, without prefix.

    They are its own `teacher_*` columns if its main input is among them, and the student's otherwise.
    """
    own = {
        name.removeprefix(TEACHER_PREFIX): value
        for name, value in batch.items()
        if name.startswith(TEACHER_PREFIX) and not name.startswith(CACHED_PREFIX)
    }
    if main not in own:
        return batch
    decoding = {name: batch[name] for name in ("labels", "decoder_input_ids", DECODER_MASK) if name in batch}
    return {**decoding, **own}


def key_columns(batch: Batch, *, main: str, inputs: Iterable[str], decodes: bool) -> tuple[str, ...]:
    """Return the columns that decide what the teacher predicts, in a fixed order.

    Args:
        batch: a batch of the training.
        main: the teacher's main input.
        inputs: all columns that the teacher reads.
        decodes: whether there is a decoder; if the collator gives it no inputs, they are made of the labels.
    """
    source = read_by_teacher(batch, main)
    found = {name for name in inputs if isinstance(source.get(name), Tensor) and name not in _NO_CONTENT}
    if decodes and "decoder_input_ids" not in found:
        found.add("labels")
    return tuple(sorted(found))


def content_keys(batch: Batch, columns: Iterable[str], *, main: str) -> np.ndarray:
    """Return the key of each row, `[b 2]` unsigned 64-bit: its high and its low half.

    Integers count by their value, whatever their width; floats by their 32-bit pattern.

    Args:
        batch: a batch of the training; DataError is raised if it lacks a column.
        columns: the columns that the key is a hash of.
        main: the teacher's main input.

    >>> short = {"input_ids": torch.tensor([[5, 6]])}
    >>> padded = {"input_ids": torch.tensor([[5, 6, 0]]), "attention_mask": torch.tensor([[1, 1, 0]])}
    >>> a, b = (content_keys(batch, ["input_ids"], main="input_ids") for batch in (short, padded))
    >>> bool((a == b).all())
    True
    """
    source = read_by_teacher(batch, main)
    missing = [name for name in columns if not isinstance(source.get(name), Tensor)]
    if missing:
        raise DataError(
            f"the cached teacher identifies an example by {', '.join(columns)}, and the batch has no "
            f"{', '.join(missing)}, only {sorted(batch)}."
        )
    arrays = {name: _plain(source[name]) for name in columns}
    mask = None if source.get(MASK) is None else _plain(source[MASK]).astype(bool)
    lengths = decoder_lengths(source)
    rows = len(next(iter(arrays.values())))
    digests = bytearray()
    for row in range(rows):
        digest = hashlib.blake2b(digest_size=_SIZE)
        for name, array in arrays.items():
            if name == "labels" or name.startswith("decoder_"):
                _add(digest, name, array[row] if lengths is None else array[row, : lengths[row]])
            elif mask is not None and array.shape[1 : mask.ndim] == mask.shape[1:]:
                _add(digest, name, array[row][mask[row]])
                _add_gaps(digest, mask[row])
            else:
                _add(digest, name, array[row])
        digests += digest.digest()
    return np.frombuffer(bytes(digests), dtype=">u8").reshape(rows, 2).astype(np.uint64)


def decoder_lengths(batch: Batch) -> np.ndarray | None:
    """Return how many decoder positions each example has, up to its last label, `[b]`; None if that is not known."""
    if batch.get("labels") is not None:
        kept = _plain(batch["labels"]) != IGNORED
    elif batch.get(DECODER_MASK) is not None:
        kept = _plain(batch[DECODER_MASK]).astype(bool)
    else:
        return None
    if kept.ndim != 2:
        return None
    last = kept.shape[1] - kept[:, ::-1].argmax(1)
    return np.where(kept.any(1), last, 0)


def _plain(tensor: Tensor) -> np.ndarray:
    """Return an array with integers of 64 bits or floats of 32 bits."""
    tensor = tensor.detach().cpu()
    return tensor.to(torch.float32 if tensor.is_floating_point() else torch.int64).numpy()


def _add(digest: hashlib.blake2b, name: str, content: np.ndarray) -> None:
    digest.update(f"{name}:{content.dtype.str}:{content.shape};".encode())
    digest.update(np.ascontiguousarray(content).tobytes())


def _add_gaps(digest: hashlib.blake2b, mask: np.ndarray) -> None:
    """Add where the real positions are relative to the first, unless they are consecutive."""
    if mask.ndim > 1:  # choices: each has its own length
        digest.update(np.ascontiguousarray(mask.sum(-1)).astype(np.int64).tobytes())
        return
    real = np.flatnonzero(mask)
    if real.size and real[-1] - real[0] + 1 != real.size:
        digest.update((real - real[0]).astype(np.int64).tobytes())


def keys_fingerprint(keys: np.ndarray) -> str:
    """Return a hash of the examples of a dataset, in their order."""
    return hashlib.blake2b(np.ascontiguousarray(keys, dtype="<u8").tobytes(), digest_size=16).hexdigest()
