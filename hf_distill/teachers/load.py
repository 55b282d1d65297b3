"""Loading a teacher from a folder or the Hub, with the head that its checkpoint has."""

from __future__ import annotations

import os
from typing import Annotated, TypeAlias

import torch
import transformers
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModel,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import cached_file
from transformers.utils.quantization_config import QuantizationConfigMixin

from hf_distill._types import Keywords, OneOf
from hf_distill.errors import HfDistillError, SettingError, TeacherError, did_you_mean
from hf_distill.tasks.infer import TASKS, kind_of_class

DTYPES = ("auto", "float32", "bfloat16", "float16")
DtypeName: TypeAlias = Annotated[str, OneOf(DTYPES)]
# Other names for them, which messages correct.
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

# SpecAugment's mask, which is read in training mode only; many published speech checkpoints lack it.
_READ_IN_TRAINING_ONLY = ("masked_spec_embed",)


def as_dtype(name: str | torch.dtype | None) -> torch.dtype | str | None:
    """Return a dtype by name; "auto" (the checkpoint's own) and None are returned as they are.

    Raises:
        SettingError: if there is no such dtype.
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
    quantization_config: QuantizationConfigMixin | None = None,
    device_map: str | Keywords | None = None,
) -> PreTrainedModel:
    """Load the model at `path` with the Auto class of this kind of head.

    Args:
        path: a folder, or a Hub id (the only case that may use the network).
        kind: the student's kind of head, a name in `TASKS`.
        dtype: the dtype to load it in; None is the checkpoint's own.
        quantization_config: as for `from_pretrained`.
        device_map: as for `from_pretrained`.

    Raises:
        TeacherError: if there is no model, or its checkpoint lacks weights (a head that transformers fills with random
            numbers teaches noise).
    """
    path = os.fspath(path)
    _check_exists(path)
    if os.path.isfile(os.path.join(path, "adapter_config.json")):
        raise TeacherError(f"teacher_model={path!r} holds a PEFT adapter. Pass the model, or merge it first.")
    options: Keywords = {"dtype": as_dtype(dtype) or "auto"}
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
    """Return the kind of head that a checkpoint was saved with, or None if its config.json does not name it.

    Raises:
        TeacherError: if there is no such folder, or its config cannot be read.
    """
    path = os.fspath(path)
    _check_exists(path)
    try:
        config = AutoConfig.from_pretrained(path)
    except (OSError, ValueError, KeyError) as error:
        raise TeacherError(f"teacher_model={path!r} cannot be loaded: {error}") from error
    kinds = (kind_of_class(name, config) for name in config.architectures or ())
    return next((kind for kind in kinds if kind is not None), None)


def _check_exists(path: str) -> None:
    # A Hub id is `name` or `organisation/name`, with nothing before or after.
    looks_local = path.startswith((".", "~", os.sep)) or path.count("/") > 1 or os.path.isfile(path)
    if looks_local and not os.path.isdir(path):
        raise TeacherError(f"teacher_model={path!r}: no such folder. Give one from save_pretrained, or a Hub id.")


def find_tokenizer(path: str | os.PathLike[str], *, download: bool = True) -> PreTrainedTokenizerBase | None:
    """Return the tokenizer saved with a teacher's weights, or None if there is none.

    Args:
        path: a folder or a Hub id.
        download: whether it may be downloaded; if not, only folders and the local Hub cache are read.
    """
    local = not download or os.path.isdir(path)
    if not any(_has_file(path, name, local=local) for name in _TOKENIZER_FILES):
        return None  # transformers would make an empty one of the model's class
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=local)
    except (OSError, ValueError, KeyError, ImportError, TypeError):
        return None  # damaged, or needs a library that is not installed
    return None if set(tokenizer.get_vocab()) <= set(tokenizer.all_special_tokens) else tokenizer


def _has_file(path: str | os.PathLike[str], name: str, *, local: bool) -> bool:
    if os.path.isdir(path):
        return os.path.isfile(os.path.join(path, name))
    try:
        return cached_file(path, name, local_files_only=local) is not None
    except OSError:  # no such file, or neither cached nor reachable
        return False


def _auto_class(path: str, kind: str) -> type[AutoModel]:
    """Return the class to load a checkpoint with: the Auto class of this kind of head that knows its configuration.

    A checkpoint that names an architecture with another kind of head (or any, for a custom task) is loaded as it is, so
    that the check that compares student and teacher can name the mismatch.
    """
    config = AutoConfig.from_pretrained(path)
    candidates = [getattr(transformers, name) for name in (TASKS[kind].auto_classes if kind in TASKS else ())]
    known = [cls for cls in candidates if type(config) in cls._model_mapping]
    architecture = next(iter(config.architectures or ()), "")
    other = getattr(transformers, architecture, None)
    if other is not None and architecture not in {name for cls in known for name in _class_names(cls, config)}:
        return other
    if not known:
        raise TeacherError(
            f"teacher_model={path!r} is a {type(config).__name__}, for which transformers has no {kind} head, and its "
            "config names no class (architectures). Load the model, and pass that."
        )
    return known[0]


def _class_names(auto_class: type[AutoModel], config: PreTrainedConfig) -> list[str]:
    models = auto_class._model_mapping[type(config)]
    return [model.__name__ for model in (models if isinstance(models, tuple) else (models,)) if model is not None]
