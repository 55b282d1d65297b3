"""A loss that uses none of a model's outputs, under DDP, which waits for gradients that do not come (alpha=None).

DDP takes every parameter that an output is reached from for used. A head whose predictions nothing compares gets no
gradient then, and the reduction never ends. So the outputs are tied to the loss with nothing, and what got its gradient
from that alone is given none afterwards: a zero would be decayed, which one process does not do.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


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
