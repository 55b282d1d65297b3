"""How the teachers of an ensemble are weighted: the settings, checked, and where the labels of rows are."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hf_distill.errors import SettingError, did_you_mean
from hf_distill.tasks import Batch, Task
from hf_distill.tasks.base import IGNORED
from hf_distill.vocabulary import Columns

MEANS = ("probabilities", "logits")
WEIGHTS = ("confidence", "entropy", "labels", "best")


def labels_in_place(logits: Tensor, task: Task, batch: Batch, columns: Columns) -> Tensor:
    """`[... 1]`: the label of each row where its logits are, -100 where there is none."""
    leading = logits.shape[:-1]
    where = torch.arange(leading.numel(), device=logits.device).view(*leading, 1)
    placed = torch.full((leading.numel(),), IGNORED, device=logits.device)
    labels = task.targets(batch)
    if labels is not None:
        placed[task.select(where, batch).flatten()] = columns.of_labels(labels)
    return placed.view(*leading, 1)


def checked_weights(weights: Sequence[float] | str | None, count: int) -> list[float] | str | None:
    """What an ensemble was given, as numbers that sum to 1, a name, or None: equal.

    Raises:
        SettingError: no such name, a number of weights that is not that of the teachers, or one not above 0.
    """
    if weights is None:
        return None
    if isinstance(weights, str):
        if weights not in WEIGHTS:
            hint = did_you_mean(weights, WEIGHTS)
            raise SettingError(f"Ensemble: weights={weights!r}: allowed are {', '.join(WEIGHTS)}, or numbers.{hint}")
        return weights
    numbers = [float(weight) for weight in weights]
    if len(numbers) != count or not all(0 < weight < float("inf") for weight in numbers):
        raise SettingError(f"Ensemble: weights={list(weights)}: give one number above 0 for each of {count} teachers.")
    return [weight / sum(numbers) for weight in numbers]
