"""Which columns of two heads mean the same thing: labels by name, padded vocabularies, tokenizers.

Columns are paired once, before training. Different tokenizers are refused, not translated.
"""

from __future__ import annotations

import hashlib
import json
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from hf_distill.errors import SettingError, TeacherError, did_you_mean

LabelMatching = Literal["by_name", "by_index"]
LABEL_MATCHING: tuple[str, ...] = get_args(LabelMatching)


@dataclass(frozen=True)
class HeadAlignment:
    """The columns of each head that are compared.

    Attributes:
        student: columns of the student's head: indices, a number of leading columns, or None for all.
        teacher: the columns of the teacher's head with the same meaning, in the student's order.
    """

    student: tuple[int, ...] | int | None = None
    teacher: tuple[int, ...] | int | None = None
    _indices: dict[tuple[str, torch.device], Tensor] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    def of_student(self, x: Tensor) -> Tensor:
        return self._pick(x, "student", self.student)

    def of_teacher(self, x: Tensor) -> Tensor:
        return self._pick(x, "teacher", self.teacher)

    def as_student(self, x: Tensor, width: int) -> Tensor:
        """Return compared columns at their places among the `width` columns of the student; -inf in the others.

        >>> HeadAlignment(student=(2, 0)).as_student(torch.tensor([[5.0, 6.0]]), 3).tolist()
        [[6.0, -inf, 5.0]]
        """
        if self.student is None:
            return x
        found = x.new_full((*x.shape[:-1], width), -torch.inf)
        if isinstance(self.student, int):
            found[..., : self.student] = x
            return found
        return found.index_copy(-1, self._index("student", self.student, x.device), x)

    def of_labels(self, labels: Tensor) -> Tensor:
        """Return label ids `[n]` as indices of the compared columns; -100 for others.

        >>> HeadAlignment(student=(0, 2)).of_labels(torch.tensor([2, 1, -100])).tolist()
        [1, -100, -100]
        """
        if self.student is None:
            return labels
        if isinstance(self.student, int):
            return labels.masked_fill(labels >= self.student, -100)
        compared = self._index("student", self.student, labels.device)
        place = torch.full((int(max(self.student)) + 1,), -100, device=labels.device)
        place[compared] = torch.arange(len(self.student), device=labels.device)
        known = (labels >= 0) & (labels < len(place))
        return torch.where(known, place[labels.clamp(0, len(place) - 1)], -100)

    def _pick(self, x: Tensor, side: str, columns: tuple[int, ...] | int | None) -> Tensor:
        if columns is None:
            return x
        if isinstance(columns, int):
            return x[..., :columns]  # a view
        return x.index_select(-1, self._index(side, columns, x.device))

    def _index(self, side: str, columns: tuple[int, ...], device: torch.device) -> Tensor:
        """Return the index on a device, made once for each: a whole vocabulary is too long to move at every step."""
        if (side, device) not in self._indices:
            self._indices[side, device] = torch.tensor(columns, device=device)
        return self._indices[side, device]


def match_labels(student: Any, teacher: Any, *, matching: str = "by_name") -> HeadAlignment:
    """Return the columns of two classification heads, paired by the label names in their configs.

    Args:
        student: the student's config.
        teacher: the teacher's config.
        matching: "by_name", or "by_index" if you know that the order is the same.

    Raises:
        TeacherError: if the label sets, or their sizes, differ.
        SettingError: if the matching is unknown.
    """
    if matching not in LABEL_MATCHING:
        hint = did_you_mean(matching, LABEL_MATCHING)
        raise SettingError(f"label_matching={matching!r}: allowed are {' and '.join(LABEL_MATCHING)}.{hint}")
    for whose, config in (("student", student), ("teacher", teacher)):
        if sorted(label_ids(config).values()) != list(range(config.num_labels)):
            problem = f"the {whose}'s labels {label_ids(config)} do not number its {config.num_labels} columns from 0"
            raise TeacherError(f"{problem}. Set {whose}.config.label2id and id2label to name each column once.")
    if student.num_labels != teacher.num_labels:
        raise TeacherError(
            f"student and teacher have different numbers of labels: student {student.num_labels} {_names(student)}, "
            f"teacher {teacher.num_labels} {_names(teacher)}. Give the student the teacher's labels: "
            "from_pretrained(..., num_labels=..., label2id=..., id2label=...)."
        )
    if matching == "by_index":
        return HeadAlignment()
    student_ids, teacher_ids = label_ids(student), label_ids(teacher)
    if set(student_ids) != set(teacher_ids):
        raise TeacherError(
            f"student and teacher label names differ: student {_names(student)}, teacher {_names(teacher)}. Set "
            'student.config.label2id and id2label to the teacher\'s names, or pass label_matching="by_index" (to '
            "DistillationArguments or ModelTeacher) if you know that the order is the same."
        )
    in_student_order = sorted(student_ids, key=student_ids.__getitem__)
    order = tuple(teacher_ids[name] for name in in_student_order)
    return HeadAlignment() if order == tuple(range(len(order))) else HeadAlignment(teacher=order)


def label_ids(config: Any) -> dict[str, int]:
    """Return name → column of a config's labels, from `label2id`, or from `id2label` if only that was set."""
    forward = {str(name): int(index) for name, index in (config.label2id or {}).items()}
    backward = {str(name): int(index) for index, name in (config.id2label or {}).items()}
    chosen = backward if has_default_names(forward) and not has_default_names(backward) else forward
    return chosen if len(chosen) == config.num_labels else backward


def has_default_names(ids: Mapping[str, int]) -> bool:
    """Return whether these are transformers' default names: LABEL_0, LABEL_1, …"""
    return all(name == f"LABEL_{index}" for name, index in ids.items())


