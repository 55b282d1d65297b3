"""A callback that tells the teacher of each optimizer step: one that is an average of students moves then."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback


class AfterStep(TrainerCallback):
    """Tells the teacher of each optimizer step."""

    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer

    def on_step_end(self, args: Any, state: Any, control: Any, **keywords: Any) -> None:
        self._trainer.distiller.after_step(self._trainer.model)
