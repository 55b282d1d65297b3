"""Distiller: the loss between a student and a teacher, for `Trainer` and for hand-written loops."""

from __future__ import annotations

import copy
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial, reduce
from itertools import chain
from operator import add
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel as DDP
from transformers import PreTrainedConfig

from hf_distill._types import Keywords, ProcessingClass
from hf_distill.blend import LABELS, LOGITS, SETTING_ALIASES, Blend, DistillerOutput, Objectives, Step
from hf_distill.ddp import forget_gradients_but, parameters_of, several_processes, tied
from hf_distill.errors import HfDistillError, SettingError, check_keywords
from hf_distill.finite import CheckAt, FiniteCheck, MicroBatch
from hf_distill.functional import Divergence
from hf_distill.functional.properties import DivergenceName
from hf_distill.fused_forward import FusedForward, FusedLoss
from hf_distill.label_agreement import LabelAgreement
from hf_distill.learned import Learned
from hf_distill.models.capture import ActivationCapture, Activations
from hf_distill.models.packing import PACKING_COLUMNS, PackingCheck
from hf_distill.models.padding import PaddingCheck
from hf_distill.objectives import LogitsMatch, Objective, ObjectiveSetup
from hf_distill.objectives.base import cross_entropy_of_probabilities
from hf_distill.schedules import PROGRESS, Schedule
from hf_distill.signals import Needs, Outputs, Signals
from hf_distill.tasks import Batch, Embedding, Task, make_task
from hf_distill.tasks.base import TEACHER_PREFIX, first_tensor, own_copies, reading_outputs_of
from hf_distill.tasks.infer import config_of, forward_names, unwrapped
from hf_distill.teachers import ModelTeacher, Teacher, TeacherSetup, as_teacher
from hf_distill.vocabulary import HeadAlignment

logger = logging.getLogger(__name__)

_NO_ACTIVATIONS = Activations([])
# Calls the student with labels: (model, inputs, whether outputs are wanted) → its mean loss, and its outputs or None.
LabelledForward = Callable[[nn.Module, Keywords, bool], tuple[Tensor, Outputs | None]]


class _ChecksKeywords:
    """A base class, so that `inspect.signature(Distiller)` is that of its `__init__`."""

    if not TYPE_CHECKING:

        def __new__(cls, *positional: Any, **keywords: Any) -> Any:
            """Raise TypeError for a keyword that does not exist, with the nearest one."""
            also = {**SETTING_ALIASES, "teacher": "teacher_model", "tokenizer": "processing_class"}
            check_keywords(cls.__init__, keywords, called=cls.__name__, also=also)
            return super().__new__(cls)


