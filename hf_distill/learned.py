"""Learned: the parameters that objectives learn beside the student; saved beside a checkpoint, never exported."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, broadcast
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from hf_distill.errors import SettingError

STATE_FILE = "distill_state.safetensors"


class Learned:
    """The learned parameters of all objectives as one module, which is not part of the student.

    A hand-written loop gives `parameters()` to the optimizer with the student's, calls `synchronize(accelerator)`
    after the last backward of an optimizer step, and clips both together.
    """

    def __init__(self) -> None:
        self.module: nn.Module = nn.ModuleDict()

    def hold(self, module: nn.Module) -> None:
        self.module = module

    def parameters(self) -> Iterator[nn.Parameter]:
        return self.module.parameters()

    def __bool__(self) -> bool:
        return any(True for _ in self.module.parameters())

    def to(self, accelerator: Accelerator) -> None:
        """Move to the accelerator's device, and start all processes from the values of process 0.

        Raises:
            SettingError: with DeepSpeed or FSDP, which manage the optimizer's parameters and do not know these.
        """
        if not self:
            return
        if accelerator.distributed_type in (DistributedType.DEEPSPEED, DistributedType.FSDP):
            raise SettingError(
                f"learned projections with {accelerator.distributed_type.value}: it shards what the optimizer "
                "holds and knows the student alone. Use data parallelism (DDP), a student as wide as the teacher "
                "(students.inherit) with projection='none', or RelationMatch, which learns nothing."
            )
        self.module.to(accelerator.device)
        if accelerator.num_processes > 1:
            for parameter in self.parameters():
                broadcast(parameter.data, from_process=0)

    def add_to(
        self,
        optimizer: torch.optim.Optimizer,
        *,
        learning_rate: float | None,
        weight_decay: float,
        has_scheduler: bool,
    ) -> None:
        """Give the optimizer a group of these parameters, if it does not hold them.

        Args:
            optimizer: the student's optimizer.
            learning_rate: learning rate of the group; None means the optimizer's own.
            weight_decay: weight decay of the group.
            has_scheduler: whether there is a scheduler already, which could not follow a new group.

        Raises:
            SettingError: if there is one.
        """
        held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        missing = [parameter for parameter in self.parameters() if id(parameter) not in held]
        if not missing:
            return
        if has_scheduler:
            raise SettingError(
                "the objectives learn projections, and the optimizer and the scheduler that were passed know nothing "
                "of them. Give the optimizer distiller.learned.parameters() too (pass distiller= to the trainer), or "
                "pass no scheduler."
            )
        rate = {} if learning_rate is None else {"lr": learning_rate}
        optimizer.add_param_group({"params": missing, "weight_decay": weight_decay, **rate})

    @torch.no_grad()
    def synchronize(self, accelerator: Accelerator | None) -> None:
        """Average the gradients over processes, as DDP does for the student's; call it once an optimizer step."""
        if accelerator is None or accelerator.num_processes == 1:
            return
        for parameter in self.parameters():
            if parameter.grad is not None:  # None in every process if the objective has weight 0 now
                parameter.grad.copy_(accelerator.reduce(parameter.grad, reduction="mean"))

    def zero_grad(self) -> None:
        self.module.zero_grad()

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write the parameters into a checkpoint's folder, whole or not at all."""
        if self:
            save_state(self.module.state_dict(), folder, STATE_FILE)

    def load(self, folder: str | os.PathLike[str]) -> None:
        """Read the parameters from a checkpoint's folder.

        Raises:
            SettingError: if they are missing, or belong to other objectives.
        """
        if not self:
            if Path(folder, STATE_FILE).is_file():
                raise SettingError(
                    f"{os.fspath(folder)} was saved with objectives that learn (it has {STATE_FILE}), and this run has "
                    "none. Pass the same objectives, or start anew from its model."
                )
            return
        names = ", ".join(self.module.state_dict())
        state = load_state(folder, STATE_FILE, what=f"what these objectives learn ({names})")
        try:
            self.module.load_state_dict(state)
        except RuntimeError as error:
            raise SettingError(
                f"{Path(folder, STATE_FILE)} does not fit the objectives of this run, which learn {names}: {error}"
            ) from error


def save_state(state: Mapping[str, Tensor], folder: str | os.PathLike[str], name: str) -> None:
    """Write tensors into a file of a checkpoint, whole or not at all."""
    target = Path(folder, name)
    beside = target.with_name(f".{name}.partial")
    save_file({key: tensor.detach().cpu().contiguous() for key, tensor in state.items()}, beside)
    os.replace(beside, target)


def load_state(folder: str | os.PathLike[str], name: str, *, what: str) -> dict[str, Tensor]:
    """Read the tensors of such a file.

    Raises:
        SettingError: if it is missing or damaged.
    """
    source = Path(folder, name)
    if not source.is_file():
        raise SettingError(
            f"{os.fspath(folder)} has no {name}, which holds {what}: it was saved without them, or with "
            "save_only_model=True. Resume from another checkpoint, or start anew from its model."
        )
    try:
        return load_file(source)
    except SafetensorError as error:
        raise SettingError(f"{source} is damaged ({error}). Resume from another checkpoint.") from error
