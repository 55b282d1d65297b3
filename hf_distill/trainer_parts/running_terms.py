"""The terms of the loss, summed on the device between two logs and averaged when they are logged."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


class RunningTerms:
    """The mean of each term over the optimizer steps since the last log, and counts of examples since then.

    As `Trainer`'s own `loss`: micro-batches of a step are summed, steps and processes averaged.

    Args:
        filters: leave out a micro-batch whose loss is not finite, as `Trainer` does for `loss`
            (`logging_nan_inf_filter`): the mean of the steps before stands in for it.
    """

    def __init__(self, *, filters: bool = False) -> None:
        self._filters = filters
        self._sums: dict[str, Tensor] = {}
        self._steps: dict[str, int] = {}
        self._counts: dict[str, Tensor] = {}

    def add(
        self, terms: Mapping[str, Tensor], *, loss: Tensor, counted: Mapping[str, Tensor], begins_step: bool
    ) -> None:
        """Add a micro-batch.

        Args:
            terms: each term of the loss.
            loss: the weighted sum of the terms.
            counted: numbers of examples, by the name they are logged under.
        """
        finite = loss.detach().isfinite()
        for name, value in terms.items():
            if name not in self._sums:
                self._sums[name], self._steps[name] = torch.zeros_like(value, dtype=torch.float32), 0
            self._steps[name] += begins_step
            if self._filters:
                value = torch.where(finite, value.detach(), self._sums[name] / max(1, self._steps[name]))
            self._sums[name] += value.detach()
        for name, count in counted.items():
            self._counts[name] = self._counts.get(name, torch.zeros_like(count)) + count

    def read(self, accelerator: Any, *, same_batch: int = 1) -> dict[str, float]:
        """`loss/<term>` → mean and name → count, over all processes; then begin again.

        Args:
            same_batch: how many processes see the same batch (tensor parallelism).
        """
        if not self._sums:
            return {}
        means = [total / max(1, self._steps[name]) for name, total in self._sums.items()]
        counts = [count.float().to(means[0].device) for count in self._counts.values()]
        reduced = accelerator.reduce(torch.stack(means + counts), reduction="mean").tolist()
        names = [f"loss/{name}" for name in self._sums]
        found = dict(zip(names, reduced, strict=False))
        for name, mean in zip(self._counts, reduced[len(names) :], strict=True):
            found[name] = round(mean * accelerator.num_processes / same_batch)
        self._sums, self._steps, self._counts = {}, {}, {}
        return found
