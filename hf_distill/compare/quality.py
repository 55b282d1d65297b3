"""Accuracy, agreement, and the spread over seeds. Plain numbers in, plain numbers out."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from hf_distill.errors import DataError, SettingError


@dataclass(frozen=True)
class Spread:
    """A mean over runs, and the sample standard deviation (None for a single run)."""

    mean: float
    spread: float | None
    runs: int


def spread_of(values: Sequence[float]) -> Spread:
    """Mean and sample standard deviation (divisor n - 1) of one number a seed.

    >>> spread_of([0.25, 0.75]).mean, round(spread_of([0.25, 0.75]).spread, 4)
    (0.5, 0.3536)
    >>> spread_of([0.5])
    Spread(mean=0.5, spread=None, runs=1)
    """
    if not values:
        raise DataError("no value: a mean needs at least one run.")
    spread = statistics.stdev(values) if len(values) > 1 else None
    return Spread(mean=statistics.fmean(values), spread=spread, runs=len(values))


def share_equal(predicted: Sequence[str], reference: Sequence[str]) -> float:
    """The share of examples where two lists of labels say the same.

    Against the true labels that is the accuracy; against the teacher's, the agreement with it.

    >>> share_equal(["cat", "dog", "cat", "cow"], ["cat", "dog", "dog", "cow"])
    0.75
    """
    if len(predicted) != len(reference) or not reference:
        raise DataError(
            f"{len(predicted)} predictions against {len(reference)} references: two lists of the "
            "same length, at least 1, are needed."
        )
    return sum(a == b for a, b in zip(predicted, reference, strict=True)) / len(reference)


def predicted_labels(
    model: PreTrainedModel, batches: Iterable[Mapping[str, Any]], *, label_column: str = "labels"
) -> list[str]:
    """Label names in the order of the batches, in evaluation mode and without gradient.

    Names rather than indices, so that a student and a teacher that order their labels differently
    can be compared. The model keeps the mode that it came with.

    Raises `SettingError` when the head gives something other than one row of logits an example.
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
                        f"{type(model).__name__} gives logits of shape {tuple(logits.shape)}: "
                        "labels are read from one row an example, [b v]."
                    )
                names += [id2label[index] for index in logits.argmax(-1).tolist()]
    finally:
        model.train(mode)
    return names
