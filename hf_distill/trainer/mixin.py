"""The one callback of a distilling trainer. It is registered while a training runs, and at no other time.

So `trainer.callback_handler.callbacks` holds what it holds in a `Trainer`, and a script may replace that list.
"""

from __future__ import annotations

import contextlib
import inspect
import logging
import math
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import DistributedType
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel as DDP
from transformers import Seq2SeqTrainer, Trainer, TrainerCallback
from transformers.trainer_utils import has_length

from hf_distill._compat import divides_the_loss, renamed_state
from hf_distill._utils import random_state, random_state_kept, set_random_state
from hf_distill.blend import LABELS, SETTING_ALIASES, DistillerOutput, Objectives, compares_nothing, uses_teacher
from hf_distill.ddp import Counts, forget_gradients_but
from hf_distill.distiller import Distiller, refuse_head_for_a_teacher
from hf_distill.errors import DataError, SettingError, did_you_mean
from hf_distill.learned import STATE_FILE, load_state, save_state
from hf_distill.models.packing import PackingCheck
from hf_distill.objectives.base import cross_entropy_of_probabilities
from hf_distill.signals import Needs
from hf_distill.tasks import make_task
from hf_distill.tasks.infer import task_or_unknown, unwrapped
from hf_distill.tasks.unknown import UnknownTask
from hf_distill.teachers import as_teacher
from hf_distill.trainer.arguments import DistillationArguments, blend_of, setting
from hf_distill.trainer.checks import (
    refuse_data_parallel,
    refuse_other_student,
    refuse_other_views,
    refuse_sequence_parallel,
    refuse_two_blends,
    refuse_values_without_teacher,
)
from hf_distill.trainer.collators import teacher_inputs_collator
from hf_distill.trainer.columns import ColumnsMixin, columns_of
from hf_distill.trainer.evaluation import EachOnce, TeacherMetrics, TeacherPredictions, examples_counted
from hf_distill.trainer.interruptions import InterruptionMixin
from hf_distill.trainer.labels_mean import own_num_items, unscaled
from hf_distill.trainer.publishing import PublishingMixin
from hf_distill.trainer.search import SearchMixin
from hf_distill.trainer.settings import SettingsMixin


class TrainingCallback(TrainerCallback):
    """After each optimizer step the teacher learns of it; before each epoch the data collator does.

    Args:
        trainer: the trainer whose `distiller` and `data_collator` are called.
    """

    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer
        self._epoch: int | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **keywords: Any) -> None:
        self._epoch = None
        self._trainer.distiller.learned.zero_grad()

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **keywords: Any) -> None:
        """Call `data_collator.set_epoch(epoch)`, if it has one, so that random augmentation can be resumed."""
        # state.epoch is a share of the epoch, and no count for streams: it is trusted where a run begins only.
        self._epoch = int(state.epoch or 0) if self._epoch is None else self._epoch + 1
        set_epoch = getattr(self._trainer.data_collator, "set_epoch", None)
        if set_epoch is not None:
            set_epoch(self._epoch)

    def on_step_end(self, args: Any, state: Any, control: Any, **keywords: Any) -> None:
        """Let the teacher follow the student, and clear the gradients of projections: `Trainer` clears its model's."""
        self._trainer.distiller.after_step(self._trainer.model)
        self._trainer.distiller.learned.zero_grad()


@contextlib.contextmanager
def registered_callback(trainer: Any) -> Iterator[None]:
    """Register the callback, after those of the user, for as long as the training runs."""
    callback = TrainingCallback(trainer)
    trainer.add_callback(callback)
    try:
        yield
    finally:
        if callback in trainer.callback_handler.callbacks:
            trainer.remove_callback(callback)


