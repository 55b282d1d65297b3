"""Fingerprints of what a cache depends on: a model's weights, a tokenizer, a collator. Plain data, no local paths."""

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

from hf_distill.errors import TeacherError
from hf_distill.inside.recorder import start_token_of
from hf_distill.run_facts.names import HIDDEN_PATH, looks_like_hub_id, without_paths
from hf_distill.tasks.infer import unwrapped

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


def of_file(path: Any) -> str:
    digest = hashlib.blake2b(digest_size=16)
    with open(path, "rb") as file:
        while piece := file.read(_CHUNK):
            digest.update(piece)
    return digest.hexdigest()


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


def differences(before: Any, now: Any, prefix: str = "") -> list[str]:
    """Where two descriptions differ, in words.

    >>> differences({"a": 1, "b": {"c": 2}}, {"a": 1, "b": {"c": 3}})
    ['b.c: 2 there, 3 now']
    """
    if isinstance(before, Mapping) and isinstance(now, Mapping):
        names: Iterable[str] = sorted({*before, *now})
        return [
            line
            for name in names
            for line in differences(before.get(name), now.get(name), f"{prefix}.{name}" if prefix else name)
        ]
    return [] if before == now else [f"{prefix}: {before} there, {now} now"]


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
