"""The facts of a machine, without names, users or paths; and the size of a model."""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass

import torch
import transformers
from torch import nn


@dataclass(frozen=True)
class Machine:
    """The facts of a machine that matter to measurements."""

    cpu_cores: int | None
    torch_threads: int
    architecture: str
    accelerator: str | None
    python_version: str
    torch_version: str
    transformers_version: str


def this_machine() -> Machine:
    """Return the facts of this machine."""
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
    """Return the number of parameters, counting shared ones once.

    >>> parameter_count(nn.Linear(3, 2))
    8
    """
    return sum(parameter.numel() for parameter in model.parameters())


def size_mb(model: nn.Module) -> float:
    """Return the size of a checkpoint in megabytes (10^6 bytes): parameters and persistent buffers, without the header.

    Tied tensors count once.

    >>> size_mb(nn.Linear(1000, 250, bias=False))
    1.0
    """
    buffers = {
        id(buffer): buffer
        for module in model.modules()
        for name, buffer in module.named_buffers(recurse=False)
        if name not in module._non_persistent_buffers_set
    }
    return sum(tensor.numel() * tensor.element_size() for tensor in (*model.parameters(), *buffers.values())) / 1e6
