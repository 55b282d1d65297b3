"""How large a model is: parameters, and bytes as stored. Not the memory of a running one."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn


def parameter_count(model: nn.Module) -> int:
    """The number of parameters, each counted once however many names it has.

    >>> parameter_count(nn.Linear(3, 2))
    8
    """
    return sum(parameter.numel() for parameter in model.parameters())


def size_mb(model: nn.Module) -> float:
    """Megabytes (10^6 bytes) of what a checkpoint holds: parameters and persistent buffers.

    Tied tensors count once. The few bytes of names in the file's header are left out.

    >>> size_mb(nn.Linear(1000, 250, bias=False))
    1.0
    """
    return sum(tensor.numel() * tensor.element_size() for tensor in _stored(model)) / 1e6


def _stored(model: nn.Module) -> Iterator[Tensor]:
    yield from model.parameters()
    seen: set[int] = set()
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            if name not in module._non_persistent_buffers_set and id(buffer) not in seen:
                seen.add(id(buffer))
                yield buffer
