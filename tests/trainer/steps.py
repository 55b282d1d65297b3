"""Optimizer steps of any head, split into micro-batches in any way, for tests and a child process."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from hf_distill import (
    AttentionMatch,
    CosineEmbedding,
    DistillationTrainer,
    HiddenMatch,
    RelationMatch,
    SimilarityMatch,
)
from tests.heads import Head
from tests.trainer.tiny import PLAIN_STEP, arguments, weights

BATCH = 8
NO_LOSS = ("bert_embedding",)  # a bare encoder has no loss of its own: it learns only from the teacher


def in_double(head: Head, features: Sequence[dict[str, Any]], *, pad_to: int | None = None) -> dict[str, torch.Tensor]:
    """Collate with fp64 in place of fp32, so that only real differences are visible."""
    batch = head.collate(features, pad_to)
    return {name: x.double() if x.is_floating_point() else x for name, x in batch.items()}


def alphas_of(name: str) -> tuple[float, ...]:
    return (1.0,) if name in NO_LOSS else (0.0, 0.5, 1.0)


def dropout_of(head: Head, rate: float) -> dict[str, float]:
    """Return the config settings that turn on dropout in this head."""
    return {key: rate for key, value in head.settings.items() if "drop" in key and "layer" not in key and value == 0.0}


def own_mean(outputs: Any, labels: Any, num_items_in_batch: Any = None) -> torch.Tensor:
    """A `compute_loss_func` that ignores the count: the mean over this micro-batch."""
    logits, labels = rows_of(outputs, labels)
    return 2 * torch.nn.functional.cross_entropy(logits, labels)


def own_share(outputs: Any, labels: Any, num_items_in_batch: Any = None) -> torch.Tensor:
    """A `compute_loss_func` as in transformers' documentation: the sum divided by the count."""
    logits, labels = rows_of(outputs, labels)
    count = (labels != -100).sum() if num_items_in_batch is None else num_items_in_batch
    return 2 * torch.nn.functional.cross_entropy(logits, labels, reduction="sum") / count


def rows_of(outputs: Any, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return outputs["logits"].flatten(0, -2), labels.flatten()


# Ways to define the labels' loss: keywords of the trainer and settings of its arguments.
VARIANTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "plain": ({}, {}),
    "smoothed": ({}, {"label_smoothing_factor": 0.2}),
    "own_mean": ({"compute_loss_func": own_mean}, {}),
    "own_share": ({"compute_loss_func": own_share}, {}),
    "evaluated_first": ({}, {}),
    "not_across_devices": ({}, {"average_tokens_across_devices": False}),
    "not_across_devices_own_share": ({"compute_loss_func": own_share}, {"average_tokens_across_devices": False}),
}
VARIED = [
    (name, variant)
    for name in ("bert_single_label", "bert_tokens", "llama_causal_lm", "t5_seq2seq")
    for variant in VARIANTS
    if variant != "plain" and not ("own" in variant and name == "llama_causal_lm")  # its labels would need a shift
]


def one_step(
    folder: Path | str, head: Head, *, alpha: float, micro_batch: int, accumulation: int, variant: str = "plain"
) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
    """Return the weights after one plain SGD step on eight ragged examples, and the log."""
    student, teacher = head.make(seed=0).double(), head.make(seed=1).double()
    # The labels' loss of some heads depends on the padding; their batches all have the same length.
    pad_to = head.longest if head.labels_see_padding and alpha < 1 else None
    keywords, settings = VARIANTS[variant]
    args = arguments(
        folder,
        **settings,
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
        train_dataset=head.examples(BATCH),
        data_collator=partial(in_double, head, pad_to=pad_to),
        **keywords,
    )
    if variant == "evaluated_first":
        trainer.predict(head.examples(BATCH))
    trainer.train()
    logged = {k: v for k, v in trainer.state.log_history[0].items() if k.startswith("loss")}
    return weights(student), logged


def asked_teacher(folder: Path | str, head: Head, *, count: int) -> dict[str, float]:
    """Return the metrics of an evaluation with the teacher on `count` examples, three at a time."""
    args = arguments(folder, alpha=0.5, temperature=3.0, evaluate_with_teacher=True, per_device_eval_batch_size=3)
    trainer = DistillationTrainer(
        model=head.make(seed=0).double(),
        teacher_model=head.make(seed=1).double(),
        args=args,
        eval_dataset=head.examples(count),
        data_collator=partial(in_double, head),
    )
    metrics = trainer.evaluate()
    asked = ("eval_loss", "eval_divergence", "eval_teacher_agreement")
    return {name: metrics[name] for name in asked if name in metrics}


# Objectives on activations, whose projections are trained with the student.

WHOLE = 3 * BATCH  # examples for three steps: an error in the state after a step shows in the next

OBJECTIVES_OF: dict[str, Callable[[], list[Any]]] = {
    "projected": lambda: [HiddenMatch("even", embeddings=True, weight=2.0), CosineEmbedding()],
    "attention": lambda: [AttentionMatch("last"), RelationMatch()],
    # Weight 0 in the first step, so that its projections have no gradient there.
    "scheduled": lambda: [HiddenMatch("even", weight=lambda progress: float(progress > 0.1))],
    "lower_block": lambda: [HiddenMatch([(0, 0)])],  # with alpha=None the upper block and the head are unused
    "similarity": lambda: [SimilarityMatch(), SimilarityMatch(distance="centered_kernel_alignment", name="cka")],
}


def inside_steps(
    folder: Path | str, head: Head, *, kind: str, alpha: float | None, micro_batch: int, accumulation: int, optim: str
) -> dict[str, Any]:
    """Return the weights of student and projections after three clipped steps, and the logs of each step."""
    student, teacher = head.make(0, layers=2).double(), head.make(1, layers=3, width=inside_width(head, alpha)).double()
    args = arguments(
        folder,
        alpha=alpha,
        max_steps=3,
        per_device_train_batch_size=micro_batch,
        gradient_accumulation_steps=accumulation,
        train_sampling_strategy="sequential",
        logging_steps=1,
        adam_epsilon=1e-4,  # some gradients are 0 up to rounding, which a small epsilon would amplify
        **{**PLAIN_STEP, "optim": optim, "learning_rate": 0.01, "max_grad_norm": 0.05, "weight_decay": 0.1},
    )
    trainer = DistillationTrainer(
        model=student,
        teacher_model=teacher,
        args=args,
        train_dataset=head.examples(WHOLE),
        data_collator=partial(in_double, head),
        objectives=OBJECTIVES_OF[kind](),
    )
    trainer.train()
    names = ("grad_norm", "weight/hidden")
    logged = [
        {key: value for key, value in entry.items() if key.startswith("loss") or key in names}
        for entry in trainer.state.log_history
        if "loss" in entry
    ]
    return {"student": weights(student), "learned": weights(trainer.distiller.learned.module), "logged": logged}


def inside_width(head: Head, alpha: float | None) -> int | None:
    """Return a width other than the student's, so that projections are learned; embeddings need equal widths."""
    return None if head.kind == "embedding" and alpha is not None else 24
