"""One optimizer step of any head, cut into micro-batches in any way. Used by tests and by a child process."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from hf_distill import DistillationTrainer
from tests.heads import Head
from tests.trainer.tiny import PLAIN_STEP, arguments, weights

BATCH = 8
NO_LOSS = ("bert_embedding",)  # a bare encoder has no loss of its own: it learns from the teacher alone


def in_double(head: Head, features: Sequence[dict[str, Any]], *, pad_to: int | None = None) -> dict[str, torch.Tensor]:
    """A collator that gives fp64 where the head's own gives fp32, so that only real differences are seen."""
    batch = head.collate(features, pad_to)
    return {name: x.double() if x.is_floating_point() else x for name, x in batch.items()}


def alphas_of(name: str) -> tuple[float, ...]:
    return (1.0,) if name in NO_LOSS else (0.0, 0.5, 1.0)


def dropout_of(head: Head, rate: float) -> dict[str, float]:
    """The settings of this head's config that turn dropout on."""
    return {key: rate for key, value in head.settings.items() if "drop" in key and "layer" not in key and value == 0.0}


def one_step(
    folder: Path | str, head: Head, *, alpha: float, micro_batch: int, accumulation: int, labelled: bool = True
) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
    """The weights after one plain SGD step on eight ragged examples, and what was logged."""
    student, teacher = head.make(seed=0).double(), head.make(seed=1).double()
    # The labels' loss of some heads depends on the padding; there every batch is padded alike.
    pad_to = head.longest if head.labels_see_padding and alpha < 1 else None
    args = arguments(
        folder,
        alpha=alpha,
        temperature=3.0,
        max_steps=1,
        per_device_train_batch_size=micro_batch,
        gradient_accumulation_steps=accumulation,
        logging_steps=1,
        **{**PLAIN_STEP, "learning_rate": 0.1},
    )
    trainer = DistillationTrainer(
        model=student,
        teacher_model=teacher,
        args=args,
        train_dataset=head.examples(BATCH, labelled=labelled),
        data_collator=partial(in_double, head, pad_to=pad_to),
    )
    trainer.train()
    logged = {k: v for k, v in trainer.state.log_history[0].items() if k.startswith("loss")}
    return weights(student), logged


def asked_teacher(folder: Path | str, head: Head, *, count: int) -> dict[str, float]:
    """What an evaluation with the teacher measures on `count` examples, three at a time."""
    args = arguments(folder, alpha=0.5, temperature=3.0, evaluate_with_teacher=True, per_device_eval_batch_size=3)
    trainer = DistillationTrainer(
        model=head.make(seed=0).double(),
        teacher_model=head.make(seed=1).double(),
        args=args,
        eval_dataset=head.examples(count),
        data_collator=partial(in_double, head),
    )
    metrics = trainer.evaluate()
    return {name: metrics[name] for name in ("eval_divergence", "eval_teacher_agreement")}
