"""Predictions compared without making them whole: the labels' and the logits' terms from hidden rows and output heads.

Says when that can be, and why not; runs within the student's forward. The mathematics is `functional/fused_linear.py`.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from hf_distill.blend import LABELS, LOGITS, Blend, FusedTerms, denominator_of
from hf_distill.ddp import Counts, tied
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
from hf_distill.objectives.logits import refuse_other_keep, refuse_other_rows
from hf_distill.signals import DeferredLogits, Signals
from hf_distill.tasks import Batch, Task
from hf_distill.tasks.base import IGNORED, rows_of
from hf_distill.vocabulary import HeadAlignment

logger = logging.getLogger(__name__)
LARGE = 16_384  # columns; below it whole logits are no burden
LABEL_NAMES = ("labels", "shift_labels")


class FusedLoss:
    """Whether, and why not, logits of this student need not be made.

    Args:
        materialize: False: never make them, or say why they must be. None: not where the vocabulary is large and
            nothing needs them. True: always.

    Raises:
        SettingError: False, and something needs them.
    """

    def __init__(self, materialize: bool | None) -> None:
        if materialize not in (None, True, False):
            raise SettingError(f"materialize_logits={materialize!r}: allowed are None, True and False.")
        self.setting = materialize
        self._tried: str | None = None
        self._tried_with: bool | None = None  # labels; None: not tried yet

    def fit(self, student: Any) -> None:
        """Begin anew, with this student."""
        self.head = OutputHead(student)
        self._tried, self._tried_with = None, None

    def forward(
        self,
        distiller: Any,
        student: nn.Module,
        batch: Batch,
        counts: Counts,
        progress: float,
        *,
        smoothing: float,
        own_loss: bool,
    ) -> FusedForward | None:
        """What makes the terms of this micro-batch within the student's forward; None: whole logits are needed.

        Args: student: as the loop calls it. own_loss: the labels' term is not the head's, but a function of the user's.

        Raises:
            SettingError: they are needed, and `materialize_logits` is False.
        """
        if self.setting is True:
            return None
        blending, task, teacher = distiller.blending, distiller.task, distiller.teacher
        columns = HeadAlignment() if teacher is None else teacher.columns
        why = self._why_not(blending, task, columns, progress, own_loss=own_loss)
        if why is None and getattr(teacher, "hear", None) is not None:
            why = "the teacher learns from the student's logits"
        with_labels = blending.uses_labels()
        if why is None and (self._tried_with is None or with_labels > self._tried_with):
            inputs = distiller.uncached(distiller.student_inputs(batch, labels=False))
            why = self._try_out(student, task, batch, inputs, with_labels=with_labels)
        if why is not None:
            self._refuse(why)
            return None
        said = None
        if blending.weight(LOGITS, progress) > 0:
            said = distiller.teacher_signals(batch, replace(blending.needs(progress)[1], deferred=True))
        return FusedForward(self.head, blending, task, batch, counts, progress=progress, said=said, smoothing=smoothing)

    def _refuse(self, why: str) -> None:
        if self.setting is False:
            raise SettingError(f"materialize_logits=False: {why}. Pass materialize_logits=True, or None.")

    def _why_not(
        self, blending: Blend, task: Task, columns: HeadAlignment, progress: float, *, own_loss: bool
    ) -> str | None:
        active = blending.active(progress)
        others = [name for name in active if name != LOGITS]
        makes = [
            n for n in others if blending.objectives[n].needs.logits or blending.objectives[n].teacher_needs.logits
        ]
        match = blending.logits_match
        if not task.over_vocabulary:
            return f"a {task.kind} head has no vocabulary"
        if self.setting is None and self.head.columns < LARGE:
            return f"{self.head.columns} columns are no burden"
        if LOGITS not in active and (self.setting is None or blending.labels_weight(progress) == 0):
            return "the logits are compared in no term at this moment"
        if makes:
            return f"{', '.join(makes)} need whole logits"
        if LOGITS in active and (match.catalogued(task) is None or match.couples_examples):
            return f"divergence={match.name_for(task)!r} is a function of yours, or compares rows with each other"
        if own_loss and blending.labels_weight(progress) > 0:
            return "the labels' term is a function of yours (compute_loss_func, compute_loss), which reads logits"
        if any(isinstance(side, tuple) for side in (columns.student, columns.teacher)):
            return "columns of the two vocabularies are paired one by one"
        return self.head.refusal or self._tried

    def _try_out(
        self, student: nn.Module, task: Task, batch: Batch, inputs: Mapping[str, Any], *, with_labels: bool
    ) -> str | None:
        """Once: whether the student's own forward makes the same logits and loss; or why it cannot be taken over."""
        inputs = {name: value for name, value in inputs.items() if name not in LABEL_NAMES}
        labelled = {name: batch[name] for name in LABEL_NAMES if with_labels and batch.get(name) is not None}
        found = self.head.trial(inputs, labelled, wrapped=student)
        if isinstance(found, Trial) and not found.loss_is(_plain_loss(found, task)):
            found = "the model's own loss is more than the cross-entropy of its labels"
        self._tried_with = with_labels
        if isinstance(found, str):
            self._tried = found
            if self.setting is None:
                logger.warning(f"Logits over {self.head.columns} columns are made whole: {found}.")
        else:
            logger.info(f"Logits are not made: the loss over {self.head.columns} columns is made from hidden states.")
        return self._tried


