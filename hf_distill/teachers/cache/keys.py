"""Keys of examples by content, and fingerprints of teachers, processors and datasets.

A key is a hash of what the teacher reads of one row of a batch, without its padding. So neither padding, batching,
order nor the number of workers matters.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from importlib.metadata import version
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from hf_distill.errors import DataError, TeacherError
from hf_distill.hub.facts import HIDDEN_PATH, looks_like_hub_id, without_paths
from hf_distill.models.capture import start_token_of
from hf_distill.tasks.base import IGNORED, TEACHER_PREFIX, Batch
from hf_distill.tasks.infer import unwrapped
from hf_distill.teachers.base import Teacher
from hf_distill.teachers.model import ModelTeacher

CACHED_PREFIX = f"{TEACHER_PREFIX}cached_"
MASK = "attention_mask"
DECODER_MASK = "decoder_attention_mask"
_SIZE = 16  # bytes of a key
_NO_CONTENT = (MASK, DECODER_MASK)


def read_by_teacher(batch: Batch, main: str) -> Mapping[str, Any]:
    """Return the columns that the teacher reads, without prefix.

    Its own `teacher_*` columns if its main input is among them, else the student's.

    Args:
        batch: with `teacher_*` columns or without.
        main: the teacher's main input.
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

    The labels are among them if decoder inputs are made of them, that is if the collator gives none.

    Args:
        batch: a batch of the training.
        main: the teacher's main input.
        inputs: all columns that the teacher reads.
        decodes: whether the model has a decoder whose inputs are made of the labels.
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
        batch: a batch of the training.
        columns: the columns that the key is a hash of.
        main: the teacher's main input.

    Raises:
        DataError: if a column is missing.

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
            f"{', '.join(missing)}, only {sorted(batch)}. Give the batch the columns that the cache was built with."
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


def _add(digest: Any, name: str, content: np.ndarray) -> None:
    digest.update(f"{name}:{content.dtype.str}:{content.shape};".encode())
    digest.update(np.ascontiguousarray(content).tobytes())


def _add_gaps(digest: Any, mask: np.ndarray) -> None:
    """Add where the real positions are relative to the first, unless they are consecutive."""
    if mask.ndim > 1:  # choices: each has its own length
        digest.update(np.ascontiguousarray(mask.sum(-1)).astype(np.int64).tobytes())
        return
    real = np.flatnonzero(mask)
    if real.size and real[-1] - real[0] + 1 != real.size:
        digest.update((real - real[0]).astype(np.int64).tobytes())


_CHUNK = 1 << 26  # bytes hashed at once
_NO_EFFECT = ("_offload", "_batch_size", "_max_concurrency")  # settings that do not change a teacher's predictions
_PLAIN = (str, int, float, bool, type(None))


