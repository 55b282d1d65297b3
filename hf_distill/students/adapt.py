"""What PEFT lets pass in silence: names that match nothing, a head that stays random, a wrapper for another head."""

from __future__ import annotations

import copy
import os
import re
import tempfile
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from hf_distill.errors import HfDistillError, SettingError, require
from hf_distill.students.report import with_report
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
        return str(make_task(student, None))
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
        _check_not_quantised(student, name)


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


def _check_not_quantised(student: nn.Module, ending: str) -> None:
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


@dataclass(frozen=True)
class AdaptReport:
    """What `adapt` did.

    Attributes:
        method: LORA, IA3, ...
        architecture: the student's class.
        adapted: the modules that an adapter was put on; empty for methods that add tokens.
        head: the modules that are trained whole, and saved with the adapter.
        trainable_parameters, parameters: how many numbers.
        quantised: how the base is held, None: in floating point.
    """

    method: str
    architecture: str
    adapted: tuple[str, ...] = field(repr=False)
    head: tuple[str, ...]
    trainable_parameters: int
    parameters: int
    quantised: str | None = None

    def __str__(self) -> str:
        share = self.trainable_parameters / self.parameters
        held = "" if self.quantised is None else f", base in {self.quantised}"
        return (
            f"{self.architecture}: {self.method} on {len(self.adapted)} modules{held}\n"
            f"  trained: {self.trainable_parameters:,} of {self.parameters:,} parameters ({share:.1%}); "
            f"whole: {', '.join(self.head) or 'nothing'}"
        )


def adapt(
    student: PreTrainedModel,
    config: Any = "lora",
    *,
    targets: Sequence[str] | str | None = None,
    rank: int | None = None,
    train_head: bool | None = None,
) -> Any:
    """The student as a `PeftModel`: its weights are frozen, a small adapter is trained, and its head where that is new.

    Pass it to the trainer as any student; `save_pretrained` writes the adapter alone, `save_merged` a plain model. The
    adapter's values are drawn from torch's generator: seed it first. The student is changed in place.

    A quantised student (`from_pretrained(..., quantization_config=BitsAndBytesConfig(load_in_4bit=True))`: QLoRA,
    Dettmers et al. 2023, section 3) is made ready by PEFT's `prepare_model_for_kbit_training`; gradient checkpointing
    is left to the training arguments.

    Args:
        config: "lora" (Hu et al. 2022, section 4.1; lora_alpha is twice the rank), or any `PeftConfig`.
        targets: of "lora": names of modules as PEFT reads them, or "all-linear" (all but the head); None: PEFT's own
            choice for the architecture.
        rank: of "lora"; None: 8.
        train_head: whether the modules outside of the encoder are trained whole (PEFT's `modules_to_save`). None: where
            the config names none itself, yes for classifiers and the like, whose heads mostly start fresh and would
            else stay random, and no for language models.

    Raises:
        SettingError: a config that targets nothing, or less than it names; a task_type that is not this head's; one
            under which nothing is trained; a student that has adapters.
        MissingExtraError: peft, or bitsandbytes for a quantised student, is not installed.

    >>> from hf_distill.students import report_of
    >>> from transformers import BertConfig, BertForSequenceClassification as Bert
    >>> student = Bert(BertConfig(vocab_size=9, hidden_size=4, num_hidden_layers=2, num_attention_heads=1))
    >>> student = adapt(student, targets=["query", "value"], rank=2)
    >>> report = report_of(student)
    >>> len(report.adapted), report.head, report.trainable_parameters
    (4, ('classifier',), 74)
    """
    peft = require("peft", extra="peft")
    check_student(student)
    made = _config(peft, student, config, targets, rank)
    head = _head(student, made, train_head)
    check_config(student, made)
    kind = _quantised(student)
    if kind is not None:
        peft.prepare_model_for_kbit_training(student, use_gradient_checkpointing=False)
    try:
        with warnings.catch_warnings():  # PEFT asks transformers for it by its old name
            warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
            adapted = peft.get_peft_model(student, made)
    except ValueError as error:
        reason = str(error).rstrip(".")
        if isinstance(config, str) and targets is None:
            reason = f"PEFT has no choice of modules for {type(student).__name__}. Pass targets=, or 'all-linear'"
        raise SettingError(f"adapt: {made.peft_type.value}: {reason}. {_linear_modules(student)}") from error
    report = _report(adapted, student, made, head, kind)
    return with_report(adapted, report)


