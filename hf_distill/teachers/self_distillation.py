"""The student as its own teacher: its base without adapters, a second pass, or a copy that follows it."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import random
from abc import abstractmethod
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from hf_distill._utils import random_state_kept
from hf_distill.errors import SettingError, TeacherError, check_below_one, check_whole_number
from hf_distill.models.capture import ActivationCapture
from hf_distill.models.generation import evaluating
from hf_distill.signals import Needs, Signals
from hf_distill.tasks import Batch, Task
from hf_distill.tasks.infer import config_of
from hf_distill.teachers.base import Teacher, TeacherSetup
from hf_distill.teachers.model import ModelTeacher, Tokenizer


class _StudentItself(Teacher):
    """Runs the student as teacher: it is not frozen, moved or copied."""

    keeps_mode = False  # whether it runs in the mode that the student is in, or in evaluation mode

    def __init__(self) -> None:
        self._teacher: _StudentModel | None = None

    @property
    def inputs(self) -> tuple[str, ...]:  # type: ignore[override]  # those of the student
        """The student's inputs; known after `bind`, as the rest."""
        return () if self._teacher is None else self._teacher.inputs

    @property
    def capture(self) -> ActivationCapture | None:  # type: ignore[override]  # that of the student
        return None if self._teacher is None else self._teacher.capture

    @property
    def fixed_temperature(self) -> bool:
        return False

    def bind(self, setup: TeacherSetup) -> None:
        self._check_student(setup.student)
        self._teacher = _StudentModel(setup.student, keeps_mode=self.keeps_mode)

    def to(self, accelerator: Accelerator) -> None:
        self._bound()._accelerator = accelerator

    @abstractmethod
    def _check_student(self, student: nn.Module) -> None:
        """Raise if this student cannot teach itself this way."""

    def _bound(self) -> _StudentModel:
        assert self._teacher is not None  # `bind` comes first
        return self._teacher


class _StudentModel(ModelTeacher):
    """The student as a model teacher that is neither frozen nor moved."""

    def __init__(self, student: nn.Module, *, keeps_mode: bool) -> None:
        super().__init__(student)
        self._is_frozen = True  # skips the freezing
        self._keeps_mode = keeps_mode

    def _set_mode(self) -> None:
        if not self._keeps_mode:
            super()._set_mode()


class BaseModelTeacher(_StudentItself):
    """The base model of a PEFT student, with its adapters switched off: a teacher without a second copy.

    Modes and adapters are restored after each of its forwards, also when a forward raises. Modules of
    `modules_to_save` (a new head) are switched off too: the teacher predicts with the base's own head, so use it if
    that head is trained (language models, fine-tuned classifiers).

    Raises:
        TeacherError: if the student is not a PEFT model.
    """

    def describe(self) -> str:
        return "the base model itself, its adapters switched off"

    def __call__(self, task: Task, batch: Batch, needs: Needs) -> Signals:
        teacher = self._bound()
        model: Any = teacher.model  # a PeftModel
        trained = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
        try:
            with evaluating(model), model.disable_adapter():
                return teacher(task, batch, needs)
        finally:
            for parameter, was_trained in trained:  # PEFT makes all parameters of an active adapter trainable
                parameter.requires_grad_(was_trained)

    def _check_student(self, student: nn.Module) -> None:
        if not hasattr(student, "disable_adapter"):
            name = type(student).__name__
            raise TeacherError(f"BaseModelTeacher: {name} has no adapters to switch off. Make it a PEFT model.")


