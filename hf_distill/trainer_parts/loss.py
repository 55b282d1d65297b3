"""The loss of a training step: rows counted before any forward, the blend of each micro-batch. No mathematics.

A step in which nothing is compared and no labels can be counted is the base trainer's own.
"""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import DistributedType
from torch import Tensor
from transformers import Trainer
from transformers.trainer_utils import has_length

from hf_distill._compat import divides_the_loss
from hf_distill.blend import LABELS, DistillerOutput
from hf_distill.counts import Counts
from hf_distill.errors import DataError, SettingError
from hf_distill.objectives.labels import cross_entropy_of_probabilities
from hf_distill.trainer_parts.labels_mean import own_num_items, unscaled
from hf_distill.trainer_parts.random_state import random_state, set_random_state
from hf_distill.trainer_parts.running_terms import RunningTerms
from hf_distill.trainer_parts.training_callback import registered_callback

if TYPE_CHECKING:
    _Trainer = Trainer
else:
    _Trainer = object
logger = logging.getLogger(__name__)


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
