"""DistillationTrainer: `Trainer` whose loss also listens to a teacher. It holds no mathematics.

`DistillationMixin` goes before any `Trainer` subclass: `class Mine(DistillationMixin, MyTrainer)`.
"""

from __future__ import annotations

import inspect
import logging
import os
from collections.abc import Mapping
from typing import Any

from transformers import Seq2SeqTrainer, Trainer

from hf_distill.arguments import blend_of, setting
from hf_distill.blend import Objectives, uses_teacher
from hf_distill.distiller import Distiller
from hf_distill.errors import SettingError
from hf_distill.one_batch import refuse_head_for_a_teacher
from hf_distill.tasks import make_task
from hf_distill.tasks.infer import unwrapped
from hf_distill.teachers import as_teacher
from hf_distill.trainer_parts.after_step import AfterStep
from hf_distill.trainer_parts.columns import ColumnsMixin
from hf_distill.trainer_parts.evaluation import EvaluationMixin
from hf_distill.trainer_parts.interruptions import InterruptionMixin
from hf_distill.trainer_parts.learning import ForgetGradients, LearningMixin
from hf_distill.trainer_parts.loss import LossMixin
from hf_distill.trainer_parts.publishing import PublishingMixin
from hf_distill.trainer_parts.random_state import random_state_kept
from hf_distill.trainer_parts.refusals import (
    refuse_data_parallel,
    refuse_other_student,
    refuse_other_views,
    refuse_sequence_parallel,
    refuse_two_blends,
)
from hf_distill.trainer_parts.restoring import RestoringMixin
from hf_distill.trainer_parts.running_terms import RunningTerms
from hf_distill.trainer_parts.several_inputs import teacher_inputs_collator
from hf_distill.trainer_parts.tells_epoch import TellsEpoch
from hf_distill.trainer_parts.viewing import ViewingMixin

logger = logging.getLogger(__name__)
_POSITIONAL = tuple(inspect.signature(Trainer.__init__).parameters)[3:]  # after self, model, args


