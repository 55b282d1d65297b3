"""Shared by `inherit` and `narrow`: checks of the teacher and of configs, an empty student, weight tying."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from hf_distill.errors import TeacherError
from hf_distill.models.stacks import empty_model


def check_teacher(teacher: object, call: str) -> None:
    """Raise TeacherError unless the teacher is a whole, unquantised PreTrainedModel without adapters.

    Args:
        teacher: the model to check.
        call: the function that needs it, for the message.
    """
    problem = None
    if getattr(teacher, "peft_config", None) is not None:
        problem = "has PEFT adapters. Merge them first: teacher = peft_model.merge_and_unload()"
    elif not isinstance(teacher, PreTrainedModel):
        problem = "is not a PreTrainedModel. Pass the model as from_pretrained returns it, not compiled or wrapped"
    elif getattr(teacher, "is_quantized", False):
        problem = "is quantised. Load it without quantization_config, for example with dtype=torch.bfloat16"
    else:
        for name, value in teacher.named_parameters():
            if value.is_meta or not value.is_floating_point():
                problem = f"is offloaded or quantised ({name} has no floating-point values). Load it without device_map"
                break
    if problem:
        raise TeacherError(f"{call}: the teacher ({type(teacher).__name__}) {problem}.")


def check_config(config: PreTrainedConfig, call: str) -> None:
    """Raise TeacherError if a config changes when it is saved and loaded."""
    name, saved = type(config).__name__, config.to_dict()
    try:
        loaded = type(config).from_dict(copy.deepcopy(saved)).to_dict()
    except (ValueError, TypeError, KeyError, IndexError, StrictDataclassError) as error:
        raise TeacherError(f"{call}: {name} does not allow this student: {' '.join(str(error).split())}") from error
    changed = sorted(key for key in saved if loaded.get(key) != saved[key])
    if changed:
        raise TeacherError(f"{call}: the student's {name} does not survive saving: {', '.join(changed)} would change.")


def empty_student(
    teacher: PreTrainedModel, config: PreTrainedConfig, call: str, untied: Iterable[str] = ()
) -> PreTrainedModel:
    """Return a model of the teacher's class and of the teacher's parts, whose parameters hold no values yet.

    Args:
        teacher: the model whose class and parts to use.
        config: the student's config.
        call: the function that builds it, for messages.
        untied: parameters that the class ties and that must have tensors of their own.

    Raises:
        TeacherError: if the class cannot be built from this config, or the config changes when it is saved.
    """
    check_config(config, call)
    try:
        student: PreTrainedModel = empty_model(teacher, config, "cpu")
    except (ValueError, IndexError, KeyError, RuntimeError) as error:
        raise TeacherError(f"{call}: {type(teacher).__name__} cannot be built with this config: {error}") from error
    _drop_absent_modules(student, teacher)
    _untie(student, {name for name in untied if name in student.all_tied_weights_keys}.union(_untied(student, teacher)))
    return student


def _drop_absent_modules(student: nn.Module, teacher: nn.Module) -> None:
    """Remove the student's modules that are None in the teacher, such as the pooler of some heads."""
    dropped: list[str] = []
    for name in [name for name, _ in student.named_modules() if name]:
        path, _, last = name.rpartition(".")
        if any(name.startswith(f"{other}.") for other in dropped):
            continue
        try:
            parent = teacher.get_submodule(path)
        except AttributeError:
            continue  # a layer that the teacher does not have: compared with its source elsewhere
        if not isinstance(parent, nn.ModuleList) and getattr(parent, last, parent) is None:
            setattr(student.get_submodule(path), last, None)
            dropped.append(name)


def all_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters of a model, tied ones under each of their names."""
    return dict(model.named_parameters(remove_duplicate=False))


def all_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return the parameters and buffers of a model, tied ones under each of their names."""
    return {**all_parameters(model), **dict(model.named_buffers(remove_duplicate=False))}


def untied_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """Return a config whose head has its own weights, or the same config if its class always ties them (T5)."""
    new = copy.deepcopy(config)
    new.tie_word_embeddings = False
    loaded = type(config).from_dict(copy.deepcopy(new.to_dict()))
    return new if getattr(loaded, "tie_word_embeddings", None) is False else config


def _untied(student: PreTrainedModel, teacher: PreTrainedModel) -> list[str]:
    """Return parameters that the class always ties and that differ in the teacher (T5 v1.1 and mT5 from files)."""
    if untied_config(student.config) is not student.config:
        return []
    theirs = all_parameters(teacher)
    pairs = [(name, other) for name, other in student.all_tied_weights_keys.items() if {name, other} <= theirs.keys()]
    return [name for name, other in pairs if _differ(theirs[name], theirs[other])]


def _untie(model: PreTrainedModel, names: Collection[str]) -> None:
    for name in sorted(names):
        path, _, last = name.rpartition(".")
        tied = model.get_parameter(name)
        untied = nn.Parameter(torch.empty_like(tied), requires_grad=tied.requires_grad)
        setattr(model.get_submodule(path), last, untied)
        model.all_tied_weights_keys.pop(name, None)


def check_weight_tying(student: nn.Module, theirs: Mapping[str, Tensor], call: str) -> None:
    """Raise TeacherError if weights that are tied in the student differ in the teacher: one of them would be lost.

    Args:
        student: the empty student.
        theirs: the teacher's tensors, by their name in the student.
        call: the function that builds it, for the message.
    """
    names_of: defaultdict[int, list[str]] = defaultdict(list)
    for name, parameter in all_parameters(student).items():
        if name in theirs:
            names_of[id(parameter)].append(name)
    for first, *others in names_of.values():
        for other in others:
            if _differ(theirs[first], theirs[other]):
                raise TeacherError(
                    f"{call}: {first} and {other} are tied by the config but differ in the teacher. To keep both, set "
                    "teacher.config.tie_word_embeddings=False; otherwise call teacher.tie_weights()."
                )


def _differ(x: Tensor, y: Tensor) -> bool:
    return x is not y and not torch.equal(x, y)


def copy_generation_config(
    student: PreTrainedModel, teacher: PreTrainedModel, move: Callable[[int, int], list[int] | None] | None
) -> list[str]:
    """Copy the generation config, with Whisper's alignment heads where they are in the student; return notes.

    Args:
        student: the student, changed in place.
        teacher: the model whose generation config to copy.
        move: returns the student's [layer, head] for a decoder layer and head of the teacher, or None if the student
            lacks that head. Without `move`, all heads stay where they are.
    """
    if getattr(teacher, "generation_config", None) is None:
        return []
    config: Any = copy.deepcopy(teacher.generation_config)
    student.generation_config = config
    heads = vars(config).get("alignment_heads")
    if not heads or move is None:
        return []
    moved = [pair for layer, head in heads if (pair := move(layer, head)) is not None]
    if moved:
        config.alignment_heads = moved
    else:
        del config.alignment_heads
    lost = "" if moved else " The student cannot predict word timestamps."
    return [f"generation_config.alignment_heads: {len(moved)} of {len(heads)} were kept.{lost}"]
