"""Distiller: one batch, two models, one loss whose denominators are those of the whole optimizer step.

Works in any training loop. It knows no Trainer; what it learns of processes comes from Accelerate.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from hf_distill._compat import gathered_sum
from hf_distill.blend import LABELS, LOGITS, Blend, DistillerOutput, Objectives, labels_part
from hf_distill.counts import Counts, scale_of
from hf_distill.functional import Divergence
from hf_distill.inside.packing import PackingCheck
from hf_distill.inside.recorder import Inside
from hf_distill.learned import Learned
from hf_distill.objectives import LogitsMatch, Objective
from hf_distill.schedules import PROGRESS, Schedule
from hf_distill.signals import Needs, Read, Signals
from hf_distill.tasks import Batch, Task, make_task
from hf_distill.tasks.base import TEACHER_PREFIX, first_tensor
from hf_distill.tasks.infer import forward_names, unwrapped
from hf_distill.teachers import Teacher, as_teacher
from hf_distill.unused_outputs import parameters_of, several_processes, tied
from hf_distill.vocabulary import Columns
from hf_distill.watch import TeacherWatch


class Distiller:
    """Blends the student's own loss on labels with its agreement with a teacher.

    `loss = (1 - alpha) * labels + alpha * T^p * divergence + Σ weight * objective`, each term a mean over the optimizer
    step.

    Args:
        student: the model to train, before Accelerate or DDP wrap it.
        teacher_model: a model, a folder or Hub id, or a `Teacher`; may be None where alpha is 0 and no objective asks.
        temperature: above 0, or a schedule. alpha: weight of the teacher's term in [0, 1], or a schedule; None: neither
        labels nor logits, the objectives alone.
        divergence: name in `DIVERGENCES` or a function; None: the task's own (forward_kl, or mean_squared_error on
        values).
        divergence_kwargs: its settings.
        task: name in `TASKS` or a Task; None: found from the student's class.
        processing_class: the student's tokenizer or processor, to compare with the teacher's.
        objectives: one or more of `hf_distill.objectives`, beside the logits. seed: of what they learn (projections);
        None: torch's own. compare_predictions: demand a teacher whose predictions can be compared, even where no term
        does so (an evaluation may).

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
        alpha: float | Schedule | None = 0.5,
        divergence: str | Divergence | None = None,
        divergence_kwargs: Mapping[str, Any] | None = None,
        task: Task | str | None = None,
        processing_class: Any = None,
        objectives: Objectives = None,
        seed: int | None = None,
        compare_predictions: bool = False,
    ) -> None:
        self._given_task = task
        self._processor = processing_class
        self._compares_anyway = compare_predictions
        self._seed = torch.initial_seed() % 2**32 if seed is None else seed
        self._watch = TeacherWatch()
        self.blending = Blend(objectives)
        self.learned = Learned()
        self.reached: set[int] = set()  # see `unused_outputs`
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
        alpha: float | Schedule | None = 0.5,
        divergence: str | Divergence | None = None,
        divergence_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        """Choose alpha and the divergence anew (a hyperparameter search does, between trials).

        Raises:
            SettingError: a value that cannot be.
        """
        self.blending.set(
            temperature=temperature, alpha=alpha, divergence=divergence, divergence_kwargs=divergence_kwargs
        )

    @property
    def objectives(self) -> dict[str, Objective]:
        """By the name of their term, the logits' first."""
        return self.blending.objectives

    @property
    def logits_match(self) -> LogitsMatch:
        return self.blending.logits_match

    def fit(self, student: nn.Module) -> None:
        """Learn where this student keeps its predictions and check that the teacher can teach it.

        Raises:
            SettingError, TeacherError: the student is as it was.
        """
        task, inside = make_task(student, self._given_task), Inside(student, "student")
        self.logits_match.divergence_for(task)
        asked = self.blending.ever_active()
        if self.teacher is not None:
            self.teacher.fit(
                student,
                task,
                student_processor=self._processor,
                compares_predictions=LOGITS in asked or not asked or self._compares_anyway,
                same_inputs=self.blending.compares_positions(),
            )
        elif asked:
            self.blending.refuse_without_teacher()
        if self.teacher is not None and hasattr(self.teacher, "check_needs"):
            for moment in PROGRESS:
                self.teacher.check_needs(self.blending.needs(moment)[1])
        theirs = getattr(self.teacher, "inside", None)
        for name in asked:
            self.objectives[name].fit(inside, theirs, task, model=unwrapped(student), seed=self._seed)
        self.learned.hold(self.blending.learned())
        self.task = task
        self._student, self._inside = unwrapped(student), inside
        self._check_packing = PackingCheck(self._student)
        self._student_names = forward_names(student)
        read = self.teacher.inputs if self.teacher is not None and self._student_names else ()
        self._teacher_only = set(read) - set(self._student_names)

    def is_for(self, student: nn.Module) -> bool:
        """Whether `fit` has seen this student."""
        return self._student is unwrapped(student)

    def place(self, accelerator: Any) -> None:
        """Bring the teacher, and what is learned beside the student, to where the batches are."""
        if self.teacher is not None:
            self.teacher.place(accelerator)
        self.learned.place(accelerator)

    def after_step(self, student: nn.Module) -> None:
        """Tell the teacher that the optimizer has made a step: one that is an average of students moves."""
        if self.teacher is not None:
            self.teacher.after_step(student)

    def needs_labels(self) -> bool:
        """Whether any moment of the training uses labels."""
        return self.blending.uses_labels()

    def asks_teacher(self, progress: float = 0.0) -> bool:
        """Whether the teacher is asked at this moment of the training."""
        return bool(self.blending.active(progress))

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
        device = first_tensor(micro_batches[0]).device if accelerator is None else accelerator.device
        self._check_packing(micro_batches[0], self.task, self.teacher, self.blending.needs(progress)[1])
        terms, sums = self.blending.count(self.task, micro_batches, device, progress)
        vector = gathered_sum(sums, accelerator) / same_batch
        if self.task.sums_over_examples and {LABELS, LOGITS} & set(terms):
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
        batch = self.prepare(batch) if self.asks_teacher(progress) else batch
        with_labels = self.blending.labels_weight(progress) > 0
        inputs = self.student_inputs(batch, labels=with_labels)
        if "use_cache" in self._student_names:  # as the teacher: with a cache, packed sequences see each other
            inputs.setdefault("use_cache", False)
        with self.reading(progress) as inside:
            outputs = student(**inputs)
        mean = outputs["loss"] if with_labels else None
        return self.blend(outputs, batch, counts, labels_mean=mean, progress=progress, inside=inside)

    def reading(self, progress: float = 0.0) -> AbstractContextManager[Mapping[Read, Any]]:
        """Around the student's forward: gives what the objectives need of its inside, to be passed to `blend`."""
        return self._inside.reading(self.blending.needs(progress)[0].reads)

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
        inside: Mapping[Read, Any] | None = None,
    ) -> DistillerOutput:
        """The loss, from the student's outputs and its own mean loss over this micro-batch.

        Args:
            labels_mean: None where labels weigh nothing. inside: from `reading`.
        """
        ours, theirs = self.blending.needs(progress)

        def ask() -> tuple[Signals, Signals]:
            return self.student_signals(outputs, batch, ours, inside), self.teacher_signals(batch, theirs)

        labels = None if labels_mean is None else labels_part(labels_mean, self.task, batch, counts)
        loss, terms, compared = self.blending.total(labels, ask, self.task, batch, counts, progress)
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
        needs = needs or Needs(logits=True, temperature=self.logits_match.temperature(1.0))
        return self.teacher(self.task, batch, needs)
