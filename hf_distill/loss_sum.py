"""LossSum: what an objective found in a micro-batch, and the count it is over. It is not averaged yet."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class LossSum:
    """A total, or the micro-batch mean of a head that only gives that, and how many rows it is over.

    Attributes:
        value: scalar with the student's graph: the total, or the mean where `is_mean`.
        count: scalar, the rows of this micro-batch that count.
        is_mean: the value already is divided by `count`.
    """

    value: Tensor
    count: Tensor
    is_mean: bool = False

    def over(self, denominator: Tensor) -> Tensor:
        """This micro-batch's part of the mean over the whole optimizer step.

        A mean is multiplied by count / denominator, which is exactly 1.0 when this micro-batch is the whole step.
        No row at all gives 0, with a graph.

        >>> mean = LossSum(torch.tensor(3.0), torch.tensor(2), is_mean=True)
        >>> mean.over(torch.tensor(8)).item()
        0.75
        """
        denominator = denominator.clamp(min=1)
        if self.is_mean:  # a mean over no row is NaN
            value = torch.where(self.count > 0, self.value, torch.zeros_like(self.value))
            return value * (self.count / denominator)
        return self.value / denominator