def _config(peft: Any, student: nn.Module, config: Any, targets: Any, rank: int | None) -> Any:
    """The config, or a copy of the user's: PEFT writes into it."""
    if isinstance(config, peft.PeftConfig):
        if targets is not None or rank is not None:
            raise SettingError("adapt: targets= and rank= are of config='lora'. Set them in the config that you pass.")
        return copy.deepcopy(config)
    if config != "lora":
        raise SettingError(f"adapt: config={config!r}. Give 'lora', or a PeftConfig: peft.LoraConfig(...).")
    rank = 8 if rank is None else rank
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
        raise SettingError(f"adapt: rank={rank!r}. Give a whole number of at least 1.")
    transposed = any(isinstance(module, Conv1D) for module in student.modules())
    named = targets if isinstance(targets, (str, type(None))) else list(targets)
    return peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=named, fan_in_fan_out=transposed)


def _head(student: PreTrainedModel, config: Any, train_head: bool | None) -> tuple[str, ...]:
    """What is trained whole; written into the config where that is ours to say."""
    own = getattr(config, "modules_to_save", None)
    head = head_modules(student)
    if train_head is False or (train_head is None and (own or not trains_its_head(student))):
        return tuple(own or ())
    if not hasattr(config, "modules_to_save"):
        if train_head is None:
            return ()
        raise SettingError(f"adapt: train_head=True: {type(config).__name__} has no modules_to_save. Leave it out.")
    if train_head and not head:
        raise SettingError(f"adapt: train_head=True: {type(student).__name__} has no modules beside its encoder.")
    config.modules_to_save = [*dict.fromkeys([*(own or ()), *head])]
    if getattr(config, "target_modules", None) == "all-linear" and not getattr(config, "exclude_modules", None):
        config.exclude_modules = list(head)  # one of the two, not both
    return tuple(config.modules_to_save)


def _quantised(student: Any) -> str | None:
    """How a quantised student is held. Its parts must be there to train beside it."""
    if not getattr(student, "is_quantized", False):
        return None
    method = getattr(student, "quantization_method", None)
    name = str(getattr(method, "value", method))
    if name.startswith("bitsandbytes"):
        require("bitsandbytes", extra="qlora")
        name = "4 bits" if getattr(student, "is_loaded_in_4bit", False) else "8 bits"
    return name


def _report(adapted: Any, student: Any, config: Any, head: tuple[str, ...], quantised: str | None) -> AdaptReport:
    trained = {name: p for name, p in adapted.named_parameters() if p.requires_grad}
    names = tuple(getattr(adapted.base_model, "targeted_module_names", ()))
    if not [name for name in trained if ".modules_to_save." not in name]:
        raise SettingError(
            f"adapt: under {config.peft_type.value} no adapter is trained. Is it a config that was saved for "
            "inference? Make one anew."
        )
    check_layers(config, names)
    # A module in 4 bits holds two numbers in one.
    sizes = [p.numel() * (2 if type(p).__name__ == "Params4bit" else 1) for p in adapted.parameters()]
    count = sum(p.numel() for p in trained.values())
    return AdaptReport(config.peft_type.value, type(student).__name__, names, head, count, sum(sizes), quantised)


def _linear_modules(student: nn.Module) -> str:
    names = {
        name.rpartition(".")[2] for name, module in student.named_modules() if isinstance(module, nn.Linear | Conv1D)
    }
    return f"Linear modules of the student: {', '.join(sorted(names))}."


def save_merged(student: Any, folder: str | os.PathLike[str]) -> PreTrainedModel:
    """Write the student with its adapter merged into its weights: a plain model, which loads without PEFT.

    The same outputs up to rounding. The student itself is left as it is; a copy of it is held for a moment. To save the
    adapter alone: `student.save_pretrained(folder)`.

    Args:
        student: from `adapt`, trained.
        folder: the files in it are replaced one by one, each whole.

    Returns:
        The plain model.

    Raises:
        SettingError: it has no adapter, one that cannot be merged, or a quantised base.
    """
    peft = require("peft", extra="peft")
    student = getattr(student, "_orig_mod", student)
    if not isinstance(student, peft.PeftModel):
        raise SettingError(f"save_merged: a {type(student).__name__} has no adapter. Save it: save_pretrained(folder).")
    method = student.active_peft_config.peft_type.value
    if not hasattr(student.base_model, "merge_and_unload"):
        raise SettingError(f"save_merged: {method} adds to the input, not to the weights. Save the adapter alone.")
    if getattr(student.get_base_model(), "is_quantized", False):
        raise SettingError(
            "save_merged: the base is quantised, and merging would round the adapter away. Save the adapter, load the "
            "base in full precision, and merge there: peft.PeftModel.from_pretrained(base, folder)."
        )
    merged = copy.deepcopy(student).merge_and_unload(safe_merge=True)
    Path(folder).mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".merged-") as beside:
        merged.save_pretrained(beside)
        for file in sorted(Path(beside).iterdir()):
            os.replace(file, Path(folder, file.name))
    return merged
