"""Counts: the denominators of one optimizer step, and what undoes the averaging that others do."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from accelerate.utils import DistributedType
from torch import Tensor, nn


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


def tied(loss: Tensor, outputs: Any) -> Tensor:
    """The same number, with a graph to every output: an empty slice sums to 0, whatever is in the rest."""
    values = outputs.values() if isinstance(outputs, Mapping) else outputs
    for value in values:
        if isinstance(value, Tensor) and value.requires_grad:
            loss = loss + value.flatten()[:0].sum()
    return loss


def several_processes() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def parameters_of(loss: Tensor) -> set[int]:
    """The ids of the parameters that a loss depends on."""
    found: set[int] = set()
    waiting, seen = [loss.grad_fn], set()
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            found.add(id(node.variable))
        waiting += [following for following, _ in node.next_functions]
    return found


@torch.no_grad()
def forget_gradients_but(parameters: Iterable[nn.Parameter], kept: set[int]) -> None:
    """Set gradients that are exactly 0 to None, of parameters that the loss was not seen to depend on.

    That they are 0 is asked too: a function that hides its parameters (reentrant checkpointing) is not seen through.
    """
    for parameter in parameters:
        if id(parameter) not in kept and parameter.grad is not None and not bool(parameter.grad.any()):
            parameter.grad = None
