"""Counts: the denominators of one optimizer step, and what undoes the averaging that others do."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from accelerate.utils import DistributedType
from torch import Tensor


@dataclass(frozen=True)
class Counts:
    """The denominators of one optimizer step.

    Attributes:
        denominators: term → scalar, over all micro-batches and processes.
        scale: what a term must be multiplied by, because processes are averaged and Accelerate divides by its
            accumulation steps, while the denominators already are those of the whole step.
    """

    denominators: Mapping[str, Tensor]
    scale: float = 1.0


def scale_of(accelerator: Any, same_batch: int) -> float:
    """Processes that see different batches, times the accumulation steps that `Accelerator.backward` divides by."""
    if accelerator is None:
        return 1.0
    divided_by = 1
    if accelerator.distributed_type != DistributedType.DEEPSPEED:
        divided_by = accelerator.gradient_accumulation_steps
    return accelerator.num_processes // same_batch * float(divided_by)