def weights_fingerprint(model: nn.Module) -> str:
    """Return a hash of every parameter and buffer: name, dtype, shape and bits. The device does not matter.

    Raises:
        TeacherError: if no process holds the whole weights.

    >>> layer = nn.Linear(2, 1)
    >>> before = weights_fingerprint(layer)
    >>> _ = nn.init.zeros_(layer.bias)
    >>> before == weights_fingerprint(layer)
    False
    """
    digest = hashlib.blake2b(digest_size=16)
    for name, held in sorted(unwrapped(model).state_dict().items()):
        for tensor in _tensors(held):
            if isinstance(tensor, DTensor):
                raise TeacherError(
                    f"the teacher's weights lie on several processes (FSDP or tensor parallelism: {name}), and a cache "
                    "needs them whole in each. Load it whole on each (without distributed_config), or in one process "
                    'with device_map="auto".'
                )
            digest.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)};".encode())
            for piece in tensor.detach().contiguous().flatten().split(_CHUNK):
                digest.update(piece.cpu().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _tensors(held: Any) -> Iterable[Tensor]:
    """Return the plain tensors in an entry of a state dict: an int8 layer packs its weight and bias into one entry."""
    if isinstance(held, (tuple, list)):
        return [tensor for part in held for tensor in _tensors(part)]
    if not isinstance(held, Tensor):
        return []
    if not held.is_quantized:
        return [held]
    per_channel = held.qscheme() in (torch.per_channel_affine, torch.per_channel_symmetric)
    scale = held.q_per_channel_scales() if per_channel else torch.tensor(held.q_scale())
    return [held.int_repr(), scale]


def describe_processor(processor: Any) -> dict[str, Any] | None:
    """Return fingerprints of a tokenizer (vocabulary and rules), feature extractor or image processor (settings)."""
    if processor is None:
        return None
    parts: dict[str, Any] = {}
    tokenizer = getattr(processor, "tokenizer", processor)
    if hasattr(tokenizer, "get_vocab"):
        vocabulary = tokenizer.get_vocab()
        parts["vocabulary"] = len(vocabulary)
        parts["ids"] = max(vocabulary.values()) + 1
        parts["tokenizer"] = _json_digest([sorted(vocabulary.items()), _rules(tokenizer)])
    extractor = getattr(processor, "feature_extractor", getattr(processor, "image_processor", processor))
    if hasattr(extractor, "to_dict") and extractor is not tokenizer:
        parts["extractor"] = _json_digest(_plain_values(extractor.to_dict()))
    return {"class": type(processor).__name__, **parts}


def keys_fingerprint(keys: np.ndarray) -> str:
    """Return a hash of the examples of a dataset, in their order."""
    return hashlib.blake2b(np.ascontiguousarray(keys, dtype="<u8").tobytes(), digest_size=16).hexdigest()


def describe_collator(collator: Any) -> dict[str, Any]:
    """Return a collator's class and those of its settings that are plain values."""
    name = getattr(collator, "__qualname__", type(collator).__qualname__)
    return {"collator": name, "settings": _plain_values(getattr(collator, "__dict__", {}))}


def describe_teacher(teacher: Teacher) -> dict[str, Any]:
    """Return who a teacher is: its class and weights, or its class, settings and members."""
    if teacher.recorded is not None:
        return dict(teacher.recorded)
    if isinstance(teacher, ModelTeacher):
        return describe_model(teacher.model)
    members = [describe_teacher(member) for member in teacher.members() if member is not teacher]
    settings = {name: _plain_setting(value) for name, value in vars(teacher).items() if name not in _NO_EFFECT}
    known = {name: value for name, value in settings.items() if value is not None}
    return {
        "name": None,
        "class": type(teacher).__name__,
        "weights": _json_digest([known, [member["weights"] for member in members]]),
        "dtype": members[0]["dtype"] if members else None,
        "members": members,
    }


def describe_model(model: nn.Module) -> dict[str, Any]:
    """Return who a model is: its class, weights, labels, and its name if that may be shown."""
    inner = unwrapped(model)
    config = getattr(inner, "config", None)
    origin = getattr(config, "_name_or_path", "")
    return {
        "name": origin if origin and looks_like_hub_id(origin) else HIDDEN_PATH if origin else None,
        "class": type(inner).__name__,
        "weights": weights_fingerprint(model),
        "dtype": str(next((p.dtype for p in inner.parameters() if p.is_floating_point()), None)).removeprefix("torch."),
        "config": describe_config(config),
    }


def describe_config(config: Any) -> dict[str, Any]:
    """Return the part of a config that decides which columns of two heads mean the same."""
    labels = getattr(config, "id2label", None)
    names = ("num_labels", "problem_type", "hidden_size", "pad_token_id")
    return {
        **{name: getattr(config, name, None) for name in names},
        "id2label": None if labels is None else {str(index): name for index, name in labels.items()},
        "bos_token_id": start_token_of(config),
    }


def _plain_setting(value: Any) -> Any:
    """Return a teacher's setting as plain data, or None if it is no setting."""
    if isinstance(value, (Tensor, np.ndarray)):
        return hashlib.blake2b(torch.as_tensor(value).cpu().numpy().tobytes(), digest_size=16).hexdigest()
    if isinstance(value, (tuple, list)):
        return [_plain_setting(part) for part in value]
    if isinstance(value, Teacher):  # of an ensemble in an ensemble, the settings count too
        return None if value.members() == [value] else describe_teacher(value)["weights"]
    if hasattr(value, "get_vocab"):
        return (describe_processor(value) or {}).get("tokenizer")
    return value if isinstance(value, _PLAIN) else None


def library_versions() -> dict[str, str]:
    return {name: version(name) for name in ("torch", "transformers", "datasets", "pyarrow")}


def _rules(tokenizer: Any) -> Any:
    """Return what a fast tokenizer does besides its vocabulary, padding and truncation (which each call sets)."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return None
    rules = json.loads(backend.to_str())
    return {name: value for name, value in rules.items() if name not in ("padding", "truncation", "added_tokens")}


def _plain_values(settings: Mapping[str, Any]) -> dict[str, Any]:
    kept = {str(name): value for name, value in settings.items() if isinstance(value, _PLAIN)}
    return {name: without_paths(value) if isinstance(value, str) else value for name, value in kept.items()}


def _json_digest(value: Any) -> str:
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, default=str)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
