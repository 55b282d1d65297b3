"""What the numbers were measured on: cores, threads, versions. No name, user or path."""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass

import torch
import transformers


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
