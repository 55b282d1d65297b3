"""The student as its own teacher: an average of its past, or its base with the adapters off."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from typing import Any

import torch
from accelerate.utils import DistributedType
from torch import Tensor, nn

from hf_distill.errors import SettingError, TeacherError
from hf_distill.inside.recorder import Inside
from hf_distill.signals import Needs, Signals
from hf_distill.tasks import Batch, Task
from hf_distill.teachers.model import ModelTeacher
from hf_distill.vocabulary import Columns


class MovingAverage(ModelTeacher):
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
        super().__init__(nn.Module())
        self.decay = float(decay)
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
        average = copy.deepcopy(student)
        for parameter in average.parameters():
            if parameter.dtype in (torch.float16, torch.bfloat16):
                average.float()
                break
        accelerator = self._accelerator
        super().__init__(average, processor=student_processor)
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

    def place(self, accelerator: Any) -> None:
        if accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED):
            raise SettingError(
                f"MovingAverage with {accelerator.distributed_type.value}: no process holds the whole student, of "
                "which this is an average. Use data parallelism (DDP)."
            )
        super().place(accelerator)

    @torch.no_grad()
    def after_step(self, student: nn.Module) -> None:
        student = getattr(student, "module", student)  # as DDP wraps it
        self._steps += 1
        decay = min(self.decay, 1 - 1 / (self._steps + 1))
        for average, parameter in zip(self.model.parameters(), student.parameters(), strict=True):
            average.lerp_(parameter.to(average.dtype), 1 - decay)
        for kept, buffer in zip(self.model.buffers(), student.buffers(), strict=True):
            kept.copy_(buffer)

    def described(self) -> str:
        """For the card."""
        return f"a moving average of the student itself (decay {self.decay:g})"

    def state(self) -> dict[str, Tensor]:
        """The average and how many steps it has seen."""
        tensors = {**dict(self.model.named_parameters()), **dict(self.model.named_buffers())}
        return {"steps": torch.tensor(self._steps), **{f"model.{name}": value for name, value in tensors.items()}}

    @torch.no_grad()
    def load_state(self, state: dict[str, Tensor]) -> None:
        """Raises SettingError: of another student."""
        own = self.state()
        if set(own) != set(state) or any(own[name].shape != value.shape for name, value in state.items()):
            raise SettingError("the saved average is of another student than this one. Resume with the same student.")
        self._steps = int(state["steps"])
        for name, value in own.items():
            if name != "steps":
                value.copy_(state[name])


class AdaptersOff:
    """The base model of a PEFT student, its adapters switched off for the moment: a teacher without a second copy.

    The student's forward is unchanged: modes and adapters are as they were afterwards, also when the forward raises.
    What `modules_to_save` trains (a fresh head) is switched off as well: the teacher speaks with the base's own head,
    so use it where that head knows something (language models, fine-tuned classifiers).

    Raises:
        TeacherError: the student is no PEFT model.
    """

    def __init__(self) -> None:
        self._teacher: _Unfrozen | None = None

    @property
    def inputs(self) -> tuple[str, ...]:
        """Known after `fit`, as the rest."""
        return () if self._teacher is None else self._teacher.inputs

    @property
    def columns(self) -> Columns:
        return Columns()

    @property
    def inside(self) -> Inside | None:
        return None if self._teacher is None else self._teacher.inside

    def fit(
        self,
        student: nn.Module,
        task: Task,
        *,
        student_processor: Any = None,
        compares_predictions: bool = True,
        same_inputs: bool = False,
    ) -> None:
        """Remember the student. See `Teacher.fit`."""
        if not hasattr(student, "disable_adapter"):
            raise TeacherError(
                f"AdaptersOff: the student is a {type(student).__name__}, which has no adapters to switch off. "
                "Make it a PEFT model (peft.get_peft_model), or pass a teacher."
            )
        self._teacher = _Unfrozen(student)

    def described(self) -> str:
        """For the card."""
        return "the base model itself, its adapters switched off"

    def __call__(self, task: Task, batch: Batch, needs: Needs) -> Signals:
        teacher = self._known()
        with _as_it_was(teacher.model), teacher.model.disable_adapter():
            teacher.model.eval()
            return teacher(task, batch, needs)

    def place(self, accelerator: Any) -> None:
        self._known().use(accelerator)

    def after_step(self, student: nn.Module) -> None:
        """Nothing: the base does not move."""

    def _known(self) -> _Unfrozen:
        assert self._teacher is not None  # `fit` comes first
        return self._teacher


class _Unfrozen(ModelTeacher):
    """A model that is asked as a teacher is, and stays the student: neither frozen nor moved."""

    def use(self, accelerator: Any) -> None:
        self._accelerator = accelerator

    def _put_to_use(self) -> None:
        self._in_use = True


@contextlib.contextmanager
def _as_it_was(model: nn.Module) -> Iterator[None]:
    """Every module's mode, and what is trained, whatever happens between."""
    modes = [(module, module.training) for module in model.modules()]
    trained = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
        for parameter, was in trained:  # PEFT leaves every parameter of an active adapter trainable
            parameter.requires_grad_(was)
