"""What every way to build a student asks of a teacher, and of the student's config. It builds nothing."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from hf_distill.errors import TeacherError


def check_teacher(teacher: Any, call: str) -> None:
    """Raise TeacherError for what is no whole PreTrainedModel with its values here."""
    if getattr(teacher, "peft_config", None) is not None:
        raise TeacherError(
            f"{call}: the teacher ({type(teacher).__name__}) has PEFT adapters. Merge them first: "
            "teacher = peft_model.merge_and_unload()."
        )
    if not isinstance(teacher, PreTrainedModel):
        raise TeacherError(
            f"{call}: the teacher is a {type(teacher).__name__}. Give a PreTrainedModel, as from_pretrained returns "
            "it, before it is compiled or wrapped for several processes."
        )
    if getattr(teacher, "is_quantized", False) or getattr(teacher, "hf_quantizer", None) is not None:
        raise TeacherError(
            f"{call}: the teacher is quantised. Load it without quantization_config, say with dtype=torch.bfloat16."
        )
    strange = [name for name, value in teacher.named_parameters() if value.is_meta or not value.is_floating_point()]
    if strange:
        raise TeacherError(
            f"{call}: {strange[0]} of the teacher holds no floating-point values here (it is quantised, or offloaded "
            "to disk). Load the teacher whole: from_pretrained(..., dtype=torch.bfloat16) without device_map."
        )


def check_config(config: PreTrainedConfig) -> None:
    """Raise TeacherError where a config with other sizes says something else after it was written and read."""
    written = config.to_dict()
    try:
        read = type(config).from_dict(copy.deepcopy(written)).to_dict()
    except (ValueError, TypeError, KeyError, IndexError, StrictDataclassError) as error:
        raise TeacherError(
            f"narrow: {type(config).__name__} does not allow these sizes together: {' '.join(str(error).split())}"
        ) from error
    changed = sorted(name for name in written if read.get(name) != written[name])
    if changed:
        raise TeacherError(
            f"narrow: {type(config).__name__} for the student reads back with other values in {', '.join(changed)}."
        )


def without_ties(config: Any) -> Any:
    """The config of a model whose head has weights of its own. The same, where its class ties them always (T5)."""
    new = copy.deepcopy(config)
    new.tie_word_embeddings = False
    read = type(config).from_dict(copy.deepcopy(new.to_dict()))
    return new if getattr(read, "tie_word_embeddings", None) is False else config


def own_heads(student: Any, teacher: Any) -> list[str]:
    """What the student's class ties always and the teacher has apart: T5 v1.1 and mT5, as they are read from files."""
    if without_ties(student.config) is not student.config:
        return []
    theirs = dict(teacher.named_parameters(remove_duplicate=False))
    pairs = [(name, other) for name, other in student.all_tied_weights_keys.items() if {name, other} <= theirs.keys()]
    return [one for one, two in pairs if theirs[one] is not theirs[two] and not torch.equal(theirs[one], theirs[two])]


def set_apart(model: Any, names: Iterable[str]) -> None:
    """Give these parameters tensors of their own, as `from_pretrained` does for a T5 whose file has both."""
    for name in names:
        path, _, last = name.rpartition(".")
        module, tied = model.get_submodule(path), model.get_parameter(name)
        setattr(module, last, nn.Parameter(torch.empty_like(tied), requires_grad=tied.requires_grad))
        model.all_tied_weights_keys.pop(name, None)