class Distiller(_ChecksKeywords):
    """Blends the student's own loss on labels with its agreement with a teacher.

    `loss = (1 - alpha) * labels + alpha * T^p * divergence + Σ weight * objective`, each term a mean over the optimizer
    step. A training loop calls `begin_step` with the micro-batches of an optimizer step, the distiller with each of
    them, and `end_step` after the optimizer.

    Args:
        student: the model to train, before Accelerate or DDP wrap it.
        teacher_model: a model, a folder, a Hub id or a `Teacher`; None if alpha is 0 and no objective needs a teacher.
        temperature: above 0, or a schedule.
        alpha: weight of the teacher's term in [0, 1], or a schedule; None means neither labels nor logits, the
            objectives alone.
        divergence: a name in `DIVERGENCES` or a function; None means the task's own (forward_kl, or mean_squared_error
            on values).
        divergence_kwargs: keyword arguments of the divergence.
        task: a name in `TASKS` or a Task; None means the task of the student's class.
        processing_class: the student's tokenizer or processor, to compare with the teacher's.
        objectives: one or more of `hf_distill.objectives`, beside the logits.
        seed: for what the objectives learn (projections); None means torch's generator.
        compare_predictions: whether the teacher's predictions must be comparable even if no term compares them (an
            evaluation may).
        fused_loss: whether to compute the terms without whole logits, which the outputs then lack: True always, False
            never, None if the vocabulary is large and nothing needs them. See `FusedLoss`.
        label_names: the names of the labels in the student's forward; None means the task's names.

    Attributes:
        task: reads predictions, rows and labels of a batch.
        teacher: the teacher, or None.
        learned: the parameters that the objectives learn.
        label_aliases: the student's name of each label of the task, if its forward has other names for them.

    Raises:
        SettingError: if a setting is not allowed, or does not go with student, teacher or task. Nothing is changed.
        TeacherError: if the teacher cannot teach this student.

    >>> from transformers import BertConfig, BertForSequenceClassification as Bert
    >>> config = BertConfig(vocab_size=9, hidden_size=4, num_hidden_layers=1, num_attention_heads=1)
    >>> student, teacher = Bert(config), Bert(config)
    >>> distiller = Distiller(student, teacher, temperature=2.0, alpha=0.5)
    >>> batch = {"input_ids": torch.tensor([[1, 2]]), "labels": torch.tensor([0])}
    >>> sorted(distiller(student, batch).terms)
    ['labels', 'logits']
    """

    task: Task

    def __init__(
        self,
        student: nn.Module,
        teacher_model: nn.Module | str | os.PathLike[str] | Teacher | None = None,
        *,
        temperature: float | Schedule = 2.0,
        alpha: float | Schedule | None = 0.5,
        divergence: DivergenceName | Divergence | None = None,
        divergence_kwargs: Mapping[str, float] | None = None,
        task: Task | str | None = None,
        processing_class: ProcessingClass | None = None,
        objectives: Objectives = None,
        seed: int | None = None,
        compare_predictions: bool = False,
        fused_loss: bool | None = None,
        label_names: Sequence[str] | None = None,
    ) -> None:
        self._given_task = task
        self._processing_class = processing_class
        self._compare_predictions = compare_predictions
        self._label_names = label_names
        self._seed = torch.initial_seed() % 2**32 if seed is None else seed
        self.blending = Blend(objectives)
        self.learned = Learned()
        self._fused_loss = FusedLoss(fused_loss)
        self._used_parameters: set[int] = set()  # in a step without labels and logits, under DDP
        self._bound: nn.Module | None = None
        self.compares_heads = False  # whether the teacher's head has been aligned with the student's
        self.set_blend(temperature=temperature, alpha=alpha, divergence=divergence, divergence_kwargs=divergence_kwargs)
        own_task = make_task(student, task)
        self.teacher: Teacher | None = None if teacher_model is None else as_teacher(teacher_model, str(own_task))
        self.bind(student)
        self.label_agreement = LabelAgreement(self.teacher)
        _warn_if_smaller(self.teacher, student)

    # Setting up.

    def set_blend(
        self,
        *,
        temperature: float | Schedule = 2.0,
        alpha: float | Schedule | None = 0.5,
        divergence: DivergenceName | Divergence | None = None,
        divergence_kwargs: Mapping[str, float] | None = None,
    ) -> None:
        """Change alpha, the temperature and the divergence, also while a training runs.

        Args:
            temperature: as for the class.
            alpha: as for the class.
            divergence: as for the class.
            divergence_kwargs: as for the class.

        Raises:
            SettingError: if a value is not allowed, or does not go with the task or the teacher; nothing is changed.
            TeacherError: if the teacher's predictions, compared from now on, cannot be aligned with the student's.
        """
        before = copy.copy(self.blending)
        self.blending.set(
            temperature=temperature, alpha=alpha, divergence=divergence, divergence_kwargs=divergence_kwargs
        )
        if self._bound is None:
            return
        try:
            self._check_changed_blend(self._bound)
        except HfDistillError:
            self.blending = before
            raise

    def _check_changed_blend(self, student: nn.Module) -> None:
        self.logits_match.divergence_for(self.task)
        if self.teacher is None:
            self.blending.check_has_teacher()
            return
        if LOGITS in self.blending.ever_active() and not self.compares_heads:
            if self.teacher.changes_in_training:  # binding it again would restart it
                raise SettingError(
                    f"alpha rose above 0, and the predictions of this {type(self.teacher).__name__} were not compared "
                    "until now. Let alpha rise by a schedule (alpha_schedule, alpha_end) instead."
                )
            self._bind_teacher(self.teacher, student, self.task)
        self._check_teacher()

    def bind(self, student: nn.Module) -> None:
        """Find this student's predictions, and check that the teacher can teach it.

        Args:
            student: the model to train, before Accelerate or DDP wrap it.

        Raises:
            SettingError: if a setting does not go with this student, which is left unchanged.
            TeacherError: if the teacher cannot teach it.
        """
        task, capture = make_task(student, self._given_task), ActivationCapture(student, "student")
        self.logits_match.divergence_for(task)
        active = self.blending.ever_active()
        if self.teacher is not None:
            self._bind_teacher(self.teacher, student, task)
        else:
            self.blending.check_has_teacher()
        theirs = None if self.teacher is None else self.teacher.capture
        setup = ObjectiveSetup(capture, theirs, task, unwrapped(student), self._seed)
        for name in active:
            self.objectives[name].bind(setup)
        self._check_teacher()
        self.learned.hold(self.blending.learned())
        if isinstance(task, Embedding) and task.inferred and LOGITS in active:
            logger.warning(
                f"Embeddings are the {task.pooling} of the last hidden states over the attended positions, of student "
                "and teacher; no config of a bare encoder says how it is pooled. Pass "
                "task=hf_distill.tasks.Embedding(pooling=...) where the teacher was trained with another pooling, and "
                "pool the student as it was trained."
            )
        self.task = task
        self._student, self._capture = unwrapped(student), capture
        self._whole_student = student  # with PEFT's wrapper: prompt tuning's vectors are outside the base
        self._found_trainable = self._wrote_config = False
        self._fused_loss.bind(student, task)
        self._prepares = type(task).prepare is not Task.prepare
        self._learns = bool(self.learned)
        self._teacher_learns = self.teacher is not None and self.teacher.learns_from_batches
        self._check_packing = PackingCheck(self._student)
        tokenizer = getattr(self._processing_class, "tokenizer", self._processing_class)
        self.check_padding = PaddingCheck(self._student, tokenizer)
        self._student_names = forward_names(student)
        read = self.teacher.inputs if self.teacher is not None and self._student_names else ()
        self._teacher_only = set(read) - set(self._student_names)
        own, known = self._label_names, task.label_names
        differ = own is not None and len(own) == len(known) and tuple(own) != known
        self.label_aliases = dict(zip(known, own or (), strict=True)) if differ else {}
        self._bound = student

    def _bind_teacher(self, teacher: Teacher, student: nn.Module, task: Task) -> None:
        active = self.blending.ever_active()
        self.compares_heads = LOGITS in active or not active or self._compare_predictions
        teacher.bind(
            TeacherSetup(
                student,
                task,
                processing_class=self._processing_class,
                compares_predictions=self.compares_heads,
                same_inputs=self.blending.compares_positions(),
            )
        )

    def _check_teacher(self) -> None:
        """Check the teacher against what the objectives need, which is known once they are bound."""
        if self.teacher is None:
            return
        objectives = [self.objectives[name] for name in self.blending.ever_active()]
        for progress in PROGRESS:
            self.teacher.check(self.blending.needs(progress)[1], objectives)

    def is_bound_to(self, student: nn.Module) -> bool:
        """Return whether `bind` has seen this student."""
        return self._student is unwrapped(student)

    def to(self, accelerator: Accelerator) -> None:
        """Move the teacher and the learned parameters of the objectives to the device of the batches."""
        if self.teacher is not None:
            self.teacher.to(accelerator)
        self.learned.to(accelerator)

    @property
    def objectives(self) -> dict[str, Objective]:
        """Return the objectives by the name of their term, that of the logits first."""
        return self.blending.objectives

    @property
    def logits_match(self) -> LogitsMatch:
        """Return the objective of the logits' term."""
        return self.blending.logits_match

    @property
    def uses_labels(self) -> bool:
        """Return whether the labels' term has a weight at any point of the training."""
        return self.blending.uses_labels()

    @property
    def compares_nothing(self) -> bool:
        """Return whether the loss is always only the labels' term."""
        return self.blending.labels_alone

    # An optimizer step.

    def begin_step(
        self,
        micro_batches: Sequence[Batch],
        accelerator: Accelerator | None = None,
        *,
        progress: float = 0.0,
        same_batch: int = 1,
        finite_check: CheckAt = "loss",
    ) -> Step:
        """Return the denominators and weights of the optimizer step that these micro-batches make.

        Call it once a step, on every process, before the first forward.

        Args:
            micro_batches: all micro-batches of this process.
            accelerator: None means one process, and no accumulation in Accelerate.
            progress: the fraction of the training that is done, 0 → 1, for schedules.
            same_batch: how many processes see the same batch (tensor parallelism).
            finite_check: "loss" to check each loss; "gradient" if `step.finite_check.look_at_gradient` will be called
                with the gradient's norm; "off" to check nothing.

        Raises:
            DataError: if a label is needed and missing, or is one that the head cannot take.
            SettingError: if the student has no trainable parameter, or every term has weight 0.
        """
        if self.label_aliases:
            micro_batches = [self.with_task_labels(batch) for batch in micro_batches]
        if not self._found_trainable and torch.is_grad_enabled():
            self._check_trainable()
        weights = self.blending.weights(progress)
        if not weights:
            raise SettingError(
                f"at {progress:.0%} of the training every term weighs 0, so there is no loss. Give alpha or an "
                "objective a weight throughout."
            )
        task, active = self.task, tuple(term for term in weights if term != LABELS)
        student_needs, teacher_needs = self.blending.needs(progress)
        if LABELS in weights:
            task.require_labels(micro_batches[0])
            for batch in micro_batches:
                task.check_labels(batch)
        device = first_tensor(micro_batches[0]).device if accelerator is None else accelerator.device
        counts = {LABELS: task.label_count, LOGITS: task.count}
        counts |= {term: partial(self.objectives[term].count, task) for term in active if term != LOGITS}
        rows = torch.stack([reduce(add, (counts[term](b).to(device) for b in micro_batches)) for term in weights])
        if any(name in batch for batch in micro_batches for name in PACKING_COLUMNS):
            self._check_packing(micro_batches, task, self.teacher, teacher_needs)
        if active and not self._wrote_config:
            self._write_config(micro_batches[0])
        if active and not self.check_padding.done:
            self.check_padding(micro_batches, self.teacher, accelerator)
        scale, is_alone = 1.0, accelerator is None or accelerator.num_processes == 1
        if accelerator is not None:
            # DDP averages over processes, and `Accelerator.backward` divides by its accumulation steps.
            is_deepspeed = accelerator.distributed_type == DistributedType.DEEPSPEED
            divided_by = 1 if is_deepspeed else accelerator.gradient_accumulation_steps
            scale = accelerator.num_processes // same_batch * float(divided_by)
            if not is_alone:
                rows = accelerator.reduce(rows, reduction="sum") / same_batch
        if task.sums_over_examples and {LABELS, LOGITS} & set(weights):
            rows = torch.ones_like(rows)
        if self.label_agreement.is_due:
            self.label_agreement.warn_if_chance(accelerator)
        return Step(
            denominators=dict(zip(weights, rows.unbind(), strict=True)),
            weights=weights,
            scale=scale,
            active=active,
            progress=progress,
            temperature=teacher_needs.temperature,
            student_needs=student_needs,
            teacher_needs=teacher_needs,
            micro_batches=len(micro_batches),
            is_whole=is_alone and len(micro_batches) == 1,
            finite_check=FiniteCheck(len(micro_batches), accelerator, at=finite_check),
        )

    def _check_trainable(self) -> None:
        """Check once, before the first step, that the student has trainable parameters."""
        parameters = chain(self._whole_student.parameters(), self.learned.parameters())
        self._found_trainable = any(parameter.requires_grad for parameter in parameters)
        if not self._found_trainable:
            raise SettingError(
                f"the student ({type(self._student).__name__}) has no trainable parameter, so there is nothing to "
                "train. A model that was a teacher has been frozen in place, and so has a copy of it. Call "
                "student.requires_grad_(True) before training it, or load it again."
            )

    def _write_config(self, batch: Batch) -> None:
        """Write the task's settings into the student's config once, when training begins, to be saved with it."""
        self._wrote_config = True
        config = config_of(self._student)
        if config is None:
            return
        before = _task_settings(config)
        self.task.write_to(config, batch)
        written = {name: value for name, value in _task_settings(config).items() if value != before[name]}
        if written:
            logger.info(f"Written to the student's config, as it is trained so: {written}.")

    def __call__(
        self,
        student: nn.Module,
        batch: Batch,
        step: Step | None = None,
        *,
        forward: LabelledForward | None = None,
        keep_logits: bool = False,
        fuse_labels: bool = True,
        label_smoothing: float = 0.0,
    ) -> DistillerOutput:
        """Run student and teacher on a micro-batch, and return its part of the optimizer step's loss.

        Args:
            student: the model as the loop calls it (wrapped or not).
            batch: the student's inputs, labels, and `teacher_*` columns.
            step: from `begin_step`; None means that this batch is a whole step of one process.
            forward: calls the student with labels, to replace the student's own loss as the labels' term. It is called
                with the model, its inputs and whether outputs are wanted, and returns the mean loss over this
                micro-batch, and the outputs or None.
            keep_logits: whether the outputs must have logits.
            fuse_labels: whether the mean loss of `forward` is the student's own, which can be computed without logits.
            label_smoothing: of the labels' term without logits; `forward` must do the same.

        Raises:
            HfDistillError: if the loss is not finite (see `FiniteCheck`).
        """
        step = step or self.begin_step([batch])
        if self.label_aliases:
            batch = self.with_task_labels(batch)
        may_fuse = self._fused_loss.is_possible and not keep_logits
        prepared = self.prepare(batch) if self._prepares and (step.active or may_fuse) else batch
        if may_fuse:
            fused = self._fused_loss.forward(
                self, student, prepared, step, smoothing=label_smoothing, fuse_labels=fuse_labels
            )
            if fused is not None:
                outputs, activations = self._forward_without_logits(student, prepared, step, fused)
                return self._blend(step, prepared, outputs, activations, fused=fused)
        batch = prepared if step.active else batch
        labels_mean, outputs, activations = self._forward(student, batch, step, forward, keep_logits)
        return self._blend(step, batch, outputs, activations, labels_mean=labels_mean)

    def _forward(
        self, student: nn.Module, batch: Batch, step: Step, forward: LabelledForward | None, wants_outputs: bool
    ) -> tuple[Tensor | None, Outputs, Activations]:
        """Return the student's mean loss on the labels, its outputs, and its activations of the same forward."""
        keys = step.student_needs.activations
        wants_outputs = wants_outputs or bool(step.active) or self._teacher_learns
        mean: Tensor | None = None
        outputs: Any = None
        with self._capture.capture(keys, validate=False) if keys else nullcontext(_NO_ACTIVATIONS) as activations:
            if LABELS in step.weights:
                forward = forward or self._labelled_forward
                # Without a comparison the forward is that of `Trainer`, bit for bit.
                inputs = self.student_inputs(batch, kv_cache=not step.active)
                mean, outputs = forward(student, inputs, wants_outputs)
        if outputs is None and (wants_outputs or LABELS not in step.weights):
            with self._capture.capture(keys, validate=False) if keys else nullcontext(_NO_ACTIVATIONS) as activations:
                outputs = student(**self.student_inputs(batch, labels=False, kv_cache=False))
        return mean, outputs, activations.validate() if keys else activations

    def _labelled_forward(self, student: nn.Module, inputs: Keywords, wants_outputs: bool) -> tuple[Tensor, Outputs]:
        """Return the student's own mean loss, and its outputs."""
        check_trainable_head(self._student)
        batch = self.with_task_labels(inputs)
        if not self.task.has_probabilities(batch):
            outputs = student(**inputs)
            return outputs["loss"], outputs
        outputs = student(**self.student_inputs(batch, labels=False, kv_cache=False))
        return cross_entropy_of_probabilities(outputs["logits"], batch["labels"]), outputs

    def _forward_without_logits(
        self, student: nn.Module, batch: Batch, step: Step, fused: FusedForward
    ) -> tuple[Outputs, Activations]:
        with self._capture.capture(step.student_needs.activations) as activations, fused.replacing_head():
            outputs = student(**self.student_inputs(batch, labels=False, kv_cache=False))
        fused.tie(outputs)
        return type(outputs)({name: value for name, value in outputs.items() if name != "logits"}), activations

    def _blend(
        self,
        step: Step,
        batch: Batch,
        outputs: Outputs,
        activations: Activations,
        *,
        labels_mean: Tensor | None = None,
        fused: FusedForward | None = None,
    ) -> DistillerOutput:
        """Return the loss from the results of the student's forward."""
        signals, fused_terms = None, None if fused is None else fused.terms
        if any(fused_terms is None or name not in fused_terms.terms for name in step.active):
            if fused is not None and fused.teacher is not None:
                signals = self.student_signals(outputs, batch, Needs(), activations), fused.teacher
            else:
                student = self.student_signals(outputs, batch, step.student_needs, activations)
                signals = student, self.teacher_signals(batch, step.teacher_needs)
                if not self.label_agreement.is_done:
                    self.label_agreement.add(self.task, batch, *signals)
        loss, terms = self.blending.total(step, self.task, batch, signals, labels_mean=labels_mean, fused=fused_terms)
        terms = {name: term.detach() for name, term in terms.items()}
        seen = MicroBatch(
            self.task,
            batch,
            loss.detach(),
            terms,
            self._student,
            lambda: self.student_inputs(batch, labels=LABELS in step.weights, kv_cache=False),
            teacher=(lambda suspect: self.teacher_signals(suspect, step.teacher_needs)) if step.active else None,
        )
        loss = step.finite_check.add(loss, seen)
        if labels_mean is None and not step.student_needs.logits and several_processes():
            self._used_parameters |= parameters_of(loss)
            loss = tied(loss, outputs)
        if self.teacher is not None and self._teacher_learns and torch.is_grad_enabled():
            student = self.student_signals(outputs, batch)
            self.teacher.on_batch(self.blending.student_batch(step, student, self.task, batch))
        return DistillerOutput(loss, terms, outputs)

    def reduce_gradients(self, student: nn.Module, accelerator: Accelerator | None = None) -> None:
        """Average the gradients of the objectives' learned parameters over processes, as DDP does for the student's.

        Call it after the last backward of an optimizer step, before clipping.

        Args:
            student: the model as the loop calls it.
            accelerator: None means one process.
        """
        if self._learns:
            self.learned.synchronize(accelerator)
        used, self._used_parameters = self._used_parameters, set()
        if used and isinstance(student, DDP):
            forget_gradients_but(self._whole_student.parameters(), used)

    def end_step(self, student: nn.Module) -> None:
        """Update a teacher that follows the student, and clear the gradients of the objectives' learned parameters.

        Call it after the optimizer's step.
        """
        if self.teacher is not None:
            self.teacher.on_step(student)
        self.learned.zero_grad()

    # Inputs and signals of student and teacher.

    def with_task_labels(self, batch: Batch) -> Batch:
        """Return the batch with its labels also under the names that the task reads."""
        aliases = self.label_aliases
        if not aliases or self.task.has_labels(batch) or any(batch.get(own) is None for own in aliases.values()):
            return batch
        return {**batch, **{name: batch[own] for name, own in aliases.items()}}

    def finds_labels(self, batch: Batch) -> bool:
        """Return whether the task can count this batch's labels."""
        batch = self.with_task_labels(batch)
        found = [batch[name] for name in self.task.label_names if batch.get(name) is not None]
        return self.task.has_labels(batch) and all(isinstance(labels, Tensor) for labels in found)

    def prepare(self, batch: Batch) -> Keywords:
        """Return the batch with the decoder inputs that both models read, made from the labels as the student does."""
        return self.task.prepare(dict(batch), self._student)

    def student_inputs(self, batch: Batch, *, labels: bool = True, kv_cache: bool = True) -> Keywords:
        """Return the student's inputs: without the teacher's columns.

        Features and labels are copies, so that a student that writes into them changes neither the batch nor what the
        teacher reads.

        Args:
            batch: the student's inputs, labels, and `teacher_*` columns.
            labels: whether they include the labels.
            kv_cache: False to run without a KV cache, in which packed sequences would see each other.
        """
        aliases = self.label_aliases
        removed = self._teacher_only | (aliases.keys() - set(self._student_names))
        if not labels:
            batch, removed = self.task.without_labels(batch), removed | set(aliases.values())
        inputs = {
            name: value
            for name, value in batch.items()
            if name not in removed and (not name.startswith(TEACHER_PREFIX) or name in self._student_names)
        }
        if not kv_cache and "use_cache" in self._student_names:
            inputs = {"use_cache": False, **inputs}
        return own_copies(inputs, self.task.label_names)

    def capture(self, progress: float = 0.0) -> AbstractContextManager[Activations]:
        """Return a context for one forward of the student that captures the activations that the objectives need."""
        return self._capture.capture(self.blending.needs(progress)[0].activations)

    def student_signals(
        self, outputs: Outputs, batch: Batch, needs: Needs | None = None, activations: Activations | None = None
    ) -> Signals:
        """Return the student's signals.

        Args:
            outputs: the outputs of its forward.
            batch: the prepared batch.
            needs: None means its predictions.
            activations: those captured in the same forward, if any.
        """
        alignment, logits = HeadAlignment() if self.teacher is None else self.teacher.alignment, None
        if needs is None or needs.logits:
            with reading_outputs_of(self._student, "student"):
                logits = self.task.read(outputs, batch, alignment, teacher=False)
        return Signals(logits=logits, alignment=alignment, activations=activations or {})

    def teacher_signals(self, batch: Batch, needs: Needs | None = None) -> Signals:
        """Return the teacher's signals.

        Args:
            batch: the prepared batch.
            needs: None means its predictions, softened as at the end of the training.
        """
        if needs is not None and not (needs.logits or needs.activations):  # the active objectives need no teacher
            return Signals(None)
        assert self.teacher is not None  # `bind` checked that a term that needs a teacher has one
        needs = needs or Needs(logits=True, temperature=self.logits_match.temperature(1.0))
        return self.teacher(self.task, batch, needs)

    def __repr__(self) -> str:
        terms = [LABELS] if self.uses_labels else []
        terms += [self.blending.described(name) for name in self.blending.ever_active()]
        return f"Distiller(teacher={self.teacher!r}, terms=[{', '.join(terms)}])"