def _names(config: PreTrainedConfig) -> str:
    ids = label_ids(config)
    return listed_names(sorted(ids, key=ids.__getitem__))


def listed_names(names: Sequence[str]) -> str:
    """Return label names in the order of their ids, for a message.

    >>> listed_names(["no", "yes"])
    '{no, yes}'
    """
    return "{" + ", ".join(names[:8]) + (f", … ({len(names)} in all)" if len(names) > 8 else "") + "}"


def match_vocabularies(
    *,
    student_width: int,
    teacher_width: int,
    student_tokenizer: PreTrainedTokenizerBase | None = None,
    teacher_tokenizer: PreTrainedTokenizerBase | None = None,
    teacher_embeddings: int | None = None,
) -> HeadAlignment:
    """Return the columns that two heads over a vocabulary share: those that both tokenizers know, without padding.

    Args:
        student_width: number of columns of the student's head, padding included.
        teacher_width: the same for the teacher's head.
        student_tokenizer: the student's tokenizer, or None if unknown.
        teacher_tokenizer: the teacher's tokenizer, or None if unknown.
        teacher_embeddings: number of input ids that the teacher embeds, or None if unknown.

    Raises:
        TeacherError: if the tokenizers differ, or the widths differ and a tokenizer is not known.
    """
    if student_tokenizer is None or teacher_tokenizer is None:
        if student_width == teacher_width:
            return HeadAlignment()
        raise TeacherError(
            f"student and teacher predict vocabularies of different width ({student_width} and {teacher_width}) and "
            "which columns they share is not known. Pass processing_class= (the student's tokenizer) and "
            "teacher_processing_class= (the teacher's)."
        )
    difference = tokenizer_difference(student_tokenizer, teacher_tokenizer)
    if difference is not None:
        raise TeacherError(
            f"student and teacher have different tokenizers: {difference}. Use a teacher with the student's tokenizer, "
            "or build the student from the teacher; at sequence level (classification) tokenizers may differ."
        )
    student_ids, teacher_ids = student_tokenizer.get_vocab(), teacher_tokenizer.get_vocab()
    last_input = max(student_ids.values())
    if teacher_embeddings is not None and last_input >= teacher_embeddings:
        raise TeacherError(
            f"the student's tokenizer makes ids up to {last_input}, the teacher embeds only {teacher_embeddings}. "
            "Remove the tokens that were added to the student's tokenizer, or add them to the teacher."
        )
    shared = sorted(student_ids[token] for token in student_ids.keys() & teacher_ids.keys())
    shared = [index for index in shared if index < min(student_width, teacher_width)]
    if len(shared) == student_width == teacher_width:
        return HeadAlignment()
    if shared == list(range(len(shared))):
        return HeadAlignment(len(shared), len(shared))
    return HeadAlignment(tuple(shared), tuple(shared))


def tokenizer_difference(student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase) -> str | None:
    """Return how two tokenizers differ, or None if every token that both know has the same id in both."""
    student_ids, teacher_ids = student.get_vocab(), teacher.get_vocab()
    moved = [t for t, i in student_ids.items() if t in teacher_ids and teacher_ids[t] != i]
    if moved:
        token = min(moved, key=student_ids.__getitem__)
        return (
            f"{len(moved)} tokens have other ids, {token!r} is {student_ids[token]} for the student and "
            f"{teacher_ids[token]} for the teacher"
        )
    shared = len(student_ids.keys() & teacher_ids.keys())
    if shared < 0.5 * min(len(student_ids), len(teacher_ids)):
        return f"only {shared} of {len(student_ids)} and {len(teacher_ids)} tokens are the same"
    by_id = {i: t for t, i in teacher_ids.items()}
    renamed = [t for t, i in student_ids.items() if t not in teacher_ids and i in by_id]
    if renamed:
        token = renamed[0]
        return f"id {student_ids[token]} is {token!r} for the student and {by_id[student_ids[token]]!r} for the teacher"
    if _merges(student) != _merges(teacher):
        return "the vocabularies agree but the merges do not"
    return None


_ATTRIBUTE = "_hf_distill_vocabulary"  # of a model, not saved: a name for the token ids that it reads
_TRIMMED = "trimmed "


def read_the_same_ids(student: nn.Module, teacher: nn.Module) -> None:
    """Remember that a student was built from this teacher, so that one tokenizer is right for both."""
    name = _vocabulary_of(teacher) or uuid.uuid4().hex
    for model in (student, teacher):
        setattr(model, _ATTRIBUTE, name)


def reads_trimmed_ids(model: nn.Module, kept: Sequence[int]) -> None:
    """Remember that a model reads the renumbered ids of a trimmed vocabulary, whatever tokenizer is in its folder."""
    setattr(model, _ATTRIBUTE, _TRIMMED + hashlib.blake2b(repr(tuple(kept)).encode(), digest_size=8).hexdigest())


def reads_ids_of(student: nn.Module, teacher: nn.Module) -> bool:
    """Return whether the student was built from this teacher, or both from the same model."""
    return bool(_vocabulary_of(teacher)) and _vocabulary_of(student) == _vocabulary_of(teacher)


def is_trimmed(model: nn.Module) -> bool:
    """Return whether its token ids were renumbered after it was loaded."""
    return _vocabulary_of(model).startswith(_TRIMMED)


def _vocabulary_of(model: nn.Module) -> str:
    """Return the name of the token ids that a model reads; empty if unknown."""
    return str(getattr(model, _ATTRIBUTE, ""))


def _merges(tokenizer: PreTrainedTokenizerBase) -> object:
    """Return the merge rules of a fast tokenizer, or None if it has none."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    return None if backend is None else json.loads(backend.to_str())["model"].get("merges")
