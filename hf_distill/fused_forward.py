"""The labels' and the logits' terms without whole logits: computed from hidden states within the student's forward.

Decides when that is possible; the mathematics is in `functional/fused/loss.py`.
"""

from __future__ import annotations

import logging
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import TYPE_CHECKING

from torch import Tensor, nn
from torch.nn import functional as F

from hf_distill.blend import LABELS, LOGITS, Blend, FusedTerms, Step
from hf_distill.ddp import tied
from hf_distill.errors import SettingError
from hf_distill.functional import PROPERTIES
from hf_distill.functional.fused.inputs import (
    Head,
    Labels,
    TeacherHidden,
    TeacherLogits,
    TeacherSparse,
    Terms,
)
from hf_distill.functional.fused.loss import fused_linear_distillation
from hf_distill.models.output_head import OutputHead, Trial
from hf_distill.objectives.logits import check_keep, check_same_rows
from hf_distill.signals import DeferredLogits, Outputs, Signals
from hf_distill.tasks import Batch, Task
from hf_distill.tasks.base import IGNORED, rows_of
from hf_distill.vocabulary import HeadAlignment

if TYPE_CHECKING:
    from hf_distill.distiller import Distiller

logger = logging.getLogger(__name__)
LARGE = 16_384  # columns; below it whole logits are cheap
LABEL_NAMES = ("labels", "shift_labels")


class FusedLoss:
    """Decides whether the terms of this student can be computed without whole logits, or says why not.

    Args:
        setting: True means never to compute them whole, False always, and None to fuse where the vocabulary is large
            and nothing needs whole logits.

    Raises:
        SettingError: if True, and something needs whole logits.
    """

    def __init__(self, setting: bool | None) -> None:
        if setting not in (None, True, False):
            raise SettingError(f"fused_loss={setting!r}: allowed are None, True and False.")
        self.setting = setting
        self._tried: str | None = None
        self._tried_with: bool | None = None  # whether with labels; None before the trial
        self.is_possible = False  # whether `forward` may fuse

    def bind(self, student: nn.Module, task: Task) -> None:
        """Forget the last student, and start with this one."""
        self.head = OutputHead(student)
        large = task.over_vocabulary and self.head.columns >= LARGE
        self.is_possible = large if self.setting is None else self.setting
        self._tried, self._tried_with = None, None

    def forward(
        self,
        distiller: Distiller,
        student: nn.Module,
        batch: Batch,
        step: Step,
        *,
        smoothing: float,
        fuse_labels: bool,
    ) -> FusedForward | None:
        """Return a `FusedForward` for this micro-batch, or None if the logits are computed whole.

        Args:
            distiller: has the teacher, task and terms.
            student: the model as the loop calls it.
            batch: the prepared micro-batch.
            step: the optimizer step.
            smoothing: label smoothing of the labels' term.
            fuse_labels: whether the labels' term is the head's own loss.

        Raises:
            SettingError: if whole logits are needed and `fused_loss` is True.
        """
        blending, task, teacher = distiller.blending, distiller.task, distiller.teacher
        alignment = HeadAlignment() if teacher is None else teacher.alignment
        why = self._why_not(blending, task, alignment, step, fuse_labels=fuse_labels)
        if why is None and teacher is not None and teacher.learns_from_batches:
            why = "the teacher learns from the student's logits"
        with_labels = blending.uses_labels()
        if why is None and (self._tried_with is None or with_labels > self._tried_with):
            inputs = distiller.student_inputs(batch, labels=False, kv_cache=False)
            why = self._try_out(student, task, batch, inputs, with_labels=with_labels)
        if why is not None:
            if self.setting is True:
                raise SettingError(f"fused_loss=True: {why}. Pass fused_loss=False, or None.")
            return None
        teacher_signals = None
        if LOGITS in step.weights:
            teacher_signals = distiller.teacher_signals(batch, replace(step.teacher_needs, deferred=True))
        return FusedForward(self.head, blending, task, batch, step, teacher=teacher_signals, smoothing=smoothing)

    def _why_not(
        self, blending: Blend, task: Task, alignment: HeadAlignment, step: Step, *, fuse_labels: bool
    ) -> str | None:
        others = {name: blending.objectives[name] for name in step.active if name != LOGITS}
        need_logits = [name for name, other in others.items() if other.needs.logits or other.teacher_needs.logits]
        match, compares = blending.logits_match, LOGITS in step.weights
        if not task.over_vocabulary:
            return f"a {task} head has no vocabulary"
        if self.setting is None and self.head.columns < LARGE:
            return f"{self.head.columns} columns are no burden"
        if not compares and (self.setting is None or LABELS not in step.weights):
            return "the logits are compared in no term at this moment"
        if need_logits:
            return f"{', '.join(need_logits)} need whole logits"
        if compares and (match.catalogued(task) is None or match.couples_examples):
            return f"divergence={match.name_for(task)!r} is your own function, or compares rows with each other"
        if not fuse_labels and LABELS in step.weights:
            return "the labels' term is your own function (compute_loss_func, compute_loss), which reads logits"
        if any(isinstance(side, tuple) for side in (alignment.student, alignment.teacher)):
            return "columns of the two vocabularies are paired one by one"
        return self.head.refusal or self._tried

    def _try_out(self, student: nn.Module, task: Task, batch: Batch, inputs: Batch, *, with_labels: bool) -> str | None:
        """Try once whether the fused forward gives the student's own logits and loss; return the reason if not."""
        inputs = {name: value for name, value in inputs.items() if name not in LABEL_NAMES}
        labelled = {name: batch[name] for name in LABEL_NAMES if with_labels and batch.get(name) is not None}
        found = self.head.trial(inputs, labelled, wrapped=student)
        if isinstance(found, Trial) and not found.loss_is(_plain_loss(found, task)):
            found = "the model's own loss is more than the cross-entropy of its labels"
        self._tried_with = with_labels
        if isinstance(found, str):
            self._tried = found
            if self.setting is None:
                logger.warning(f"Logits over {self.head.columns} columns are computed whole: {found}.")
        else:
            logger.info(f"The loss over {self.head.columns} columns is computed from hidden states, without logits.")
        return self._tried