class RunningTerms:
    """The mean of each term over the optimizer steps since the last log, and counts of examples since then.

    As `Trainer`'s own `loss`: micro-batches of a step are summed, steps and processes averaged.

    Args:
        filters: leave out a micro-batch whose loss is not finite, as `Trainer` does for `loss`
            (`logging_nan_inf_filter`): the mean of the steps before stands in for it.
    """

    def __init__(self, *, filters: bool = False) -> None:
        self._filters = filters
        self._sums: dict[str, Tensor] = {}
        self._steps: dict[str, int] = {}
        self._counts: dict[str, Tensor] = {}

    def add(
        self, terms: Mapping[str, Tensor], *, loss: Tensor, counted: Mapping[str, Tensor], begins_step: bool
    ) -> None:
        """Add a micro-batch.

        Args:
            terms: each term of the loss.
            loss: the weighted sum of the terms.
            counted: numbers of examples, by the name they are logged under.
        """
        finite = loss.detach().isfinite()
        for name, value in terms.items():
            if name not in self._sums:
                self._sums[name], self._steps[name] = torch.zeros_like(value, dtype=torch.float32), 0
            self._steps[name] += begins_step
            if self._filters:
                value = torch.where(finite, value.detach(), self._sums[name] / max(1, self._steps[name]))
            self._sums[name] += value.detach()
        for name, count in counted.items():
            self._counts[name] = self._counts.get(name, torch.zeros_like(count)) + count

    def read(self, accelerator: Any, *, same_batch: int = 1) -> dict[str, float]:
        """`loss/<term>` → mean and name → count, over all processes; then begin again.

        Args:
            same_batch: how many processes see the same batch (tensor parallelism).
        """
        if not self._sums:
            return {}
        means = [total / max(1, self._steps[name]) for name, total in self._sums.items()]
        counts = [count.float().to(means[0].device) for count in self._counts.values()]
        reduced = accelerator.reduce(torch.stack(means + counts), reduction="mean").tolist()
        names = [f"loss/{name}" for name in self._sums]
        found = dict(zip(names, reduced, strict=False))
        for name, mean in zip(self._counts, reduced[len(names) :], strict=True):
            found[name] = round(mean * accelerator.num_processes / same_batch)
        self._sums, self._steps, self._counts = {}, {}, {}
        return found


if TYPE_CHECKING:
    _Trainer = Trainer
else:
    _Trainer = object
logger = logging.getLogger(__name__)


