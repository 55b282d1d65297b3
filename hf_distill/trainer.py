"""DistillationTrainer: `Trainer` whose loss also listens to a teacher. It holds no mathematics.

`DistillationMixin` goes before any `Trainer` subclass: `class Mine(DistillationMixin, MyTrainer)`.
"""

from __future__ import annotations

import inspect
import logging
import os
import re
from collections.abc import Iterable, Mapping
from typing import Any

from transformers import Seq2SeqTrainer, Trainer

from hf_distill.arguments import DistillationArguments, blend_of, setting
from hf_distill.blend import SETTING_ALIASES, Objectives, compares_nothing, uses_teacher
from hf_distill.distiller import Distiller
from hf_distill.errors import SettingError, did_you_mean
from hf_distill.one_batch import refuse_head_for_a_teacher
from hf_distill.tasks import make_task
from hf_distill.tasks.infer import task_or_unknown, unwrapped
from hf_distill.teachers import as_teacher
from hf_distill.trainer_parts.columns import ColumnsMixin, columns_of
from hf_distill.trainer_parts.evaluation import EvaluationMixin
from hf_distill.trainer_parts.interruptions import InterruptionMixin
from hf_distill.trainer_parts.learning import LearningMixin
from hf_distill.trainer_parts.loss import LossMixin
from hf_distill.trainer_parts.publishing import PublishingMixin
from hf_distill.trainer_parts.random_state import random_state_kept
from hf_distill.trainer_parts.refusals import (
    refuse_data_parallel,
    refuse_other_student,
    refuse_other_views,
    refuse_sequence_parallel,
    refuse_two_blends,
    refuse_values_without_teacher,
)
from hf_distill.trainer_parts.restoring import RestoringMixin
from hf_distill.trainer_parts.running_terms import RunningTerms
from hf_distill.trainer_parts.search import SearchMixin
from hf_distill.trainer_parts.settings import SettingsMixin
from hf_distill.trainer_parts.several_inputs import teacher_inputs_collator
from hf_distill.trainer_parts.viewing import ViewingMixin

logger = logging.getLogger(__name__)
_POSITIONAL = tuple(inspect.signature(Trainer.__init__).parameters)[3:]  # after self, model, args
_NO_KEYWORDS = {"self", "args", "kwargs", "positional", "keywords"}
# What people call the keywords; only proposed in messages.
_KEYWORD_ALIASES = {
    "teacher": "teacher_model",
    **dict.fromkeys(("teacher_tokenizer", "teacher_processor"), "teacher_processing_class"),
    **dict.fromkeys(("tokenizer", "processor", "feature_extractor"), "processing_class"),
}


class DistillationMixin(
    PublishingMixin,
    SearchMixin,
    SettingsMixin,
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
        self._columns_given = set(columns_of(given.get("train_dataset")))
        self._terms = RunningTerms()
        # transformers' own trainers take model and data as they are, so everything is checked before they make a folder
        # or a repository; what this draws from the random generators is undone by Trainer's own seeding. A base trainer
        # of another make may first load the model, wrap it, or make inputs and labels of the data.
        checks_first = model is not None and _is_of_transformers(super().__init__)
        if checks_first:
            self.distiller = self._make_distiller(model, args, given.get("processing_class"), distiller)
            self._look_at_data(model, args, given)
        folder = "tmp_trainer" if args is None else args.output_dir  # the former is Trainer's own default
        fresh_folder = not os.path.exists(folder)
        try:
            super().__init__(model, args, *positional, **keywords)
        except TypeError as error:
            hint = _keyword_hint(error, keywords, type(self))
            if hint:
                raise TypeError(f"{error}.{hint}") from error
            raise
        try:
            self._finish_init(None if checks_first else distiller, given, makes_distiller=not checks_first)
        except ValueError:
            if fresh_folder and os.path.isdir(folder) and not os.listdir(folder):
                os.rmdir(folder)
            raise

    def _finish_init(self, distiller: Distiller | None, given: Mapping[str, Any], *, makes_distiller: bool) -> None:
        refuse_data_parallel(self.args, self.model)
        refuse_sequence_parallel(self)
        if makes_distiller:
            with random_state_kept():
                self.distiller = self._make_distiller(self.model, self.args, self.processing_class, distiller)
            # A base trainer of another make may have prepared the data, and chosen a collator that makes labels.
            prepared = {name: getattr(self, name) for name in ("train_dataset", "eval_dataset", "data_collator")}
            chosen = prepared if not _is_of_transformers(super().__init__) else {}
            self._look_at_data(self.model, self.args, {**given, **chosen})
        self._use_settings()
        self._check_view()
        if self.distiller.needs_labels() and not self._has_own_loss():
            refuse_head_for_a_teacher(unwrapped(self.model))
        self.distiller.place(self.accelerator)
        self._collate_answer_masks(*self._datasets())
        refuse_other_views(self.data_collator, self.distiller, has_teacher_columns=self._has_teacher_columns())
        if self._teacher_processor is not None or self._has_teacher_columns():
            self.data_collator = teacher_inputs_collator(self.data_collator, self._teacher_processor)
        self._collate_for_teacher()
        self._warn_of_unread_columns()

    def _collate_for_teacher(self) -> None:
        """Let the data loader fetch what a cached teacher has kept of each example."""
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
        asks_teacher = uses_teacher(blend["alpha"], self._objectives_setting)
        if asks_teacher and self._teacher_setting is None:
            refuse_values_without_teacher(self._columns_given)
        task = self._task_setting
        if task is None and not evaluates and compares_nothing(blend["alpha"], self._objectives_setting):
            task = task_or_unknown(student)
        if self._teacher_setting is not None and (evaluates or asks_teacher):
            teacher = as_teacher(
                self._teacher_setting,
                make_task(student, task).kind,
                processor=self._teacher_processor,
                dtype=setting(args, "teacher_dtype"),
                label_matching=setting(args, "label_matching"),
                quantization=setting(args, "teacher_quantization"),
                device_map=setting(args, "teacher_device_map"),
            )
        return Distiller(
            student,
            teacher,
            task=task,
            processing_class=processing_class,
            objectives=self._objectives_setting,
            seed=None if args is None else args.seed,
            compare_predictions=evaluates,
            materialize_logits=setting(args, "materialize_logits"),
            label_names=None if args is None else args.label_names,
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
        self._follow_settings()


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


def _is_of_transformers(init: Any) -> bool:
    """Whether the next constructor is that of `Trainer` or `Seq2SeqTrainer` itself."""
    return getattr(init, "__func__", None) in (Trainer.__init__, Seq2SeqTrainer.__init__)


def _keyword_hint(error: TypeError, given: Iterable[str], trainer_class: type) -> str:
    """A sentence on the keyword that was probably meant, where one of these is not known; empty for other errors."""
    found = re.search(r"unexpected keyword argument '(\w+)'", str(error))
    if found is None:
        return ""
    name, meant = found[1], SETTING_ALIASES.get(found[1], found[1])
    if meant in DistillationArguments.__dataclass_fields__:
        return (
            f" {meant} is a setting: pass args=DistillationArguments(..., {meant}=...). A base trainer with its own "
            "arguments needs a class of both: class Args(DistillationArgumentsMixin, ItsArguments)."
        )
    if name not in given:
        return ""
    parameters = [
        inspect.signature(vars(one)["__init__"]).parameters for one in trainer_class.__mro__ if "__init__" in vars(one)
    ]
    return did_you_mean(name, {name for known in parameters for name in known} - _NO_KEYWORDS, _KEYWORD_ALIASES)
