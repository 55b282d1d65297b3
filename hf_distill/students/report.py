"""What was done to make a student: which layers or units, which tensors from where. Plain data that prints itself."""

from __future__ import annotations

import weakref
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from hf_distill.errors import SettingError
from hf_distill.layer_map import LayerMap

_REPORTS: weakref.WeakKeyDictionary[nn.Module, Any] = weakref.WeakKeyDictionary()


def report_of(student: nn.Module) -> Any:
    """Return the report on how a student was made, by `inherit`, `narrow`, `fresh` or `adapt`.

    It belongs to the object that these functions returned, and is not saved with the model.

    Raises:
        SettingError: if none of them returned this object.
    """
    if student not in _REPORTS:
        raise SettingError(
            f"report_of: this {type(student).__name__} was not made by inherit, narrow, fresh or adapt in this process."
        )
    return _REPORTS[student]


def with_report(student: Any, report: Any) -> Any:
    """Return the student, and remember how it was made."""
    _REPORTS[student] = report
    return student


@dataclass(frozen=True)
class StackReport:
    """One layer stack: where it is, the setting that holds its length, and which layer came from which."""

    path: str
    setting: str
    layer_map: LayerMap


@dataclass(frozen=True)
class InheritReport:
    """How a student was made.

    Attributes:
        architecture: the model class.
        stacks: the layer stacks that were cut.
        copied: the name of a parameter or buffer in the student → its name in the teacher.
        carried: those of `copied` that live in the first layer and serve all (T5's table of relative positions).
        recut: those of `copied` with one entry a layer, of which the kept layers' entries were taken.
        fresh: what has no source. Empty: `inherit` refuses rather than start something at random.
        left: parameters of the teacher that the student has not.
        student_parameters, teacher_parameters: how many numbers, tied ones once.
        notes: what else a reader should know.
    """

    architecture: str
    stacks: tuple[StackReport, ...]
    copied: dict[str, str] = field(repr=False)
    carried: tuple[str, ...]
    recut: tuple[str, ...]
    fresh: tuple[str, ...]
    left: tuple[str, ...] = field(repr=False)
    student_parameters: int
    teacher_parameters: int
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        lines = [
            f"{self.architecture}: {self.student_parameters:,} of {self.teacher_parameters:,} parameters "
            f"({self.student_parameters / self.teacher_parameters:.0%})"
        ]
        lines += [f"  {stack.path}: {stack.layer_map}" for stack in self.stacks]
        fresh = ", ".join(self.fresh) or "nothing"
        lines.append(f"  copied: {len(self.copied)} tensors; left behind: {len(self.left)}; fresh: {fresh}")
        lines += [f"  {name}: serves all layers; from teacher's {self.copied[name]}" for name in self.carried]
        lines += [f"  {name}: one entry a layer; those of the kept layers" for name in self.recut]
        return "\n".join(lines + [f"  {note}" for note in self.notes])


@dataclass(frozen=True)
class SizeReport:
    """One setting of the config that changed: the student's value, and the teacher's."""

    setting: str
    student: int
    teacher: int

    def __str__(self) -> str:
        return f"{self.setting}: {self.student} of {self.teacher}"


@dataclass(frozen=True)
class NarrowReport:
    """How a thinner student was made.

    Attributes:
        architecture: the model class.
        sizes: settings of the config that changed.
        kept: where the units lie → which of the teacher's were kept, in the student's order. Heads and neurons go by
            the matrix that reads them; channels are under "hidden states", tokens under "tokens". Empty for channels
            that were projected.
        cut: parameters and buffers that are smaller than the teacher's, or in another basis.
        copied: those that are equal.
        fresh: what has no source. Empty: `narrow` refuses rather than start something at random.
        importance: how the units were chosen; None: no choice was needed.
        projected: which share of the hidden states on the data, each with mean square 1, lies in the directions kept;
            None: the width was not projected.
        student_parameters, teacher_parameters: how many numbers, tied ones once.
        notes: what else a reader should know.
    """

    architecture: str
    sizes: tuple[SizeReport, ...]
    kept: dict[str, tuple[int, ...]] = field(repr=False)
    cut: tuple[str, ...] = field(repr=False)
    copied: tuple[str, ...] = field(repr=False)
    fresh: tuple[str, ...]
    importance: str | None
    student_parameters: int
    teacher_parameters: int
    notes: tuple[str, ...] = ()
    projected: float | None = None

    def __str__(self) -> str:
        lines = [
            f"{self.architecture}: {self.student_parameters:,} of {self.teacher_parameters:,} parameters "
            f"({self.student_parameters / self.teacher_parameters:.0%})"
        ]
        lines += [f"  {size}" for size in self.sizes]
        if self.projected is not None:
            lines.append(f"  hidden states projected: the student holds {self.projected:.1%} of them")
        if self.importance is not None:
            lines.append(f"  chosen by {self.importance}")
        fresh = ", ".join(self.fresh) or "nothing"
        lines.append(f"  cut: {len(self.cut)} tensors; whole: {len(self.copied)}; fresh: {fresh}")
        return "\n".join(lines + [f"  {note}" for note in self.notes])


@dataclass(frozen=True)
class FreshReport:
    """How a student of another architecture was made.

    Attributes:
        architecture: the student's model class.
        teacher: the teacher's; None: there was none.
        embeddings: parameters of the student that hold rows of the teacher's embeddings; empty: none do.
        tokens: how many tokens have the teacher's embedding.
        missing: how many have not, and start fresh.
        fresh: all other parameters: at random, as the student's class starts them, or as the given model had them.
        student_parameters, teacher_parameters: how many numbers, tied ones once.
        notes: what else a reader should know.
    """

    architecture: str
    teacher: str | None
    embeddings: tuple[str, ...]
    tokens: int
    missing: int
    fresh: tuple[str, ...] = field(repr=False)
    student_parameters: int
    teacher_parameters: int | None
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        of = "" if self.teacher_parameters is None else f" ({self.teacher} has {self.teacher_parameters:,})"
        lines = [f"{self.architecture}: {self.student_parameters:,} parameters{of}"]
        names = ", ".join(self.embeddings) or "nothing"
        lines.append(f"  copied: {names}; {self.tokens} tokens from the teacher, {self.missing} fresh")
        lines.append(f"  not from the teacher: {len(self.fresh)} parameters")
        return "\n".join(lines + [f"  {note}" for note in self.notes])
