"""The trainers: `Trainer` and `Seq2SeqTrainer` with a teacher. One class, to be read from top to bottom."""

from __future__ import annotations

import contextlib
import inspect
import logging
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from accelerate.utils import DistributedType
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader, Dataset
from transformers import Seq2SeqTrainer, Trainer, TrainingArguments
from transformers.trainer_utils import BestRun, EvalLoopOutput, TrainOutput, has_length

from hf_distill._compat import TRAINER_MAY_DIVIDE, divides_the_loss, forget_preparation, renamed_state
from hf_distill._types import Batch, Collator, Data, Example, Keywords, ProcessingClass, State
from hf_distill._utils import random_state_kept, set_random_state
from hf_distill.augment.on_policy import OnPolicy
from hf_distill.blend import LABELS, SETTING_ALIASES, Objectives, Step
from hf_distill.data.labels import LabelReader
from hf_distill.distiller import Distiller, check_trainable_head
from hf_distill.errors import DataError, did_you_mean
from hf_distill.finite import CheckAt
from hf_distill.learned import STATE_FILE, Learned
from hf_distill.models.packing import PackingCheck
from hf_distill.signals import Outputs
from hf_distill.tasks import Task
from hf_distill.tasks.base import IGNORED
from hf_distill.tasks.infer import unwrapped
from hf_distill.teachers import Teacher
from hf_distill.trainer import checks, columns, interruptions, publishing, settings
from hf_distill.trainer.arguments import DistillationArguments, picklable, setting
from hf_distill.trainer.callback import RunningTerms, registered_callback, scheduled_values, warn_if_lost
from hf_distill.trainer.collators import ANSWER_MASKS, teacher_inputs_collator, without_augmentation
from hf_distill.trainer.evaluation import (
    EachOnce,
    Prediction,
    TeacherMetrics,
    TeacherPredictions,
    check_evaluated,
    compare_with_teacher,
    each_example_once,
    teacher_evaluated,
    warn_of_infinite_loss,
)
from hf_distill.trainer.head_loss import (
    carries_gradient,
    loss_of_probabilities,
    observed_forwards,
)
from hf_distill.trainer.search import search_arguments
from hf_distill.trainer.setup import make_distiller

logger = logging.getLogger(__name__)
Count: TypeAlias = Tensor | int | None
Loss: TypeAlias = Tensor | tuple[Tensor, Outputs]  # with the outputs if they are wanted
_POSITIONAL = tuple(inspect.signature(Trainer.__init__).parameters)[3:]  # after self, model, args
_NO_KEYWORDS = {"self", "args", "kwargs", "positional", "keywords"}
# What people call the keywords; only proposed in messages.
_KEYWORD_ALIASES = {
    "teacher": "teacher_model",
    **dict.fromkeys(("teacher_tokenizer", "teacher_processor"), "teacher_processing_class"),
    **dict.fromkeys(("tokenizer", "processor", "feature_extractor"), "processing_class"),
    "view": "on_policy",
}

if TYPE_CHECKING:
    from optuna import Trial

    _Trainer = Trainer
else:
    _Trainer = object


