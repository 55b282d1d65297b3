"""Loading a teacher from a folder or the Hub, with the head that its checkpoint has."""

from __future__ import annotations

import os
from typing import Annotated, Any, TypeAlias

import torch
import transformers
from safetensors import SafetensorError
from transformers import AutoConfig, AutoTokenizer
from transformers.utils import cached_file

from hf_distill._types import OneOf
from hf_distill.errors import HfDistillError, SettingError, TeacherError, did_you_mean
from hf_distill.tasks.infer import TASKS, kind_of_class

DTYPES = ("auto", "float32", "bfloat16", "float16")
DtypeName: TypeAlias = Annotated[str, OneOf(DTYPES)]
# What people call them; only proposed in messages.
DTYPE_ALIASES = {
    **dict.fromkeys(("fp32", "float", "f32", "torch.float32", "full"), "float32"),
    **dict.fromkeys(("bf16", "bfloat", "torch.bfloat16"), "bfloat16"),
    **dict.fromkeys(("fp16", "half", "f16", "torch.float16"), "float16"),
}

_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "vocab.txt",
    "vocab.json",
    "spiece.model",
    "sentencepiece.bpe.model",
    "source.spm",
    "tekken.json",
)

# SpecAugment's mask: many published speech checkpoints lack it, and a teacher, never in training mode, never reads it.
_READ_IN_TRAINING_ONLY = ("masked_spec_embed",)


def as_dtype(name: str | torch.dtype | None) -> Any:
    """A dtype by name; "auto" is the checkpoint's own.

    Raises:
        SettingError: no such dtype.
    """
    if name is None or name == "auto" or isinstance(name, torch.dtype):
        return name
    if name not in DTYPES:
        hint = did_you_mean(name, DTYPES, DTYPE_ALIASES)
        raise SettingError(f"teacher_dtype={name!r}: allowed are {', '.join(DTYPES)}.{hint}")
    return getattr(torch, name)


def load_teacher(
    path: str | os.PathLike[str],
    kind: str,
    *,
    dtype: str | None = None,
    quantization_config: Any = None,
    device_map: str | dict[str, Any] | None = None,
) -> Any:
    """The model at `path`, with the Auto class of this kind of head, in `dtype` (default: the checkpoint's own).

    Args:
        path: a folder, or a Hub id (the only case that may use the network).
        kind: a name in `TASKS`: the head of the student.
        quantization_config, device_map: as `from_pretrained`.

    Raises:
        TeacherError: nothing there, no model, or weights missing from the checkpoint: a head that
            transformers would fill at random teaches noise.
    """
    path = os.fspath(path)
    _check_exists(path)
    if os.path.isfile(os.path.join(path, "adapter_config.json")):
        raise TeacherError(
            f"teacher_model={path!r} holds a PEFT adapter, and what head its base is to get is not known here. Load "
            "it with peft (AutoPeftModelFor....from_pretrained) and pass the model, or merge it first "
            "(merge_and_unload, save_pretrained)."
        )
    options: dict[str, Any] = {"dtype": as_dtype(dtype) or "auto"}
    if quantization_config is not None:
        options["quantization_config"] = quantization_config
    if device_map is not None:
        options["device_map"] = device_map
    try:
        auto_class = _auto_class(path, kind)
        model, loading = auto_class.from_pretrained(path, output_loading_info=True, **options)
    except HfDistillError:
        raise
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError, ImportError) as error:
        raise TeacherError(f"teacher_model={path!r} cannot be loaded: {error}") from error
    missing = sorted(name for name in loading["missing_keys"] if not name.endswith(_READ_IN_TRAINING_ONLY))
    if missing and kind != "embedding":
        raise TeacherError(
            f"teacher_model={path!r} is not trained for {kind}: its checkpoint lacks "
            f"{', '.join(missing[:4])}{' and more' if len(missing) > 4 else ''}, which would be random numbers. "
            "Fine-tune it first, and give the folder that training saved."
        )
    return model


def kind_of_checkpoint(path: str | os.PathLike[str]) -> str | None:
    """The kind of head that a checkpoint was saved with, from its config.json; None where that does not tell.

    Raises:
        TeacherError: there is no such folder, or its config cannot be read.
    """
    path = os.fspath(path)
    _check_exists(path)
    try:
        config = AutoConfig.from_pretrained(path)
    except (OSError, ValueError, KeyError) as error:
        raise TeacherError(f"teacher_model={path!r} cannot be loaded: {error}") from error
    named = getattr(config, "architectures", None) or ()
    return next((kind for kind in (kind_of_class(name, config) for name in named) if kind is not None), None)


def _check_exists(path: str) -> None:
    if not os.path.isdir(path) and _looks_local(path):
        raise TeacherError(
            f"teacher_model={path!r}: no such folder. Give the path of a folder written by save_pretrained, or a Hub "
            "id like organisation/name."
        )


def find_tokenizer(path: str | os.PathLike[str], *, download: bool = True) -> Any:
    """The tokenizer beside a teacher's weights, to compare with the student's; None where there is none.

    For a Hub id it comes from where the weights have just come from.

    Args:
        path: a folder or a Hub id.
        download: False: of a Hub id, only what the local cache holds.
    """
    local = not download or os.path.isdir(path)
    if not any(_has_file(path, name, local=local) for name in _TOKENIZER_FILES):
        return None  # transformers would make an empty one of the model's class
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=local)
    except (OSError, ValueError, KeyError, ImportError, TypeError):
        return None  # one that is damaged, or needs a library that is not there: then it is not known
    return None if set(tokenizer.get_vocab()) <= set(tokenizer.all_special_tokens) else tokenizer


def _has_file(path: str | os.PathLike[str], name: str, *, local: bool) -> bool:
    if os.path.isdir(path):
        return os.path.isfile(os.path.join(path, name))
    try:
        return cached_file(path, name, local_files_only=local) is not None
    except OSError:  # not there, or neither in the cache nor in reach
        return False


def _looks_local(path: str) -> bool:
    """Whether it cannot be meant as a Hub id: `name` or `organisation/name`, nothing before or after."""
    return path.startswith((".", "~", os.sep)) or path.count("/") > 1 or os.path.isfile(path)


def _auto_class(path: str, kind: str) -> Any:
    """The Auto class of this kind that knows the checkpoint's configuration; of a kind of the user's, the checkpoint's.

    When the checkpoint names an architecture with another kind of head, it is loaded as what it is, so that the
    mismatch is named by the check that compares student and teacher.
    """
    config = AutoConfig.from_pretrained(path)
    candidates = [getattr(transformers, name) for name in (TASKS[kind].auto_classes if kind in TASKS else ())]
    known = [cls for cls in candidates if type(config) in cls._model_mapping]
    architecture = (getattr(config, "architectures", None) or [None])[0]
    other = getattr(transformers, architecture or "", None)
    if other is not None and architecture not in _class_names(known, config):
        return other
    if not known:
        raise TeacherError(
            f"teacher_model={path!r} is a {type(config).__name__}, for which transformers has no {kind} head, and its "
            "config names no class (architectures). Load the model, and pass that."
        )
    return known[0]


def _class_names(auto_classes: list[Any], config: Any) -> set[str]:
    found: set[str] = set()
    for cls in auto_classes:
        models = cls._model_mapping[type(config)]
        found.update(m.__name__ for m in (models if isinstance(models, tuple) else (models,)))
    return found
