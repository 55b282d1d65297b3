"""A student of another architecture: started at random, with the teacher's embeddings where a token is the same."""

from __future__ import annotations

import copy
import json
import logging
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto

from hf_distill.errors import SettingError, TeacherError
from hf_distill.students.checks import check_teacher
from hf_distill.students.report import FreshReport, with_report

logger = logging.getLogger(__name__)


def fresh(
    student: PreTrainedConfig | PreTrainedModel,
    *,
    teacher: PreTrainedModel | None = None,
    processing_class: Any = None,
    teacher_processing_class: Any = None,
    reduce: str | None = None,
) -> PreTrainedModel:
    """A student of any architecture, with the teacher's input embeddings for the tokens that both tokenizers know.

    Args:
        student: a config, from which the class with the teacher's kind of head is built (torch's generator starts it);
            or a model, which is changed in place.
        teacher: whose head and embeddings to take. Can be left out for a model.
        processing_class: the student's tokenizer. Tokens are matched by their text, not by id; without tokenizers no
            embedding is copied.
        teacher_processing_class: the teacher's tokenizer. Both must cut words alike: "the" begins a word for one
            kind of tokenizer and not for another.
        reduce: "svd" where the student's embeddings are narrower: the truncated singular value decomposition of the
            copied rows, which keeps the products of rows best (Eckart and Young 1936). None: widths must agree.

    Raises:
        SettingError: for arguments that do not go together, or widths that differ.
        TeacherError: for a teacher whose head has no counterpart, or without embeddings, or no token in common.

    >>> from transformers import BertConfig, BertForMaskedLM, DistilBertConfig
    >>> sizes = dict(num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, vocab_size=40)
    >>> student = fresh(DistilBertConfig(dim=8, n_heads=2), teacher=BertForMaskedLM(BertConfig(hidden_size=8, **sizes)))
    >>> type(student).__name__
    'DistilBertForMaskedLM'
    """
    if reduce not in (None, "svd"):
        raise SettingError(f"fresh: reduce={reduce!r}: allowed are 'svd' and None.")
    if (processing_class is None) != (teacher_processing_class is None):
        raise SettingError("fresh: give both processing_class= and teacher_processing_class=, or none of them.")
    if teacher is not None:
        check_teacher(teacher, "fresh")
    elif processing_class is not None:
        raise SettingError("fresh: tokenizers without teacher=: there are no embeddings to copy.")
    made, notes = _made(student, teacher)
    names: list[str] = []
    tokens = missing = 0
    if teacher is not None and processing_class is not None:
        names, tokens, missing = _copy_embeddings(made, teacher, processing_class, teacher_processing_class, reduce)
    report = FreshReport(
        architecture=type(made).__name__,
        teacher=None if teacher is None else type(teacher).__name__,
        embeddings=tuple(names),
        tokens=tokens,
        missing=missing,
        fresh=tuple(name for name, _ in made.named_parameters() if name not in names),
        student_parameters=sum(parameter.numel() for parameter in made.parameters()),
        teacher_parameters=None if teacher is None else sum(one.numel() for one in teacher.parameters()),
        notes=tuple(notes),
    )
    logger.info("%s", report)
    return with_report(made, report)


def _made(student: Any, teacher: PreTrainedModel | None) -> tuple[Any, list[str]]:
    if isinstance(student, PreTrainedModel):
        return student, ["The given model was changed in place."]
    if not isinstance(student, PreTrainedConfig):
        raise SettingError(f"fresh: the student is a {type(student).__name__}. Give a config or a PreTrainedModel.")
    if teacher is None:
        raise SettingError(
            "fresh: a config says nothing about the head. Pass teacher=, or a model instead of a config."
        )
    model_class = _counterpart(type(student), type(teacher))
    config: Any = copy.deepcopy(student)
    named: Any = teacher.config
    notes = []
    if _default_labels(config) and not _default_labels(named):
        config.id2label, config.label2id = dict(named.id2label), dict(named.label2id)
        notes.append("The labels are the teacher's.")
    return model_class(config).eval(), notes


def _default_labels(config: Any) -> bool:
    return all(name == f"LABEL_{index}" for index, name in (config.id2label or {}).items())


