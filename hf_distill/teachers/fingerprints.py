"""Fingerprints of teachers, processors and collators, by which a pass knows whether it continues the same work."""

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
from transformers import PreTrainedTokenizerBase

from hf_distill._types import Collator, ProcessingClass
from hf_distill.errors import TeacherError
from hf_distill.hub.facts import HIDDEN_PATH, looks_like_hub_id, without_paths
from hf_distill.models.capture import start_token_of
from hf_distill.tasks.infer import config_of, unwrapped
from hf_distill.teachers.base import Teacher
from hf_distill.teachers.model import ModelTeacher, tokenizer_in
from hf_distill.teachers.shards import Json

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
    for name, entry in sorted(unwrapped(model).state_dict().items()):
        for tensor in _tensors(entry):
            if isinstance(tensor, DTensor):
                raise TeacherError(f"the teacher's weights are sharded ({name}). Load it without distributed_config.")
            digest.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)};".encode())
            for piece in tensor.detach().contiguous().flatten().split(_CHUNK):
                digest.update(piece.cpu().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _tensors(entry: object) -> Iterable[Tensor]:
    """Return the plain tensors in an entry of a state dict: an int8 layer packs its weight and bias into one entry."""
    if isinstance(entry, (tuple, list)):
        return [tensor for part in entry for tensor in _tensors(part)]
    if not isinstance(entry, Tensor):
        return []
    if not entry.is_quantized:
        return [entry]
    per_channel = entry.qscheme() in (torch.per_channel_affine, torch.per_channel_symmetric)
    scale = entry.q_per_channel_scales() if per_channel else torch.tensor(entry.q_scale())
    return [entry.int_repr(), scale]


def describe_processor(processor: ProcessingClass | None) -> Json | None:
    """Return fingerprints of a tokenizer (vocabulary and rules), feature extractor or image processor (settings)."""
    if processor is None:
        return None
    parts: Json = {}
    tokenizer = tokenizer_in(processor)
    if tokenizer is not None:
        vocabulary = tokenizer.get_vocab()
        parts["vocabulary"] = len(vocabulary)
        parts["ids"] = max(vocabulary.values()) + 1
        parts["tokenizer"] = _json_digest([sorted(vocabulary.items()), _rules(tokenizer)])
    extractor = getattr(processor, "feature_extractor", getattr(processor, "image_processor", processor))
    if hasattr(extractor, "to_dict") and extractor is not tokenizer:
        parts["extractor"] = _json_digest(_plain_values(extractor.to_dict()))
    return {"class": type(processor).__name__, **parts}


def describe_collator(collator: Collator) -> Json:
    """Return a collator's class and its settings that are plain values."""
    name = getattr(collator, "__qualname__", type(collator).__qualname__)
    return {"collator": name, "settings": _plain_values(getattr(collator, "__dict__", {}))}


def describe_teacher(teacher: Teacher) -> Json:
    """Return a teacher's identity: its class and weights, or its class, settings and members."""
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


def describe_model(model: nn.Module) -> Json:
    """Return a model's identity: its class, weights, labels, and its name if that may be shown."""
    inner = unwrapped(model)
    origin = getattr(config_of(inner), "_name_or_path", "")
    return {
        "name": origin if origin and looks_like_hub_id(origin) else HIDDEN_PATH if origin else None,
        "class": type(inner).__name__,
        "weights": weights_fingerprint(model),
        "dtype": str(next((p.dtype for p in inner.parameters() if p.is_floating_point()), None)).removeprefix("torch."),
        "config": describe_config(model),
    }


def describe_config(model: nn.Module) -> Json:
    """Return the part of a model's config from which heads are aligned."""
    config = config_of(model)
    labels = getattr(config, "id2label", None)
    names = ("num_labels", "problem_type", "hidden_size", "pad_token_id")
    return {
        **{name: getattr(config, name, None) for name in names},
        "id2label": None if labels is None else {str(index): name for index, name in labels.items()},
        "bos_token_id": start_token_of(config),
    }


def _plain_setting(value: Any) -> object:
    """Return a teacher's setting as plain data, or None if it is no setting."""
    if isinstance(value, (Tensor, np.ndarray)):
        return hashlib.blake2b(torch.as_tensor(value).cpu().numpy().tobytes(), digest_size=16).hexdigest()
    if isinstance(value, (tuple, list)):
        return [_plain_setting(part) for part in value]
    if isinstance(value, Teacher):  # the settings of a nested ensemble count too
        return None if value.members() == [value] else describe_teacher(value)["weights"]
    if hasattr(value, "get_vocab"):
        return (describe_processor(value) or {}).get("tokenizer")
    return value if isinstance(value, _PLAIN) else None


def library_versions() -> dict[str, str]:
    return {name: version(name) for name in ("torch", "transformers", "datasets", "pyarrow")}


def _rules(tokenizer: PreTrainedTokenizerBase) -> Json | None:
    """Return the rules of a fast tokenizer, without its vocabulary and the padding and truncation of a call."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return None
    rules = json.loads(backend.to_str())
    return {name: value for name, value in rules.items() if name not in ("padding", "truncation", "added_tokens")}


def _plain_values(settings: Mapping[str, Any]) -> Json:
    kept = {str(name): value for name, value in settings.items() if isinstance(value, _PLAIN)}
    return {name: without_paths(value) if isinstance(value, str) else value for name, value in kept.items()}


def _json_digest(value: object) -> str:
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, default=str)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
