"""Keys of examples by content: a hash of what the teacher reads of one row of a batch, without its padding.

So neither padding, nor batching, nor order, nor the number of workers matters. What is looked up is elsewhere.
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

CACHED_PREFIX = f"{TEACHER_PREFIX}cached_"
MASK = "attention_mask"
DECODER_MASK = "decoder_attention_mask"
_SIZE = 16  # bytes of a key
_NO_CONTENT = (MASK, DECODER_MASK)


def read_by_teacher(batch: Batch, main: str) -> Mapping[str, Any]:
    """What the teacher reads: its own `teacher_*` columns, prefix taken off, where they have its main input; else the
    student's."""
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
    """The columns that decide what the teacher says, in a fixed order.

    A decoder's inputs are made of the labels where the collator gives none, so then the labels are among them.
    """
    source = read_by_teacher(batch, main)
    found = {name for name in inputs if isinstance(source.get(name), Tensor) and name not in _NO_CONTENT}
    if decodes and "decoder_input_ids" not in found:
        found.add("labels")
    return tuple(sorted(found))


def content_keys(batch: Batch, columns: Iterable[str], *, main: str) -> np.ndarray:
    """`[b 2]` unsigned 64-bit: the key of each row, its high and its low half.

    Integers count by their value, whatever their width; floats by their 32-bit pattern.

    Raises:
        DataError: a column that the cache is keyed by is missing.

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
            f"the cached teacher knows an example by {', '.join(columns)}, and the batch has no "
            f"{', '.join(missing)}, only {sorted(batch)}. Give the batch the columns that the cache was built with."
        )
    arrays = {name: _plain(source[name]) for name in columns}
    mask = None if source.get(MASK) is None else _plain(source[MASK]).astype(bool)
    lengths = _decoder_lengths(source)
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
    """`[b]` how many decoder positions each example has, up to its last label; None where nothing says so."""
    return _decoder_lengths(batch)


def _decoder_lengths(source: Mapping[str, Any]) -> np.ndarray | None:
    if source.get("labels") is not None:
        kept = _plain(source["labels"]) != IGNORED
    elif source.get(DECODER_MASK) is not None:
        kept = _plain(source[DECODER_MASK]).astype(bool)
    else:
        return None
    if kept.ndim != 2:
        return None
    last = kept.shape[1] - kept[:, ::-1].argmax(1)
    return np.where(kept.any(1), last, 0)


def _plain(tensor: Tensor) -> np.ndarray:
    """On the CPU, integers as 64 bit, floats as 32 bit."""
    tensor = tensor.detach().cpu()
    return tensor.to(torch.float32 if tensor.is_floating_point() else torch.int64).numpy()


def _add(digest: Any, name: str, content: np.ndarray) -> None:
    digest.update(f"{name}:{content.dtype.str}:{content.shape};".encode())
    digest.update(np.ascontiguousarray(content).tobytes())


def _add_gaps(digest: Any, mask: np.ndarray) -> None:
    """Where the real positions are, relative to the first, if that does not follow from how many there are."""
    if mask.ndim > 1:  # choices: each has its own length
        digest.update(np.ascontiguousarray(mask.sum(-1)).astype(np.int64).tobytes())
        return
    real = np.flatnonzero(mask)
    if real.size and real[-1] - real[0] + 1 != real.size:
        digest.update((real - real[0]).astype(np.int64).tobytes())


_CHUNK = 1 << 26  # bytes that are hashed at once
_OF_ONE_RUN = ("_offload", "_batch_size", "_max_concurrency")  # settings of teachers that change nothing that they say
_PLAIN = (str, int, float, bool, type(None))


def of_weights(model: nn.Module) -> str:
    """Of every parameter and buffer: name, dtype, shape and bits. The device does not matter.

    Raises:
        TeacherError: no process holds the weights whole.

    >>> layer = nn.Linear(2, 1)
    >>> before = of_weights(layer)
    >>> _ = nn.init.zeros_(layer.bias)
    >>> before == of_weights(layer)
    False
    """
    digest = hashlib.blake2b(digest_size=16)
    for name, held in sorted(unwrapped(model).state_dict().items()):
        for tensor in _tensors(held):
            if isinstance(tensor, DTensor):
                raise TeacherError(
                    f"the teacher's weights lie on several processes (FSDP or tensor parallelism: {name}), and each "
                    "process asks it by itself. Load it whole on each (without distributed_config), or in one process "
                    'with device_map="auto".'
                )
            digest.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)};".encode())
            for piece in tensor.detach().contiguous().flatten().split(_CHUNK):
                digest.update(piece.cpu().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _tensors(held: Any) -> Iterable[Tensor]:
    """Plain tensors in an entry of a state: a layer in int8 packs its weight and bias into one."""
    if isinstance(held, (tuple, list)):
        return [tensor for one in held for tensor in _tensors(one)]
    if not isinstance(held, Tensor):
        return []
    if not held.is_quantized:
        return [held]
    a_channel = held.qscheme() in (torch.per_channel_affine, torch.per_channel_symmetric)
    scale = held.q_per_channel_scales() if a_channel else torch.tensor(held.q_scale())
    return [held.int_repr(), scale]


def of_processor(processor: Any) -> dict[str, Any] | None:
    """Of a tokenizer (vocabulary and rules), a feature extractor or an image processor (settings); None for none."""
    if processor is None:
        return None
    parts: dict[str, Any] = {}
    tokenizer = getattr(processor, "tokenizer", processor)
    if hasattr(tokenizer, "get_vocab"):
        vocabulary = tokenizer.get_vocab()
        parts["vocabulary"] = len(vocabulary)
        parts["ids"] = max(vocabulary.values()) + 1
        parts["tokenizer"] = _of_json([sorted(vocabulary.items()), _rules(tokenizer)])
    extractor = getattr(processor, "feature_extractor", getattr(processor, "image_processor", processor))
    if hasattr(extractor, "to_dict") and extractor is not tokenizer:
        parts["extractor"] = _of_json(_plain_value(extractor.to_dict()))
    return {"class": type(processor).__name__, **parts}


def of_tokenizer(processor: Any) -> str | None:
    """The tokenizer's part of `of_processor`."""
    found = of_processor(processor)
    return None if found is None else found.get("tokenizer")