def check_trainable_head(student: nn.Module) -> None:
    """Raise if labels are used with a class that has separate heads for labels and teacher, and no loss (DeiT, LeViT).

    Raises:
        SettingError: if the student is of such a class.
    """
    name = type(student).__name__
    if not name.endswith("WithTeacher"):
        return
    raise SettingError(
        f"{name} has a head for labels and a head for a teacher, and transformers made it for inference: its forward "
        f"takes no labels and has no loss. Train {name.removesuffix('WithTeacher')} instead, whose one head "
        "learns from both; or pass alpha=1, and the mean of both heads learns from the teacher."
    )


def _task_settings(config: PreTrainedConfig) -> Keywords:
    """Return the entries of a config that `Task.write_to` may write."""
    return {name: getattr(config, name, None) for name in ("problem_type", "id2label", "label2id")}


def _warn_if_smaller(teacher: Teacher | None, student: nn.Module) -> None:
    """Log a warning if a frozen teacher has fewer weights than its student: they may have been swapped."""
    models = []
    for member in [] if teacher is None else teacher.members():
        if type(member) is not ModelTeacher or getattr(member.model, "is_quantized", False):
            return  # packed weights, caches and the student itself are not counted
        models.append(member.model)
    adapters = ("lora_", "modules_to_save")
    sizes = [
        sum(getattr(p, "ds_numel", p.numel()) for n, p in model.named_parameters() if not any(a in n for a in adapters))
        for model in (student, *models)
    ]
    if models and sum(sizes[1:]) < sizes[0]:
        logger.warning(
            f"The teacher has {sum(sizes[1:]):,} weights, fewer than the student's {sizes[0]:,}. If that is not meant, "
            "model and teacher_model are exchanged."
        )
