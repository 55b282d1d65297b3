"""Drop-in trainings that also run in several processes: unknown classes, base trainers, a rising alpha."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import Trainer, TrainerCallback, TrainingArguments

from hf_distill import DistillationArguments, DistillationTrainer
from tests.trainer.test_base_trainers import args as base_args
from tests.trainer.test_base_trainers import mine
from tests.trainer.test_unknown_classes import CASES
from tests.trainer.tiny import arguments, bert, make, weights

UNKNOWN = ("module", "home_made", "no_labels")


class Raise(TrainerCallback):
    """Raises alpha after the first step, so that the teacher is used."""

    def on_step_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        args.alpha = 0.5


def unknown_class(folder: Path | str, name: str, *, ours: bool) -> tuple[Any, ...]:
    """Return weights, logged losses and `eval_loss` of an unknown class, with accumulation."""
    case = CASES[name]
    kind, base, more = (TrainingArguments, Trainer, {})
    if ours:
        kind, base, more = DistillationArguments, DistillationTrainer, {"alpha": 0.0}
    cut = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "logging_steps": 1}
    cut["per_device_eval_batch_size"] = 2  # full batches in two processes too: Trainer counts duplicated examples
    student = case.make()
    trainer = base(
        model=student,
        args=arguments(folder, kind, **cut, **case.settings, **more),
        train_dataset=case.data,
        eval_dataset=case.data[:4],
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return weights(student), losses, trainer.evaluate().get("eval_loss")


def own_forward(folder: Path | str, batch: int) -> tuple[dict[str, torch.Tensor], float]:
    """Run one step over a base trainer whose outputs have no gradient: two forwards, one backward."""
    given = base_args(folder, alpha=0.5, temperature=2.0, per_device_train_batch_size=batch)
    trainer = mine(folder, args=given)
    trainer.train()
    return weights(trainer.model), trainer.state.log_history[0]["loss"]


def rising_alpha(folder: Path | str, batch: int) -> tuple[dict[str, torch.Tensor], list[float]]:
    """Run two steps, the second with a teacher that was not loaded before."""
    student = bert().double()
    settings = {"per_device_train_batch_size": batch, "train_sampling_strategy": "sequential", "logging_steps": 1}
    trainer = make(folder, student, bert(seed=1).double(), alpha=0.0, callbacks=[Raise()], **settings)
    trainer.train()
    return weights(student), [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def everything(folder: Path | str, batch: int) -> dict[str, Any]:
    """Return the results of a process; `batch` examples are its share of eight."""
    found: dict[str, Any] = {
        name: [unknown_class(folder, name, ours=ours) for ours in (False, True)] for name in UNKNOWN
    }
    return {**found, "own_forward": own_forward(folder, batch), "rising_alpha": rising_alpha(folder, batch)}
