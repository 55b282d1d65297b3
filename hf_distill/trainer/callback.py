"""The callback of a distilling trainer, and the running means of the terms of its loss.

The callback is registered only while a training runs. Outside of one, `trainer.callback_handler.callbacks` is the same
list as in a `Trainer`, and a script may replace it.
"""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

import torch
from accelerate import Accelerator
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

if TYPE_CHECKING:
    from hf_distill.trainer.mixin import DistillationMixin

logger = logging.getLogger(__name__)


class TrainingCallback(TrainerCallback):
    """Ends each optimizer step of the distiller, and announces each epoch to the data collator.

    Args:
        trainer: the trainer whose `distiller` and `data_collator` are called.
    """

    def __init__(self, trainer: DistillationMixin) -> None:
        self._trainer = trainer
        self._epoch: int | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **keywords: object
    ) -> None:
        self._epoch = None
        self._trainer.distiller.learned.zero_grad()

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **keywords: object
    ) -> None:
        """Call `data_collator.set_epoch(epoch)`, if it has one, so that random augmentation can be resumed."""
        # state.epoch is a fraction, and meaningless for streams, so it is read only when a run begins.
        self._epoch = int(state.epoch or 0) if self._epoch is None else self._epoch + 1
        set_epoch = getattr(self._trainer.data_collator, "set_epoch", None)
        if set_epoch is not None:
            set_epoch(self._epoch)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **keywords: object
    ) -> None:
        """Let the teacher follow the student, and clear the gradients of projections: `Trainer` clears its model's."""
        self._trainer.distiller.end_step(self._trainer.model)


@contextlib.contextmanager
def registered_callback(trainer: DistillationMixin) -> Iterator[None]:
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

    Like `Trainer`'s `loss`, it sums the micro-batches of a step and averages over steps and processes.

    Args:
        filters: whether to replace a micro-batch whose loss is not finite by the mean of the steps before, as `Trainer`
            does for `loss` (`logging_nan_inf_filter`).
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

    def read(self, accelerator: Accelerator, *, same_batch: int = 1) -> dict[str, float]:
        """Return `loss/<term>` → mean and name → count, over all processes, and reset both.

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


def scheduled_values(trainer: DistillationMixin) -> dict[str, float]:
    """Return the values that the last optimizer step used, of settings with a schedule or changed during training."""
    progress = 0.0 if trainer._step is None else trainer._step.progress
    schedules = trainer.distiller.blending.scheduled_values()
    moving = {n: s for n, s in schedules.items() if s(0.0) != s(1.0) or n in trainer._blend_at_start}
    return {name: schedule(progress) for name, schedule in moving.items()}


def warn_if_lost(trainer: DistillationMixin, logs: dict[str, float]) -> None:
    """Warn once that the gradient was not finite, in a training with labels only, which goes on as with `Trainer`."""
    norm = logs.get("grad_norm")
    if not trainer._is_plain or trainer._warned_of_loss or norm is None or math.isfinite(norm):
        return
    trainer._warned_of_loss = True
    too_long = logs.get("ctc_labels_too_long", 0)
    cause = f" Examples whose labels need more frames than they have, since the last log: {too_long}."
    logger.warning(
        f"At step {trainer.state.global_step} the norm of the gradient is {norm}, and the optimizer has made the "
        "step: the student's weights are lost. Without a teacher this is Trainer's training, which goes on; with "
        f"one it is an error, before the step, that names the cause.{cause if too_long else ''}"
    )
