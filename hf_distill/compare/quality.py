"""Accuracy, agreement, and the spread over seeds."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from hf_distill._types import Batch
from hf_distill.errors import DataError, SettingError


@dataclass(frozen=True)
class Spread:
    """A mean over runs, and the sample standard deviation, which is None for a single run."""

    mean: float
    spread: float | None
    runs: int


def spread_of(values: Sequence[float]) -> Spread:
    """Return the mean and the sample standard deviation (divisor n - 1) of a number for each seed.

    >>> spread_of([0.25, 0.75]).mean, round(spread_of([0.25, 0.75]).spread, 4)
    (0.5, 0.3536)
    >>> spread_of([0.5])
    Spread(mean=0.5, spread=None, runs=1)
    """
    if not values:
        raise DataError("spread_of: a mean needs at least one run.")
    spread = statistics.stdev(values) if len(values) > 1 else None
    return Spread(mean=statistics.fmean(values), spread=spread, runs=len(values))


def share_equal(predicted: Sequence[str], reference: Sequence[str]) -> float:
    """Return the share of examples with equal labels: the accuracy for true labels, the agreement for a teacher's.

    >>> share_equal(["cat", "dog", "cat", "cow"], ["cat", "dog", "dog", "cow"])
    0.75
    """
    if len(predicted) != len(reference) or not reference:
        raise DataError(
            f"{len(predicted)} predictions and {len(reference)} references: give two lists of the same length, at "
            "least 1."
        )
    return sum(a == b for a, b in zip(predicted, reference, strict=True)) / len(reference)


def predicted_labels(model: PreTrainedModel, batches: Iterable[Batch], *, label_column: str = "labels") -> list[str]:
    """Return the name of the predicted label of each example.

    Names can be compared even if student and teacher order their labels differently. The model keeps its mode.

    Args:
        model: a sequence classifier.
        batches: inputs on the model's device.
        label_column: a column that is not passed to the model.

    Raises:
        SettingError: if the head does not give a row of logits for each example.
    """
    names: list[str] = []
    mode = model.training
    model.eval()
    id2label = model.config.id2label or {}
    try:
        with torch.inference_mode():
            for batch in batches:
                inputs = {name: value for name, value in batch.items() if name != label_column}
                logits = model(**inputs).logits
                if logits.dim() != 2:
                    raise SettingError(
                        f"{type(model).__name__} gives logits of shape {tuple(logits.shape)}, and labels are read from "
                        "a row for each example, [b v]."
                    )
                names += [id2label[index] for index in logits.argmax(-1).tolist()]
    finally:
        model.train(mode)
    return names
