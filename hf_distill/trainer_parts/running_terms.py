"""Running sums of the loss's terms, on the device; read and reduced only when the Trainer logs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


class RunningTerms:
    """The mean of each term over the optimizer steps since it was last read.

    As `Trainer`'s own `loss`: micro-batches of a step are summed, steps and processes averaged.
    """

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._steps: dict[str, int] = {}

    def add(self, terms: Mapping[str, Tensor], *, begins_step: bool) -> None:
        for name, value in terms.items():
            if name in self._sums:
                self._sums[name] += value.detach()
            else:
                self._sums[name] = value.detach().clone().float()
                self._steps[name] = 0
            self._steps[name] += begins_step

    def read(self, accelerator: Any) -> dict[str, float]:
        """`loss/<term>` → mean, reduced over processes; starts anew."""
        if not self._sums:
            return {}
        means = [total / max(1, self._steps[name]) for name, total in self._sums.items()]
        reduced = accelerator.reduce(torch.stack(means), reduction="mean").tolist()
        names = [f"loss/{name}" for name in self._sums]
        self._sums, self._steps = {}, {}
        return dict(zip(names, reduced, strict=True))
