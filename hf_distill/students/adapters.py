"""Checks on a student with PEFT adapters: mistakes that PEFT accepts silently and that waste a training."""

from __future__ import annotations

import copy
import os
import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import nn
from transformers import PreTrainedModel

from hf_distill.errors import HfDistillError, SettingError, require
from hf_distill.tasks import Task, make_task

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel

# PEFT's task_type for the Auto class that loads a head. Other heads have none.
_TASK_TYPES = {
    "AutoModelForSequenceClassification": "SEQ_CLS",
    "AutoModelForTokenClassification": "TOKEN_CLS",
    "AutoModelForQuestionAnswering": "QUESTION_ANS",
    "AutoModelForCausalLM": "CAUSAL_LM",
    "AutoModelForSeq2SeqLM": "SEQ_2_SEQ_LM",
    "AutoModel": "FEATURE_EXTRACTION",
}
_OF_PEFT = {"lora_A", "lora_B", "default", "base_layer", "modules_to_save", "original_module"}
_SET_BY_PEFT = {"classifier", "score", "qa_outputs"}  # what a task_type adds to modules_to_save, present or not


@dataclass(frozen=True)
class AdapterReport:
    """What is trained in a student with adapters.

    Attributes:
        method: PEFT's name of the method, such as LORA or IA3.
        architecture: the class of the base model.
        adapted: the names of the modules with an adapter; empty for methods that add tokens.
        head: the modules outside of the encoder or decoder that are trained.
        trainable_parameters: number of parameters that are trained.
        parameters: number of all parameters; a 4-bit module counts its packed values.
    """

    method: str
    architecture: str
    adapted: tuple[str, ...] = field(repr=False)
    head: tuple[str, ...]
    trainable_parameters: int
    parameters: int

    def __str__(self) -> str:
        return (
            f"{self.architecture}: {self.method} on {len(self.adapted)} modules\n"
            f"  trained: {self.trainable_parameters:,} of {self.parameters:,} parameters "
            f"({self.trainable_parameters / self.parameters:.1%}); head: {', '.join(self.head) or 'frozen'}"
        )


def check_adapters(student: PeftModel, *, allow_frozen_head: bool = False) -> AdapterReport:
    """Check that a `PeftModel` trains what its config names, and its head if that is new; report what is trained.

    Args:
        student: the model that `peft.get_peft_model` returned.
        allow_frozen_head: whether the head of a classifier (or another head that mostly starts at random) may stay
            frozen. Set it only if the head is already trained.

    Raises:
        SettingError: if no adapter is trained, the config names modules or layers that do not exist, its task_type does
            not belong to this head, or a head that mostly starts at random is frozen.
        MissingExtraError: if peft is not installed.

    >>> from peft import LoraConfig, get_peft_model
    >>> from transformers import BertConfig, BertForSequenceClassification as Bert
    >>> student = Bert(BertConfig(vocab_size=9, hidden_size=4, num_hidden_layers=2, num_attention_heads=1))
    >>> config = LoraConfig(r=2, target_modules=["query", "value"], modules_to_save=["classifier"])
    >>> report = check_adapters(get_peft_model(student, config))
    >>> len(report.adapted), report.head, report.trainable_parameters
    (4, ('classifier',), 74)
    """
    student = _peft_model(student, "check_adapters")
    base: Any = student.get_base_model()
    config, task = student.active_peft_config, _task_of(base)
    adapted = tuple(getattr(student.base_model, "targeted_module_names", ()))
    trained = {name: p for name, p in student.named_parameters() if p.requires_grad}
    heads = _head_modules(base)
    frozen = [name for name in heads if not any(p.requires_grad for p in base.get_submodule(name).parameters())]
    # Language models and embeddings mostly come with a trained head.
    is_new = task is None or not (task.over_vocabulary or task.auto_classes == ("AutoModel",))
    problem = _unknown_name(base, config) or _missing_layer(config, adapted) or _wrong_task_type(base, task, config)
    if all(".modules_to_save." in name for name in trained):
        problem = "no adapter is trained. Set inference_mode=False in its config, or load it with is_trainable=True"
    elif not problem and frozen and is_new and not allow_frozen_head:
        problem = (
            f"the head ({', '.join(frozen)}) is frozen, and would stay random if it is new. Use modules_to_save="
            f"{heads} in the PEFT config, or pass allow_frozen_head=True if it is already trained"
        )
    if problem:
        raise SettingError(f"check_adapters: {type(base).__name__} with {config.peft_type.value}: {problem}.")
    return AdapterReport(
        method=config.peft_type.value,
        architecture=type(base).__name__,
        adapted=adapted,
        head=tuple(name for name in heads if name not in frozen),
        trainable_parameters=sum(p.numel() for p in trained.values()),
        parameters=sum(p.numel() for p in student.parameters()),
    )