def of_keys(keys: np.ndarray) -> str:
    """Of the examples of a dataset, in their order."""
    return hashlib.blake2b(np.ascontiguousarray(keys, dtype="<u8").tobytes(), digest_size=16).hexdigest()


def of_collator(collator: Any) -> dict[str, Any]:
    """A collator's class and those of its settings that are plain values."""
    name = getattr(collator, "__qualname__", type(collator).__qualname__)
    return {"collator": name, "settings": _plain_value(getattr(collator, "__dict__", {}))}


def of_teacher(model: nn.Module) -> dict[str, Any]:
    """Who the teacher is: its class, its weights, its labels, and its name where that may be shown."""
    inner = unwrapped(model)
    config = getattr(inner, "config", None)
    origin = getattr(config, "_name_or_path", "")
    return {
        "name": origin if origin and looks_like_hub_id(origin) else HIDDEN_PATH if origin else None,
        "class": type(inner).__name__,
        "weights": of_weights(model),
        "dtype": str(next((p.dtype for p in inner.parameters() if p.is_floating_point()), None)).removeprefix("torch."),
        "config": of_config(config),
    }


def of_config(config: Any) -> dict[str, Any]:
    """As much of it as decides which columns of two heads mean the same."""
    labels = getattr(config, "id2label", None)
    return {
        "num_labels": getattr(config, "num_labels", None),
        "id2label": None if labels is None else {str(index): name for index, name in labels.items()},
        "problem_type": getattr(config, "problem_type", None),
        "hidden_size": getattr(config, "hidden_size", None),
        "pad_token_id": getattr(config, "pad_token_id", None),
        "bos_token_id": start_token_of(config),
    }


def of_several(teacher: Any) -> dict[str, Any]:
    """As `of_teacher` of a teacher that is no model: its class, its settings, and the teachers in it."""
    if hasattr(teacher, "cache"):
        return dict(teacher.cache.manifest["teacher"])
    if isinstance(getattr(teacher, "model", None), nn.Module):
        return of_teacher(teacher.model)
    members = [of_several(one) for one in getattr(teacher, "teachers", ())]
    settings = {name: _told(value) for name, value in vars(teacher).items() if name not in _OF_ONE_RUN}
    known = {name: value for name, value in settings.items() if value is not None}
    return {
        "name": None,
        "class": type(teacher).__name__,
        "weights": _of_json([known, [one["weights"] for one in members]]),
        "dtype": members[0]["dtype"] if members else None,
        "members": members,
    }


def _told(value: Any) -> Any:
    """A setting as plain data; None for what is none."""
    if isinstance(value, (Tensor, np.ndarray)):
        return hashlib.blake2b(torch.as_tensor(value).cpu().numpy().tobytes(), digest_size=16).hexdigest()
    if isinstance(value, (tuple, list)):
        return [_told(one) for one in value]
    if hasattr(value, "get_vocab"):
        return of_tokenizer(value)
    return value if isinstance(value, _PLAIN) else None


def versions() -> dict[str, str]:
    return {name: version(name) for name in ("torch", "transformers", "datasets", "pyarrow")}


def _rules(tokenizer: Any) -> Any:
    """What a fast tokenizer does beside its vocabulary; without padding and truncation, which each call sets anew."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return None
    rules = json.loads(backend.to_str())
    return {name: value for name, value in rules.items() if name not in ("padding", "truncation", "added_tokens")}


def _plain_value(settings: Mapping[str, Any]) -> dict[str, Any]:
    kept = {str(name): value for name, value in settings.items() if isinstance(value, _PLAIN)}
    return {name: without_paths(value) if isinstance(value, str) else value for name, value in kept.items()}


def _of_json(value: Any) -> str:
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, default=str)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