class EvaluationMixin(_Trainer):
    """Evaluation steps on the student's columns, and with `evaluate_with_teacher` a second look with the teacher."""

    distiller: Any
    args: Any
    _teacher_metrics: TeacherMetrics | None = None
    _teacher_predictions: TeacherPredictions | None = None
    _warnings_given: frozenset[str] = frozenset()
    _evaluated_outputs: Any = None
    _packing: PackingCheck | None = None
    _loss_of_probabilities: Any
    _follow_settings: Any
    _collate_answer_masks: Any

    @property
    def _progress(self) -> float:
        """How much of the training is done, 0 → 1."""
        return self.state.global_step / self.state.max_steps if self.state.max_steps > 0 else 0.0

    def get_eval_dataloader(self, *positional: Any, **keywords: Any) -> Any:
        """As the trainer's own, of data as they are: a collator that augments says what evaluates."""
        with self._ready_to_evaluate(*positional, *keywords.values()):
            return super().get_eval_dataloader(*positional, **keywords)

    def get_test_dataloader(self, *positional: Any, **keywords: Any) -> Any:
        """As `get_eval_dataloader`."""
        with self._ready_to_evaluate(*positional, *keywords.values()):
            return super().get_test_dataloader(*positional, **keywords)

    @contextlib.contextmanager
    def _ready_to_evaluate(self, *datasets: Any) -> Iterator[None]:
        self._follow_settings()
        self._collate_answer_masks(*(data for data in datasets if not isinstance(data, str)))
        kept, clean = self.data_collator, getattr(self.data_collator, "for_evaluation", None)
        self.data_collator = kept if clean is None else clean()
        try:
            yield
        finally:
            self.data_collator = kept

    def _evaluation_loss(self, model: Any, inputs: Any, return_outputs: bool, num_items: Any) -> Any:
        inputs = self.distiller.student_inputs(inputs)
        if isinstance(self.distiller.task, UnknownTask):
            return super().compute_loss(model, inputs, return_outputs, num_items)
        wants_outputs = return_outputs or self._teacher_metrics is not None
        if self.accelerator.num_processes > 1:  # else Trainer multiplies the loss by the processes, for most heads
            num_items = None
        with self._loss_of_probabilities(inputs):
            found = super().compute_loss(model, inputs, return_outputs=wants_outputs, num_items_in_batch=num_items)
        if not wants_outputs:
            return found
        loss, self._evaluated_outputs = found
        return found if return_outputs else loss

    def prediction_step(self, model: Any, inputs: Any, *rest: Any, **keywords: Any) -> Any:
        """As the trainer's own, on the student's columns; with `evaluate_with_teacher`, the teacher is asked too."""
        self._evaluated_outputs = None
        each_once = self.gather_function if isinstance(self.gather_function, EachOnce) else None
        if each_once is not None:
            each_once.begin(inputs)
        if not isinstance(self.distiller.task, UnknownTask):
            self._check_packing(inputs)
        found = super().prediction_step(model, self.distiller.student_inputs(inputs), *rest, **keywords)
        self._compare_with_teacher(model, inputs, found)
        self._evaluated_outputs = None
        if each_once is not None and found[0] is not None:
            each_once.loss_is_next()
        return found

    def _check_packing(self, inputs: Any) -> None:
        """As a training step does, of the models that are asked here: a loss of texts that see others is not theirs."""
        student = unwrapped(self.model)
        if self._packing is None or self._packing.student is not student:
            self._packing = PackingCheck(student)
        compares = self._compares(inputs)
        self._packing([inputs], self.distiller.task, self.distiller.teacher, Needs(logits=compares))
        if compares:
            self.distiller.check_padding([inputs], self.distiller.teacher, self.accelerator)

    def _compares(self, inputs: Any) -> bool:
        return self._teacher_metrics is not None and self.distiller.task.can_compare(inputs)

    @torch.no_grad()
    def _compare_with_teacher(self, model: Any, inputs: Any, found: Any) -> None:
        if self._teacher_metrics is None or not self._compares(inputs):
            return
        batch = self.distiller.prepare(self.distiller.with_task_labels(self._prepare_inputs(inputs)))
        outputs = self._evaluated_outputs
        if outputs is None:  # no labels, or generation: the forward that is compared has not been made
            outputs = model(**self.distiller.student_inputs(batch, labels=False))
        teacher = self._teacher_metrics.add(self.distiller, outputs, batch)
        if self._teacher_predictions is not None and found[2] is not None:
            self._teacher_predictions.add(self.distiller, teacher, outputs, found)

    def evaluation_loop(self, *positional: Any, **keywords: Any) -> Any:
        """As the trainer's own, each example once; `evaluate_with_teacher` adds what it says of the teacher.

        That is `teacher_agreement`, `divergence`, and a `teacher_<metric>` beside each metric of `compute_metrics`.
        """
        bound = inspect.signature(Trainer.evaluation_loop).bind(self, *positional, **keywords)
        bound.apply_defaults()
        asked = bound.arguments
        with self._each_example_once(asked["dataloader"]):
            if not setting(self.args, "evaluate_with_teacher"):
                return super().evaluation_loop(*positional, **keywords)
            prefix, loss_only = asked["metric_key_prefix"], asked["prediction_loss_only"]
            loss_only = self.args.prediction_loss_only if loss_only is None else loss_only
            with self._with_teacher(prefix, loss_only) as found:
                output = super().evaluation_loop(*positional, **keywords)
        measured = found.read(on_values=self.distiller.task.on_values)
        if not measured and output.num_samples:
            self._warn_once(
                f"evaluate_with_teacher=True: there is no {prefix}_divergence and nothing else of the teacher. No row "
                f"of these batches counts; a {self.distiller.task.kind} head may need labels to know its rows."
            )
        passed = found.passed()
        if passed is not None:
            self._warn_once(passed, "passed")
        named = {f"{prefix}_{name}": value for name, value in measured.items()}
        return output._replace(metrics={**(output.metrics or {}), **named})

    @contextlib.contextmanager
    def _each_example_once(self, dataloader: Any) -> Iterator[None]:
        """In several processes, gather without the examples that fill up the last batches."""
        accelerator = self.accelerator
        gathers = getattr(self.gather_function, "func", self.gather_function)  # Trainer binds a setting to it
        keeps_all = gathers == accelerator.gather  # Seq2SeqTrainer's choice
        is_trainers = keeps_all or gathers == accelerator.gather_for_metrics
        alone = accelerator.num_processes == 1 or self.get_tp_size() > 1
        if alone or not is_trainers or self.args.eval_use_gather_object:
            yield
            return
        with examples_counted(dataloader) as counted:
            # As in one process, where nothing is cut off of a dataset without a length either.
            whole_batches = keeps_all or (counted is not None and not has_length(counted))
            self.gather_function = EachOnce(accelerator, counted, whole_batches=whole_batches)
            try:
                yield
            finally:
                self.gather_function = accelerator.gather_for_metrics

    @contextlib.contextmanager
    def _with_teacher(self, prefix: str, loss_only: bool) -> Iterator[TeacherMetrics]:
        """Ask the teacher about each batch, and compute the user's metrics of its predictions too."""
        gather = self.gather_function
        self._teacher_metrics = TeacherMetrics(
            gather if isinstance(gather, EachOnce) else self.accelerator.gather_for_metrics
        )
        compute_metrics, why_none = self.compute_metrics, None
        generates = isinstance(self, Seq2SeqTrainer) and self.args.predict_with_generate
        if compute_metrics is not None and not loss_only:
            if generates:
                why_none = "predict_with_generate=True: the metrics are of texts that only the student generates"
            elif self.args.batch_eval_metrics:
                why_none = "batch_eval_metrics=True: compute_metrics keeps sums of the student's batches"
            else:
                self._teacher_predictions = TeacherPredictions(self, gather, prefix)
                self.compute_metrics = self._teacher_predictions
        try:
            yield self._teacher_metrics
        finally:
            if self._teacher_predictions is not None:
                why_none = self._teacher_predictions.why_none
            self._teacher_metrics = self._teacher_predictions = None
            self.compute_metrics = compute_metrics
        if why_none is not None:
            self._warn_once(f"There is no {prefix}_teacher_<metric>: {why_none}.")

    def _warn_once(self, message: str, about: str | None = None) -> None:
        """Log a warning in the main process, unless it has been given (or another about the same)."""
        about = message if about is None else about
        if about not in self._warnings_given and self.is_world_process_zero():
            logger.warning(message)
        self._warnings_given |= {about}


