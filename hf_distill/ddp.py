"""Several processes: graphs that DDP accepts, and gradients that it leaves alone."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
import torch.distributed as dist
from torch import Tensor, nn


def tied(loss: Tensor, outputs: Mapping[str, object] | Iterable[object]) -> Tensor:
    """Return the same value with a graph to every output; the sum of an empty slice is 0, whatever the output holds."""
    values = outputs.values() if isinstance(outputs, Mapping) else outputs
    for value in values:
        if isinstance(value, Tensor) and value.requires_grad:
            loss = loss + value.flatten()[:0].sum()
    return loss


def several_processes() -> bool:
    """Return whether this is one of several processes."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def parameters_of(loss: Tensor) -> set[int]:
    """Return the ids of the parameters that a loss depends on."""
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
    """Set gradients that are exactly 0 to None, for parameters that the loss does not seem to depend on.

    The gradient is checked because reentrant checkpointing hides parameters from the graph.
    """
    for parameter in parameters:
        if id(parameter) not in kept and parameter.grad is not None and not bool(parameter.grad.any()):
            parameter.grad = None
