"""LogitsMatch: a divergence between softened logits (or values) on every valid row."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hf_distill.errors import SettingError, TeacherError, check_choice
from hf_distill.functional import DIVERGENCE_ALIASES, DIVERGENCES, PROPERTIES, Divergence, DivergenceProperties
from hf_distill.functional.features import DISTANCES
from hf_distill.functional.properties import DivergenceName, check_settings
from hf_distill.functional.rows import in_full_precision
from hf_distill.functional.sparse import (
    OUTCOME_DIVERGENCES,
    SAMPLE_DIVERGENCES,
    sampled_forward_kl,
    student_outcomes,
    teacher_outcomes,
)
from hf_distill.objectives.base import Objective, ObjectiveSetup
from hf_distill.schedules import Schedule, constant
from hf_distill.signals import LossSum, Needs, Signals, SparseRows
from hf_distill.tasks import Batch, Task
from hf_distill.tasks.base import rows_of


@dataclass(frozen=True)
class RowValues:
    """The divergence on every valid row.

    Attributes:
        values: `[m]`, temperature factor included.
        kept: `[m]`, the index of each among the task's n rows; None if they are all of them.
        student: `[m v]`, the student's rows.
        teacher: `[m v]`, the teacher's rows. Those of a sparse teacher are `[m k+1]`, the last column for all others;
            those of a teacher that samples are the logs of the weights.
        ids: `[m k]`, the columns of a sparse teacher; None if all columns are there in order.
    """

    values: Tensor
    kept: Tensor | None
    student: Tensor
    teacher: Tensor
    ids: Tensor | None = None

    def choices(self) -> tuple[Tensor, Tensor]:
        """Return the most likely column `[m]` of the student and of the teacher."""
        if self.ids is None:
            return self.student.argmax(-1), self.teacher.argmax(-1)
        best = self.teacher[..., :-1].argmax(-1, keepdim=True)  # the tail is not a column
        return self.student.argmax(-1), self.ids.gather(-1, best).squeeze(-1)


class LogitsMatch(Objective):
    """T^p · divergence(student / T, teacher / T), summed over the valid rows.

    p is the divergence's own power (2 for the KL family), so that the gradient does not shrink as T grows
    (Hinton et al. 2015, section 2). Values (regression, embeddings) are not divided by a temperature.

    Args:
        divergence: a name in `DIVERGENCES`, or a function `[n v], [n v] -> [n]`; None means forward_kl for
            logits and mean_squared_error for values.
        divergence_kwargs: keyword arguments of the divergence.
        temperature: a schedule.

    Raises:
        SettingError: for an unknown divergence or setting.
    """

    paper = "hinton2015distilling"
    name = "logits"
    needs = teacher_needs = Needs(logits=True)

    def __init__(
        self,
        divergence: DivergenceName | Divergence | None = None,
        *,
        divergence_kwargs: Mapping[str, float] | None = None,
        temperature: Schedule | None = None,
    ) -> None:
        self.temperature = temperature or constant(2.0)
        self.divergence_kwargs = dict(divergence_kwargs or {})
        self._chosen: dict[bool, tuple[Divergence, DivergenceProperties]] = {}
        if isinstance(divergence, str) and divergence not in DIVERGENCES:
            if divergence in DISTANCES:
                raise SettingError(
                    f"divergence={divergence!r} is a distance of hidden states: use alpha=None and objectives="
                    f"HiddenMatch('last', distance={divergence!r})."
                )
            check_choice("divergence", divergence, DIVERGENCES, DIVERGENCE_ALIASES)
        self._given = DIVERGENCES[divergence] if isinstance(divergence, str) else divergence
        self._try_settings()

    @property
    def weight(self) -> Schedule:  # type: ignore[override]  # alpha, which may change
        """Raise: the blend knows the weight of this term, alpha."""
        raise SettingError("the logits' term is weighted by alpha.")

    @property
    def couples_examples(self) -> bool:  # type: ignore[override]  # it follows from the divergence
        """Whether the divergence does."""
        name = next((n for n, f in DIVERGENCES.items() if f is getattr(self._given, "func", self._given)), None)
        return name is not None and PROPERTIES[name].couples_rows

    def bind(self, setup: ObjectiveSetup) -> None:
        """Check that the divergence compares what the task predicts."""
        self.divergence_for(setup.task)

    def __call__(
        self, student: Signals, teacher: Signals, task: Task, batch: Batch, *, progress: float = 0.0
    ) -> LossSum:
        rows = self.per_row(student, teacher, task, batch, progress=progress)
        count = torch.tensor(rows.values.shape[0], device=rows.values.device)
        if type(task).count is not Task.count:
            check_row_count(rows.values, task, batch)
        # sum() of no row is 0 with a graph, so backward works (law L2).
        return LossSum(rows.values.sum(), count)

    def count(self, task: Task, batch: Batch) -> Tensor:
        return task.count(batch)

    def per_row(
        self, student: Signals, teacher: Signals, task: Task, batch: Batch, *, progress: float = 0.0
    ) -> RowValues:
        """Return the divergence of each valid row. Other rows are never read, so a NaN in them does not matter."""
        if teacher.sparse is not None:
            return self._per_outcome(student, teacher.sparse, task, batch, progress)
        function, properties = self.divergence_for(task)
        q = rows_of(student.predictions(), task, batch, whose="student")
        p = rows_of(teacher.predictions(), task, batch, whose="teacher")
        check_same_rows(q, p, task, batch)
        kept = kept_of(q, task, batch)
        if kept is not None:
            q, p = q.index_select(0, kept), p.index_select(0, kept)
        keywords: dict[str, Any] = dict(self.divergence_kwargs)
        if properties.wants_target:
            target = task.targets(batch)
            if target is not None:
                target = student.alignment.of_labels(target if kept is None else target[kept])
            keywords["target"] = target
        if task.on_values or not properties.softens:
            return RowValues(function(q, p, **keywords), kept, q, p)
        t = self.temperature(progress)
        values = function(in_full_precision(q) / t, in_full_precision(p) / t, **keywords)
        return RowValues(values * t**properties.temperature_power, kept, q, p)

    def _per_outcome(
        self, student: Signals, teacher: SparseRows, task: Task, batch: Batch, progress: float
    ) -> RowValues:
        """Return the divergence over a sparse teacher's columns and one for all others, or over its samples."""
        function, properties = self.divergence_for(task)
        t = self.temperature(progress)
        self.check_sparse(task, teacher, t)
        fields = (teacher.ids, teacher.log_probabilities, teacher.log_tail, teacher.weights)
        q = rows_of(student.predictions(), task, batch, whose="student")
        sparse = [
            rows_of(x, task, batch, whose="teacher", columns=x is not teacher.log_tail) for x in fields if x is not None
        ]
        check_same_rows(q, sparse[0], task, batch, columns=False)
        kept = kept_of(q, task, batch)
        if kept is not None:
            q, *sparse = (x.index_select(0, kept) for x in (q, *sparse))
        ids, log_p, log_tail, *weights = sparse
        rows = in_full_precision(q) if t == 1 else in_full_precision(q) / t  # dividing by 1 would copy
        if weights:
            p = teacher_outcomes(weights[0].log(), torch.full_like(log_tail, -torch.inf))
            values = sampled_forward_kl(rows, ids, log_p, weights[0])
        else:
            p = teacher_outcomes(log_p, log_tail)
            values = function(student_outcomes(rows, ids), p, **self.divergence_kwargs)
        return RowValues(values * t**properties.temperature_power, kept, q, p, ids)

    def check_sparse(self, task: Task, teacher: SparseRows, ours: float) -> None:
        """Raise SettingError if a sparse teacher does not support this divergence or temperature."""
        name, theirs = self.name_for(task), teacher.temperature
        if teacher.weights is not None and name not in SAMPLE_DIVERGENCES:
            raise SettingError(
                f"divergence={name!r} is not linear in the teacher's probabilities, so weighted samples of them are "
                f"biased. Use {', '.join(SAMPLE_DIVERGENCES)}, or a cache with Dense or TopK."
            )
        if name not in OUTCOME_DIVERGENCES:
            raise SettingError(
                f"divergence={name!r} needs every column, and a sparse teacher has some. Allowed: "
                f"{', '.join(OUTCOME_DIVERGENCES)}."
            )
        if theirs != ours:
            raise SettingError(
                f"temperature={ours:g}, but this sparse teacher's probabilities are those at temperature {theirs:g}. "
                f"Pass temperature={theirs:g}, constant through the training."
            )

    def divergence_for(self, task: Task) -> tuple[Divergence, DivergenceProperties]:
        """Return the divergence and its properties; by default the task chooses it.

        Raises:
            SettingError: for a divergence of distributions if the task predicts values.
        """
        if task.on_values in self._chosen:
            return self._chosen[task.on_values]
        name = self.name_for(task)
        function = self._given or DIVERGENCES[name]
        # A function of the catalogue has its properties with bound settings (`partial`) too.
        found = function, PROPERTIES.get(name, DivergenceProperties(paper=None, on_values=True))
        if task.on_values and not found[1].on_values:
            allowed = [n for n, properties in PROPERTIES.items() if properties.on_values]
            raise SettingError(
                f"divergence={name!r} compares distributions, but {task} predicts values. Allowed: "
                f"{', '.join(allowed)}."
            )
        self._chosen[task.on_values] = found
        return found

    def catalogued(self, task: Task) -> str | None:
        """Return the divergence's name in `DIVERGENCES`; None for a user's function, or one with bound settings."""
        name = self.name_for(task)
        return name if name in DIVERGENCES and self._given in (None, DIVERGENCES[name]) else None

    def name_for(self, task: Task) -> str:
        """Return the divergence's name, for logs and cards."""
        if self._given is None:
            return "mean_squared_error" if task.on_values else "forward_kl"
        return divergence_name(self._given)

    def __repr__(self) -> str:
        divergence = None if self._given is None else divergence_name(self._given)
        settings = f", divergence_kwargs={self.divergence_kwargs}" if self.divergence_kwargs else ""
        return f"LogitsMatch({divergence!r}{settings}, temperature={self.temperature(0.0):g})"

    def _try_settings(self) -> None:
        """Call the divergence on two tiny rows, so that a wrong setting fails now and not in the first step."""
        if self._given is None:
            if self.divergence_kwargs:
                raise SettingError(f"divergence_kwargs={self.divergence_kwargs} need a divergence=.")
            return
        check_settings(f"divergence_kwargs: {divergence_name(self._given)}", self._given, self.divergence_kwargs)
        rows = torch.zeros(2, 3)
        try:
            found = self._given(rows, rows, **self.divergence_kwargs)
        except TypeError as error:  # a string where a number belongs
            raise SettingError(f"divergence_kwargs={self.divergence_kwargs}: {error}") from error
        if tuple(found.shape) != (2,):
            raise SettingError(
                f"a divergence returns one number for each row; for two rows this one returned {list(found.shape)}. "
                "Leave out the mean or sum over rows."
            )


