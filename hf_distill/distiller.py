"""A micro-batch: the student's forward, the teacher's, and the loss; and the counts of a step of them.

What is set up before is in `distiller.py`.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from hf_distill._compat import gathered_sum
from hf_distill.blend import LABELS, LOGITS, SETTING_ALIASES, Blend, DistillerOutput, Objectives, labels_part
from hf_distill.ddp import Counts, parameters_of, scale_of, several_processes, tied
from hf_distill.errors import HfDistillError, SettingError, check_keywords
from hf_distill.finite import FiniteCheck, MicroBatch
from hf_distill.functional import Divergence
from hf_distill.fused_forward import FusedForward, FusedLoss
from hf_distill.label_agreement import LabelAgreement
from hf_distill.learned import Learned
from hf_distill.models.capture import ActivationCapture
from hf_distill.models.packing import PackingCheck
from hf_distill.models.padding import PaddingCheck
from hf_distill.objectives import LogitsMatch, Objective
from hf_distill.objectives.base import cross_entropy_of_probabilities
from hf_distill.schedules import PROGRESS, Schedule
from hf_distill.signals import ActivationKey, Needs, Signals
from hf_distill.tasks import Batch, Embedding, Task, make_task
from hf_distill.tasks.base import TEACHER_PREFIX, first_tensor, own_copies, reading_outputs_of
from hf_distill.tasks.infer import forward_names, unwrapped
from hf_distill.teachers import ModelTeacher, Teacher, as_teacher
from hf_distill.vocabulary import HeadAlignment

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
    _inside: ActivationCapture
    finite_check: FiniteCheck
    label_agreement: LabelAgreement
    _without_logits: FusedLoss
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

    def reading(self, progress: float = 0.0) -> AbstractContextManager[Mapping[ActivationKey, Any]]:
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
        inside: Mapping[ActivationKey, Any] | None = None,
        forward: FusedForward | None = None,
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
        self, outputs: Any, batch: Batch, needs: Needs | None = None, inside: Mapping[ActivationKey, Any] | None = None
    ) -> Signals:
        columns, logits = HeadAlignment() if self.teacher is None else self.teacher.columns, None
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


class Distiller(OneBatch):
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
        does so (an evaluation may). materialize_logits: False or None (where the vocabulary is large): see
        `FusedLoss`; the outputs then have none.
        label_names: what the student's forward calls its labels, if not as the task does; None: as the task.

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
        materialize_logits: bool | None = True,
        label_names: Sequence[str] | None = None,
    ) -> None:
        self._given_task = task
        self._processor = processing_class
        self._compares_anyway = compare_predictions
        self._label_names = label_names
        self._seed = torch.initial_seed() % 2**32 if seed is None else seed
        self.finite_check = FiniteCheck()
        self.blending = Blend(objectives)
        self.learned = Learned()
        self.reached: set[int] = set()  # see `unused_outputs`
        self._without_logits = FusedLoss(materialize_logits)
        self._fitted: nn.Module | None = None
        self.pairs_predictions = False  # whether the columns of the teacher's head are paired with the student's
        self.set_blend(
            temperature=temperature,
            alpha=alpha,
            divergence=divergence,
            divergence_kwargs=divergence_kwargs,
        )
        kind = make_task(student, task).kind
        self.teacher: Teacher | None = None if teacher_model is None else as_teacher(teacher_model, kind)
        self.label_agreement = LabelAgreement(self.teacher)
        self.fit(student)
        _warn_if_smaller(self.teacher, student)

    def set_blend(
        self,
        *,
        temperature: float | Schedule = 2.0,
        alpha: float | Schedule | None = 0.5,
        divergence: str | Divergence | None = None,
        divergence_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        """Change alpha, the temperature and the divergence, also while a training runs.

        Raises:
            SettingError: a value that cannot be, or that this task or teacher cannot serve; the blend is as it was.
            TeacherError: the teacher's predictions, compared from now on, cannot be paired with the student's.
        """
        before = copy.copy(self.blending)
        self.blending.set(
            temperature=temperature, alpha=alpha, divergence=divergence, divergence_kwargs=divergence_kwargs
        )
        if self._fitted is None:
            return
        try:
            self._check_changed_blend(self._fitted)
        except HfDistillError:
            self.blending = before
            raise

    def _check_changed_blend(self, student: nn.Module) -> None:
        self.logits_match.divergence_for(self.task)
        if self.teacher is None:
            self.blending.refuse_without_teacher()
            return
        if LOGITS in self.blending.ever_active() and not self.pairs_predictions:
            if hasattr(self.teacher, "state"):  # fitting it again would restart it
                raise SettingError(
                    f"alpha rose above 0, and the predictions of this {type(self.teacher).__name__} were not compared "
                    "until now. Let alpha rise by a schedule (alpha_schedule, alpha_end) instead."
                )
            self._fit_teacher(student, self.task)
        self._check_teacher_needs()

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
        task, inside = make_task(student, self._given_task), ActivationCapture(student, "student")
        self.logits_match.divergence_for(task)
        asked = self.blending.ever_active()
        if self.teacher is not None:
            self._fit_teacher(student, task)
        else:
            self.blending.refuse_without_teacher()
        theirs = getattr(self.teacher, "inside", None)
        for name in asked:
            self.objectives[name].fit(inside, theirs, task, model=unwrapped(student), seed=self._seed)
        self._check_teacher_needs()
        teacher: Any = self.teacher
        if hasattr(teacher, "check_objectives"):
            teacher.check_objectives([self.objectives[name] for name in asked])
        self.learned.hold(self.blending.learned())
        if isinstance(task, Embedding) and task.inferred and LOGITS in asked:
            logger.warning(
                f"Embeddings are the {task.pooling} of the last hidden states over the attended positions, of student "
                "and teacher; no config of a bare encoder says how it is pooled. Pass "
                "task=hf_distill.tasks.Embedding(pooling=...) where the teacher was trained with another pooling, and "
                "pool the student as it was trained."
            )
        self.task = task
        self._student, self._inside = unwrapped(student), inside
        self._whole_student, self._found_trainable = student, False
        self._config_is_written = False
        self._without_logits.fit(student)
        self._check_packing = PackingCheck(self._student)
        self.check_padding = PaddingCheck(self._student, getattr(self._processor, "tokenizer", self._processor))
        self._student_names = forward_names(student)
        read = self.teacher.inputs if self.teacher is not None and self._student_names else ()
        self._teacher_only = set(read) - set(self._student_names)
        own, known = self._label_names, task.label_names
        differ = own is not None and len(own) == len(known) and tuple(own) != known
        self._label_aliases = dict(zip(known, own or (), strict=True)) if differ else {}
        self._fitted = student

    def _fit_teacher(self, student: nn.Module, task: Task) -> None:
        assert self.teacher is not None
        asked = self.blending.ever_active()
        self.pairs_predictions = LOGITS in asked or not asked or self._compares_anyway
        self.teacher.fit(
            student,
            task,
            student_processor=self._processor,
            compares_predictions=self.pairs_predictions,
            same_inputs=self.blending.compares_positions(),
        )

    def _check_teacher_needs(self) -> None:
        """What objectives need of the teacher is known once they are fitted."""
        teacher: Any = self.teacher
        if hasattr(teacher, "check_needs"):
            for moment in PROGRESS:
                teacher.check_needs(self.blending.needs(moment)[1])

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


def _warn_if_smaller(teacher: Any, student: nn.Module) -> None:
    """Log a warning if a frozen teacher has fewer weights than its student: the two may have been exchanged."""
    members = getattr(teacher, "teachers", [teacher])
    if any(type(one) is not ModelTeacher or getattr(one.model, "is_quantized", False) for one in members):
        return  # packed weights, a cache and the student itself cannot be counted
    adapters = ("lora_", "modules_to_save")
    sizes = [
        sum(getattr(p, "ds_numel", p.numel()) for n, p in model.named_parameters() if not any(a in n for a in adapters))
        for model in (student, *(one.model for one in members))
    ]
    if sum(sizes[1:]) < sizes[0]:
        logger.warning(
            f"The teacher has {sum(sizes[1:]):,} weights, fewer than the student's {sizes[0]:,}. If that is not meant, "
            "model and teacher_model are exchanged."
        )