class DistillationMixin(_Trainer):
    """Everything that a `Trainer` accepts, with the same meaning, and a teacher.

    Args:
        model: as of `Trainer`.
        args: as of `Trainer`; `DistillationArguments` hold the settings of the distillation.
        positional: as of `Trainer`.
        teacher_model: a model, a folder, a Hub id, or a `Teacher`; not needed if alpha is 0.
        teacher_processing_class: the teacher's tokenizer or feature extractor, if it is not the student's; for an
            `Ensemble` a list, one for each teacher.
        task: a name in `hf_distill.tasks.TASKS` or a Task; None means the task of the student's class.
        objectives: one or more of `hf_distill.objectives`, beside labels and logits, each with its weight.
        on_policy: lets the student continue a share of the batches: `hf_distill.augment.OnPolicy`.
        distiller: full control: your own `Distiller` for this student. Then `teacher_model` and the settings of the
            blend in `args` are not read.
        keywords: as of `Trainer`.

    Raises:
        SettingError: if a setting is not allowed, before anything is written.
        TeacherError: if the teacher cannot teach this student.
        DataError: if the student cannot read a dataset, or its labels.
    """

    distiller: Distiller

    # State of an evaluation.
    _teacher_metrics: TeacherMetrics | None = None
    _teacher_predictions: TeacherPredictions | None = None
    _evaluated_outputs: Any = None
    _packing_check: PackingCheck | None = None
    _warnings_given: frozenset[str] = frozenset()

    # State of a training.
    _step: Step | None = None
    _micro_batches_left = 0
    _in_training_step = False
    _is_plain: bool | None = None  # labels alone, at every moment: `Trainer`'s own training
    _warned_of_loss = False
    _is_base_step = False  # the current optimizer step is the base trainer's own
    _base_loss_is_scaled: bool | None = None  # the base trainer's `loss_is_scaled_for_ga`
    _base_outputs_serve: bool | None = None  # whether they carry the gradient of one forward; None: not known yet
    _last_checkpoint: str | None = None  # that this run has saved, or began with

    # Settings and data that are in use.
    _settings_in_use: State | None = None  # None: the trainer is being made
    _batches_are_made = False  # whether the training's data loader exists, and with it the columns that it keeps
    _on_policy_checked: nn.Module | None = None  # the student that `on_policy` was checked with
    _reads_answer_masks = False
    _labels_have_own_loss = False
    model: Any
    args: Any
    eval_dataset: Any
    compute_loss_func: Any
    data_collator: Collator
    hub_model_id: Any
    push_in_progress: Any
    _signature_columns: Any

    # Construction.

    def __init__(
        self,
        model: nn.Module | None = None,
        args: TrainingArguments | None = None,
        *positional: Any,
        teacher_model: nn.Module | str | os.PathLike[str] | Teacher | None = None,
        teacher_processing_class: ProcessingClass | Sequence[ProcessingClass | None] | None = None,
        task: Task | str | None = None,
        objectives: Objectives = None,
        on_policy: OnPolicy | None = None,
        distiller: Distiller | None = None,
        **keywords: Any,
    ) -> None:
        _check_keywords(keywords, type(self))
        given = dict(zip(_POSITIONAL, positional, strict=False)) | keywords
        checks.check_one_gpu_a_process(args, model)
        self._teacher_processing_class = teacher_processing_class
        self._task_setting = task
        self._teacher_setting = teacher_model
        self._objectives_setting = objectives
        self._on_policy = on_policy
        self._blend_is_ours = distiller is None
        # Whether the base trainer computes its loss in a way of its own.
        self._overrides_loss = _function(super().compute_loss) is not Trainer.compute_loss
        self._columns_given = set(columns.columns_of(given.get("train_dataset")))
        self._terms = RunningTerms()
        self._blend_at_start: dict[str, float] = {}  # of what was changed while the training ran
        self._readers: list[tuple[Any, bool, LabelReader]] = []  # a dataset, whether it trains, and its labels' reader
        # transformers' own trainers take model and data as they are, so everything is checked before they make a folder
        # or a repository; what this draws from the random generators is undone by Trainer's own seeding. A base trainer
        # of another make may first load the model, wrap it, or make inputs and labels of the data.
        checks_first = False
        if model is not None and _is_of_transformers(super().__init__):
            checks_first = True
            self.distiller = make_distiller(self, model, args, given.get("processing_class"), distiller)
            columns.check_datasets(self, model, args, given)
        folder = (args and args.output_dir) or "tmp_trainer"  # Trainer's own default
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

    def _finish_init(self, distiller: Distiller | None, given: Keywords, *, makes_distiller: bool) -> None:
        checks.check_one_gpu_a_process(self.args, self.model)
        checks.check_no_sequence_parallelism(self)
        if makes_distiller:
            with random_state_kept():
                self.distiller = make_distiller(self, self.model, self.args, self.processing_class, distiller)
            # A base trainer of another make may have prepared the data, and chosen a collator that makes labels.
            prepared = {name: getattr(self, name) for name in ("train_dataset", "eval_dataset", "data_collator")}
            chosen = prepared if not _is_of_transformers(super().__init__) else {}
            columns.check_datasets(self, self.model, self.args, {**given, **chosen})
        self._base_loss_is_scaled = getattr(self, "loss_is_scaled_for_ga", None)  # older versions have none
        self.loss_is_scaled_for_ga = True
        self._settings_in_use = settings.settings_of(self.args)
        self._given_optimizers = self.optimizer, self.lr_scheduler  # of the user; None: the arguments choose them
        checks.check_on_policy(self)
        if self.distiller.uses_labels and self.compute_loss_func is None and not self._overrides_loss:
            check_trainable_head(unwrapped(self.model))
        self.distiller.to(self.accelerator)
        columns.collate_answer_masks(self, *columns.datasets_of(self))
        has_teacher_columns = columns.has_teacher_columns(self)
        checks.check_augmentation(self.data_collator, self.distiller, has_teacher_columns=has_teacher_columns)
        if self._teacher_processing_class is not None or has_teacher_columns:
            self.data_collator = teacher_inputs_collator(self.data_collator, self._teacher_processing_class)
        if self.distiller.teacher is not None:
            self.data_collator = self.distiller.teacher.wrap_collator(self.data_collator)
        columns.warn_of_unread_columns(self)
        if self.is_world_process_zero():
            checks.warn_of_adapters(self.model)

    # Data loaders: the columns of student and teacher, and labels as the student numbers them.

    @property
    def _base_chooses_columns(self) -> bool:
        """Whether the base trainer chooses its columns itself, as TRL's do: then it reads the masks of answers too."""
        return _function(super()._set_signature_columns_if_needed) is not Trainer._set_signature_columns_if_needed

    def _set_signature_columns_if_needed(self) -> None:
        is_first = self._signature_columns is None
        super()._set_signature_columns_if_needed()
        if not is_first:
            return
        teacher = self.distiller.teacher if hasattr(self, "distiller") else None  # a base trainer may be making it
        added = [] if teacher is None else columns.read_by(teacher)
        added += ANSWER_MASKS if self._reads_answer_masks else ()
        known = self._signature_columns or []
        self._signature_columns = known + [name for name in added if name not in known]

    def get_train_dataloader(self) -> DataLoader:
        """As the trainer's own, with the labels read as the student numbers them."""
        with columns.reading_labels(self, self.train_dataset, columns.TRAINED_ON) as reader:
            if reader is not None and self.distiller.uses_labels:
                self.distiller.task.learn_names(reader.names)
            loader = super().get_train_dataloader()
        self._batches_are_made = self.is_in_train
        return loader

    def get_eval_dataloader(self, eval_dataset: str | Dataset[Example] | None = None) -> DataLoader:
        """As the trainer's own, without augmentation, and with the labels read as the student numbers them."""
        data: Any = self.eval_dataset if eval_dataset is None else eval_dataset
        named = isinstance(data, str)  # one of several
        with self._ready_to_evaluate(None if named else data):
            read: Any = self.eval_dataset[data] if named else data
            with columns.reading_labels(self, read, columns.EVALUATED_ON):
                return super().get_eval_dataloader(eval_dataset)

    def get_test_dataloader(self, test_dataset: Dataset[Example]) -> DataLoader:
        """As `get_eval_dataloader`."""
        with self._ready_to_evaluate(test_dataset), columns.reading_labels(self, test_dataset, columns.EVALUATED_ON):
            return super().get_test_dataloader(test_dataset)

    @contextlib.contextmanager
    def _ready_to_evaluate(self, data: Data | None) -> Iterator[None]:
        """Follow changed settings, and use the collator without augmentation."""
        settings.follow_settings(self)
        columns.collate_answer_masks(self, data)
        kept, self.data_collator = self.data_collator, without_augmentation(self.data_collator)
        try:
            yield
        finally:
            self.data_collator = kept

    # A training, and its optimizer steps.

    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,
        trial: Trial | Keywords | None = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> TrainOutput:
        """As the trainer's own.

        With `resume_from_checkpoint=True`, a checkpoint that was not written to the end (a full disk, a killed process)
        is passed over. Settings that differ from those of the checkpoint are logged.

        Raises:
            SettingError: if the checkpoint, or each one in the output folder, was not written to the end.
        """
        checkpoint = interruptions.checkpoint_to_resume(self, resume_from_checkpoint)
        self._last_checkpoint = checkpoint if isinstance(checkpoint, str) else None
        if self._last_checkpoint is not None:
            interruptions.warn_of_other_settings(self, self._last_checkpoint)
        try:
            return super().train(checkpoint, trial, ignore_keys_for_eval)
        except KeyboardInterrupt as interrupt:
            if self.is_world_process_zero():
                interruptions.add_note(interrupt, interruptions.how_to_go_on(self))
            raise

    def _inner_training_loop(self, *positional: Any, **keywords: Any) -> TrainOutput:
        settings.follow_settings(self)
        self._blend_at_start = {}
        self._terms = RunningTerms(filters=self.args.logging_nan_inf_filter)  # nothing of an earlier run
        self._step, self._micro_batches_left, self._is_plain = None, 0, None
        self._is_base_step, self._base_outputs_serve = False, None
        # An evaluation before the training marks the model as prepared without DDP, and no gradient would be averaged.
        if self.accelerator.distributed_type.startswith("MULTI_") and self.model_wrapped is self.model:
            forget_preparation(self.accelerator.unwrap_model(self.model, keep_fp32_wrapper=False))
        try:
            with registered_callback(self):
                return super()._inner_training_loop(*positional, **keywords)
        finally:
            self._batches_are_made = False

    def get_batch_samples(
        self, epoch_iterator: Iterator[Batch], num_batches: int, device: torch.device
    ) -> tuple[list[Batch], Count]:
        """The micro-batches of the next optimizer step, whose rows are counted before any forward."""
        settings.follow_settings(self)
        batches, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        if self._on_policy is not None and batches:
            checks.check_on_policy(self)
            batches = [
                self._on_policy(
                    batch,
                    self.model,
                    step=self.state.global_step,
                    micro_batch=micro_batch,
                    process=self.accelerator.process_index,
                    progress=self.state.global_step / self.state.max_steps,
                )
                for micro_batch, batch in enumerate(batches)
            ]
            num_items = self._get_num_items_in_batch(batches, device)
        self._is_base_step = self.distiller.blending.labels_alone and bool(batches) and self._belongs_to_base(batches)
        # The terms are divided by the rows of the whole optimizer step.
        self.loss_is_scaled_for_ga = self._base_loss_is_scaled if self._is_base_step else True
        if self._is_base_step:
            self._step, self._micro_batches_left = None, 0
            return batches, num_items
        if 0 < len(batches) < num_batches and not has_length(self.callback_handler.train_dataloader):
            # Trainer would make no step of them, and leave their gradients to the first step of the next epoch.
            logger.warning(
                f"The epoch's last {len(batches)} micro-batches are too few for a step of {num_batches}; they are "
                "left out. (The dataset has no length: with one, they would be a step of their own.)"
            )
            return [], None
        if batches:
            # DeepSpeed makes its step within the backward: the gradient is known too late.
            deepspeed = self.accelerator.distributed_type == DistributedType.DEEPSPEED
            self._step = self._begin_step(batches, check_at="loss" if deepspeed else "gradient")
            self._micro_batches_left = len(batches)
        return batches, num_items

    def _belongs_to_base(self, batches: list[Batch]) -> bool:
        """Whether the loss of these micro-batches is left to the base trainer, where nothing is compared throughout.

        It is if the task finds no labels that it could count: the class is not known, or its loss needs no labels.
        """
        return not all(map(self.distiller.finds_labels, batches))

    def _begin_step(self, batches: list[Batch], *, check_at: CheckAt = "loss") -> Step:
        if self._is_plain is None:
            self._is_plain = not self.distiller.blending.ever_active()
        state = self.state
        return self.distiller.begin_step(
            batches,
            self.accelerator,
            progress=state.global_step / state.max_steps if state.max_steps > 0 else 0.0,
            same_batch=self.get_tp_size(),
            finite_check="off" if self._is_plain else check_at,
        )

    def training_step(self, model: nn.Module, inputs: Keywords, num_items_in_batch: Count = None) -> Tensor:
        """As `Trainer`'s; after the last micro-batch, what the objectives learn has its gradients averaged."""
        self._in_training_step = True  # a model may keep its evaluation mode in training, so its mode does not tell
        try:
            loss = super().training_step(model, inputs, num_items_in_batch)
        finally:
            self._in_training_step = False
        if self._micro_batches_left == 0 and self.accelerator.num_processes > 1:
            self.distiller.reduce_gradients(self.model_wrapped, self.accelerator)
        return loss

    def compute_loss(
        self, model: nn.Module, inputs: Batch, return_outputs: bool = False, num_items_in_batch: Count = None
    ) -> Loss:
        """In training, the blend; in evaluation, the plain task loss, as `Trainer`'s.

        Called outside of the training loop it takes the batch for a whole optimizer step.
        """
        if not (model.training or self._in_training_step):
            return self._evaluation_loss(model, inputs, return_outputs, num_items_in_batch)
        in_loop = self._step is not None and self._micro_batches_left > 0
        is_plain = self._is_base_step or (self.distiller.blending.labels_alone and not in_loop)
        if is_plain and (self._is_base_step or self._belongs_to_base([inputs])):
            return self._base_loss(model, inputs, return_outputs, num_items_in_batch)
        step = self._step if in_loop and self._step is not None else self._begin_step([inputs])
        batch = self.distiller.with_task_labels(inputs) if self.distiller.label_aliases else inputs
        found = self.distiller(
            model,
            batch,
            step,
            forward=partial(self._head_loss, batch, step, num_items_in_batch),
            keep_logits=return_outputs,
            fuse_labels=self.compute_loss_func is None and not self._overrides_loss,
            label_smoothing=self.args.label_smoothing_factor,
        )
        loss = found.loss
        if in_loop:
            self._terms.add(
                found.terms,
                loss=loss,
                counted=self.distiller.task.counted(batch) if LABELS in found.terms else {},
                begins_step=self._micro_batches_left == step.micro_batches,
            )
            self._micro_batches_left -= 1
            if TRAINER_MAY_DIVIDE and divides_the_loss(self, num_items_in_batch):
                loss = loss * self.current_gradient_accumulation_steps
        return (loss, found.outputs) if return_outputs else loss

    def _head_loss(
        self, batch: Batch, step: Step, num_items: Count, model: nn.Module, inputs: Keywords, wants_outputs: bool
    ) -> tuple[Tensor, Outputs | None]:
        """Return the base trainer's loss over this micro-batch, as its own mean, and the outputs of the same forward.

        TRL's `SFTTrainer` returns the outputs of a second forward, made without gradient: a divergence of them would
        be logged and teach nothing. So the first micro-batch of a training shows whether `compute_loss` calls the
        student once, with gradient. If it does not, the outputs are None, and the distiller makes a forward of its own
        for what is compared.
        """
        task, is_trainer = self.distiller.task, step.is_whole and step.weights[LABELS] == 1
        if num_items is not None and not is_trainer:
            # Trainer takes some causal heads (GPT-2's) for ones that do not shift, and counts one label too many.
            labels = batch.get("shift_labels")
            if labels is None:
                shifts = self._loss_shifts_labels or task.shifts_labels
                labels = batch["labels"][..., 1:] if shifts else batch["labels"]
            num_items = labels.ne(IGNORED).sum().clamp(min=1)
        observes = self._overrides_loss and wants_outputs and self._base_outputs_serve is not False
        with contextlib.ExitStack() as stack:
            # Trainer multiplies by the number of processes, which not every head accounts for.
            stack.callback(setattr, self.args, "average_tokens_across_devices", self.args.average_tokens_across_devices)
            self.args.average_tokens_across_devices = False
            if task.has_probabilities(batch):
                stack.enter_context(loss_of_probabilities(self, batch))
            with_gradient, states = stack.enter_context(observed_forwards(model)) if observes else ([], [])
            wants_outputs = observes or not self._overrides_loss
            found: Any = super().compute_loss(model, inputs, return_outputs=wants_outputs, num_items_in_batch=num_items)
        if not wants_outputs:
            return found, None
        loss, outputs = found
        if not observes:
            return loss, outputs
        if self._base_outputs_serve is None:
            self._base_outputs_serve = with_gradient == [True] and carries_gradient(outputs)
        if self._base_outputs_serve:
            return loss, outputs
        if states:  # what was drawn for outputs is not drawn in later steps, so that a resumed run draws the same
            set_random_state(states[-1])
        return loss, None

    def _base_loss(self, model: nn.Module, inputs: Batch, return_outputs: bool, num_items: Count) -> Loss:
        """The base trainer's own loss; if labels are missing that the task would count, its error is explained."""
        try:
            return super().compute_loss(model, self.distiller.student_inputs(inputs), return_outputs, num_items)
        except ValueError as error:
            try:
                self.distiller.task.require_labels(inputs)
            except DataError as missing:
                raise missing from error
            raise

    def _users_code_reads_labels(self, compute_loss_func: Callable[..., Tensor] | None) -> bool:
        """Whether the user's own code reads the labels: `compute_loss_func`, or an override of `compute_loss`."""
        overridden = self._overrides_loss or type(self).compute_loss is not DistillationMixin.compute_loss
        return compute_loss_func is not None or overridden

    # The optimizer holds the student and what the objectives learn.

    def create_optimizer(self, *positional: Any, **keywords: Any) -> Optimizer:
        """As `Trainer`'s, with a group for what the objectives learn."""
        optimizer = super().create_optimizer(*positional, **keywords)
        self.distiller.learned.add_to(
            optimizer,
            learning_rate=setting(self.args, "projection_learning_rate"),
            weight_decay=self.args.weight_decay,
            has_scheduler=self.lr_scheduler is not None,
        )
        return optimizer

    def _clip_grad_norm(self, model: nn.Module) -> Tensor | float | None:
        return super()._clip_grad_norm(self._with_learned(model))

    def _get_grad_norm(self, model: nn.Module, *positional: Any, **keywords: Any) -> float | None:
        """As `Trainer`'s, before the optimizer's step: a gradient or a loss that is not finite is an error here."""
        norm = super()._get_grad_norm(self._with_learned(model), *positional, **keywords)
        if self._step is not None:
            self._step.finite_check.look_at_gradient(norm)
        return norm

    def _with_learned(self, model: nn.Module) -> nn.Module | _WithLearned:
        return _WithLearned(model, self.distiller.learned) if self.distiller.learned else model

    # Evaluation.

    def _evaluation_loss(self, model: nn.Module, inputs: Batch, return_outputs: bool, num_items: Count) -> Loss:
        inputs = self.distiller.student_inputs(inputs)
        if not self.distiller.task.is_known:
            return super().compute_loss(model, inputs, return_outputs, num_items)
        wants_outputs = return_outputs or self._teacher_metrics is not None
        if self.accelerator.num_processes > 1:  # else Trainer multiplies the loss by the processes, for most heads
            num_items = None
        with loss_of_probabilities(self, inputs):
            found = super().compute_loss(model, inputs, return_outputs=wants_outputs, num_items_in_batch=num_items)
        if not wants_outputs:
            return found
        loss, self._evaluated_outputs = found
        return found if return_outputs else loss

    def prediction_step(
        self,
        model: nn.Module,
        inputs: Keywords,
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
        **keywords: Any,
    ) -> Prediction:
        """As the trainer's own, on the student's columns; `evaluate_with_teacher` also runs the teacher."""
        self._evaluated_outputs = None
        each_once = self.gather_function if isinstance(self.gather_function, EachOnce) else None
        if each_once is not None:
            each_once.begin(inputs)
        compares = self._teacher_metrics is not None and self.distiller.task.can_compare(inputs)
        if self.distiller.task.is_known:
            check_evaluated(self, inputs, compares=compares)
        own_inputs = self.distiller.student_inputs(inputs)
        found = super().prediction_step(model, own_inputs, prediction_loss_only, ignore_keys, **keywords)
        if compares:
            compare_with_teacher(self, model, inputs, found)
        if found[0] is not None:
            warn_of_infinite_loss(self, inputs)
        self._evaluated_outputs = None
        if each_once is not None and found[0] is not None:
            each_once.loss_is_next()
        return found

    def evaluation_loop(
        self,
        dataloader: DataLoader,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """As the trainer's own, each example once; `evaluate_with_teacher` adds metrics of the teacher.

        These are `teacher_agreement`, `divergence`, and a `teacher_<metric>` beside each metric of `compute_metrics`.
        """
        prefix, given = metric_key_prefix, (description, prediction_loss_only, ignore_keys, metric_key_prefix)
        with each_example_once(self, dataloader):
            if not setting(self.args, "evaluate_with_teacher"):
                return super().evaluation_loop(dataloader, *given)
            loss_only = self.args.prediction_loss_only if prediction_loss_only is None else prediction_loss_only
            with teacher_evaluated(self, prefix, loss_only) as found:
                output = super().evaluation_loop(dataloader, *given)
        measured = found.read(on_values=self.distiller.task.on_values)
        if not measured and output.num_samples:
            self._warn_once(
                f"evaluate_with_teacher=True: there is no {prefix}_divergence and nothing else of the teacher. No row "
                f"of these batches counts; a {self.distiller.task} head may need labels to know its rows."
            )
        passed = found.passed()
        if passed is not None:
            self._warn_once(passed, "passed")
        named = {f"{prefix}_{name}": value for name, value in measured.items()}
        return output._replace(metrics={**(output.metrics or {}), **named})

    def _warn_once(self, message: str, about: str | None = None) -> None:
        """Log a warning in the main process, unless it has been given (or another about the same)."""
        about = message if about is None else about
        if about not in self._warnings_given and self.is_world_process_zero():
            logger.warning(message)
        self._warnings_given |= {about}

    # Checkpoints.

    def _save_checkpoint(self, model: nn.Module, trial: Trial | Keywords | None) -> None:
        folder = Path(self._get_output_dir(trial), f"checkpoint-{self.state.global_step}")
        if self.args.should_save:  # the state of an earlier run would make half a checkpoint look whole
            (folder / interruptions.STATE).unlink(missing_ok=True)
        try:
            super()._save_checkpoint(model, trial)
        except (OSError, RuntimeError, SafetensorError) as error:  # the latter two write files, and name none
            if self.args.should_save and folder.is_dir() and not interruptions.is_whole(folder):
                interruptions.add_note(
                    error,
                    f"Saving {folder} failed, and it is not whole: resume_from_checkpoint=True passes it over. "
                    + interruptions.how_to_go_on(self),
                )
            raise
        self._last_checkpoint = str(folder)

    def _save(self, *positional: Any, **keywords: Any) -> None:
        with picklable(self.args):  # `Trainer` pickles them
            super()._save(*positional, **keywords)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self.args.should_save:
            interruptions.save_distillation(self, output_dir)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        self._load_student(resume_from_checkpoint, model)
        interruptions.load_distillation(self, resume_from_checkpoint)

    def _load_student(self, checkpoint: str, model: nn.Module | None = None) -> None:
        """Load the student's weights alone, also if the checkpoint's names are not those of its state."""
        super()._load_from_checkpoint(checkpoint, model)
        _load_renamed(self.model if model is None else model, checkpoint)

    def _load_best_model(self) -> None:
        super()._load_best_model()
        best = self.state.best_model_checkpoint
        if best is None:
            return
        _load_renamed(self.model, best)
        if os.path.isfile(os.path.join(best, STATE_FILE)):
            self.distiller.learned.load(best)

    # Hyperparameter search: a new student, new settings.

    def call_model_init(self, trial: Trial | Keywords | None = None) -> nn.Module:
        """As `Trainer`'s; the distiller is bound to the new student."""
        model = super().call_model_init(trial)
        if hasattr(self, "distiller"):
            self.distiller.bind(model)
            self.distiller.learned.to(self.accelerator)
        return model

    def _hp_search_setup(self, trial: Trial | Keywords | None) -> None:
        super()._hp_search_setup(trial)
        settings.follow_settings(self)

    def hyperparameter_search(self, *positional: Any, **keywords: Any) -> BestRun | list[BestRun]:
        """As `Trainer`'s. Without `hp_space` a distillation searches alpha, the temperature and the learning rate.

        Without `compute_objective`, the figures of `evaluate_with_teacher` are not added to the user's metrics.

        Raises:
            SettingError: if the space has a name that is no setting.
        """
        bound = search_arguments(self, *positional, **keywords)
        return super().hyperparameter_search(*bound.args[1:], **bound.kwargs)

    # Logs, card and Hub.

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As `Trainer`'s, with one figure a term beside `loss`, reduced over processes."""
        if "loss" in logs:
            terms = self._terms.read(self.accelerator, same_batch=self.get_tp_size())
            logs = {"loss": logs["loss"], **terms, **scheduled_values(self), **logs}
            warn_if_lost(self, logs)
        super().log(logs, start_time)

    create_model_card = publishing.write_card
    push_to_hub = publishing.push  # type: ignore[assignment]  # Trainer too may return None, or a future
    _push_from_checkpoint = publishing.push_from_checkpoint

    def __repr__(self) -> str:
        return f"{type(self).__name__}({type(unwrapped(self.model)).__name__}, {self.distiller!r})"


class _WithLearned:
    """The parameters of the student and of what the objectives learn, for a norm over both."""

    def __init__(self, model: nn.Module, learned: Learned) -> None:
        self._model, self._learned = model, learned

    def parameters(self) -> Iterator[nn.Parameter]:
        return chain(self._model.parameters(), self._learned.parameters())

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)


