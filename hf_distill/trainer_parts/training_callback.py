"""The one callback of a distilling trainer. It is registered while a training runs, and at no other time.

So `trainer.callback_handler.callbacks` holds what it holds in a `Trainer`, and a script may replace that list.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from transformers import TrainerCallback


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
