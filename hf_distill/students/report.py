"""Reports on how a student was built: which layers or units were kept, and which tensors came from where."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from hf_distill.errors import SettingError
from hf_distill.layer_map import LayerMap

logger = logging.getLogger("hf_distill.students")


@dataclass(frozen=True)
class StackReport:
    """One layer stack that was cut.

    Attributes:
        path: the stack's path in the model.
        setting: the config setting that holds its length.
        layer_map: which layer of the student came from which layer of the teacher.
    """

    path: str
    setting: str
    layer_map: LayerMap


@dataclass(frozen=True)
class SizeReport:
    """One config setting that changed.

    Attributes:
        setting: the path of the setting.
        student: its value in the student's config.
        teacher: its value in the teacher's config.
    """

    setting: str
    student: int
    teacher: int

    def __str__(self) -> str:
        return f"{self.setting}: {self.student} of {self.teacher}"


@dataclass(frozen=True, kw_only=True)
class StudentReport:
    """How a student was built.

    Attributes:
        architecture: the student's model class.
        student_parameters: number of the student's parameters; tied parameters count once.
        teacher_parameters: the same for the teacher, or None if there was no teacher.
        notes: further remarks, one sentence each.
    """

    architecture: str
    student_parameters: int
    teacher_parameters: int | None
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        return "\n  ".join((self._size(), *self._details(), *self.notes))

    def _size(self) -> str:
        student, teacher = self.student_parameters, self.teacher_parameters or 0
        return f"{self.architecture}: {student:,} of {teacher:,} parameters ({student / teacher:.0%})"

    def _details(self) -> Iterable[str]:
        return ()


@dataclass(frozen=True, kw_only=True)
class InheritReport(StudentReport):
    """How `inherit` built a student.

    Attributes:
        stacks: the layer stacks that were cut.
        copied: the student's parameters and buffers, each with its name in the teacher.
        carried: the names in `copied` of tensors that lie in layer 0 and serve all layers (T5's relative positions).
        recut: the names in `copied` of tensors with one entry for each layer, which were cut to the kept layers.
        left: the names of the teacher's tensors that were left behind.
    """

    stacks: tuple[StackReport, ...]
    copied: dict[str, str] = field(repr=False)
    carried: tuple[str, ...]
    recut: tuple[str, ...]
    left: tuple[str, ...] = field(repr=False)

    def _details(self) -> Iterable[str]:
        yield from (f"{stack.path}: {stack.layer_map}" for stack in self.stacks)
        yield f"copied: {len(self.copied)} tensors; left behind: {len(self.left)}"
        yield from (f"{name}: serves all layers; copied from {self.copied[name]}" for name in self.carried)
        yield from (f"{name}: one entry for each layer; cut to the kept layers" for name in self.recut)


@dataclass(frozen=True, kw_only=True)
class NarrowReport(StudentReport):
    """How `narrow` built a student.

    Attributes:
        sizes: the config settings that changed.
        kept: where units lie, and which of the teacher's were kept, in the student's order. Heads and neurons are
            listed under the matrix that reads them, channels under "hidden states" (absent if they were projected),
            tokens under "tokens".
        cut: the names of tensors that are smaller than the teacher's, or in another basis.
        copied: the names of tensors that equal the teacher's.
        importance: how units were chosen, or None if no choice was needed.
        projected: the share of the hidden states on the data, each scaled to mean square 1, that lies in the kept
            directions; None if the width was not projected.
    """

    sizes: tuple[SizeReport, ...]
    kept: dict[str, tuple[int, ...]] = field(repr=False)
    cut: tuple[str, ...] = field(repr=False)
    copied: tuple[str, ...] = field(repr=False)
    importance: str | None
    projected: float | None

    def _details(self) -> Iterable[str]:
        yield from map(str, self.sizes)
        if self.projected is not None:
            yield f"hidden states projected: the student holds {self.projected:.1%} of them"
        if self.importance is not None:
            yield f"chosen by {self.importance}"
        yield f"cut: {len(self.cut)} tensors; whole: {len(self.copied)}"


@dataclass(frozen=True, kw_only=True)
class FreshReport(StudentReport):
    """How `fresh` built a student.

    Attributes:
        teacher: the teacher's model class, or None if there was no teacher.
        embeddings: the student's parameters that hold rows of the teacher's embeddings.
        tokens: number of tokens that have the teacher's embedding.
        missing: number of tokens that the teacher does not know.
        fresh: all other parameters: random, or as they were in the given model.
    """

    teacher: str | None
    embeddings: tuple[str, ...]
    tokens: int
    missing: int
    fresh: tuple[str, ...] = field(repr=False)

    def _size(self) -> str:
        teacher = "" if self.teacher is None else f" ({self.teacher} has {self.teacher_parameters:,})"
        return f"{self.architecture}: {self.student_parameters:,} parameters{teacher}"

    def _details(self) -> Iterable[str]:
        names = ", ".join(self.embeddings) or "nothing"
        yield f"copied: {names}; {self.tokens} tokens from the teacher, {self.missing} fresh"
        yield f"not from the teacher: {len(self.fresh)} parameters"


_REPORTS: weakref.WeakKeyDictionary[nn.Module, StudentReport] = weakref.WeakKeyDictionary()


def report_of(student: nn.Module) -> Any:
    """Return the report on a student: an InheritReport, NarrowReport or FreshReport, by the function that built it.

    The report belongs to the object that these functions returned. It is not saved with the model.

    Raises:
        SettingError: if none of these functions returned this object.
    """
    if student not in _REPORTS:
        raise SettingError(f"report_of: inherit, narrow and fresh did not build this {type(student).__name__}.")
    return _REPORTS[student]


def with_report(student: PreTrainedModel, report: StudentReport) -> PreTrainedModel:
    """Log and remember how a student was built, and return the student."""
    logger.info("%s", report)
    _REPORTS[student] = report
    return student


def count_parameters(model: nn.Module) -> int:
    """Return the number of a model's parameters; tied parameters count once."""
    return sum(parameter.numel() for parameter in model.parameters())