def _peft_model(student: PeftModel, call: str) -> PeftModel:
    peft = require("peft", extra="peft")
    student = getattr(student, "_orig_mod", student)  # of a compiled model
    if not isinstance(student, peft.PeftModel):
        raise SettingError(f"{call}: a {type(student).__name__} is not a PeftModel. Use peft.get_peft_model.")
    return student


def _task_of(base: PreTrainedModel) -> Task | None:
    try:
        return make_task(base, None)
    except HfDistillError:
        return None


def _head_modules(base: PreTrainedModel) -> list[str]:
    """Return the modules beside the encoder or decoder: children with parameters and without a list of blocks."""
    found = []
    for name, child in [] if base.base_model is base else base.named_children():
        has_blocks = any(isinstance(module, nn.ModuleList) for module in child.modules())
        if name != base.base_model_prefix and not has_blocks and list(child.parameters()):
            found.append(name)
    return found


def _unknown_name(base: nn.Module, config: PeftConfig) -> str | None:
    """Describe the problem if a name in the config matches no module: PEFT accepts it if another one matches."""
    names = [f".{name}" for name, _ in base.named_modules()]
    settings = vars(config)
    saved = set(settings.get("modules_to_save") or ()) - (_SET_BY_PEFT if config.task_type else set())
    targets = settings.get("target_modules") or ()
    for setting, wanted in (("target_modules", targets), ("modules_to_save", saved)):
        missing = () if isinstance(wanted, str) else (n for n in wanted if not any(m.endswith(f".{n}") for m in names))
        for name in sorted(missing):
            known = sorted({last for name in names if (last := name.rpartition(".")[2]).isidentifier()} - _OF_PEFT)
            return f"{setting} names {name}, which the model does not have. Its modules: {', '.join(known)}"
    return None


def _missing_layer(config: PeftConfig, adapted: tuple[str, ...]) -> str | None:
    wanted = vars(config).get("layers_to_transform") or []
    present = {int(number) for name in adapted for number in re.findall(r"\.(\d+)\.", name)}
    for layer in [wanted] if isinstance(wanted, int) else wanted:
        if layer not in present:
            layers = ", ".join(map(str, sorted(present)))
            return f"layers_to_transform={wanted}: layer {layer} has no adapter. Layers with adapters: {layers}"
    return None


def _wrong_task_type(base: PreTrainedModel, task: Task | None, config: PeftConfig) -> str | None:
    """Describe the problem if the task_type does not fit: PEFT takes the forward and the modules to train from it."""
    classes = task.auto_classes if task is not None and base.main_input_name == "input_ids" else ()
    fitting = [*(_TASK_TYPES[name] for name in classes if name in _TASK_TYPES), None]
    given = None if config.task_type is None else str(getattr(config.task_type, "value", config.task_type))
    return None if given in fitting else f"task_type={given!r} does not fit. Use {' or '.join(map(repr, fitting))}"


def save_merged(student: PeftModel, folder: str | os.PathLike[str]) -> PreTrainedModel:
    """Save the student with its adapter merged into its weights, as a plain model that loads without PEFT.

    The outputs are the same up to rounding. The student does not change; a copy of it is held in the meantime. To save
    the adapter alone, call `student.save_pretrained(folder)`.

    Args:
        student: the trained `PeftModel`.
        folder: where to save.

    Returns:
        The plain model.

    Raises:
        SettingError: if the student has no adapter, one that cannot be merged, or a quantised base.
    """
    student = _peft_model(student, "save_merged")
    if not hasattr(student.base_model, "merge_and_unload"):
        method = student.active_peft_config.peft_type.value
        raise SettingError(f"save_merged: {method} changes the input, not the weights. Save the adapter alone.")
    if getattr(student.get_base_model(), "is_quantized", False):
        raise SettingError("save_merged: the base is quantised. Merge the saved adapter into a base in full precision.")
    merged: PreTrainedModel = copy.deepcopy(student).merge_and_unload(safe_merge=True)
    merged.save_pretrained(folder)
    return merged