def _load_renamed(model: nn.Module, checkpoint: str) -> None:
    with random_state_kept():
        state = renamed_state(model, checkpoint)
    if state is not None:
        model.load_state_dict(state, strict=True)


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


def _is_of_transformers(init: Callable[..., None]) -> bool:
    """Return whether the next constructor is that of `Trainer` or `Seq2SeqTrainer` itself."""
    return _function(init) in (Trainer.__init__, Seq2SeqTrainer.__init__)


def _function(method: Callable[..., Any]) -> Callable[..., Any] | None:
    """Return the function of a bound method."""
    return getattr(method, "__func__", None)


def _known_keywords(trainer_class: type) -> set[str]:
    parameters = [
        inspect.signature(vars(one)["__init__"]).parameters for one in trainer_class.__mro__ if "__init__" in vars(one)
    ]
    return {name for known in parameters for name in known} - _NO_KEYWORDS


def _check_keywords(given: Iterable[str], trainer_class: type) -> None:
    """Raise TypeError for other names of the keywords, before a missing one is reported under its own name."""
    for name in set(given) & set(_KEYWORD_ALIASES) - _known_keywords(trainer_class):
        raise TypeError(
            f"{trainer_class.__name__}() got an unexpected keyword argument {name!r}. Did you mean "
            f"{_KEYWORD_ALIASES[name]!r}?"
        )


def _keyword_hint(error: TypeError, given: Iterable[str], trainer_class: type) -> str:
    """A sentence on the keyword that was probably meant, where one of these is not known; empty for other errors."""
    found = re.search(r"unexpected keyword argument '(\w+)'", str(error))
    if found is None:
        return ""
    name, meant = found[1], SETTING_ALIASES.get(found[1], found[1])
    if meant in DistillationArguments.__dataclass_fields__:
        return (
            f" {meant} is a setting: pass args=DistillationArguments(..., {meant}=...). A base trainer with its own "
            "arguments needs a class of both: class Args(DistillationSettings, ItsArguments)."
        )
    if name not in given:
        return ""
    return did_you_mean(name, _known_keywords(trainer_class), _KEYWORD_ALIASES)
