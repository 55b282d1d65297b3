"""The task of a model, from its class or by name, and facts of its forward."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn
from transformers import PreTrainedConfig
from transformers.models.auto import modeling_auto as auto

from hf_distill.errors import SettingError, did_you_mean
from hf_distill.tasks.base import OWN_TASK, Batch, Task
from hf_distill.tasks.classification import Classification, MultipleChoice, TokenClassification
from hf_distill.tasks.ctc import CTC
from hf_distill.tasks.language import CausalLM, MaskedLM, Seq2Seq
from hf_distill.tasks.regression import Embedding, Regression
from hf_distill.tasks.span import Span

_CLASSES = (
    *(Classification, Regression, MultipleChoice, TokenClassification, Span),
    *(MaskedLM, CausalLM, Seq2Seq, CTC, Embedding),
)
TASKS: dict[str, type[Task]] = {task.kind: task for task in _CLASSES}

# Names used by the Hub and AutoModel classes, for suggestions in messages.
TASK_ALIASES: dict[str, str] = {
    **dict.fromkeys(("text_classification", "sequence_classification", "seq_cls", "multi_label"), "classification"),
    **dict.fromkeys(("image_classification", "audio_classification", "multi_label_classification"), "classification"),
    **dict.fromkeys(("ner", "pos", "token_cls", "tagging", "sequence_tagging"), "token_classification"),
    **dict.fromkeys(("qa", "question_answering", "extractive_qa", "question_ans"), "span"),
    **dict.fromkeys(("mlm", "fill_mask", "masked_language_modeling"), "masked_lm"),
    **dict.fromkeys(("clm", "lm", "text_generation", "language_modeling", "sft"), "causal_lm"),
    **dict.fromkeys(("seq2seq_lm", "seq_2_seq_lm", "seq_to_seq", "summarization", "translation"), "seq2seq"),
    **dict.fromkeys(("speech_seq2seq", "text2text_generation"), "seq2seq"),
    **dict.fromkeys(("feature_extraction", "sentence_similarity", "embeddings", "feature_ext"), "embedding"),
    **dict.fromkeys(("swag", "mc"), "multiple_choice"),
}

# In this order, since BART and T5 are also in the masked-LM table, and are sequence to sequence first.
_TABLES: tuple[tuple[str, Mapping[str, Any]], ...] = (
    ("seq2seq", auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES),
    ("seq2seq", auto.MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES),
    ("ctc", auto.MODEL_FOR_CTC_MAPPING_NAMES),
    ("causal_lm", auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES),
    ("masked_lm", auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES),
    ("classification", auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES),
    ("classification", auto.MODEL_FOR_AUDIO_CLASSIFICATION_MAPPING_NAMES),
    ("classification", auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES),
    ("token_classification", auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES),
    ("span", auto.MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES),
    ("multiple_choice", auto.MODEL_FOR_MULTIPLE_CHOICE_MAPPING_NAMES),
    ("embedding", auto.MODEL_MAPPING_NAMES),
)


def unwrapped(model: nn.Module | None) -> Any:
    """Return the transformers model inside a compiled or a PEFT model, or the model itself."""
    inner: Any = getattr(model, "_orig_mod", model)
    return inner.get_base_model() if hasattr(inner, "get_base_model") else inner


def config_of(model: nn.Module | None) -> PreTrainedConfig | None:
    """Return the config of a model, plain, compiled or PEFT; None for a module without one."""
    return getattr(unwrapped(model), "config", None)


def forward_names(model: nn.Module) -> tuple[str, ...]:
    """Return the names of the forward's arguments, from a base class if the model's own forward only passes them on.

    The result is empty if no forward names any, so that the model's inputs are unknown.
    """
    for cls in type(unwrapped(model)).__mro__:
        forward = vars(cls).get("forward")
        if cls is nn.Module or forward is None:
            continue
        parameters = list(inspect.signature(forward).parameters.values())[1:]
        named = tuple(p.name for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD))
        if named:
            return named
    return ()


def main_input_of(model: nn.Module) -> str:
    """Return the name of the model's main input: the declared one, or else the first argument of its forward."""
    named, declared = forward_names(model), getattr(unwrapped(model), "main_input_name", None)
    if isinstance(declared, str) and (declared in named or not named):
        return declared
    return next((name for name in named if name == "input_ids"), named[0] if named else "input_ids")


