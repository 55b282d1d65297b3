"""What the numbers were measured on: cores, threads, versions. No name, user or path."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import transformers
from torch import Tensor, nn


@dataclass(frozen=True)
class Machine:
    """The machine facts of a report."""

    cpu_cores: int | None
    torch_threads: int
    architecture: str
    accelerator: str | None
    python_version: str
    torch_version: str
    transformers_version: str


def this_machine() -> Machine:
    """The facts of the machine that runs this."""
    return Machine(
        cpu_cores=os.cpu_count(),
        torch_threads=torch.get_num_threads(),
        architecture=platform.machine(),
        accelerator=torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        python_version=platform.python_version(),
        torch_version=torch.__version__,
        transformers_version=transformers.__version__,
    )


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