def _plain_loss(trial: Trial, task: Task) -> Tensor:
    """Mean cross-entropy of the tried positions, in the precision of the model's own loss.

    Many heads sum their loss in bf16, where sixteen positions are up to a percent away from their mean in fp32.
    """
    targets = task.targets(trial.labels)
    if targets is None or trial.loss is None:
        assert trial.loss is None
        return trial.logits.new_zeros(())
    logits = task.select(trial.logits, trial.labels).to(trial.loss.dtype)
    return F.cross_entropy(logits, targets, ignore_index=IGNORED)


class FusedForward:
    """One forward of the student in which the terms over the vocabulary are made.

    Args:
        said: the teacher's signals; None: labels alone. smoothing: of the labels.
    """

    def __init__(
        self,
        head: OutputHead,
        blending: Blend,
        task: Task,
        batch: Batch,
        counts: Counts,
        *,
        progress: float,
        said: Signals | None,
        smoothing: float,
    ) -> None:
        self.said = said
        self.made: FusedTerms | None = None
        self._head, self._blending, self._task, self._batch = head, blending, task, batch
        self._counts, self._progress, self._smoothing = counts, progress, smoothing

    def taking_over(self) -> AbstractContextManager[None]:
        """Around the student's forward; afterwards `made` holds the terms."""
        return self._head.taken_over(self._work)

    def tie(self, outputs: Any) -> None:
        """Let the backward pass through the output too: DDP with a static graph and FSDP hang their hooks on it."""
        assert self.made is not None  # the trial saw the head called
        self.made = replace(self.made, loss=tied(self.made.loss, [outputs["logits"]]))

    def _work(self, ours: DeferredLogits) -> Tensor:
        blending, progress, task, batch, said = self._blending, self._progress, self._task, self._batch, self.said
        match, name = blending.logits_match, blending.logits_match.name_for(task)
        labels_weight, t = blending.labels_weight(progress), match.temperature(progress)
        wants_target = said is not None and PROPERTIES[name].wants_target
        targets = task.targets(batch) if labels_weight > 0 or wants_target else None
        selected = rows_of(ours.hidden, task, batch, whose="student")
        refuse_other_rows(selected, selected, task, batch, columns=False)
        rows, weights = self._rows(selected, targets)
        found = fused_linear_distillation(
            selected.index_select(0, rows),
            _head(ours),
            teacher=None if said is None else self._teacher(said, rows, t),
            terms=Terms(
                divergence=name,
                settings=match.settings,
                temperature=t,
                labels_factor=self._factor(LABELS, labels_weight),
                divergence_factor=self._factor(LOGITS, blending.weight(LOGITS, progress)),
                columns=None if said is None or isinstance(said.columns.student, tuple) else said.columns.student,
            ),
            labels=None if targets is None else Labels(targets[rows], smoothing=self._smoothing),
            row_weights=weights,
        )
        terms = {}
        if labels_weight > 0:
            terms[LABELS] = found.labels_total * self._factor(LABELS, 1.0)
        if said is not None:
            terms[LOGITS] = found.divergence_total * t ** PROPERTIES[name].temperature_power * self._factor(LOGITS, 1.0)
        self.made = FusedTerms(found.loss, terms)
        return found.loss

    def _factor(self, term: str, weight: float) -> Tensor | float:
        """What a total is multiplied by: its weight, over the step's denominator."""
        if weight == 0:
            return 0.0
        return weight * self._counts.scale / denominator_of(term, self._counts, self._progress).clamp(min=1)

    def _rows(self, selected: Tensor, targets: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """`[m]` which of the n rows are looked at, and the weight of each in the divergence; None: 1.

        A label may count where no comparison does (causal, left padding: the first token, predicted from nothing).
        """
        kept = self._task.keep(self._batch)
        assert kept is not None  # every task over a vocabulary says so
        refuse_other_keep(kept, selected, self._task)
        if targets is None or self.said is None:
            looked_at = kept if targets is None else targets != IGNORED
            return looked_at.nonzero().squeeze(-1), None
        rows = (kept | (targets != IGNORED)).nonzero().squeeze(-1)
        compared = kept[rows]
        return rows, None if bool(compared.all()) else compared.float()

    def _teacher(
        self, said: Signals, rows: Tensor, temperature: float
    ) -> TeacherHidden | TeacherLogits | TeacherSparse:
        task, batch = self._task, self._batch

        def of_rows(x: Tensor, *, columns: bool = True) -> Tensor:
            selected = rows_of(x, task, batch, whose="teacher", columns=columns)
            refuse_other_rows(selected, selected, task, batch, columns=False)
            return selected.index_select(0, rows)

        if said.deferred is not None:
            return TeacherHidden(of_rows(said.deferred.hidden), _head(said.deferred))
        if said.sparse is None:
            return TeacherLogits(of_rows(said.predictions()))
        listed = said.sparse
        self._blending.logits_match.refuse_for_sparse(task, listed, temperature)
        # Softened already, and log-probabilities are logits: times T, as they will be divided by it.
        return TeacherSparse(
            of_rows(listed.ids),
            of_rows(listed.log_probabilities) * temperature,
            of_rows(listed.log_tail, columns=False),
            None if listed.weights is None else of_rows(listed.weights),
        )


def _head(deferred: DeferredLogits) -> Head:
    return Head(deferred.weight, deferred.bias, deferred.logit_scale, deferred.softcap, deferred.dtype)