def infer_kind(model: nn.Module | None) -> str:
    """Return the kind of a model's head, by the name of its class or of a base class.

    Raises:
        SettingError: if these classes are in none of the known tables of transformers.
    """
    model = unwrapped(model)
    for cls in type(model).__mro__:
        kind = kind_of_class(cls.__name__, config_of(model))
        if kind is not None:
            return kind
    raise SettingError(
        f"{type(model).__name__}: this library does not know where it keeps its predictions. Supported kinds of "
        f"head: {', '.join(TASKS)}. Pass one of these names as task= only if the model's output has exactly that form "
        f'(task="classification": one row of logits an example, [examples, classes]). {OWN_TASK} (With alpha=0 and no '
        "objectives a DistillationTrainer trains any class, as Trainer does.)"
    )


def kind_of_class(name: str, config: PreTrainedConfig | None) -> str | None:
    """Return the kind of head of transformers' class of this name, with this config; None if it is in no table."""
    for kind, table in _TABLES:
        if name in _class_names(table) and _belongs(kind, name):
            return _narrowed(kind, config)
    return None


def infer_task(model: nn.Module | None) -> Task:
    """Return the task of a student, from its class and its config.

    >>> from transformers import BertConfig, BertForTokenClassification
    >>> tiny = BertConfig(vocab_size=9, hidden_size=4, num_hidden_layers=1, num_attention_heads=1)
    >>> infer_task(BertForTokenClassification(tiny)).kind
    'token_classification'
    """
    return _inferred(infer_kind(model), model)


def _inferred(kind: str, model: nn.Module | None) -> Task:
    task = TASKS[kind].from_model(unwrapped(model))
    task.inferred = True
    return task


class UnknownTask(Task):
    """The task for classes outside transformers' tables, for trainings with alpha=0 in which nothing is compared.

    It has no rows and counts no labels, so it cannot be used to count or compare.
    """

    kind = "unknown"
    matched_by = "width"
    needs_same_inputs = False
    label_names = ()
    is_known = False

    def has_labels(self, batch: Batch) -> bool:
        """Return False, since the columns of the labels and their number are unknown."""
        return False

    def require_labels(self, columns: Batch) -> None:
        """Do nothing, since the model may need no labels."""


def task_or_unknown(model: nn.Module) -> Task:
    """Return the task of a student, or `UnknownTask` for an unknown class, in a training that compares nothing."""
    try:
        return infer_task(model)
    except SettingError:
        return UnknownTask()


def make_task(model: nn.Module | None, task: Task | str | None) -> Task:
    """Return the given task, the task of this name, or for None the student's own.

    Raises:
        SettingError: if the name, or without a name the class, is unknown.
    """
    if task is None:
        return infer_task(model)
    if isinstance(task, Task):
        return task
    if task not in TASKS:
        hint = did_you_mean(task, TASKS, TASK_ALIASES)
        raise SettingError(f"task={task!r}: no such task. Allowed: {', '.join(TASKS)}.{hint}")
    return _inferred(task, model)


# Heads in the causal-LM table whose own loss does not shift the labels; XLM is a masked LM.
_NOT_CAUSAL = {"XLNetLMHeadModel", "ProphetNetForCausalLM", "CpmAntForCausalLM", "XLMWithLMHeadModel"}


def _belongs(kind: str, name: str) -> bool:
    """Return False for heads in the table of bare models, and for unshifted labels in the causal table."""
    if kind == "embedding":
        return re.search(r"For[A-Z]|Backbone$", name) is None
    return kind != "causal_lm" or name not in _NOT_CAUSAL


def _narrowed(kind: str, config: Any) -> str:
    """Return the kind that a config specifies within that of a class.

    Audio language models are in the sequence-to-sequence tables, but have no decoder inputs and shift their labels.
    A classification head with one output, or so declared, is a regression.
    """
    if kind == "seq2seq" and not config.is_encoder_decoder:
        return "causal_lm"
    if kind != "classification":
        return kind
    if config.problem_type == "regression" or (config.problem_type is None and config.num_labels == 1):
        return "regression"
    return kind


def _class_names(table: Mapping[str, Any]) -> Iterator[str]:
    for names in table.values():
        yield from (names,) if isinstance(names, str) else names