def _counterpart(config_class: type, teacher_class: type) -> Any:
    """The class with the same kind of head, by the tables of transformers' Auto classes."""
    kinds = []
    for name in sorted(vars(modeling_auto)):
        if name.startswith("MODEL_") and name.endswith("_MAPPING"):
            names = getattr(modeling_auto, f"{name}_NAMES", {}).values()
            if any(teacher_class.__name__ in ((one,) if isinstance(one, str) else one) for one in names):
                kinds.append(name)
    # A masked LM is listed as a model for pre-training too: the narrower table first.
    for name in sorted(kinds, key=lambda one: (one == "MODEL_FOR_PRETRAINING_MAPPING", one == "MODEL_MAPPING", one)):
        found = getattr(modeling_auto, name).get(config_class, None)
        if found is not None:
            return found[0] if isinstance(found, (tuple, list)) else found
    raise TeacherError(
        f"fresh: no class of {config_class.__name__} has the head of {teacher_class.__name__} "
        f"(looked for: {', '.join(kinds) or 'no Auto class knows it'}). Give a model instead of a config."
    )


def _copy_embeddings(
    student: Any, teacher: Any, processing_class: Any, teacher_processing_class: Any, reduce: str | None
) -> tuple[list[str], int, int]:
    ours, theirs = (_embeddings(model, whose) for model, whose in ((student, "student"), (teacher, "teacher")))
    one, two = _cuts_words(processing_class), _cuts_words(teacher_processing_class)
    if one != two:
        raise SettingError(
            f"fresh: the tokenizers cut words in different ways: the student's is {one}, the teacher's {two}. The same "
            "letters are not the same token there. Use tokenizers of one kind, or none: then no embedding is copied."
        )
    known = teacher_processing_class.get_vocab()
    words = processing_class.get_vocab()
    pairs = sorted((index, known[token]) for token, index in words.items() if token in known)
    if not pairs:
        raise TeacherError("fresh: the two tokenizers have no token in common, so no embedding can be copied.")
    for whose, table, last in (("student", ours, max(words.values())), ("teacher", theirs, max(known.values()))):
        if last >= len(table):
            raise SettingError(
                f"fresh: the {whose}'s tokenizer has ids up to {last}, and its embeddings have {len(table)} rows. "
                f"Set {whose}.config.vocab_size to {last + 1} or more, or pass the tokenizer that belongs to it."
            )
    rows = theirs.detach()[[index for _, index in pairs]]
    rows = _reduced(rows, ours.shape[1], reduce)
    with torch.no_grad():
        ours[[index for index, _ in pairs]] = rows.to(ours)
    names = [name for name, parameter in student.named_parameters(remove_duplicate=False) if parameter is ours]
    return names, len(pairs), len(words) - len(pairs)


def _embeddings(model: Any, whose: str) -> Tensor:
    try:
        weight: Tensor = model.get_input_embeddings().weight
    except (NotImplementedError, AttributeError) as error:
        raise TeacherError(
            f"fresh: the {whose} ({type(model).__name__}) reads no tokens: leave out tokenizers."
        ) from error
    if weight.dim() != 2:
        raise TeacherError(f"fresh: the {whose} ({type(model).__name__}) reads no tokens: leave out tokenizers.")
    return weight


def _cuts_words(tokenizer: Any) -> str:
    """What says where a word begins: the kind of tokenizer, and the marks of its pieces."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return type(tokenizer).__name__
    parts = json.loads(backend.to_str())
    model = parts["model"]
    marks = [model["type"], *(f"{key}={model[key]!r}" for key in _MARKS if model.get(key))]
    marks += [kind for kind in ("ByteLevel", "Metaspace") if f"'{kind}'" in str(parts.get("decoder"))]
    return " ".join(marks)


_MARKS = ("continuing_subword_prefix", "end_of_word_suffix")


def _reduced(rows: Tensor, width: int, reduce: str | None) -> Tensor:
    """Rows `[n d_t]` as `[n d]`: as they are, or their first d singular directions."""
    if rows.shape[1] == width:
        return rows
    if reduce is None or rows.shape[1] < width:
        hint = "say reduce='svd'" if rows.shape[1] > width else "embeddings cannot be made wider"
        raise SettingError(
            f"fresh: the student's embeddings are {width} wide, the teacher's {rows.shape[1]}. Give the student the "
            f"same width, or leave out the tokenizers; {hint}."
        )
    rows = rows.double()
    directions = torch.linalg.eigh(rows.T @ rows).eigenvectors.flip(1)[:, :width]
    largest = directions.abs().argmax(0, keepdim=True)
    return rows @ (directions * directions.gather(0, largest).sign())  # the sign of a direction is free: made definite
