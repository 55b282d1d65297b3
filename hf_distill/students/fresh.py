"""`fresh`: a student of another architecture, with the teacher's embeddings for the tokens that both models know."""

from __future__ import annotations

import copy
import json
from typing import Literal

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.models.auto import modeling_auto

from hf_distill.errors import SettingError, TeacherError
from hf_distill.students.building import all_parameters, check_teacher
from hf_distill.students.report import FreshReport, count_parameters, with_report


def fresh(
    student: PreTrainedConfig | PreTrainedModel,
    *,
    teacher: PreTrainedModel | None = None,
    processing_class: PreTrainedTokenizerBase | None = None,
    teacher_processing_class: PreTrainedTokenizerBase | None = None,
    reduce: Literal["svd"] | None = None,
) -> PreTrainedModel:
    """Return a student of any architecture, with the teacher's input embeddings for tokens that both tokenizers know.

    Args:
        student: a config, from which the class with the teacher's kind of head is built (with random weights from
            torch's generator); or a model, which is changed in place.
        teacher: the model whose head and embeddings to use. It may be left out if `student` is a model.
        processing_class: the student's tokenizer. Tokens are matched by their text, not by their id. None means that no
            embedding is copied.
        teacher_processing_class: the teacher's tokenizer. It must mark the start of a word as the student's does.
        reduce: "svd" reduces the copied embeddings to the student's width by a truncated singular value decomposition,
            which preserves inner products best (Eckart and Young 1936). None requires equal widths.

    Raises:
        SettingError: if arguments do not fit together, or the widths differ.
        TeacherError: if the teacher's head has no counterpart, it has no embeddings, or no token is shared.

    >>> from transformers import BertConfig, BertForMaskedLM, DistilBertConfig
    >>> sizes = dict(num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, vocab_size=40)
    >>> student = fresh(DistilBertConfig(dim=8, n_heads=2), teacher=BertForMaskedLM(BertConfig(hidden_size=8, **sizes)))
    >>> type(student).__name__
    'DistilBertForMaskedLM'
    """
    if reduce not in (None, "svd"):
        raise SettingError(f"fresh: reduce={reduce!r}: allowed are 'svd' and None.")
    tokenizers = (processing_class, teacher_processing_class)
    if (tokenizers[0] is None) != (tokenizers[1] is None) or (teacher is None and tokenizers[0] is not None):
        raise SettingError("fresh: processing_class=, teacher_processing_class= and teacher= go together to copy rows.")
    if teacher is not None:
        check_teacher(teacher, "fresh")
    notes = ["The given model was changed in place."]
    if not isinstance(student, PreTrainedModel):
        student, notes = _from_config(student, teacher)
    names: list[str] = []
    tokens = missing = 0
    if teacher is not None and processing_class is not None and teacher_processing_class is not None:
        ours, theirs = _embeddings(student, "student"), _embeddings(teacher, "teacher")
        tokens, missing = _copy_rows(ours, theirs, processing_class, teacher_processing_class, reduce)
        names = [name for name, parameter in all_parameters(student).items() if parameter is ours]
    report = FreshReport(
        architecture=type(student).__name__,
        teacher=None if teacher is None else type(teacher).__name__,
        embeddings=tuple(names),
        tokens=tokens,
        missing=missing,
        fresh=tuple(name for name, _ in student.named_parameters() if name not in names),
        student_parameters=count_parameters(student),
        teacher_parameters=None if teacher is None else count_parameters(teacher),
        notes=tuple(notes),
    )
    return with_report(student, report)


def _from_config(config: PreTrainedConfig, teacher: PreTrainedModel | None) -> tuple[PreTrainedModel, list[str]]:
    if not isinstance(config, PreTrainedConfig):
        raise SettingError(f"fresh: the student is a {type(config).__name__}. Pass a config or a PreTrainedModel.")
    if teacher is None:
        raise SettingError("fresh: a config does not define the head. Pass teacher=, or a model instead of a config.")
    model_class = _class_with_the_same_head(type(config), type(teacher))
    config, named = copy.deepcopy(config), copy.deepcopy(teacher.config)
    notes = []
    if _has_default_labels(config) and not _has_default_labels(named):
        config.id2label, config.label2id = named.id2label, named.label2id
        notes.append("The labels are the teacher's.")
    return model_class(config).eval(), notes


def _has_default_labels(config: PreTrainedConfig) -> bool:
    return all(name == f"LABEL_{index}" for index, name in (config.id2label or {}).items())


