"""Evaluations whose metrics must not depend on the number of processes, for tests and a child process."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import IterableDataset

from hf_distill import (
    DistillationArguments,
    DistillationTrainer,
    Seq2SeqDistillationArguments,
    Seq2SeqDistillationTrainer,
)
from tests.heads import HEADS, Head
from tests.trainer.steps import in_double
from tests.trainer.tiny import arguments

BATCH = 2  # examples per process
SIZES = range(1, 10)  # each remainder for two processes, and fewer examples than processes
# The evaluations: a head, the number of examples, and a special property.
EVALUATIONS: list[tuple[str, int, str]] = [
    *(("bert_single_label", size, "plain") for size in SIZES),
    *(("bert_tokens", size, "plain") for size in (1, 3, 5, 6)),
    ("llama_causal_lm", 5, "plain"),
    ("bert_span", 7, "plain"),
    ("wav2vec2_ctc_mean", 5, "plain"),
    ("t5_seq2seq", 5, "plain"),
    *(("t5_seq2seq", size, "seq2seq") for size in (1, 5, 6)),
    *(("t5_seq2seq", size, "generates") for size in (1, 5, 6, 7)),
    ("bert_tokens", 5, "alpha_zero"),
    ("bert_single_label", 5, "inputs"),
    ("bert_single_label", 7, "loss_alone"),
    ("bert_tokens", 5, "preprocessed"),
    ("bert_tokens", 5, "batch_metrics"),
    *(("vit_image_class", size, "stream") for size in (1, 5, 8)),
    *(("bert_tokens", size, "own_stream") for size in (1, 5, 8)),
    ("bert_tokens", 5, "split_batches"),
    ("bert_tokens", 5, "in_training"),
    ("t5_seq2seq", 5, "in_training"),
]


class Stream(IterableDataset):
    """A dataset without a length."""

    def __init__(self, examples: list[Any]) -> None:
        self._examples = examples

    def __iter__(self) -> Iterator[Any]:
        return iter(self._examples)


def summed(evaluated: Any, compute_result: bool = True) -> dict[str, float]:
    """Return metrics that depend on each example, and on its predictions if those do not depend on padding."""
    predictions = evaluated.predictions[0] if isinstance(evaluated.predictions, tuple) else evaluated.predictions
    labels = evaluated.label_ids[0] if isinstance(evaluated.label_ids, tuple) else evaluated.label_ids
    predictions, labels = np.asarray(predictions), np.asarray(labels, dtype=float)
    found = {
        "examples": len(labels),
        "predicted": len(predictions),
        "labels": float(labels[labels != -100].sum()),
        "firsts": float(np.abs(predictions.reshape(len(predictions), -1)[:, 0]).sum()),
    }
    if predictions.dtype.kind == "i":  # predicted or generated tokens, padded with -100 and token 0
        found["tokens"] = float(predictions.clip(min=0).sum())
    elif predictions.shape[: labels.ndim] == labels.shape:
        found["squares"] = float((predictions[labels != -100] ** 2).sum())
    if evaluated.inputs is not None:
        found["inputs"] = float(np.maximum(np.asarray(evaluated.inputs), 0).sum())
    return found


def evaluated(folder: Path | str, name: str, size: int, special: str) -> dict[str, Any]:
    """Return the metrics of `evaluate`, and the predictions and metrics of `predict`."""
    head, two = HEADS[name], special in ("seq2seq", "generates")
    settings: dict[str, Any] = {"per_device_eval_batch_size": BATCH, "temperature": 3.0, "evaluate_with_teacher": True}
    given: dict[str, Any] = {"compute_metrics": summed}
    if special == "generates":
        settings |= {"predict_with_generate": True, "generation_max_length": 6}
    elif special == "alpha_zero":
        settings |= {"alpha": 0.0, "evaluate_with_teacher": False}
    elif special == "inputs":
        settings["include_for_metrics"] = ["inputs"]
    elif special == "loss_alone":
        given = {}
    elif special == "preprocessed":
        given["preprocess_logits_for_metrics"] = lambda logits, labels: logits.argmax(-1).masked_fill(labels < 0, -100)
    elif special == "batch_metrics":
        settings["batch_eval_metrics"] = True
        given["compute_metrics"] = Batches()
    elif special == "own_stream":
        settings["accelerator_config"] = {"dispatch_batches": False}
    elif special == "in_training":
        settings |= {"eval_strategy": "steps", "eval_steps": 1, "max_steps": 1, "learning_rate": 0.0}
        given |= {"train_dataset": head.examples(8), "eval_dataset": head.examples(size)}
    elif special == "split_batches":
        settings["accelerator_config"] = {"split_batches": True}
    args = arguments(folder, Seq2SeqDistillationArguments if two else DistillationArguments, **settings)
    if special == "split_batches":
        args.per_device_eval_batch_size = BATCH * args.world_size
    trainer = (Seq2SeqDistillationTrainer if two else DistillationTrainer)(
        model=head.make(seed=0).double(),
        teacher_model=None if special == "alpha_zero" else head.make(seed=1).double(),
        args=args,
        data_collator=partial(in_double, head, pad_to=head.longest if head.labels_see_padding else None),
        **given,
    )
    data = examples_of(head, size, special)
    if special == "in_training":
        trainer.train()
        [found] = [entry for entry in trainer.state.log_history if "eval_loss" in entry]
        return {"evaluated": figures(found), "predicted": None}
    predicted = trainer.predict(data) if special not in ("loss_alone", "batch_metrics") else None
    return {
        "evaluated": figures(trainer.evaluate(data)),
        "predicted": None if predicted is None else figures(predicted.metrics),
    }


def examples_of(head: Head, size: int, special: str) -> Any:
    examples = head.examples(size)
    return Stream(examples) if special.endswith("stream") else examples


def figures(metrics: dict[str, float]) -> dict[str, float]:
    return {
        name: value
        for name, value in metrics.items()
        if not name.endswith(("runtime", "per_second", "preparation_time", "epoch", "step"))
    }


class Batches:
    """Metrics summed over batches."""

    def __init__(self) -> None:
        self.sums: dict[str, float] = {}

    def __call__(self, found: Any, compute_result: bool) -> dict[str, float]:
        arrays = type(found)(found.predictions.numpy(), found.label_ids.numpy())
        for name, value in summed(arrays).items():
            self.sums[name] = self.sums.get(name, 0.0) + value
        if not compute_result:
            return {}
        result, self.sums = self.sums, {}
        return result
