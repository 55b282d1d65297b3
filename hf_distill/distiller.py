"""Distiller: one batch, two models, one loss whose denominators are those of the whole optimizer step.

Works in any training loop. It knows no Trainer; what it learns of processes comes from Accelerate.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hf_distill._compat import gathered_sum
from hf_distill.counts import Counts, scale_of
from hf_distill.errors import DataError, SettingError
from hf_distill.functional import Divergence
from hf_distill.objectives import LabelsTerm, LogitsMatch, Objective
from hf_distill.schedules import PROGRESS, Schedule, checked_schedule
from hf_distill.signals import Signals
from hf_distill.tasks import Batch, Task, make_task
from hf_distill.tasks.base import TEACHER_PREFIX, first_tensor
from hf_distill.tasks.infer import forward_names, unwrapped
from hf_distill.teachers import Teacher, as_teacher
from hf_distill.vocabulary import Columns
from hf_distill.watch import TeacherWatch

LABELS = "labels"
LOGITS = "logits"


@dataclass(frozen=True)
class DistillerOutput:
    """One micro-batch's part of the optimizer step's loss.

    Attributes:
        loss: scalar with a graph: call backward on it, once a micro-batch, without dividing it.
        terms: each term before its weight, detached; `loss = (1 - alpha) * labels + alpha * logits`.
        outputs: what the student's forward returned.
    """

    loss: Tensor
    terms: dict[str, Tensor]
    outputs: Any


class Distiller:
    """Blends the student's own loss on labels with its agreement with a teacher.

    `loss = (1 - alpha) * labels + alpha * T^p * divergence`, each term a mean over the optimizer step.

    Args:
        student: the model to train, before Accelerate or DDP wrap it.
        teacher_model: a model, a folder or Hub id, or a `Teacher`; may be None where alpha is 0.
        temperature: above 0, or a schedule. alpha: weight of the teacher's term in [0, 1], or a schedule.
        divergence: name in `DIVERGENCES` or a function; None: the task's own (forward_kl, or mean_squared_error on
        values).
        divergence_kwargs: its settings.
        task: name in `TASKS` or a Task; None: found from the student's class.
        processing_class: the student's tokenizer or processor, to compare with the teacher's.

    Raises:
        SettingError, TeacherError: see the messages; nothing is changed then.

    >>> from transformers import BertConfig, BertForSequenceClassification as Bert
    >>> config = BertConfig(vocab_size=9, hidden_size=4, num_hidden_layers=1, num_attention_heads=1)
    >>> student, teacher = Bert(config), Bert(config)
    >>> distiller = Distiller(student, teacher, temperature=2.0, alpha=0.5)
    >>> batch = {"input_ids": torch.tensor([[1, 2]]), "labels": torch.tensor([0])}
    >>> sorted(distiller(student, batch).terms)
    ['labels', 'logits']
    """

    def __init__(
        self,
        student: nn.Module,
        teacher_model: Any = None,
        *,
        temperature: float | Schedule = 2.0,
        alpha: float | Schedule = 0.5,
        divergence: str | Divergence | None = None,
        divergence_kwargs: Mapping[str, Any] | None = None,
        task: Task | str | None = None,
        processing_class: Any = None,
    ) -> None:
        self._given_task = task
        self._processor = processing_class
        self._labels_term = LabelsTerm()
        self._watch = TeacherWatch(lambda batch: self.teacher_signals(batch).logits)
        self.objectives: dict[str, Objective] = {}
        self.set_blend(
            temperature=temperature,
            alpha=alpha,
            divergence=divergence,
            divergence_kwargs=divergence_kwargs,
        )
        kind = make_task(student, task).kind
        self.teacher: Teacher | None = None if teacher_model is None else as_teacher(teacher_model, kind)
        self.fit(student)

    def set_blend(
        self,
        *,
        temperature: float | Schedule = 2.0,
        alpha: float | Schedule = 0.5,
        divergence: str | Divergence | None = None,
        divergence_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        """Choose the weights and the divergence anew (a hyperparameter search does, between trials).

        Raises:
            SettingError: a value that cannot be.
        """
        softening = checked_schedule("temperature", temperature)
        self.alpha = checked_schedule("alpha", alpha)
        self.objectives[LOGITS] = LogitsMatch(divergence, settings=divergence_kwargs, temperature=softening)

    @property
    def logits_match(self) -> LogitsMatch:
        objective = self.objectives[LOGITS]
        assert isinstance(objective, LogitsMatch)
        return objective

    def fit(self, student: nn.Module) -> None:
        """Learn where this student keeps its predictions and check that the teacher can teach it.

        Raises:
            SettingError, TeacherError: it is left as it was before.
        """
        task = make_task(student, self._given_task)
        self.logits_match.divergence_for(task)
        if self.teacher is None:
            if any(self.alpha(p) > 0 for p in PROGRESS):
                raise SettingError(
                    f"alpha is {self.alpha(0.0):g} but there is no teacher. Pass teacher_model= (a model, a folder or "
                    "a Hub id), or alpha=0 to train without one."
                )
        else:
            self.teacher.fit(student, task, student_processor=self._processor)
        self.task = task
        self._student = unwrapped(student)
        self._student_names = forward_names(student)
        theirs = self.teacher.inputs if self.teacher is not None and self._student_names else ()
        self._teacher_only = set(theirs) - set(self._student_names)

    def place(self, accelerator: Any) -> None:
        """Bring the teacher to where the batches are."""
        if self.teacher is not None:
            self.teacher.place(accelerator)

    def after_step(self, student: nn.Module) -> None:
        """Tell the teacher that the optimizer has made a step: one that is an average of students moves."""
        if self.teacher is not None:
            self.teacher.after_step(student)

    def needs_labels(self) -> bool:
        """Whether any moment of the training uses labels."""
        return any(self.alpha(p) < 1 for p in PROGRESS)

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
        terms = self._terms_of(micro_batches[0], progress)
        device = first_tensor(micro_batches[0]).device if accelerator is None else accelerator.device
        sums = []
        for term in terms:
            source = self._labels_term if term == LABELS else self.objectives[term]
            counted = [source.count(self.task, batch).to(device) for batch in micro_batches]
            sums.append(torch.stack(counted).sum())
        if LABELS in terms:
            for batch in micro_batches:
                self.task.check_labels(batch)
        vector = gathered_sum(torch.stack(sums), accelerator) / same_batch
        if self.task.sums_over_examples:
            vector = torch.ones_like(vector)
        self._watch.begin_step(len(micro_batches))
        return Counts(dict(zip(terms, vector.unbind(), strict=True)), scale_of(accelerator, same_batch))

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
        batch = self.prepare(batch) if self.alpha(progress) > 0 else batch
        with_labels = self.alpha(progress) < 1
        inputs = self.student_inputs(batch, labels=with_labels)
        if "use_cache" in self._student_names:  # as the teacher: with a cache, packed sequences see each other
            inputs.setdefault("use_cache", False)
        outputs = student(**inputs)
        mean = outputs["loss"] if with_labels else None
        return self.blend(outputs, batch, counts, labels_mean=mean, progress=progress)

    def prepare(self, batch: Batch) -> dict[str, Any]:
        """The batch with what both models must be given alike: decoder inputs, made by the student's rule."""
        return self.task.prepare(dict(batch), self._student)

    def student_inputs(self, batch: Batch, *, labels: bool = True) -> dict[str, Any]:
        """What the student is called with: nothing of the teacher's, and labels only where they are used."""
        batch = batch if labels else self.task.without_labels(batch)
        return {
            name: value
            for name, value in batch.items()
            if not name.startswith(TEACHER_PREFIX) and name not in self._teacher_only
        }

    def blend(
        self,
        outputs: Any,
        batch: Batch,
        counts: Counts,
        *,
        labels_mean: Tensor | None,
        progress: float = 0.0,
    ) -> DistillerOutput:
        """The loss, from the student's outputs and its own mean loss over this micro-batch.

        Args:
            labels_mean: None where alpha is 1.
        """
        alpha = self.alpha(progress)
        terms, loss = {}, None
        if labels_mean is not None:
            terms[LABELS] = self._labels_part(labels_mean, batch, counts) * counts.scale
            loss = terms[LABELS] if alpha == 0 else (1 - alpha) * terms[LABELS]
        if alpha > 0:
            totals = []
            student, teacher = self.student_signals(outputs, batch), self.teacher_signals(batch)
            for name, objective in self.objectives.items():
                found = objective(student, teacher, self.task, batch, progress=progress)
                totals.append(found.value)
                terms[name] = found.over(counts.denominators[name]) * counts.scale
                loss = alpha * terms[name] if loss is None else loss + alpha * terms[name]
            self._watch.look(self.task, batch, torch.stack(totals).sum())
        assert loss is not None  # alpha lies in [0, 1], so one of the two terms is there
        return DistillerOutput(loss, {name: t.detach() for name, t in terms.items()}, outputs)

    def student_signals(self, outputs: Any, batch: Batch) -> Signals:
        columns = Columns() if self.teacher is None else self.teacher.columns
        return Signals(logits=self.task.read(outputs, batch, columns, teacher=False), columns=columns)

    def teacher_signals(self, batch: Batch) -> Signals:
        assert self.teacher is not None  # `fit` refuses alpha > 0 without a teacher
        needs = self.logits_match.needs
        for objective in self.objectives.values():
            needs = needs | objective.needs
        return self.teacher(self.task, batch, needs)

    def _labels_part(self, mean: Tensor, batch: Batch, counts: Counts) -> Tensor:
        if self.task.sums_over_examples:
            return mean
        return self._labels_term(mean, self.task, batch).over(counts.denominators[LABELS])

    def _terms_of(self, batch: Batch, progress: float) -> list[str]:
        alpha = self.alpha(progress)
        terms = list(self.objectives) if alpha > 0 else []
        if alpha < 1:
            self.require_labels(batch)
            terms.insert(0, LABELS)
        return terms

    def require_labels(self, columns: Any) -> None:
        """Raise `DataError` where labels are needed and these columns hold none."""
        names = self.task.label_names
        if self.task.has_labels(columns):
            return
        raise DataError(
            f"alpha < 1 weighs labels, but there is no {' and '.join(names)} in {sorted(columns)}. Give the dataset "
            "labels, or pass alpha=1 to learn from the teacher alone."
        )