TEACHER_FILE = "distill_teacher.safetensors"


class LearningMixin(_Trainer):
    """Trains `distiller.learned` with the student. Where nothing is learned it does nothing."""

    distiller: Any
    _micro_batches_left: int

    def create_optimizer(self, *positional: Any, **keywords: Any) -> Any:
        """As `Trainer`'s, with a group for what the objectives learn."""
        optimizer = super().create_optimizer(*positional, **keywords)
        learned = list(self.distiller.learned.parameters())
        held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        missing = [parameter for parameter in learned if id(parameter) not in held]
        if not missing:
            return optimizer
        if self.lr_scheduler is not None:
            raise SettingError(
                "the objectives learn projections, and the optimizer and the scheduler that were passed know nothing "
                "of them. Give the optimizer distiller.learned.parameters() too (pass distiller= to the trainer), or "
                "pass no scheduler."
            )
        group: dict[str, Any] = {"params": missing, "weight_decay": self.args.weight_decay}
        rate = setting(self.args, "projection_learning_rate")
        optimizer.add_param_group({**group, "lr": rate} if rate is not None else group)
        return optimizer

    def training_step(self, *positional: Any, **keywords: Any) -> Any:
        loss = super().training_step(*positional, **keywords)
        if self._micro_batches_left == 0:
            self.distiller.learned.synchronize(self.accelerator)
            if self.distiller.reached and self.model is not None and isinstance(self.model_wrapped, DDP):
                forget_gradients_but(self.model.parameters(), self.distiller.reached)
                self.distiller.reached = set()
        return loss

    def _clip_grad_norm(self, model: Any) -> Any:
        return super()._clip_grad_norm(self._with_learned(model))

    def _get_grad_norm(self, model: Any, *positional: Any, **keywords: Any) -> Any:
        return super()._get_grad_norm(self._with_learned(model), *positional, **keywords)

    def _with_learned(self, model: Any) -> Any:
        return _Together(model, self.distiller.learned) if self.distiller.learned else model

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self.args.should_save:
            self.distiller.learned.save(output_dir)
            state = self._teacher_state()
            if state:
                save_state(state, output_dir, TEACHER_FILE)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        self.distiller.learned.load(resume_from_checkpoint)
        if self._teacher_state():
            self.distiller.teacher.load_state(
                load_state(resume_from_checkpoint, TEACHER_FILE, what="the moving teacher")
            )
        elif os.path.isfile(os.path.join(resume_from_checkpoint, TEACHER_FILE)):
            raise SettingError(
                f"{resume_from_checkpoint} was saved with a teacher that training changes (it has {TEACHER_FILE}), and "
                "this run's stays. Pass the same kind of teacher, or start anew from the saved student."
            )

    def _load_best_model(self) -> None:
        super()._load_best_model()
        best = self.state.best_model_checkpoint
        if best is not None and os.path.isfile(os.path.join(best, STATE_FILE)):
            self.distiller.learned.load(best)

    def _teacher_state(self) -> dict[str, Any]:
        """Of a teacher that training changes (an average of students); empty for one that stays."""
        state = getattr(self.distiller.teacher, "state", None)
        return {} if state is None else state()