def divergence_name(divergence: str | Divergence) -> str:
    """Return a divergence's name in `DIVERGENCES`, or `own:` and the name of the user's function."""
    if isinstance(divergence, str):
        return divergence
    function = getattr(divergence, "func", divergence)
    known = [name for name, catalogued in DIVERGENCES.items() if catalogued is function]
    return known[0] if known else f"own:{getattr(function, '__name__', type(function).__name__)}"


def check_row_count(values: Tensor, task: Task, batch: Batch) -> None:
    """Raise SettingError if a task's `count` is not the number of rows that it selects and keeps.

    The default count follows from `rows` and `keep`, and comparing it would only synchronise.
    """
    counted = int(task.count(batch))
    if counted != values.shape[0]:
        raise SettingError(
            f"{type(task).__name__}.count() returns {counted} rows, but select() and keep() leave {values.shape[0]}. "
            "Leave count() out: it follows from rows() and keep()."
        )


def check_same_rows(student: Tensor, teacher: Tensor, task: Task, batch: Batch, *, columns: bool = True) -> None:
    """Raise TeacherError if the numbers of rows differ: rows are paired by position."""
    rows = task.rows(batch)
    same = student.shape == teacher.shape if columns else student.shape[0] == teacher.shape[0]
    if same and student.shape[0] == rows:
        return
    raise TeacherError(
        f"the batch makes {rows} rows of {task}, but the student gives {list(student.shape)} and the teacher "
        f"{list(teacher.shape)} [rows, columns]. They must predict at the same positions: the same frame rate (CTC), "
        "teacher_ columns as long as the student's, no virtual tokens of prompt tuning; and have equally many columns."
    )


def kept_of(rows: Tensor, task: Task, batch: Batch) -> Tensor | None:
    """Return the indices `[m]` of the valid rows among `[n v]`, or None if all are valid."""
    keep = task.keep(batch)
    if keep is None:
        return None
    check_keep(keep, rows, task)
    return keep.nonzero().squeeze(-1)


def check_keep(keep: Tensor, rows: Tensor, task: Task) -> None:
    """Raise SettingError if a task's `keep` has not one bool for each row that it selects."""
    if keep.shape != rows.shape[:1]:
        raise SettingError(
            f"{type(task).__name__}.keep() must have the shape [{rows.shape[0]}] of the rows, not {list(keep.shape)}."
        )
