"""A micro-batch: the student's forward, the teacher's, and the loss; and the counts of a step of them.

What is set up before is in `distiller.py`.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from hf_distill._compat import gathered_sum
from hf_distill.blend import LABELS, LOGITS, SETTING_ALIASES, Blend, DistillerOutput, labels_part
from hf_distill.counts import Counts, scale_of
from hf_distill.errors import SettingError, check_keywords
from hf_distill.inside.packing import PackingCheck
from hf_distill.inside.padding import PaddingCheck
from hf_distill.inside.recorder import Inside
from hf_distill.label_agreement import LabelAgreement
from hf_distill.learned import Learned
from hf_distill.objectives.labels import cross_entropy_of_probabilities
from hf_distill.signals import Needs, Read, Signals
from hf_distill.tasks import Batch, Task
from hf_distill.tasks.base import TEACHER_PREFIX, first_tensor, own_copies, reading_outputs_of
from hf_distill.teachers import Teacher
from hf_distill.unused_outputs import parameters_of, several_processes, tied
from hf_distill.vocabulary import Columns
from hf_distill.watch import FiniteCheck, MicroBatch
from hf_distill.without_logits import Forward, WithoutLogits

logger = logging.getLogger(__name__)


class OneBatch:
    """What a `Distiller` does with a micro-batch."""

    blending: Blend
    task: Task
    teacher: Teacher | None
    reached: set[int]
    _student: nn.Module
    _whole_student: nn.Module  # with what PEFT puts around it: the vectors of prompt tuning are no part of the base
    _student_names: tuple[str, ...]
    _teacher_only: set[str]
    _label_aliases: dict[str, str]
    _inside: Inside
    finite_check: FiniteCheck
    label_agreement: LabelAgreement
    _without_logits: WithoutLogits
    _check_packing: PackingCheck
    check_padding: PaddingCheck
    learned: Learned
    _found_trainable: bool = False
    _config_is_written: bool

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
            SettingError: the student has no trainable parameter.
        """
        micro_batches = [self.with_task_labels(batch) for batch in micro_batches]
        if self.asks_teacher(progress):
            self._write_config(micro_batches[0])
        device = first_tensor(micro_batches[0]).device if accelerator is None else accelerator.device
        self._refuse_frozen_student()
        self._check_packing(micro_batches, self.task, self.teacher, self.blending.needs(progress)[1])
        if self.asks_teacher(progress):
            self.check_padding(micro_batches, self.teacher, accelerator)
        terms, sums = self.blending.count(self.task, micro_batches, device, progress)
        vector = gathered_sum(sums, accelerator) / same_batch
        if self.task.sums_over_examples and {LABELS, LOGITS} & set(terms):
            vector = torch.ones_like(vector)
        self.finite_check.begin_step(len(micro_batches), accelerator)
        self.label_agreement.warn_if_chance(accelerator)
        return Counts(dict(zip(terms, vector.unbind(), strict=True)), scale_of(accelerator, same_batch))

    def _refuse_frozen_student(self) -> None:
        """Look once, before the first step that is to train something."""
        if self._found_trainable or not torch.is_grad_enabled():
            return
        parameters = chain(self._whole_student.parameters(), self.learned.parameters())
        self._found_trainable = any(parameter.requires_grad for parameter in parameters)
        if not self._found_trainable:
            raise SettingError(
                f"the student ({type(self._student).__name__}) has no trainable parameter, so there is nothing to "
                "train. A model that was a teacher has been frozen in place, and so has a copy of it. Call "
                "student.requires_grad_(True) before training it, or load it again."
            )

    def _write_config(self, batch: Batch) -> None:
        """Let the student's config say what it is trained as, once, when the training begins: it is saved with it."""
        config = getattr(self._student, "config", None)
        if self._config_is_written or config is None:
            return
        self._config_is_written = True
        before = _told_by(config)
        self.task.write_to(config, batch)
        written = {name: value for name, value in _told_by(config).items() if value != before[name]}
        if written:
            logger.info(f"Written to the student's config, as it is trained so: {written}.")

    def compares_nothing(self) -> bool:
        """Whether the loss is the labels' term alone, at every moment of the training."""
        return self.blending.labels_alone

    def has_other_label_names(self) -> bool:
        """Whether the student's forward calls its labels by other names than the task."""
        return bool(self._label_aliases)

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

        Raises:
            HfDistillError: the loss is not finite (see `FiniteCheck`).
        """
        counts = counts or self.count([batch], progress=progress)
        batch = self.with_task_labels(batch)
        batch = self.prepare(batch) if self.asks_teacher(progress) else batch
        found = self.without_logits(student, batch, counts, progress=progress)
        if found is not None:
            return found
        with_labels = self.blending.labels_weight(progress) > 0
        if with_labels:
            refuse_head_for_a_teacher(self._student)
        is_soft = with_labels and self.task.has_probabilities(batch)
        inputs = self.student_inputs(batch, labels=with_labels and not is_soft)
        with self.reading(progress) as inside:
            outputs = student(**self.uncached(inputs))
        if is_soft:
            mean: Tensor | None = cross_entropy_of_probabilities(outputs["logits"], batch["labels"])
        else:
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
        """What the student is called with: nothing of the teacher's, and labels only where they are used.

        Features and labels are its own copies: what it writes into them changes neither the batch nor what the teacher
        reads.
        """
        aliases = self._label_aliases
        removed = self._teacher_only | (aliases.keys() - set(self._student_names))
        if not labels:
            batch, removed = self.task.without_labels(batch), removed | set(aliases.values())
        inputs = {
            name: value
            for name, value in batch.items()
            if name not in removed and (not name.startswith(TEACHER_PREFIX) or name in self._student_names)
        }
        return own_copies(inputs, self.task.label_names)

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
            student, teacher = self.student_signals(outputs, batch, ours, inside), self.teacher_signals(batch, theirs)
            self.label_agreement.add(self.task, batch, student, teacher)
            return student, teacher

        labels = None if labels_mean is None else labels_part(labels_mean, self.task, batch, counts, progress)
        loss, terms = self.blending.total(labels, ask, self.task, batch, counts, progress, made=made)
        terms = {name: term.detach() for name, term in terms.items()}
        seen = MicroBatch(
            self.task,
            batch,
            loss.detach(),
            terms,
            self._student,
            self.uncached(self.student_inputs(batch, labels=LABELS in terms)),
            teacher=None if terms.keys() <= {LABELS} else lambda suspect: self.teacher_signals(suspect, theirs),
        )
        loss = self.finite_check.add(loss, seen)
        if labels is None and not ours.logits and several_processes():
            self.reached |= parameters_of(loss)
            loss = tied(loss, outputs)
        hear = getattr(self.teacher, "hear", None)
        if hear is not None and torch.is_grad_enabled():
            hear(self.blending.lesson(self.student_signals(outputs, batch), self.task, batch, counts, progress))
        return DistillerOutput(loss, terms, outputs)

    def student_signals(
        self, outputs: Any, batch: Batch, needs: Needs | None = None, inside: Mapping[Read, Any] | None = None
    ) -> Signals:
        columns, logits = Columns() if self.teacher is None else self.teacher.columns, None
        if needs is None or needs.logits:
            with reading_outputs_of(self._student, "student"):
                logits = self.task.read(outputs, batch, columns, teacher=False)
        return Signals(logits=logits, columns=columns, inside=inside or {})

    def teacher_signals(self, batch: Batch, needs: Needs | None = None) -> Signals:
        """Args: needs: None: its predictions, as the end of the training would soften them."""
        if needs is not None and not (needs.logits or needs.reads):  # what is active asks the student alone
            return Signals(None)
        assert self.teacher is not None  # `fit` refuses to ask one that is not there
        needs = needs or Needs(logits=True, temperature=self.blending.logits_match.temperature(1.0))
        return self.teacher(self.task, batch, needs)


def refuse_head_for_a_teacher(student: Any) -> None:
    """Refuse labels for a class that has one head for labels and one for a teacher, and no loss (DeiT, LeViT).

    Raises:
        SettingError: it is such a class.
    """
    name = type(student).__name__
    if not name.endswith("WithTeacher"):
        return
    raise SettingError(
        f"{name} has a head for labels and a head for a teacher, and transformers made it for inference: its forward "
        f"takes no labels and has no loss. Train {name.removesuffix('WithTeacher')} instead, whose one head "
        "learns from both; or pass alpha=1, and the mean of both heads learns from the teacher."
    )


def _told_by(config: Any) -> dict[str, Any]:
    """What `Task.write_to` may write."""
    return {name: getattr(config, name, None) for name in ("problem_type", "id2label", "label2id")}
