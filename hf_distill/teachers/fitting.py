"""Whether a model can teach a student, and which columns of their heads mean the same; decided before training."""

from __future__ import annotations

import logging
from typing import Any, NamedTuple
from weakref import WeakSet

from torch import Tensor, nn

from hf_distill.errors import SettingError, TeacherError
from hf_distill.tasks import Task
from hf_distill.tasks.infer import infer_kind
from hf_distill.teachers.load import find_tokenizer
from hf_distill.vocabulary import Columns, is_trimmed, match_labels, match_vocabularies, tokenizer_difference

logger = logging.getLogger(__name__)
_WARNED_OF: WeakSet[Any] = WeakSet()  # teachers whose tokenizer is not known
_WRITING = ("seq2seq", "causal_lm")
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
    """Raise TeacherError for a class of another kind of head; a Task of the user's may read any class."""
    kind = _kind_or_none(teacher)  # None: not a class of transformers; its outputs will tell
    if task.inferred and kind not in (None, task.kind):
        article = "an" if str(kind)[0] in "aeiou" else "a"
        by_texts = kind in _WRITING and task.kind in (*_WRITING, "ctc")
        way_out = ", or train on texts that this one writes: hf_distill.generate_completions" if by_texts else ""
        raise TeacherError(
            f"the teacher ({type(teacher).__name__}) has {article} {kind} head, the student needs a teacher for "
            f"{task.kind}. Fine-tune a teacher with the student's kind of head{way_out}; or pass task= an object "
            "derived from hf_distill.tasks.Task that reads the outputs of both."
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
            "bridge by itself. Give the student the teacher's hidden_size; or compare no embeddings (alpha=None), and "
            "pass objectives= what needs no equal widths: SimilarityMatch() (which examples are alike, by their pooled "
            'hidden states), HiddenMatch("last") or CosineEmbedding() (position by position, through a learned '
            "projection)."
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


class InputDifference(NamedTuple):
    """Why a teacher may not read the student's input ids.

    Attributes:
        words: what differs.
        missing: the arguments by which the tokenizers would be compared; empty where they were.
    """

    words: str
    missing: tuple[str, ...] = ()

    def sentence(self) -> str:
        """What is known, and the near way out where it is not known enough."""
        if not self.missing:
            return f"student and teacher have different tokenizers: {self.words}."
        return (
            f"{self.words}, and their tokenizers were not compared. If both have the same tokenizer (and only "
            f"the embeddings are padded differently), pass {' and '.join(self.missing)}."
        )


def input_difference(student: Any, teacher: Any, task: Task, *, tokenizers: Tokenizers) -> InputDifference | None:
    """Why the teacher cannot read the student's input ids; None where nothing says so."""
    ours, theirs = tokenizers
    ours_embedded, theirs_embedded = _embeddings(student), _embeddings(teacher)
    is_text = ours_embedded is not None and theirs_embedded is not None  # else sound or images
    if ours is not None and theirs is None and (is_text or task.matched_by == "vocabulary"):
        _warn_of_unknown_tokenizer(teacher)
    if ours_embedded is None or theirs_embedded is None:
        return None
    if ours is None or theirs is None:
        if task.matched_by == "vocabulary" or ours_embedded == theirs_embedded:
            return None
        missing = {"processing_class=": ours, "teacher_processing_class=": theirs}
        return InputDifference(
            f"student and teacher embed {ours_embedded} and {theirs_embedded} tokens",
            tuple(name for name, tokenizer in missing.items() if tokenizer is None),
        )
    last = max(ours.get_vocab().values())
    if last >= theirs_embedded:
        return InputDifference(f"the student's tokenizer makes ids up to {last}, the teacher embeds {theirs_embedded}")
    difference = tokenizer_difference(ours, theirs)
    return None if difference is None else InputDifference(difference)


def _warn_of_unknown_tokenizer(teacher: Any) -> None:
    """Once for each teacher: a training in stages asks again at each of them."""
    if teacher in _WARNED_OF:
        return
    _WARNED_OF.add(teacher)
    logger.warning(
        "The teacher's tokenizer is not known, so it was not compared with the student's. If it is another one, "
        "the student learns from misread text: pass teacher_processing_class= to have it checked."
    )


def tokenizer_in(processor: Any) -> Any:
    """The tokenizer in a processor, or the tokenizer itself; None for what has none."""
    processor = getattr(processor, "tokenizer", processor)
    return processor if hasattr(processor, "get_vocab") else None


def tokenizer_of(model: Any) -> Any:
    """The tokenizer beside the checkpoint that a model was loaded from, where that lies on this machine.

    That is its folder, or the local cache of the Hub. Nothing is downloaded.
    """
    origin = getattr(getattr(model, "config", None), "_name_or_path", None)
    return None if not origin or is_trimmed(model) else find_tokenizer(origin, download=False)


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
    config: Any = getattr(model, "config", None)
    text = config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config
    width = getattr(text, "vocab_size", None)
    return width if isinstance(width, int) else None


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
