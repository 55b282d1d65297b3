"""Checks on a student with PEFT adapters: mistakes that PEFT accepts silently and that waste a training."""

from __future__ import annotations

import copy
import os
import re
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn
from transformers import PreTrainedModel

from hf_distill.errors import HfDistillError, SettingError, require
from hf_distill.tasks import Task, make_task

if TYPE_CHECKING:
    from peft import PeftModel

# PEFT's task_type for the Auto class that loads a head. Other heads have none.
_TASK_TYPES = {
    "AutoModelForSequenceClassification": "SEQ_CLS",
    "AutoModelForTokenClassification": "TOKEN_CLS",
    "AutoModelForQuestionAnswering": "QUESTION_ANS",
    "AutoModelForCausalLM": "CAUSAL_LM",
    "AutoModelForSeq2SeqLM": "SEQ_2_SEQ_LM",
    "AutoModel": "FEATURE_EXTRACTION",
}
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
    config = student.active_peft_config
    adapted = tuple(getattr(student.base_model, "targeted_module_names", ()))
    heads = _head_modules(base)
    frozen = [name for name in heads if not _is_trained(base.get_submodule(name))]
    task = _task_of(base)
    trained = {name: p for name, p in student.named_parameters() if p.requires_grad}
    problem = _unknown_names(base, config) or _missing_layer(config, adapted) or _task_type_problem(base, task, config)
    if all(".modules_to_save." in name for name in trained):
        problem = "no adapter is trained. Set inference_mode=False in its config, or load it with is_trainable=True"
    elif not problem and frozen and not allow_frozen_head and not _has_pretrained_head(task):
        names = ", ".join(repr(name) for name in heads)
        problem = (
            f"the head ({', '.join(frozen)}) is frozen, and would stay random if it is new. Use modules_to_save="
            f"[{names}] in the PEFT config, or pass allow_frozen_head=True if it is already trained"
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


def _has_pretrained_head(task: Task | None) -> bool:
    """Whether such a head mostly comes with the model: language models and embeddings."""
    return task is not None and (task.over_vocabulary or task.auto_classes == ("AutoModel",))


def _head_modules(base: PreTrainedModel) -> list[str]:
    """Return the modules beside the encoder or decoder: children with parameters and without a list of blocks."""
    if base.base_model is base:
        return []
    others = {name: child for name, child in base.named_children() if name != base.base_model_prefix}
    return [
        name
        for name, child in others.items()
        if any(True for _ in child.parameters()) and not any(isinstance(m, nn.ModuleList) for m in child.modules())
    ]


def _is_trained(module: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in module.parameters())


def _unknown_names(base: nn.Module, config: Any) -> str | None:
    """Names in the config that match no module: PEFT accepts them as long as one name matches."""
    names = {name for name, _ in base.named_modules()}
    listed = {"target_modules": vars(config).get("target_modules"), "modules_to_save": _saved_modules(config)}
    for setting, given in listed.items():
        wanted = () if given is None or isinstance(given, str) else given
        missing = sorted(one for one in wanted if not any(f".{name}".endswith(f".{one}") for name in names))
        if missing:
            return f"{setting} names {', '.join(missing)}, which the model does not have. {_last_names(names)}"
    return None


def _saved_modules(config: Any) -> Iterable[str]:
    saved = set(vars(config).get("modules_to_save") or ())
    return saved if config.task_type is None else saved - _SET_BY_PEFT


def _last_names(names: Iterable[str]) -> str:
    hidden = {"lora_A", "lora_B", "default", "base_layer", "modules_to_save", "original_module"}
    last = {name.rpartition(".")[2] for name in names} - hidden
    return f"Its modules: {', '.join(sorted(name for name in last if name and not name.isdigit()))}"


def _missing_layer(config: Any, adapted: tuple[str, ...]) -> str | None:
    wanted = vars(config).get("layers_to_transform")
    wanted = [wanted] if isinstance(wanted, int) else list(wanted or ())
    present = {int(number) for name in adapted for number in re.findall(r"\.(\d+)\.", name)}
    missing = [layer for layer in wanted if layer not in present]
    if not missing:
        return None
    layers = ", ".join(map(str, sorted(present)))
    return f"layers_to_transform={wanted}: layer {missing[0]} has no adapter. Layers with adapters: {layers}"


def _task_type_problem(base: PreTrainedModel, task: Task | None, config: Any) -> str | None:
    """PEFT takes the forward, and the modules that are trained whole, from the task_type."""
    given = getattr(config.task_type, "value", config.task_type)
    if given is None:
        return None
    reads_text = task is not None and base.main_input_name == "input_ids"
    fitting = [_TASK_TYPES[name] for name in task.auto_classes if name in _TASK_TYPES] if task and reads_text else []
    if given in fitting:
        return None
    return f"task_type={given!r} does not fit. Use {' or '.join(map(repr, [*fitting, None]))}"


def save_merged(student: PeftModel, folder: str | os.PathLike[str]) -> PreTrainedModel:
    """Save the student with its adapter merged into its weights, as a plain model that loads without PEFT.

    The outputs are the same up to rounding. The student does not change; a copy of it is held in the meantime. To save
    the adapter alone, call `student.save_pretrained(folder)`.

    Args:
        student: the trained `PeftModel`.
        folder: where to save. Files that exist are replaced, each in one step.

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
        raise SettingError(
            "save_merged: the base is quantised, and merging would round the adapter away. Save the adapter, load the "
            "base in full precision, and merge there: peft.PeftModel.from_pretrained(base, folder)."
        )
    merged: PreTrainedModel = copy.deepcopy(student).merge_and_unload(safe_merge=True)
    Path(folder).mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".merged-") as beside:
        merged.save_pretrained(beside)
        for file in sorted(Path(beside).iterdir()):
            os.replace(file, Path(folder, file.name))
    return merged
