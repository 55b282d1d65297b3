"""Whether a model can teach a student, and which columns of their heads mean the same; decided before training."""

from __future__ import annotations

import logging
import os
from typing import Any

from torch import Tensor, nn

from hf_distill.errors import SettingError, TeacherError
from hf_distill.tasks import Task
from hf_distill.tasks.infer import infer_kind
from hf_distill.teachers.load import find_tokenizer
from hf_distill.vocabulary import Columns, match_labels, match_vocabularies, tokenizer_difference

logger = logging.getLogger(__name__)
Tokenizers = tuple[Any, Any]  # the student's and the teacher's, None where not known


def refuse_shared_weights(student: nn.Module, teacher: nn.Module) -> None:
    if student is teacher:
        raise TeacherError(
            "student and teacher are the same object, so there is nothing to learn and freezing the one freezes the "
            f"other. {_of_one_base(student)}Load the teacher apart, or pass copy.deepcopy(model)."
        )
    theirs = {id(p) for p in teacher.parameters()}
    shared = [name for name, p in student.named_parameters() if id(p) in theirs]
    if shared:
        raise TeacherError(
            f"student and teacher share weights ({shared[0]} and {len(shared) - 1} more): training the one changes "
            f"the other. {_of_one_base(student)}Load the teacher apart."
        )


def _of_one_base(student: nn.Module) -> str:
    """What to do where the student is a base with adapters, which PEFT puts into the base itself."""
    if not any(hasattr(module, "base_layer") for module in student.modules()):
        return ""
    return "The student has adapters: for its own base as teacher pass teacher_model=AdaptersOff(). "


def refuse_other_head(teacher: nn.Module, task: Task) -> None:
    kind = _kind_or_none(teacher)  # None: not a class of transformers; its outputs will tell
    if kind not in (None, task.kind):
        raise TeacherError(
            f"the teacher ({type(teacher).__name__}) has a {kind} head, the student needs a teacher for {task.kind}. "
            "Fine-tune a teacher with the student's kind of head."
        )


def matched_columns(student: Any, teacher: Any, task: Task, *, tokenizers: Tokenizers, label_matching: str) -> Columns:
    """The columns that both heads predict.

    Raises:
        TeacherError: they predict different things.
    """
    configs = [getattr(model, "config", None) for model in (student, teacher)]
    if task.matched_by == "labels":
        if None not in configs:
            return match_labels(*configs, matching=label_matching)
        if label_matching == "by_name":
            nameless = type(student if configs[0] is None else teacher).__name__
            raise TeacherError(
                f"{nameless} has no config, so its labels have no names. Give it one with label2id, or, if the order "
                'is the same, pass label_matching="by_index" (in a loop of your own to ModelTeacher).'
            )
    if task.matched_by == "vocabulary":
        return _matched_vocabulary(student, teacher, task, tokenizers)
    widths = [getattr(config, "hidden_size", None) for config in configs]
    if task.kind == "embedding" and None not in widths and widths[0] != widths[1]:
        raise TeacherError(
            f"student and teacher embed in different widths ({widths[0]} and {widths[1]}), which an embedding cannot "
            "bridge by itself. Give the student the teacher's hidden_size."
        )
    return Columns()


def _matched_vocabulary(student: Any, teacher: Any, task: Task, tokenizers: Tokenizers) -> Columns:
    widths = _head_width(student), _head_width(teacher)
    if widths[0] is None or widths[1] is None:
        return Columns()  # a head that is not found: the rows themselves are compared at the first step
    ours, theirs = tokenizers
    columns = match_vocabularies(
        student_width=widths[0],
        teacher_width=widths[1],
        student_tokenizer=ours,
        teacher_tokenizer=theirs,
        teacher_embeddings=_embeddings(teacher),
    )
    blanks = [model.config.pad_token_id for model in (student, teacher)] if task.kind == "ctc" else [0, 0]
    if blanks[0] != blanks[1]:
        raise TeacherError(
            f"student and teacher have different CTC blanks: pad_token_id {blanks[0]} and {blanks[1]}. Use a teacher "
            "with the student's vocabulary."
        )
    return columns


def known_columns(task: Task, tokenizers: Tokenizers) -> Columns:
    """Of heads whose columns are not paired: over a vocabulary, those that each one's own tokenizer can write."""
    if task.matched_by != "vocabulary":
        return Columns()
    known = [None if one is None else max(one.get_vocab().values()) + 1 for one in tokenizers]
    return Columns(*known)


def input_difference(student: Any, teacher: Any, task: Task, *, tokenizers: Tokenizers) -> str | None:
    """Why the teacher cannot read the student's input ids, in words; None where nothing says so."""
    ours, theirs = tokenizers
    ours_embedded, theirs_embedded = _embeddings(student), _embeddings(teacher)
    is_text = ours_embedded is not None and theirs_embedded is not None  # else sound or images
    if ours is not None and theirs is None and (is_text or task.matched_by == "vocabulary"):
        logger.warning(
            "The teacher's tokenizer is not known, so it was not compared with the student's. If it is another one, "
            "the student learns from misread text: pass teacher_processing_class= to have it checked."
        )
    if ours_embedded is None or theirs_embedded is None:
        return None
    if ours is None or theirs is None:
        if task.matched_by != "vocabulary" and ours_embedded != theirs_embedded:
            return f"they embed {ours_embedded} and {theirs_embedded} tokens"
        return None
    last = max(ours.get_vocab().values())
    if last >= theirs_embedded:
        return f"the student's tokenizer makes ids up to {last}, the teacher embeds {theirs_embedded}"
    return tokenizer_difference(ours, theirs)


def tokenizer_in(processor: Any) -> Any:
    """The tokenizer in a processor, or the tokenizer itself; None for what has none."""
    processor = getattr(processor, "tokenizer", processor)
    return processor if hasattr(processor, "get_vocab") else None


def tokenizer_of(model: Any) -> Any:
    """The tokenizer beside the checkpoint that a model was loaded from, where that lies on this machine."""
    origin = getattr(getattr(model, "config", None), "_name_or_path", None)
    return find_tokenizer(origin) if origin and os.path.isdir(origin) else None


def _kind_or_none(model: Any) -> str | None:
    try:
        return infer_kind(model)
    except SettingError:
        return None


def _head_width(model: Any) -> int | None:
    find = getattr(model, "get_output_embeddings", None)
    head = None if find is None else find()
    head = getattr(model, "lm_head", None) if head is None else head
    if head is not None and getattr(head, "weight", None) is not None:
        return int(head.weight.shape[0])
    config = getattr(model, "config", None)
    return None if config is None else int(config.get_text_config(decoder=True).vocab_size)


def _embeddings(model: Any) -> int | None:
    """How many input ids a model of text can read; None for speech and images, and where it is not known."""
    find = getattr(model, "get_input_embeddings", None)
    if find is None or getattr(model, "main_input_name", "input_ids") != "input_ids":
        return None
    try:
        weight = getattr(find(), "weight", None)
    except NotImplementedError:  # CLIP: two towers
        return None
    return int(weight.shape[0]) if isinstance(weight, Tensor) else None