def _plain_loss(trial: Trial, task: Task) -> Tensor:
    """Return the mean cross-entropy of the positions tried, in the precision of the model's own loss.

    Many heads sum their loss in bf16, where the mean of sixteen positions is up to a percent off.
    """
    targets = task.targets(trial.labels)
    if targets is None or trial.loss is None:
        assert trial.loss is None
        return trial.logits.new_zeros(())
    logits = task.select(trial.logits, trial.labels).to(trial.loss.dtype)
    return F.cross_entropy(logits, targets, ignore_index=IGNORED)


class FusedForward:
    """One forward of the student in which the terms over the vocabulary are computed.

    Args:
        head: the student's output head.
        blending: has the divergence.
        task: selects rows and targets.
        batch: the prepared micro-batch.
        step: the optimizer step.
        teacher: the teacher's signals, or None for the labels alone.
        smoothing: label smoothing of the labels' term.
    """

    def __init__(
        self,
        head: OutputHead,
        blending: Blend,
        task: Task,
        batch: Batch,
        step: Step,
        *,
        teacher: Signals | None,
        smoothing: float,
    ) -> None:
        self.teacher = teacher
        self.terms: FusedTerms | None = None
        self._head, self._blending, self._task, self._batch = head, blending, task, batch
        self._step, self._smoothing = step, smoothing

    def replacing_head(self) -> AbstractContextManager[None]:
        """Return the context of the student's forward; afterwards `terms` holds the terms."""
        return self._head.replaced(self._compute)

    def tie(self, outputs: Outputs) -> None:
        """Let the backward pass through the output too: DDP with a static graph and FSDP have their hooks on it."""
        assert self.terms is not None  # the trial saw the head called
        self.terms = replace(self.terms, loss=tied(self.terms.loss, [outputs["logits"]]))

    def _compute(self, ours: DeferredLogits) -> Tensor:
        step, task, batch, teacher = self._step, self._task, self._batch, self.teacher
        match, name = self._blending.logits_match, self._blending.logits_match.name_for(task)
        wants_target = teacher is not None and PROPERTIES[name].wants_target
        targets = task.targets(batch) if LABELS in step.weights or wants_target else None
        selected = rows_of(ours.hidden, task, batch, whose="student")
        check_same_rows(selected, selected, task, batch, columns=False)
        rows, weights = self._rows(selected, targets)
        shared = None if teacher is None else teacher.alignment.student
        found = fused_linear_distillation(
            selected.index_select(0, rows),
            _head(ours),
            teacher=None if teacher is None else self._teacher_rows(teacher, rows),
            terms=Terms(
                divergence=name,
                settings=match.divergence_kwargs,
                temperature=step.temperature,
                labels_factor=self._factor(LABELS, step.weights.get(LABELS, 0.0)),
                divergence_factor=self._factor(LOGITS, step.weights.get(LOGITS, 0.0)),
                columns=None if isinstance(shared, tuple) else shared,
            ),
            labels=None if targets is None else Labels(targets[rows], smoothing=self._smoothing),
            row_weights=weights,
        )
        terms = {}
        if LABELS in step.weights:
            terms[LABELS] = found.labels_total * self._factor(LABELS, 1.0)
        if teacher is not None:
            power = PROPERTIES[name].temperature_power
            terms[LOGITS] = found.divergence_total * step.temperature**power * self._factor(LOGITS, 1.0)
        self.terms = FusedTerms(found.loss, terms)
        return found.loss

    def _factor(self, term: str, weight: float) -> Tensor | float:
        """Return the factor of a total: its weight over the step's denominator."""
        if weight == 0:
            return 0.0
        return weight * self._step.scale / self._step.denominators[term].clamp(min=1)

    def _rows(self, selected: Tensor, targets: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Return the indices `[m]` of the rows that any term needs, and their weights in the divergence (None: all 1).

        A row may count for the labels only: the first token of a left-padded causal sequence is predicted from nothing.
        """
        kept = self._task.keep(self._batch)
        assert kept is not None  # every task over a vocabulary sets it
        check_keep(kept, selected, self._task)
        if targets is None or self.teacher is None:
            looked_at = kept if targets is None else targets != IGNORED
            return looked_at.nonzero().squeeze(-1), None
        rows = (kept | (targets != IGNORED)).nonzero().squeeze(-1)
        compared = kept[rows]
        return rows, None if bool(compared.all()) else compared.float()

    def _teacher_rows(self, teacher: Signals, rows: Tensor) -> TeacherHidden | TeacherLogits | TeacherSparse:
        task, batch, temperature = self._task, self._batch, self._step.temperature

        def of_rows(x: Tensor, *, columns: bool = True) -> Tensor:
            selected = rows_of(x, task, batch, whose="teacher", columns=columns)
            check_same_rows(selected, selected, task, batch, columns=False)
            return selected.index_select(0, rows)

        if teacher.deferred is not None:
            return TeacherHidden(of_rows(teacher.deferred.hidden), _head(teacher.deferred))
        if teacher.sparse is None:
            return TeacherLogits(of_rows(teacher.predictions()))
        sparse = teacher.sparse
        self._blending.logits_match.check_sparse(task, sparse, temperature)
        # Log-probabilities are logits that are softened already: multiply by T, since they will be divided by it.
        return TeacherSparse(
            of_rows(sparse.ids),
            of_rows(sparse.log_probabilities) * temperature,
            of_rows(sparse.log_tail, columns=False),
            None if sparse.weights is None else of_rows(sparse.weights),
        )


def _head(deferred: DeferredLogits) -> Head:
    return Head(deferred.weight, deferred.bias, deferred.logit_scale, deferred.softcap, deferred.dtype)
