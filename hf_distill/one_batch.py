"""A micro-batch: the student's forward, the teacher's, and the loss; and the counts of a step of them.

What is set up before is in `distiller.py`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from hf_distill._compat import gathered_sum
from hf_distill.blend import LABELS, LOGITS, SETTING_ALIASES, Blend, DistillerOutput, labels_part
from hf_distill.counts import Counts, scale_of
from hf_distill.errors import check_keywords
from hf_distill.inside.packing import PackingCheck
from hf_distill.inside.recorder import Inside
from hf_distill.signals import Needs, Read, Signals
from hf_distill.tasks import Batch, Task
from hf_distill.tasks.base import TEACHER_PREFIX, first_tensor
from hf_distill.teachers import Teacher
from hf_distill.unused_outputs import parameters_of, several_processes, tied
from hf_distill.vocabulary import Columns
from hf_distill.watch import TeacherWatch
from hf_distill.without_logits import Forward, WithoutLogits


class OneBatch:
    """What a `Distiller` does with a micro-batch."""

    blending: Blend
    task: Task
    teacher: Teacher | None
    reached: set[int]
    _student: nn.Module
    _student_names: tuple[str, ...]
    _teacher_only: set[str]
    _label_aliases: dict[str, str]
    _inside: Inside
    _watch: TeacherWatch
    _without_logits: WithoutLogits
    _check_packing: PackingCheck

    if not TYPE_CHECKING:  # type checkers and editors read the signature of __init__

        def __new__(cls, *positional: Any, **keywords: Any) -> Any:
            """Raises TypeError for a keyword that does not exist, with the nearest one."""
            also = {**SETTING_ALIASES, "teacher": "teacher_model", "tokenizer": "processing_class"}
            check_keywords(cls.__init__, keywords, called=cls.__name__, also=also)
            return super().__new__(cls)

    def count(
        self,
        micro_batches: Sequence[Batch],
        accelerator: Any = None,
        *,
        progress: float = 0.0,
        same_batch: int = 1,
    ) -> Counts:
        """The denominators of the optimizer step that these micro-batches make. Call it once a step, on every process.

        Args:
            micro_batches: all of this process's, before the first forward.
            accelerator: None where there is one process and no accumulation in Accelerate.
            same_batch: how many processes see the same batch (tensor parallelism).

        Raises:
            DataError: a label is needed and missing, or is one that the head cannot take.
        """
        micro_batches = [self.with_task_labels(batch) for batch in micro_batches]
        device = first_tensor(micro_batches[0]).device if accelerator is None else accelerator.device
        self._check_packing(micro_batches, self.task, self.teacher, self.blending.needs(progress)[1])
        terms, sums = self.blending.count(self.task, micro_batches, device, progress)
        vector = gathered_sum(sums, accelerator) / same_batch
        if self.task.sums_over_examples and {LABELS, LOGITS} & set(terms):
            vector = torch.ones_like(vector)
        self._watch.begin_step(len(micro_batches))
        return Counts(dict(zip(terms, vector.unbind(), strict=True)), scale_of(accelerator, same_batch))

    def compares_nothing(self) -> bool:
        """Whether the loss is the labels' term alone, at every moment of the training."""
        return self.blending.labels_alone

    def with_task_labels(self, batch: Batch) -> Batch:
        """The batch with its labels under the names that the task reads, beside the names that the student reads."""
        aliases = self._label_aliases
        if not aliases or self.task.has_labels(batch) or any(batch.get(own) is None for own in aliases.values()):
            return batch
        return {**batch, **{name: batch[own] for name, own in aliases.items()}}

    def finds_labels(self, batch: Batch) -> bool:
        """Whether the task can count this batch's labels."""
        batch = self.with_task_labels(batch)
        found = [batch[name] for name in self.task.label_names if batch.get(name) is not None]
        return self.task.has_labels(batch) and all(isinstance(labels, Tensor) for labels in found)

    def asks_teacher(self, progress: float = 0.0) -> bool:
        """Whether the teacher is asked at this moment of the training."""
        return bool(self.blending.active(progress))

    def __call__(
        self,
        student: nn.Module,
        batch: Batch,
        *,
        counts: Counts | None = None,
        progress: float = 0.0,
    ) -> DistillerOutput:
        """The student's forward, the teacher's, and the loss of this micro-batch.

        Args:
            student: the model as the loop calls it (wrapped, if it is).
            batch: the student's inputs, labels, and `teacher_*` columns.
            counts: from `count`; None: this batch is a whole step of one process.
            progress: how much of the training is done, 0 → 1, for schedules.
        """
        counts = counts or self.count([batch], progress=progress)
        batch = self.with_task_labels(batch)
        batch = self.prepare(batch) if self.asks_teacher(progress) else batch
        found = self.without_logits(student, batch, counts, progress=progress)
        if found is not None:
            return found
        with_labels = self.blending.labels_weight(progress) > 0
        inputs = self.student_inputs(batch, labels=with_labels)
        with self.reading(progress) as inside:
            outputs = student(**self.uncached(inputs))
        mean = outputs["loss"] if with_labels else None
        return self.blend(outputs, batch, counts, labels_mean=mean, progress=progress, inside=inside)

    def without_logits(
        self,
        student: nn.Module,
        batch: Batch,
        counts: Counts,
        *,
        progress: float = 0.0,
        smoothing: float = 0.0,
        own_loss: bool = False,
    ) -> DistillerOutput | None:
        """As calling it, of a prepared batch, with logits never made whole; None where they must be.

        Args:
            smoothing: of the labels. own_loss: the labels' term is a function of the user's.

        Raises:
            SettingError: they must be, and `materialize_logits` is False.
        """
        batch = self.prepare(batch)
        forward = self._without_logits.forward(
            self, student, batch, counts, progress, smoothing=smoothing, own_loss=own_loss
        )
        if forward is None:
            return None
        with self.reading(progress) as inside, forward.taking_over():
            outputs = student(**self.uncached(self.student_inputs(batch, labels=False)))
        forward.tie(outputs)
        outputs = type(outputs)({name: value for name, value in outputs.items() if name != "logits"})
        return self.blend(outputs, batch, counts, labels_mean=None, progress=progress, inside=inside, forward=forward)

    def uncached(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """As the teacher: with a cache, packed sequences see each other."""
        return {"use_cache": False, **inputs} if "use_cache" in self._student_names else inputs

    def reading(self, progress: float = 0.0) -> AbstractContextManager[Mapping[Read, Any]]:
        """Around the student's forward: gives what the objectives need of its inside, to be passed to `blend`."""
        return self._inside.reading(self.blending.needs(progress)[0].reads)

    def prepare(self, batch: Batch) -> dict[str, Any]:
        """The batch with what both models must be given alike: decoder inputs, made by the student's rule."""
        return self.task.prepare(dict(batch), self._student)

    def student_inputs(self, batch: Batch, *, labels: bool = True) -> dict[str, Any]:
        """What the student is called with: nothing of the teacher's, and labels only where they are used."""
        aliases = self._label_aliases
        removed = self._teacher_only | (aliases.keys() - set(self._student_names))
        if not labels:
            batch, removed = self.task.without_labels(batch), removed | set(aliases.values())
        return {
            name: value
            for name, value in batch.items()
            if name not in removed and (not name.startswith(TEACHER_PREFIX) or name in self._student_names)
        }

    def blend(
        self,
        outputs: Any,
        batch: Batch,
        counts: Counts,
        *,
        labels_mean: Tensor | None,
        progress: float = 0.0,
        inside: Mapping[Read, Any] | None = None,
        forward: Forward | None = None,
    ) -> DistillerOutput:
        """The loss, from the student's outputs and its own mean loss over this micro-batch.

        Args:
            labels_mean: None where labels weigh nothing. inside: from `reading`. forward: what made terms already.
        """
        ours, theirs = self.blending.needs(progress)
        made = None if forward is None else forward.made

        def ask() -> tuple[Signals, Signals]:
            if forward is not None and forward.said is not None:
                return self.student_signals(outputs, batch, Needs(), inside), forward.said
            return self.student_signals(outputs, batch, ours, inside), self.teacher_signals(batch, theirs)

        labels = None if labels_mean is None else labels_part(labels_mean, self.task, batch, counts, progress)
        loss, terms, compared = self.blending.total(labels, ask, self.task, batch, counts, progress, made=made)
        if compared is not None:
            self._watch.look(self.task, batch, compared, lambda suspect: self.teacher_signals(suspect, theirs))
        if labels is None and not ours.logits and several_processes():
            self.reached |= parameters_of(loss)
            loss = tied(loss, outputs)
        hear = getattr(self.teacher, "hear", None)
        if hear is not None and torch.is_grad_enabled():
            hear(self.blending.lesson(self.student_signals(outputs, batch), self.task, batch, counts, progress))
        return DistillerOutput(loss, {name: t.detach() for name, t in terms.items()}, outputs)

    def student_signals(
        self, outputs: Any, batch: Batch, needs: Needs | None = None, inside: Mapping[Read, Any] | None = None
    ) -> Signals:
        columns, logits = Columns() if self.teacher is None else self.teacher.columns, None
        if needs is None or needs.logits:
            logits = self.task.read(outputs, batch, columns, teacher=False)
        return Signals(logits=logits, columns=columns, inside=inside or {})

    def teacher_signals(self, batch: Batch, needs: Needs | None = None) -> Signals:
        """Args: needs: None: its predictions, as the end of the training would soften them."""
        if needs is not None and not (needs.logits or needs.reads):  # what is active asks the student alone
            return Signals(None)
        assert self.teacher is not None  # `fit` refuses to ask one that is not there
        needs = needs or Needs(logits=True, temperature=self.blending.logits_match.temperature(1.0))
        return self.teacher(self.task, batch, needs)
