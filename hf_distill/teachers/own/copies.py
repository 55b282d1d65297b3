"""A second copy of the student as its teacher: a running average of it, or it as it was some steps ago."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from typing import Any

import torch
from accelerate.utils import DistributedType
from torch import Tensor, nn

from hf_distill.errors import SettingError
from hf_distill.tasks import Task
from hf_distill.tasks.infer import unwrapped
from hf_distill.teachers.model import ModelTeacher


class _CopyOfStudent(ModelTeacher, ABC):
    """A copy that follows the student; a subclass says how. It is saved with each checkpoint and goes on from there."""

    def __init__(self) -> None:
        super().__init__(nn.Module())
        self._steps = 0

    def fit(
        self,
        student: nn.Module,
        task: Task,
        *,
        student_processor: Any = None,
        compares_predictions: bool = True,
        same_inputs: bool = False,
    ) -> None:
        """Start from a copy of this student."""
        accelerator = self._accelerator
        ModelTeacher.__init__(self, self._copied(student), processor=student_processor)
        self._steps = 0
        super().fit(
            student,
            task,
            student_processor=student_processor,
            compares_predictions=compares_predictions,
            same_inputs=same_inputs,
        )
        if accelerator is not None:  # a new student of the same run
            self.place(accelerator)

    def prepare_inputs(self, student: nn.Module, task: Task, *, tokenizer: Any = None) -> None:
        """Nothing: it is given what the student is given, and reads it by the student's own config."""

    def place(self, accelerator: Any) -> None:
        if accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED):
            raise SettingError(
                f"{type(self).__name__} with {accelerator.distributed_type.value}: no process holds the whole student, "
                "of which this is a copy. Use data parallelism (DDP)."
            )
        super().place(accelerator)

    @torch.no_grad()
    def after_step(self, student: nn.Module) -> None:
        self._steps += 1
        self._follow(getattr(student, "module", student))  # as DDP wraps it

    def state(self) -> dict[str, Tensor]:
        """The copy, and how many steps it has seen."""
        tensors = {**dict(self.model.named_parameters()), **dict(self.model.named_buffers())}
        return {"steps": torch.tensor(self._steps), **{f"model.{name}": value for name, value in tensors.items()}}

    @torch.no_grad()
    def load_state(self, state: dict[str, Tensor]) -> None:
        """Raises SettingError: of another student."""
        own = self.state()
        if set(own) != set(state) or any(own[name].shape != value.shape for name, value in state.items()):
            raise SettingError(
                f"the saved {type(self).__name__} is of another student than this one. Resume with the same student."
            )
        self._steps = int(state["steps"])
        for name, value in own.items():
            if name != "steps":
                value.copy_(state[name])

    def _copied(self, student: nn.Module) -> nn.Module:
        """A copy of its weights; the config is the student's own, which `Trainer` aligns with the tokenizer later."""
        config = getattr(unwrapped(student), "config", None)
        return copy.deepcopy(student, {} if config is None else {id(config): config})

    @abstractmethod
    def _follow(self, student: nn.Module) -> None:
        """What becomes of the copy after an optimizer step."""


class MovingAverage(_CopyOfStudent):
    """An exponential moving average of the student's weights: a mean teacher.

    Tarvainen and Valpola 2017 (section 2): after each optimizer step, average = d · average + (1 - d) · student, with
    d = min(decay, 1 - 1 / (step + 1)) so that the start is forgotten, as in their code. Buffers are copied. The average
    is kept in fp32 (in bf16 it would stand still), is saved with each checkpoint and goes on from there at resume. It
    costs one copy of the student, of a PEFT student with its base.

    Args:
        decay: in [0, 1); 0.99 early and 0.999 later in the paper.

    Raises:
        SettingError: a decay that cannot be; FSDP and DeepSpeed, where no process holds the whole student.
    """

    def __init__(self, *, decay: float = 0.999) -> None:
        if isinstance(decay, bool) or not isinstance(decay, (int, float)) or not 0 <= decay < 1:
            raise SettingError(f"MovingAverage: decay={decay!r}: must lie in [0, 1).")
        super().__init__()
        self.decay = float(decay)

    def described(self) -> str:
        """For the card."""
        return f"a moving average of the student itself (decay {self.decay:g})"

    def _copied(self, student: nn.Module) -> nn.Module:
        average = super()._copied(student)
        halves = (torch.float16, torch.bfloat16)
        return average.float() if any(p.dtype in halves for p in average.parameters()) else average

    def _follow(self, student: nn.Module) -> None:
        decay = min(self.decay, 1 - 1 / (self._steps + 1))
        for average, parameter in zip(self.model.parameters(), student.parameters(), strict=True):
            average.lerp_(parameter.to(average.dtype), 1 - decay)
        for kept, buffer in zip(self.model.buffers(), student.buffers(), strict=True):
            kept.copy_(buffer)


class Snapshot(_CopyOfStudent):
    """The student as it was when the last multiple of `every` optimizer steps ended.

    Yang et al. 2019 (Snapshot Distillation, section 3): one training in several parts, the end of each the teacher of
    the next; born-again generations without starting anew. There the learning rate begins again with each part, and the
    first has no teacher; here a schedule of each says so: until the first refresh the teacher is the student as it was
    at the start, so let alpha be 0 that long (a function of progress), or start from a student that knows something. It
    is saved with each checkpoint and goes on from there at resume, and costs one copy of the student.

    Args:
        every: optimizer steps between two refreshes; those of an epoch are `math.ceil(examples / batch size)`.

    Raises:
        SettingError: no whole number above 0; FSDP and DeepSpeed, where no process holds the whole student.

    >>> from transformers import BertConfig, BertForSequenceClassification as Bert
    >>> from hf_distill import Distiller
    >>> student = Bert(BertConfig(vocab_size=9, hidden_size=4, num_hidden_layers=1, num_attention_heads=1))
    >>> distiller = Distiller(student, Snapshot(every=100))
    >>> batch = {"input_ids": torch.tensor([[1, 2]]), "labels": torch.tensor([0])}
    >>> round(distiller(student.eval(), batch).terms["logits"].item(), 6)  # it is the student itself, as yet
    0.0
    """

    def __init__(self, *, every: int) -> None:
        if isinstance(every, bool) or not isinstance(every, int) or every < 1:
            raise SettingError(f"Snapshot: every={every!r}: give a whole number of optimizer steps, at least 1.")
        super().__init__()
        self.every = every

    def described(self) -> str:
        """For the card."""
        return f"the student itself as it was at the last of every {self.every} optimizer steps"

    def _follow(self, student: nn.Module) -> None:
        if self._steps % self.every:
            return
        for of in (nn.Module.parameters, nn.Module.buffers):
            for kept, now in zip(of(self.model), of(student), strict=True):
                kept.copy_(now)
