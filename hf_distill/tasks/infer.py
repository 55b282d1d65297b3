"""Which task a model is for, from its class; and tasks by name."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable, Iterator
from typing import Any

from torch import nn
from transformers.models.auto import modeling_auto as auto

from hf_distill.errors import SettingError, did_you_mean
from hf_distill.tasks.base import OWN_TASK, Task
from hf_distill.tasks.classification import Classification, MultipleChoice, TokenClassification
from hf_distill.tasks.ctc import CTC
from hf_distill.tasks.language import CausalLM, MaskedLM, Seq2Seq
from hf_distill.tasks.regression import Embedding, Regression
from hf_distill.tasks.span import Span
from hf_distill.tasks.unknown import UnknownTask

TASKS: dict[str, type[Task]] = {
    task.kind: task
    for task in (
        Classification,
        Regression,
        MultipleChoice,
        TokenClassification,
        Span,
        MaskedLM,
        CausalLM,
        Seq2Seq,
        CTC,
        Embedding,
    )
}

# What the Hub and AutoModel classes call them; only proposed in messages.
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

# In this order: BART and T5 stand in the masked-LM table too, and are sequence to sequence first.
_TABLES: tuple[tuple[str, tuple[Any, ...]], ...] = (
    (
        "seq2seq",
        (
            auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
            auto.MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES,
        ),
    ),
    ("ctc", (auto.MODEL_FOR_CTC_MAPPING_NAMES,)),
    ("causal_lm", (auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,)),
    ("masked_lm", (auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES,)),
    (
        "classification",
        (
            auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
            auto.MODEL_FOR_AUDIO_CLASSIFICATION_MAPPING_NAMES,
            auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES,
        ),
    ),
    ("token_classification", (auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES,)),
    ("span", (auto.MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES,)),
    ("multiple_choice", (auto.MODEL_FOR_MULTIPLE_CHOICE_MAPPING_NAMES,)),
    ("embedding", (auto.MODEL_MAPPING_NAMES,)),
)


def unwrapped(model: Any) -> Any:
    """The transformers model inside a compiled or a PEFT model, or the model itself."""
    model = getattr(model, "_orig_mod", model)
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def forward_names(model: Any) -> tuple[str, ...]:
    """The arguments of a model's forward by name; of the class it derives from where its own only passes them on.

    Empty where no forward names any: then nothing is known of what it reads.
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


def main_input_of(model: Any) -> str:
    """The name of the input that a model cannot do without: what it declares, or the first argument of its forward.

    A module that is not of transformers declares none; then it is the first that its forward names.
    """
    named, declared = forward_names(model), getattr(unwrapped(model), "main_input_name", None)
    if isinstance(declared, str) and (declared in named or not named):
        return declared
    return next((name for name in named if name == "input_ids"), named[0] if named else "input_ids")


def infer_kind(model: Any) -> str:
    """The kind of head a model has, by the name of its class or of one it derives from.

    Raises:
        SettingError: the class is in none of transformers' tables that we know.
    """
    model = unwrapped(model)
    for cls in type(model).__mro__:
        kind = kind_of_class(cls.__name__, getattr(model, "config", None))
        if kind is not None:
            return kind
    raise SettingError(
        f"{type(model).__name__}: this library does not know where it keeps its predictions. Supported kinds of "
        f"head: {', '.join(TASKS)}. Pass one of these names as task= only where the model's output has just that form "
        f'(task="classification": one row of logits an example, [examples, classes]). {OWN_TASK} (With alpha=0 and no '
        "objectives a DistillationTrainer compares nothing, and trains any class as Trainer does.)"
    )


def kind_of_class(name: str, config: Any) -> str | None:
    """The kind of head of transformers' class of this name, with this config; None where it is in no table."""
    for kind, tables in _TABLES:
        if name in _class_names(tables) and _is_meant(kind, name):
            return _narrowed(kind, config)
    return None


def infer_task(model: Any) -> Task:
    """The task of a student, from its class and its config.

    >>> from transformers import BertConfig, BertForTokenClassification
    >>> tiny = BertConfig(vocab_size=9, hidden_size=4, num_hidden_layers=1, num_attention_heads=1)
    >>> infer_task(BertForTokenClassification(tiny)).kind
    'token_classification'
    """
    return _made(infer_kind(model), model)


def _made(kind: str, model: Any) -> Task:
    task = TASKS[kind].from_model(unwrapped(model))
    task.inferred = True
    return task


def task_or_unknown(model: Any) -> Task:
    """The task of a student, or an `UnknownTask` where its class is not known: for a training that compares nothing."""
    try:
        return infer_task(model)
    except SettingError:
        return UnknownTask()


def make_task(model: Any, task: Task | str | None) -> Task:
    """The task that was given, by name or whole, or else the student's own.

    Raises:
        SettingError: no such name, or nothing given and the class is not known.
    """
    if task is None:
        return infer_task(model)
    if isinstance(task, Task):
        return task
    if task not in TASKS:
        hint = did_you_mean(task, TASKS, TASK_ALIASES)
        raise SettingError(f"task={task!r}: no such task. Allowed: {', '.join(TASKS)}.{hint}")
    return _made(task, model)


# Heads in the causal-LM table whose own loss does not shift the labels; XLM is a masked LM.
_NOT_CAUSAL = {"XLNetLMHeadModel", "ProphetNetForCausalLM", "CpmAntForCausalLM", "XLMWithLMHeadModel"}


def _is_meant(kind: str, name: str) -> bool:
    """The tables hold more than their names say: heads among the bare models, unshifted labels among the shifted."""
    if kind == "embedding":
        return re.search(r"For[A-Z]|Backbone$", name) is None
    return kind != "causal_lm" or name not in _NOT_CAUSAL


def _narrowed(kind: str, config: Any) -> str:
    """What the config says beside the class.

    Audio language models stand in the sequence-to-sequence tables, but have no decoder inputs and shift their labels.
    A sequence classification head with one output, or declared so, is a regression.
    """
    if kind == "seq2seq" and not config.is_encoder_decoder:
        return "causal_lm"
    if kind != "classification":
        return kind
    problem = getattr(config, "problem_type", None)
    alone = problem is None and config.num_labels == 1
    return "regression" if problem == "regression" or alone else kind


def _class_names(tables: Iterable[Any]) -> Iterator[str]:
    for table in tables:
        for names in table.values():
            yield from (names,) if isinstance(names, str) else names