class _Together:
    """The parameters of the student and of what is learned, for a norm over both."""

    def __init__(self, model: Any, learned: Any) -> None:
        self._model, self._learned = model, learned

    def parameters(self) -> Iterator[nn.Parameter]:
        return chain(self._model.parameters(), self._learned.parameters())

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)


class LossMixin(_Trainer):
    """Training steps on the blend; in evaluation, the plain task loss."""

    distiller: Any
    _counts: Counts | None = None
    _micro_batches = _micro_batches_left = 0
    _step_progress = 0.0
    _in_training_step = False
    _warned_of_loss = False
    _is_plain: bool | None = None  # labels alone, at every moment: `Trainer`'s own training
    _is_base_step = False  # the current optimizer step is the base trainer's own
    _base_loss_is_scaled: bool | None = None  # what a base trainer has set `loss_is_scaled_for_ga` to
    _base_outputs_serve: bool | None = None  # whether they carry the gradient of one forward; None: not known yet
    _terms: RunningTerms
    _progress: float
    _evaluation_loss: Any
    _follow_settings: Callable[[], None]
    _blend_at_start: dict[str, float]

    @property
    def loss_is_scaled_for_ga(self) -> bool | None:
        """True: the terms are divided by the counts of the whole optimizer step. In a base step, the base trainer's."""
        if not self._is_base_step:
            return True
        if self._base_loss_is_scaled is not None:
            return self._base_loss_is_scaled
        return getattr(super(), "loss_is_scaled_for_ga", None)

    @loss_is_scaled_for_ga.setter
    def loss_is_scaled_for_ga(self, value: bool | None) -> None:
        self._base_loss_is_scaled = value

    def _inner_training_loop(self, *positional: Any, **keywords: Any) -> Any:
        self._terms = RunningTerms(filters=self.args.logging_nan_inf_filter)  # nothing of an earlier run
        self._counts, self._micro_batches_left, self._is_plain = None, 0, None
        self._is_base_step, self._base_outputs_serve = False, None
        with registered_callback(self):
            return super()._inner_training_loop(*positional, **keywords)

    def training_step(self, *positional: Any, **keywords: Any) -> Any:
        self._in_training_step = True  # a model may keep its evaluation mode in training, so its mode does not tell
        try:
            return super().training_step(*positional, **keywords)
        finally:
            self._in_training_step = False

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: Any) -> Any:
        """The micro-batches of the next optimizer step, whose rows are counted before any forward."""
        self._follow_settings()
        batches, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        self._step_progress = self._progress
        self._is_base_step = bool(batches) and self._belongs_to_base(batches)
        if self._is_base_step:
            self._counts, self._micro_batches_left = None, 0
            return batches, num_items
        if 0 < len(batches) < num_batches and not has_length(self.callback_handler.train_dataloader):
            # Trainer would make no step of them, and leave their gradients to the first step of the next epoch.
            logger.warning(
                f"The epoch's last {len(batches)} micro-batches are too few for a step of {num_batches}; they are "
                "left out. (The dataset has no length: with one, they would be a step of their own.)"
            )
            return [], None
        if batches:
            self._counts = self._count(batches)
            # DeepSpeed makes its step within the backward: the gradient is known too late.
            if self.accelerator.distributed_type != DistributedType.DEEPSPEED:
                self.distiller.finite_check.defer()
            self._micro_batches = self._micro_batches_left = len(batches)
        return batches, num_items

    def _belongs_to_base(self, batches: list[Any]) -> bool:
        """Whether the loss of these micro-batches is left to the base trainer.

        That is where nothing is compared throughout, and the task finds no labels that it could count: the class is
        not known, or its loss needs no labels.
        """
        distiller = self.distiller
        return distiller.compares_nothing() and not all(map(distiller.finds_labels, batches))

    def _base_loss(self, model: Any, inputs: Any, return_outputs: bool, num_items: Any) -> Any:
        """The base trainer's own loss; without labels that the task would count, its error is explained."""
        try:
            return super().compute_loss(model, self.distiller.student_inputs(inputs), return_outputs, num_items)
        except ValueError as error:
            try:
                self.distiller.task.require_labels(inputs)
            except DataError as missing:
                raise missing from error
            raise

    def _count(self, batches: list[Any]) -> Counts:
        counts = self.distiller.count(batches, self.accelerator, progress=self._progress, same_batch=self.get_tp_size())
        if self._is_plain is None:
            self._is_plain = not self.distiller.blending.ever_active()
        if self._is_plain:
            self.distiller.finite_check.ignore()
        return counts

    def _get_grad_norm(self, model: Any, *positional: Any, **keywords: Any) -> Any:
        """As `Trainer`'s, before the optimizer's step: a gradient or a loss that is not finite is an error here."""
        norm = super()._get_grad_norm(model, *positional, **keywords)
        self.distiller.finite_check.look_at_gradient(norm)
        return norm

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As `Trainer`'s, with one figure a term beside `loss`, reduced over processes."""
        if "loss" in logs:
            terms = self._terms.read(self.accelerator, same_batch=self.get_tp_size())
            logs = {"loss": logs["loss"], **terms, **self._moving_knobs(), **logs}
            self._warn_if_lost(logs)
        super().log(logs, start_time)

    def _moving_knobs(self) -> dict[str, float]:
        """Scheduled numbers, and those that were changed during the training, as the last optimizer step used them."""
        knobs, changed = self.distiller.blending.knobs(), self._blend_at_start
        return {name: s(self._step_progress) for name, s in knobs.items() if s(0.0) != s(1.0) or name in changed}

    def _warn_if_lost(self, logs: dict[str, float]) -> None:
        """Once, in a training that is exactly `Trainer`'s and so goes on."""
        norm = logs.get("grad_norm")
        if not self._is_plain or self._warned_of_loss or norm is None or math.isfinite(norm):
            return
        self._warned_of_loss = True
        too_long = logs.get("ctc_labels_too_long", 0)
        cause = f" Examples whose labels need more frames than they have, since the last log: {too_long}."
        logger.warning(
            f"At step {self.state.global_step} the norm of the gradient is {norm}, and the optimizer has made the "
            "step: the student's weights are lost. Without a teacher this is Trainer's training, which goes on; with "
            f"one it is an error, before the step, that names the cause.{cause if too_long else ''}"
        )

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """In training, the blend; in evaluation, the plain task loss, as `Trainer`'s.

        Called outside of the training loop it takes the batch for a whole optimizer step.
        """
        distiller, progress = self.distiller, self._progress
        if not (model.training or self._in_training_step):
            return self._evaluation_loss(model, inputs, return_outputs, num_items_in_batch)
        in_loop = self._counts is not None and self._micro_batches_left > 0
        if self._is_base_step or (not in_loop and self._belongs_to_base([inputs])):
            return self._base_loss(model, inputs, return_outputs, num_items_in_batch)
        inputs = distiller.with_task_labels(inputs)
        counts = self._counts if in_loop else self._count([inputs])
        assert counts is not None
        batch = distiller.prepare(inputs) if distiller.asks_teacher(progress) else inputs
        found = None if return_outputs else self._without_logits(model, batch, counts, progress)
        if found is None:
            whole_step = self.accelerator.num_processes == 1 and (not in_loop or self._micro_batches == 1)
            found = self._with_logits(
                model, batch, counts, progress, num_items_in_batch, whole_step=whole_step, wants_outputs=return_outputs
            )
        if in_loop:
            self._terms.add(
                found.terms,
                loss=found.loss,
                counted=distiller.task.counted(batch) if LABELS in found.terms else {},
                begins_step=self._micro_batches_left == self._micro_batches,
            )
            self._micro_batches_left -= 1
        loss = found.loss
        if in_loop and divides_the_loss(self, num_items_in_batch):
            loss = loss * self.current_gradient_accumulation_steps
        return (loss, found.outputs) if return_outputs else loss

    @property
    def _overrides_loss(self) -> bool:
        """Whether the base trainer computes its loss in a way of its own."""
        return getattr(super().compute_loss, "__func__", None) is not Trainer.compute_loss

    def _users_code_reads_labels(self, compute_loss_func: Any) -> bool:
        """Whether the user's own code reads the labels: `compute_loss_func`, or an override of `compute_loss`."""
        overridden = self._overrides_loss or type(self).compute_loss is not LossMixin.compute_loss
        return compute_loss_func is not None or overridden

    @contextlib.contextmanager
    def _loss_of_probabilities(self, batch: Any) -> Iterator[None]:
        """Labels that are a probability for each class have their cross-entropy, for which no head has a loss."""
        if self.compute_loss_func is not None or not self.distiller.task.has_probabilities(batch):
            yield
            return
        smoothing = self.args.label_smoothing_factor

        def loss_of(outputs: Any, labels: Any, num_items_in_batch: Any = None) -> Any:
            return cross_entropy_of_probabilities(outputs["logits"], labels, smoothing=smoothing)

        self.compute_loss_func = loss_of
        try:
            yield
        finally:
            self.compute_loss_func = None

    def _without_logits(self, model: Any, batch: Any, counts: Counts, progress: float) -> DistillerOutput | None:
        return self.distiller.without_logits(
            model,
            batch,
            counts,
            progress=progress,
            smoothing=self.args.label_smoothing_factor,
            own_loss=self._has_own_loss(),
        )

    def _has_own_loss(self) -> bool:
        """Whether the labels' term is a function of the user's, and not the loss of the student's head."""
        return self.compute_loss_func is not None or self._overrides_loss

    def _with_logits(
        self,
        model: Any,
        batch: Any,
        counts: Counts,
        progress: float,
        num_items: Any,
        *,
        whole_step: bool,
        wants_outputs: bool,
    ) -> DistillerOutput:
        distiller = self.distiller
        labels_weight = distiller.blending.labels_weight(progress)
        compares = distiller.asks_teacher(progress) or hasattr(distiller.teacher, "hear")
        mean, outputs, inside = None, None, None
        if labels_weight > 0:
            # Trainer takes some causal heads (GPT-2's) for ones that do not shift, and counts a label too many an
            # example.
            shifts = self._loss_shifts_labels or distiller.task.kind == "causal_lm"
            is_trainer = whole_step and labels_weight == 1
            own = num_items if is_trainer else own_num_items(batch, num_items, shifts=shifts)
            if not self._overrides_loss:
                with distiller.reading(progress) as inside:
                    mean, outputs = self._labels_loss(model, batch, own, return_outputs=True)
            elif compares or wants_outputs:
                mean, outputs, inside = self._loss_and_outputs_of_base(model, batch, own, progress)
            else:
                mean = self._labels_loss(model, batch, own, return_outputs=False)
                return distiller.blend(None, batch, counts, labels_mean=mean, progress=progress)
        if outputs is None:
            with distiller.reading(progress) as inside:
                outputs = model(**distiller.student_inputs(batch, labels=False))
        return distiller.blend(outputs, batch, counts, labels_mean=mean, progress=progress, inside=inside)

    def _labels_loss(self, model: Any, batch: Any, num_items: Any, *, return_outputs: bool) -> Any:
        """The base trainer's loss over this micro-batch, as its own mean."""
        with unscaled(self.args), self._loss_of_probabilities(batch):
            return super().compute_loss(
                model, self.distiller.student_inputs(batch), return_outputs=return_outputs, num_items_in_batch=num_items
            )

    def _loss_and_outputs_of_base(
        self, model: Any, batch: Any, num_items: Any, progress: float
    ) -> tuple[Any, Any, Mapping[Any, Any] | None]:
        """The labels' loss of a base trainer with its own `compute_loss`, and outputs and inside of the same forward.

        TRL's `SFTTrainer` returns the outputs of a second forward, made without gradient: a divergence of them would
        be logged and teach nothing. So the first micro-batch of a training shows whether `compute_loss` calls the
        student once, with gradient. Where it does not, outputs and inside are None, and the student needs a forward of
        its own for what is compared.
        """
        if self._base_outputs_serve is False:
            return self._labels_loss(model, batch, num_items, return_outputs=False), None, None
        if self._base_outputs_serve:
            with self.distiller.reading(progress) as inside:
                loss, outputs = self._labels_loss(model, batch, num_items, return_outputs=True)
            return loss, outputs, inside
        loss = outputs = None
        with _forwards_of(model) as (with_gradient, states):
            try:
                with self.distiller.reading(progress) as inside:
                    loss, outputs = self._labels_loss(model, batch, num_items, return_outputs=True)
            except SettingError:  # what was read has no gradient
                if loss is None or with_gradient == [True]:
                    raise
        self._base_outputs_serve = with_gradient == [True] and _carries_gradient(outputs)
        if self._base_outputs_serve:
            return loss, outputs, inside
        if states:  # what was drawn for outputs is not drawn in later steps, so that a resumed run draws the same
            set_random_state(states[-1])
        return loss, None, None


