"""The loss of a training step: rows counted before any forward, the blend of each micro-batch. No mathematics."""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from accelerate.utils import DistributedType
from transformers import Trainer
from transformers.trainer_utils import has_length

from hf_distill._compat import divides_the_loss
from hf_distill.blend import LABELS, DistillerOutput
from hf_distill.counts import Counts
from hf_distill.objectives.labels import cross_entropy_of_probabilities
from hf_distill.trainer_parts.labels_mean import own_num_items, unscaled
from hf_distill.trainer_parts.running_terms import RunningTerms

if TYPE_CHECKING:
    _Trainer = Trainer
else:
    _Trainer = object
logger = logging.getLogger(__name__)


class LossMixin(_Trainer):
    """Training steps on the blend; in evaluation, the plain task loss."""

    distiller: Any
    # The terms already are divided by the counts of the whole optimizer step.
    loss_is_scaled_for_ga = True
    _counts: Counts | None = None
    _micro_batches = _micro_batches_left = 0
    _step_progress = 0.0
    _in_training_step = False
    _warned_of_loss = False
    _is_plain: bool | None = None  # labels alone, at every moment: `Trainer`'s own training
    _terms: RunningTerms
    _progress: float
    _evaluation_loss: Any

    def _inner_training_loop(self, *positional: Any, **keywords: Any) -> Any:
        self._terms = RunningTerms(filters=self.args.logging_nan_inf_filter)  # nothing of an earlier run
        self._counts, self._micro_batches_left, self._is_plain = None, 0, None
        return super()._inner_training_loop(*positional, **keywords)

    def training_step(self, *positional: Any, **keywords: Any) -> Any:
        self._in_training_step = True  # a model may keep its evaluation mode in training, so its mode does not tell
        try:
            return super().training_step(*positional, **keywords)
        finally:
            self._in_training_step = False

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: Any) -> Any:
        """The micro-batches of the next optimizer step, whose rows are counted before any forward."""
        batches, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        self._step_progress = self._progress
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
        """Scheduled numbers, as the last optimizer step used them."""
        return {name: s(self._step_progress) for name, s in self.distiller.blending.knobs().items() if s(0.0) != s(1.0)}

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
        counts = self._counts if in_loop else self._count([inputs])
        assert counts is not None
        batch = distiller.prepare(inputs) if distiller.asks_teacher(progress) else inputs
        found = None if return_outputs else self._without_logits(model, batch, counts, progress)
        if found is None:
            whole_step = self.accelerator.num_processes == 1 and (not in_loop or self._micro_batches == 1)
            found = self._with_logits(model, batch, counts, progress, num_items_in_batch, whole_step=whole_step)
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

    def _users_code_reads_labels(self, compute_loss_func: Any) -> bool:
        """Whether the user's own code reads the labels: `compute_loss_func`, or an override of `compute_loss`."""
        of_base = getattr(super().compute_loss, "__func__", None)
        overridden = of_base is not Trainer.compute_loss or type(self).compute_loss is not LossMixin.compute_loss
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
        overridden = getattr(super().compute_loss, "__func__", None) is not Trainer.compute_loss
        return self.compute_loss_func is not None or overridden

    def _with_logits(
        self, model: Any, batch: Any, counts: Counts, progress: float, num_items: Any, *, whole_step: bool
    ) -> DistillerOutput:
        distiller = self.distiller
        labels_weight = distiller.blending.labels_weight(progress)
        with_labels = labels_weight > 0
        # Trainer takes some causal heads (GPT-2's) for ones that do not shift, and counts a label too many an example.
        shifts = self._loss_shifts_labels or distiller.task.kind == "causal_lm"
        inputs = distiller.student_inputs(batch, labels=with_labels)
        with distiller.reading(progress) as inside:
            if with_labels:
                is_trainer = whole_step and labels_weight == 1
                own = num_items if is_trainer else own_num_items(batch, num_items, shifts=shifts)
                with unscaled(self.args), self._loss_of_probabilities(batch):
                    mean, outputs = super().compute_loss(model, inputs, return_outputs=True, num_items_in_batch=own)
            else:
                mean, outputs = None, model(**inputs)
        return distiller.blend(outputs, batch, counts, labels_mean=mean, progress=progress, inside=inside)