class DistillationMixin(
    PublishingMixin,
    LossMixin,
    EvaluationMixin,
    ColumnsMixin,
    InterruptionMixin,
    LearningMixin,
    RestoringMixin,
    ViewingMixin,
):
    """Everything that a `Trainer` accepts, with the same meaning, and a teacher.

    Args:
        teacher_model: a model, a folder, a Hub id, or a `Teacher`; not needed where alpha is 0.
        teacher_processing_class: the teacher's tokenizer or feature extractor, where it is not the student's; of an
            `Ensemble` a list, one for each.
        task: a name in `hf_distill.tasks.TASKS` or a Task; None: from the student's class.
        objectives: one or more of `hf_distill.objectives`, beside labels and logits, each with its weight.
        view: changes batches of the training with the student's help: `hf_distill.views.OnPolicy`.
        distiller: full control: a `Distiller` built by you for this student. Then `teacher_model` and the settings of
            the blend in `args` are not read.

    Raises:
        SettingError, TeacherError, DataError: before anything is written.
    """

    def __init__(
        self,
        model: Any = None,
        args: Any = None,
        *positional: Any,
        teacher_model: Any = None,
        teacher_processing_class: Any = None,
        task: Any = None,
        objectives: Objectives = None,
        view: Any = None,
        distiller: Distiller | None = None,
        **keywords: Any,
    ) -> None:
        given = dict(zip(_POSITIONAL, positional, strict=False)) | keywords
        refuse_data_parallel(args, model)
        self._teacher_processor = teacher_processing_class
        self._task_setting = task
        self._teacher_setting = teacher_model
        self._objectives_setting = objectives
        self._view = view
        self._blend_is_ours = distiller is None
        self._terms = RunningTerms()
        # With a model at hand everything is checked before Trainer makes a folder or a repository; what
        # this draws from the random generators is undone by Trainer's own seeding.
        if model is not None:
            self.distiller = self._make_distiller(model, args, given.get("processing_class"), distiller)
            self._look_at_data(model, args, given)
        folder = "tmp_trainer" if args is None else args.output_dir  # the former is Trainer's own default
        fresh_folder = not os.path.exists(folder)
        super().__init__(model, args, *positional, **keywords)
        try:
            self._finish_init(model, distiller, given)
        except ValueError:
            if fresh_folder and os.path.isdir(folder) and not os.listdir(folder):
                os.rmdir(folder)
            raise

    def _finish_init(self, model: Any, distiller: Distiller | None, given: Mapping[str, Any]) -> None:
        refuse_data_parallel(self.args, self.model)
        refuse_sequence_parallel(self)
        if model is None:
            with random_state_kept():
                self.distiller = self._make_distiller(self.model, self.args, self.processing_class, distiller)
            self._look_at_data(self.model, self.args, given)
        self._check_view()
        if self.distiller.needs_labels() and not self._has_own_loss():
            refuse_head_for_a_teacher(unwrapped(self.model))
        self.distiller.place(self.accelerator)
        for callback in (AfterStep, ForgetGradients, TellsEpoch):
            self.add_callback(callback(self))
        refuse_other_views(self.data_collator, self.distiller, has_teacher_columns=self._has_teacher_columns())
        if self._teacher_processor is not None or self._has_teacher_columns():
            self.data_collator = teacher_inputs_collator(self.data_collator, self._teacher_processor)
        looks_up = getattr(self.distiller.teacher, "collator", None)
        if looks_up is not None:
            self.data_collator = looks_up(self.data_collator)

    def _make_distiller(
        self, student: Any, args: Any, processing_class: Any, given: Distiller | None = None
    ) -> Distiller:
        evaluates = setting(args, "evaluate_with_teacher")
        if evaluates and (self._teacher_setting if given is None else given.teacher) is None:
            raise SettingError("evaluate_with_teacher=True needs a teacher: pass teacher_model=.")
        if given is not None:
            refuse_two_blends(self._objectives_setting)
            if not given.is_for(student):
                refuse_other_student(has_model_init=getattr(self, "model_init", None) is not None)
                given.fit(student)
            return given
        blend, teacher = blend_of(args), None
        if evaluates and blend["alpha"] is None:
            raise SettingError("evaluate_with_teacher=True compares predictions, and alpha=None has none compared.")
        if self._teacher_setting is not None and (evaluates or uses_teacher(blend["alpha"], self._objectives_setting)):
            teacher = as_teacher(
                self._teacher_setting,
                make_task(student, self._task_setting).kind,
                processor=self._teacher_processor,
                dtype=setting(args, "teacher_dtype"),
                label_matching=setting(args, "label_matching"),
                quantization=setting(args, "teacher_quantization"),
                device_map=setting(args, "teacher_device_map"),
            )
        return Distiller(
            student,
            teacher,
            task=self._task_setting,
            processing_class=processing_class,
            objectives=self._objectives_setting,
            seed=None if args is None else args.seed,
            compare_predictions=evaluates,
            materialize_logits=setting(args, "materialize_logits"),
            **blend,
        )

    # Hyperparameter search: a new student, new settings.

    def call_model_init(self, trial: Any = None) -> Any:
        """As `Trainer`'s; the distiller learns of the new student."""
        model = super().call_model_init(trial)
        if hasattr(self, "distiller"):
            self.distiller.fit(model)
            self.distiller.learned.place(self.accelerator)
        return model

    def _hp_search_setup(self, trial: Any) -> None:
        super()._hp_search_setup(trial)
        if trial is None or not self._blend_is_ours:
            return
        blend = blend_of(self.args)
        if self.distiller.teacher is None and uses_teacher(blend["alpha"], self._objectives_setting):
            self.distiller = self._make_distiller(self.model, self.args, self.processing_class)
            self.distiller.place(self.accelerator)
            self._signature_columns = None  # the teacher's inputs belong to them from now on
        self.distiller.set_blend(**blend)


class DistillationTrainer(DistillationMixin, Trainer):
    """`Trainer` with a teacher. Change one line of a fine-tuning script, and get a distilled student.

    `loss = (1 - alpha) * labels + alpha * T^p * divergence + Σ weight * objective`: each term a mean over the whole
    optimizer step (all accumulated micro-batches, all processes). `alpha=0` without objectives is `Trainer`; `alpha=1`
    needs no labels; `alpha=None` is the objectives alone.

    Args: `Trainer`'s, and `DistillationMixin`'s.

    Hinton et al. 2015, Distilling the Knowledge in a Neural Network, section 2. There the weights are free; here alpha
    is the teacher's and 1 - alpha the labels'.

    >>> import tempfile, torch
    >>> from transformers import BertConfig, BertForSequenceClassification as Bert
    >>> from hf_distill import DistillationArguments, DistillationTrainer
    >>> config = BertConfig(vocab_size=9, hidden_size=4, num_hidden_layers=1, num_attention_heads=1)
    >>> args = DistillationArguments(
    ...     tempfile.mkdtemp(), alpha=0.9, max_steps=1, report_to="none", disable_tqdm=True, use_cpu=True
    ... )
    >>> data = [{"input_ids": [1, 2], "labels": 0}, {"input_ids": [3, 4], "labels": 1}]
    >>> trainer = DistillationTrainer(
    ...     model=Bert(config), teacher_model=Bert(config), args=args, train_dataset=data
    ... )
    >>> trainer.train().global_step
    {'train_runtime': ...}
    1
    """


class Seq2SeqDistillationTrainer(DistillationMixin, Seq2SeqTrainer):
    """`Seq2SeqTrainer` with a teacher: `predict_with_generate` and all. See `DistillationTrainer`."""