@contextlib.contextmanager
def _forwards_of(model: torch.nn.Module) -> Iterator[tuple[list[bool], list[Any]]]:
    """Whether each forward of the model has gradients, and the random state after each one that has."""
    with_gradient: list[bool] = []
    states: list[Any] = []

    def ended(*_: Any) -> None:
        with_gradient.append(torch.is_grad_enabled())
        if with_gradient[-1]:
            states.append(random_state())

    hook = model.register_forward_hook(ended)
    try:
        yield with_gradient, states
    finally:
        hook.remove()


def _carries_gradient(outputs: Any) -> bool:
    """Whether a model's outputs, other than its loss, lead back to its parameters."""
    values = [value for name, value in outputs.items() if name != "loss"] if isinstance(outputs, Mapping) else outputs
    return any(isinstance(value, Tensor) and value.requires_grad for value in values)


class RestoringMixin(_Trainer):
    """Resume and the best model, for models whose checkpoint has other names than their state."""

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        _load_renamed(self.model if model is None else model, resume_from_checkpoint)

    def _load_best_model(self) -> None:
        super()._load_best_model()
        if self.state.best_model_checkpoint is not None:
            _load_renamed(self.model, self.state.best_model_checkpoint)


def _load_renamed(model: Any, checkpoint: str) -> None:
    with random_state_kept():
        state = renamed_state(model, checkpoint)
    if state is not None:
        model.load_state_dict(state, strict=True)


