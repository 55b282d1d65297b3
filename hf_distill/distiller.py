"""Distiller: one batch, two models, one loss whose denominators are those of the whole optimizer step.

Works in any training loop. It knows no Trainer; what it learns of processes comes from Accelerate.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from hf_distill.blend import LOGITS, Blend, Objectives
from hf_distill.errors import HfDistillError, SettingError
from hf_distill.functional import Divergence
from hf_distill.inside.packing import PackingCheck
from hf_distill.inside.padding import PaddingCheck
from hf_distill.inside.recorder import Inside
from hf_distill.label_agreement import LabelAgreement
from hf_distill.learned import Learned
from hf_distill.objectives import LogitsMatch, Objective
from hf_distill.one_batch import OneBatch
from hf_distill.schedules import PROGRESS, Schedule
from hf_distill.tasks import Embedding, Task, make_task
from hf_distill.tasks.infer import forward_names, unwrapped
from hf_distill.teachers import ModelTeacher, Teacher, as_teacher
from hf_distill.watch import FiniteCheck
from hf_distill.without_logits import WithoutLogits

logger = logging.getLogger(__name__)


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
        `WithoutLogits`; the outputs then have none.
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
        self._without_logits = WithoutLogits(materialize_logits)
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
        task, inside = make_task(student, self._given_task), Inside(student, "student")
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