def _class_with_the_same_head(
    config_class: type[PreTrainedConfig], teacher_class: type[PreTrainedModel]
) -> type[PreTrainedModel]:
    """Find the class through the mappings of transformers' Auto classes."""
    mappings = []
    for name in sorted(vars(modeling_auto)):
        if name.startswith("MODEL_") and name.endswith("_MAPPING"):
            names = vars(modeling_auto).get(f"{name}_NAMES", {}).values()
            if any(teacher_class.__name__ in ((entry,) if isinstance(entry, str) else entry) for entry in names):
                mappings.append(name)
    # A masked LM is listed as a model for pre-training too: the more specific mappings first.
    last = ("MODEL_FOR_PRETRAINING_MAPPING", "MODEL_MAPPING")
    for name in sorted(mappings, key=lambda name: (name == last[0], name == last[1], name)):
        found = vars(modeling_auto)[name].get(config_class, None)
        if found is not None:
            result: type[PreTrainedModel] = found[0] if isinstance(found, (tuple, list)) else found
            return result
    names = f"{config_class.__name__} has the head of {teacher_class.__name__}"
    raise TeacherError(f"fresh: no class of {names}. Pass a model instead.")


def _embeddings(model: PreTrainedModel, whose: str) -> Tensor:
    try:
        weight = model.get_input_embeddings().weight
        if isinstance(weight, Tensor) and weight.dim() == 2:
            return weight
    except (NotImplementedError, AttributeError):
        pass
    raise TeacherError(f"fresh: the {whose} ({type(model).__name__}) has no token embeddings: leave out tokenizers.")


def _copy_rows(
    ours: Tensor,
    theirs: Tensor,
    processing_class: PreTrainedTokenizerBase,
    teacher_processing_class: PreTrainedTokenizerBase,
    reduce: Literal["svd"] | None,
) -> tuple[int, int]:
    """Copy the rows of shared tokens; return the number of tokens with a row of the teacher and without."""
    marks = f"student: {_word_marks(processing_class)}; teacher: {_word_marks(teacher_processing_class)}"
    if _word_marks(processing_class) != _word_marks(teacher_processing_class):
        raise SettingError(f"fresh: the tokenizers mark words differently ({marks}). Leave them out.")
    words, known = processing_class.get_vocab(), teacher_processing_class.get_vocab()
    pairs = sorted((index, known[token]) for token, index in words.items() if token in known)
    if not pairs:
        raise TeacherError("fresh: the two tokenizers share no token, so no embedding can be copied.")
    for whose, table, last in (("student", ours, max(words.values())), ("teacher", theirs, max(known.values()))):
        if last >= len(table):
            problem = f"the {whose}'s tokenizer has ids up to {last}, but its embeddings have {len(table)} rows"
            raise SettingError(f"fresh: {problem}. Set its config.vocab_size to at least {last + 1}.")
    rows = theirs.detach()[[index for _, index in pairs]]
    width = ours.shape[1]
    if rows.shape[1] < width or (rows.shape[1] > width and reduce is None):
        hint = "Pass reduce='svd'" if rows.shape[1] > width else "Use the same width, or leave out tokenizers"
        raise SettingError(f"fresh: the student's embeddings are {width} wide, the teacher's {rows.shape[1]}. {hint}.")
    with torch.no_grad():
        ours[[index for index, _ in pairs]] = (rows if rows.shape[1] == width else _reduced(rows, width)).to(ours)
    return len(pairs), len(words) - len(pairs)


def _word_marks(processing_class: PreTrainedTokenizerBase) -> str:
    """Return the kind of tokenizer and how its pieces mark where a word begins."""
    backend = getattr(processing_class, "backend_tokenizer", None)
    if backend is None:
        return type(processing_class).__name__
    parts = json.loads(backend.to_str())
    model = parts["model"]
    keys = ("continuing_subword_prefix", "end_of_word_suffix")
    marks = [model["type"], *(f"{key}={model[key]!r}" for key in keys if model.get(key))]
    marks += [kind for kind in ("ByteLevel", "Metaspace") if f"'{kind}'" in str(parts.get("decoder"))]
    return " ".join(marks)


def _reduced(rows: Tensor, width: int) -> Tensor:
    """Return rows `[n d_t]` in their first singular directions, `[n width]`, with a definite sign for each."""
    rows = rows.double()
    directions = torch.linalg.eigh(rows.T @ rows).eigenvectors.flip(1)[:, :width]
    largest = directions.abs().argmax(0, keepdim=True)
    return rows @ (directions * directions.gather(0, largest).sign())