_SHARDED = {DistributedType.FSDP: "FSDP", DistributedType.DEEPSPEED: "DeepSpeed"}


class ViewingMixin(_Trainer):
    """Asks `view` about each micro-batch of a training step; evaluation is on the data as it is."""

    distiller: Any
    _view: Any = None
    _progress: float
    _view_fits: Any = None  # the student that was looked at

    def _check_view(self) -> None:
        """Refuse a view that this training cannot have. Called again for another student.

        Raises:
            SettingError: see the messages.
        """
        if self._view is None or self._view_fits is self.model:
            return
        _refuse_no_view(self._view)
        teacher = self.distiller.teacher
        self._view.fit(self.model, self.distiller.task, teacher=teacher, processing_class=self.processing_class)
        if self.distiller.needs_labels():
            raise SettingError(
                f"{self._view!r} shows texts that the student wrote, which are no gold labels, and alpha < 1 would "
                "teach it them as such. Pass alpha=1.0, or alpha=None with objectives."
            )
        if _looks_up(teacher):
            raise SettingError(
                f"{self._view!r} shows texts that the student writes while it trains, and a cached teacher was asked "
                "before. Use a model as teacher."
            )
        sharded = _SHARDED.get(self.accelerator.distributed_type)
        how = "tensor parallelism" if self.get_tp_size() > 1 else sharded
        if how is not None:
            raise SettingError(
                f"{self._view!r} lets the student write in each process by itself, and with {how} no process has all "
                "of it. Use data parallelism (DDP), or let the teacher write before the training: "
                "hf_distill.generate_completions."
            )
        self._view_fits = self.model

    def _with_view(self, training: Any) -> Any:
        """The facts of a training, with the view that it had."""
        return training if self._view is None else replace(training, extra={**training.extra, "view": repr(self._view)})

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: Any) -> Any:
        """As `Trainer`'s; its count of items is that of what is shown."""
        batches, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        if self._view is None or not batches:
            return batches, num_items
        self._check_view()
        shown = [
            self._view(
                batch,
                self.model,
                step=self.state.global_step,
                micro_batch=place,
                process=self.accelerator.process_index,
                progress=self._progress,
            )
            for place, batch in enumerate(batches)
        ]
        return shown, self._get_num_items_in_batch(shown, device)


def _refuse_no_view(view: Any) -> None:
    if isinstance(view, type):
        raise SettingError(f"view={view.__name__} is a class. Make one of it: view={view.__name__}(...).")
    if not callable(view) or not hasattr(view, "fit"):
        raise SettingError(
            f"view={view!r} is no view: that is an object such as hf_distill.augment.OnPolicy(lmbda=0.5). "
            "Augmentations go into the collator: data_collator=hf_distill.augment.AugmentingCollator(...)."
        )


def _looks_up(teacher: Any) -> bool:
    """Whether its answers, or those of a member, come with the data, which the student has not continued yet."""
    members = getattr(teacher, "teachers", None)  # an Ensemble has a collator for those of its members that have one
    return hasattr(teacher, "collator") if members is None else any(map(_looks_up, members))


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
        view: changes batches of the training with the student's help: `hf_distill.augment.OnPolicy`.
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