class RDropTeacher(_StudentItself):
    """A second pass of the student with different dropout: two passes over an example should agree (R-Drop).

    Liang et al. 2021 (section 2) take gradients through both passes, of
    `-log p1(y) - log p2(y) + α · ½ (KL(p1 ‖ p2) + KL(p2 ‖ p1))`. Here the second pass has no gradient. Both passes have
    the same distribution, so each half of the paper's gradient has the same expectation, and the gradient of
    `divergence="jeffreys"` (the sum of both directions) at temperature 1 is the paper's in expectation. The paper's
    label term covers two passes, so its loss is, in expectation, (2 + α) times that of this blend at
    alpha = α / (2 + α): `RDropTeacher.alpha` (with Adam the factor does not matter). The second pass costs a forward,
    and no backward or memory for one; the paper's costs a backward more, and its gradient is less noisy.

    The dropout of the second pass depends on its own seed, the process and the number of passes so far: the run's
    random numbers do not change, and a resumed run continues where it was. It runs in the student's mode.

    Args:
        seed: the seed of its dropout.

    Raises:
        SettingError: if the student has no dropout, so that both passes would be the same.

    >>> from transformers import BertConfig, BertForSequenceClassification as Bert
    >>> from hf_distill import Distiller
    >>> shape = dict(vocab_size=9, hidden_size=4, num_hidden_layers=1, num_attention_heads=1)
    >>> _, student = torch.manual_seed(0), Bert(BertConfig(**shape, initializer_range=1.0)).train()
    >>> distiller = Distiller(
    ...     student, RDropTeacher(), divergence="jeffreys", temperature=1.0, alpha=RDropTeacher.alpha(1.0)
    ... )
    >>> batch = {"input_ids": torch.tensor([[1, 2]]), "labels": torch.tensor([0])}
    >>> distiller(student, batch).terms["logits"].item() > 0
    True
    """

    paper = "liang2021rdrop"
    keeps_mode = True

    def __init__(self, *, seed: int = 0) -> None:
        super().__init__()
        self.seed = seed
        self._passes = 0
        self._process = 0

    @staticmethod
    def alpha(paper_weight: float) -> float:
        """Return the blend's alpha for the paper's α.

        Args:
            paper_weight: the paper's α, 1 to 5 there.

        Raises:
            SettingError: if it is below 0.

        >>> RDropTeacher.alpha(2.0)
        0.5
        """
        if not 0 <= paper_weight < float("inf"):
            raise SettingError(f"RDropTeacher.alpha: paper_weight={paper_weight!r}: must be at least 0 and finite.")
        return paper_weight / (2 + paper_weight)

    def describe(self) -> str:
        return "the student itself, a second pass with other dropout"

    def __repr__(self) -> str:
        return f"RDropTeacher(seed={self.seed})"

    def __call__(self, task: Task, batch: Batch, needs: Needs) -> Signals:
        teacher = self._bound()
        digest = hashlib.blake2b(f"{self.seed} {self._process} {self._passes}".encode(), digest_size=4).digest()
        seed = int.from_bytes(digest, "big")
        with _statistics_kept(teacher.model), random_state_kept():
            random.seed(seed)
            np.random.seed(seed)
            torch.manual_seed(seed)
            signals = teacher(task, batch, needs)
        if torch.is_grad_enabled():  # an evaluation changes nothing
            self._passes += 1
        return signals

    def to(self, accelerator: Accelerator) -> None:
        super().to(accelerator)
        self._process = accelerator.process_index

    def state_dict(self) -> dict[str, Tensor]:
        return {"passes": torch.tensor(self._passes)}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Continue from a checkpoint; raise SettingError if it belongs to another kind of teacher."""
        if set(state) != {"passes"}:
            names = ", ".join(sorted(state)[:3])
            raise SettingError(f"the checkpoint's teacher ({names}, ...) is no RDropTeacher. Resume with that teacher.")
        self._passes = int(state["passes"])

    def _check_student(self, student: nn.Module) -> None:
        self._passes = 0
        if not _has_randomness(student):
            name = type(student).__name__
            raise SettingError(f"RDropTeacher: nothing in the student ({name}) is random. Load it with dropout.")


def _has_randomness(model: nn.Module) -> bool:
    """Return whether some dropout, layer drop or masking is above 0, as a module or as an attribute."""
    for module in model.modules():
        if "drop" in type(module).__name__.lower() and getattr(module, "p", False):
            return True
        if any("drop" in name and isinstance(value, float) and value > 0 for name, value in vars(module).items()):
            return True
    config = config_of(model)

    def any_set(*names: str) -> bool:
        return any(getattr(config, name, 0) for name in names)

    masks = any_set("apply_spec_augment") and any_set("mask_time_prob", "mask_feature_prob")
    return masks or any_set("layerdrop", "encoder_layerdrop", "decoder_layerdrop")


@contextlib.contextmanager
def _statistics_kept(model: nn.Module) -> Iterator[None]:
    """Restore the running statistics of batch norms, which only the student's own pass may move."""
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    saved = [(buffer, buffer.clone()) for norm in norms for buffer in norm.buffers()]
    try:
        yield
    finally:
        for buffer, before in saved:
            buffer.copy_(before)


