"""A callback that tells a collator which epoch begins: what draws at random by it can be resumed."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback


class TellsEpoch(TrainerCallback):
    """Calls `data_collator.set_epoch(epoch)`, where there is one, before an epoch's data are read."""

    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer
        self._epoch: int | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **keywords: Any) -> None:
        self._epoch = None

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **keywords: Any) -> None:
        # state.epoch is a share of the epoch, and no count for streams: it is trusted where a run begins only.
        self._epoch = int(state.epoch or 0) if self._epoch is None else self._epoch + 1
        tell = getattr(self._trainer.data_collator, "set_epoch", None)
        if tell is not None:
            tell(self._epoch)
