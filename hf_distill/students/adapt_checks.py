"""What PEFT lets pass in silence: names that match nothing, a head that stays random, a wrapper for another head."""

from __future__ import annotations

import re
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from hf_distill.errors import HfDistillError, SettingError
from hf_distill.tasks import make_task

# The task_type of PEFT for each kind of head; none for the others.
_TASK_TYPES = {
    "classification": "SEQ_CLS",
    "regression": "SEQ_CLS",
    "token_classification": "TOKEN_CLS",
    "span": "QUESTION_ANS",
    "causal_lm": "CAUSAL_LM",
    "seq2seq": "SEQ_2_SEQ_LM",
    "embedding": "FEATURE_EXTRACTION",
}
_PRETRAINED_HEADS = ("masked_lm", "causal_lm", "seq2seq", "embedding")


def check_student(student: Any) -> None:
    """Raises SettingError: no model of transformers, or one with adapters."""
    if getattr(student, "peft_config", None) is not None:
        raise SettingError(
            f"adapt: the student ({type(student).__name__}) has adapters already. Merge them first "
            "(student.merge_and_unload()), or start from its base."
        )
    if not isinstance(student, PreTrainedModel):
        raise SettingError(
            f"adapt: the student is a {type(student).__name__}. Give a PreTrainedModel, not compiled or wrapped."
        )


def kind_of(student: PreTrainedModel) -> str | None:
    """The kind of its head; None where its class does not tell."""
    try:
        return make_task(student, None).kind
    except HfDistillError:
        return None


def trains_its_head(student: PreTrainedModel) -> bool:
    """Whether the head mostly starts fresh."""
    return kind_of(student) not in _PRETRAINED_HEADS


def head_modules(student: PreTrainedModel) -> tuple[str, ...]:
    """The modules beside the encoder: those that hold no list of blocks."""
    found = []
    for name, child in student.named_children():
        is_body = name == student.base_model_prefix or any(isinstance(part, nn.ModuleList) for part in child.modules())
        if not is_body and any(True for _ in child.parameters()):
            found.append(name)
    return tuple(found) if student.base_model is not student else ()


def check_config(student: PreTrainedModel, config: Any) -> None:
    """Refuse, before anything is changed, what PEFT would take for less than it says.

    Raises:
        SettingError: see the messages.
    """
    if config.inference_mode:
        raise SettingError("adapt: inference_mode=True trains nothing. Set it to False.")
    _check_task_type(student, config)
    names = [name for name, _ in student.named_modules()]
    targets = getattr(config, "target_modules", None)
    for what, given in (("target_modules", targets), ("modules_to_save", getattr(config, "modules_to_save", None))):
        listed = () if given is None or isinstance(given, str) else given
        missing = sorted(one for one in listed if not any(name == one or name.endswith(f".{one}") for name in names))
        if missing:
            last = sorted({name.rpartition(".")[2] for name in names if not name.rpartition(".")[2].isdigit()} - {""})
            raise SettingError(
                f"adapt: {what} names {', '.join(missing)}, and {type(student).__name__} has no such module. Its "
                f"modules: {', '.join(last)}."
            )
    for name in getattr(config, "modules_to_save", None) or ():
        _refuse_quantised(student, name)


def _check_task_type(student: PreTrainedModel, config: Any) -> None:
    given = getattr(config.task_type, "value", config.task_type)
    if given is None:
        return
    kind = kind_of(student)
    expected = _TASK_TYPES.get(kind or "") if student.main_input_name == "input_ids" else None
    if given != expected:
        fits = "leave task_type out" if expected is None else f"it is {expected!r}, or can be left out"
        raise SettingError(
            f"adapt: task_type={given!r} is not that of {type(student).__name__} (kind of head: {kind}): {fits}. PEFT "
            "takes the forward and the head from it."
        )


def _refuse_quantised(student: nn.Module, ending: str) -> None:
    for name, module in student.named_modules():
        if name == ending or name.endswith(f".{ending}"):
            held = [p for p in module.parameters() if not p.is_floating_point()]
            if held:
                raise SettingError(
                    f"adapt: {name} is to be trained whole, and is quantised. Load the student with "
                    f'BitsAndBytesConfig(..., llm_int8_skip_modules=["{ending}"]), or pass train_head=False.'
                )


def check_layers(config: Any, adapted: tuple[str, ...]) -> None:
    """Raises SettingError: of the layers that are named, one has no adapter."""
    wanted = getattr(config, "layers_to_transform", None)
    wanted = [wanted] if isinstance(wanted, int) else list(wanted or ())
    there = {int(number) for name in adapted for number in re.findall(r"\.(\d+)\.", name)}
    missing = [layer for layer in wanted if layer not in there]
    if missing:
        raise SettingError(
            f"adapt: layers_to_transform={wanted}: layer {missing[0]} has no module that is targeted. Adapted are "
            f"layers {', '.join(map(str, sorted(there)))}."
        )
