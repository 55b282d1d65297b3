"""Accuracy, agreement, and the spread over seeds. Plain numbers in, plain numbers out."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from hf_distill.errors import DataError


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