class _CopyOfStudent(ModelTeacher):
    """A copy of the student, saved with each checkpoint; a subclass defines how it follows the student."""

    def __init__(self) -> None:
        super().__init__(nn.Module())
        self._steps = 0

    def bind(self, setup: TeacherSetup) -> None:
        """Start from a copy of this student."""
        accelerator = self._accelerator
        ModelTeacher.__init__(self, self._copy(setup.student), processing_class=setup.processing_class)
        self._steps = 0
        super().bind(setup)
        if accelerator is not None:  # a new student of the same run
            self.to(accelerator)

    def prepare_inputs(self, student: nn.Module, task: Task, *, tokenizer: Tokenizer = None) -> None:
        """Do nothing: a copy reads the student's inputs as the student does."""

    def to(self, accelerator: Accelerator) -> None:
        if accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED):
            kind = accelerator.distributed_type.value
            raise SettingError(f"{type(self).__name__} with {kind}: no process holds the whole student. Use DDP.")
        super().to(accelerator)

    @torch.no_grad()
    def on_step(self, student: nn.Module) -> None:
        self._steps += 1
        self._follow(getattr(student, "module", student))  # DDP wraps it

    def state_dict(self) -> dict[str, Tensor]:
        """Return the copy and the number of steps that it has followed."""
        tensors = {**dict(self.model.named_parameters()), **dict(self.model.named_buffers())}
        return {"steps": torch.tensor(self._steps), **{f"model.{name}": value for name, value in tensors.items()}}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Continue from a checkpoint; raise SettingError if it belongs to another student."""
        own = self.state_dict()
        if set(own) != set(state) or any(own[name].shape != value.shape for name, value in state.items()):
            raise SettingError(
                f"the saved {type(self).__name__} is of another student than this one. Resume with the same student."
            )
        self._steps = int(state["steps"])
        for name, value in own.items():
            if name != "steps":
                value.copy_(state[name])

    def _copy(self, student: nn.Module) -> nn.Module:
        """Return a copy that shares the student's config, which `Trainer` aligns with the tokenizer later."""
        config = config_of(student)
        return copy.deepcopy(student, {} if config is None else {id(config): config})

    @abstractmethod
    def _follow(self, student: nn.Module) -> None:
        """Update the copy after an optimizer step."""


class MovingAverage(_CopyOfStudent):
    """An exponential moving average of the student's weights: a mean teacher.

    Tarvainen and Valpola 2017 (section 2): after each optimizer step, average = d · average + (1 - d) · student, with
    d = min(decay, 1 - 1 / (step + 1)) so that the start is forgotten, as in their code. Buffers are copied. The average
    is kept in fp32, because in bf16 such small updates would be lost to rounding, and is saved with each checkpoint.
    It costs the memory of one copy of the student, including the base of a PEFT student.

    Args:
        decay: d, in [0, 1); 0.99 early and 0.999 later in the paper.

    Raises:
        SettingError: if decay is out of range, or FSDP or DeepSpeed shards the student.
    """

    paper = "tarvainen2017meanteacher"

    def __init__(self, *, decay: float = 0.999) -> None:
        check_below_one("MovingAverage: decay", decay)
        super().__init__()
        self.decay = float(decay)

    def describe(self) -> str:
        return f"a moving average of the student itself (decay {self.decay:g})"

    def __repr__(self) -> str:
        return f"MovingAverage(decay={self.decay:g})"

    def _copy(self, student: nn.Module) -> nn.Module:
        average = super()._copy(student)
        halves = (torch.float16, torch.bfloat16)
        return average.float() if any(p.dtype in halves for p in average.parameters()) else average

    def _follow(self, student: nn.Module) -> None:
        decay = min(self.decay, 1 - 1 / (self._steps + 1))
        for average, parameter in zip(self.model.parameters(), student.parameters(), strict=True):
            average.lerp_(parameter.to(average.dtype), 1 - decay)
        for copied, buffer in zip(self.model.buffers(), student.buffers(), strict=True):
            copied.copy_(buffer)


class Snapshot(_CopyOfStudent):
    """The student as it was when the last multiple of `every` optimizer steps ended.

    Yang et al. 2019 (Snapshot Distillation, section 3): one training in several parts, where the student at the end of
    a part teaches the next part, as born-again generations without starting over. In the paper the learning rate
    restarts with each part, and the first part has no teacher. Here schedules do this: until the first refresh the
    teacher is the student at the start, so keep alpha at 0 that long (a function of progress), or start from a trained
    student. It costs the memory of one copy of the student and is saved with each checkpoint.

    Args:
        every: optimizer steps between two refreshes; an epoch has `math.ceil(examples / batch size)`.

    Raises:
        SettingError: if `every` is not a whole number above 0, or FSDP or DeepSpeed shards the student.

    >>> from transformers import BertConfig, BertForSequenceClassification as Bert
    >>> from hf_distill import Distiller
    >>> student = Bert(BertConfig(vocab_size=9, hidden_size=4, num_hidden_layers=1, num_attention_heads=1))
    >>> distiller = Distiller(student, Snapshot(every=100))
    >>> batch = {"input_ids": torch.tensor([[1, 2]]), "labels": torch.tensor([0])}
    >>> round(distiller(student.eval(), batch).terms["logits"].item(), 6)  # still the student itself
    0.0
    """

    paper = "yang2019snapshot"

    def __init__(self, *, every: int) -> None:
        check_whole_number("Snapshot: every", every)
        super().__init__()
        self.every = every

    def describe(self) -> str:
        return f"the student itself as it was at the last of every {self.every} optimizer steps"

    def __repr__(self) -> str:
        return f"Snapshot(every={self.every})"

    def _follow(self, student: nn.Module) -> None:
        if self._steps % self.every:
            return
        for tensors in (nn.Module.parameters, nn.Module.buffers):
            for copied, current in zip(tensors(self.model), tensors(student), strict=True):
                copied.copy_(current)
