"""The student itself as its teacher, without a second copy: its adapters off, or once more with other dropout."""

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

from hf_distill.errors import SettingError, TeacherError
from hf_distill.models.capture import ActivationCapture
from hf_distill.signals import Needs, Signals
from hf_distill.tasks import Batch, Task
from hf_distill.tasks.infer import unwrapped
from hf_distill.teachers.base import Teacher, TeacherSetup
from hf_distill.teachers.model import ModelTeacher


class _StudentItself(Teacher):
    """What is asked is the student; it is neither frozen nor moved nor copied."""

    def __init__(self) -> None:
        self._teacher: _Unfrozen | None = None

    @property
    def inputs(self) -> tuple[str, ...]:  # type: ignore[override]  # those of the student
        """Known after `bind`, as the rest."""
        return () if self._teacher is None else self._teacher.inputs

    @property
    def capture(self) -> ActivationCapture | None:  # type: ignore[override]  # that of the student
        return None if self._teacher is None else self._teacher.capture

    @property
    def fixed_temperature(self) -> bool:
        return False

    def bind(self, setup: TeacherSetup) -> None:
        self._check_student(setup.student)
        self._teacher = _Unfrozen(setup.student)

    def to(self, accelerator: Accelerator) -> None:
        self._known().use(accelerator)

    @abstractmethod
    def _check_student(self, student: Any) -> None:
        """Refuse a student that cannot be its own teacher so."""

    def _known(self) -> _Unfrozen:
        assert self._teacher is not None  # `bind` comes first
        return self._teacher


class BaseModelTeacher(_StudentItself):
    """The base model of a PEFT student, its adapters switched off for the moment: a teacher without a second copy.

    The student's forward is unchanged: modes and adapters are as they were afterwards, also when the forward raises.
    What `modules_to_save` trains (a fresh head) is switched off as well: the teacher speaks with the base's own head,
    so use it where that head knows something (language models, fine-tuned classifiers).

    Raises:
        TeacherError: the student is no PEFT model.
    """

    def describe(self) -> str:
        return "the base model itself, its adapters switched off"

    def __call__(self, task: Task, batch: Batch, needs: Needs) -> Signals:
        teacher = self._known()
        with _as_it_was(teacher.model), teacher.model.disable_adapter():
            teacher.model.eval()
            return teacher(task, batch, needs)

    def _check_student(self, student: Any) -> None:
        if not hasattr(student, "disable_adapter"):
            raise TeacherError(
                f"BaseModelTeacher: the student is a {type(student).__name__}, which has no adapters to switch off. "
                "Make it a PEFT model (peft.get_peft_model), or pass a teacher."
            )


class RDropTeacher(_StudentItself):
    """The student once more, with other dropout: two passes over an example should agree (R-Drop).

    Liang et al. 2021 (section 2) take gradients through both passes, of
    `-log p1(y) - log p2(y) + α · ½ (KL(p1 ‖ p2) + KL(p2 ‖ p1))`. Here the second pass has none. The passes are drawn
    alike, so each half of the paper's gradient has the same expectation, and the gradient of `divergence="jeffreys"`
    (the sum of both directions) at temperature 1 is the paper's in expectation. The paper's labels' term is of two
    passes, so its loss is, in expectation, (2 + α) times that of this blend at alpha = α / (2 + α):
    `RDropTeacher.alpha` (with Adam the factor does not matter). It costs a forward, no backward and no memory of one;
    the paper's way costs a forward and a backward more, and its gradient is less noisy.

    What the second pass draws is of its own seed, the process and the number of passes so far: the run's random numbers
    are as without it, and a resumed run goes on where it was. It is as the student is: in training mode in training.

    Args:
        seed: of its dropout.

    Raises:
        SettingError: a student that draws nothing: both passes would be the same.

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

    def __init__(self, *, seed: int = 0) -> None:
        super().__init__()
        self.seed = seed
        self._passes = 0
        self._process = 0

    @staticmethod
    def alpha(paper_weight: float) -> float:
        """The blend's alpha for the paper's α (1 to 5 there).

        Raises:
            SettingError: below 0.

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
        teacher = self._known()
        drawn = hashlib.blake2b(f"{self.seed} {self._process} {self._passes}".encode(), digest_size=4).digest()
        with _statistics_kept(teacher.model), _drawing_from(int.from_bytes(drawn, "big")):
            found = teacher(task, batch, needs)
        if torch.is_grad_enabled():  # in training: what an evaluation asks changes nothing
            self._passes += 1
        return found

    def to(self, accelerator: Accelerator) -> None:
        super().to(accelerator)
        self._process = accelerator.process_index

    def state_dict(self) -> dict[str, Tensor]:
        return {"passes": torch.tensor(self._passes)}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Raises SettingError: of another kind of teacher."""
        if set(state) != {"passes"}:
            raise SettingError(
                f"the checkpoint's teacher ({', '.join(sorted(state)[:3])}, ...) is no RDropTeacher. Resume with the "
                "teacher of that run."
            )
        self._passes = int(state["passes"])

    def _check_student(self, student: Any) -> None:
        self._passes = 0
        if not _draws(student):
            raise SettingError(
                f"RDropTeacher: nothing in the student ({type(student).__name__}) is drawn at random: no dropout is "
                "above 0, so two passes would be the same. Load it with dropout (hidden_dropout_prob=0.1, or as its "
                "config calls it), or use MovingAverage with an augmentation."
            )

    def _known(self) -> _Unfrozen:
        teacher = super()._known()
        teacher.keeps_mode = True
        return teacher


class _Unfrozen(ModelTeacher):
    """A model that is asked as a teacher is, and stays the student: neither frozen nor moved."""

    keeps_mode = False

    def use(self, accelerator: Any) -> None:
        self._accelerator = accelerator

    def _put_to_use(self) -> None:
        self._in_use = True

    def _set_mode(self) -> None:
        if not self.keeps_mode:
            super()._set_mode()


def _draws(model: nn.Module) -> bool:
    """Whether some dropout, layer drop or masking is above 0: of a module, or of an attribute that is so called."""
    for module in model.modules():
        if getattr(module, "p", 0) and "drop" in type(module).__name__.lower():
            return True
        for name, value in vars(module).items():
            if "drop" in name and isinstance(value, float) and value > 0:
                return True
    config = getattr(model, "config", None)
    if any(getattr(config, name, 0) for name in ("layerdrop", "encoder_layerdrop", "decoder_layerdrop")):
        return True
    masks = (getattr(config, name, 0) for name in ("mask_time_prob", "mask_feature_prob"))
    return bool(getattr(config, "apply_spec_augment", False)) and any(masks)


@contextlib.contextmanager
def _drawing_from(seed: int) -> Iterator[None]:
    """Random numbers of this seed; afterwards every generator is as it was."""
    python, numpy_state, cpu = random.getstate(), np.random.get_state(), torch.get_rng_state()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    try:
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy_state)
        torch.set_rng_state(cpu)
        if cuda:
            torch.cuda.set_rng_state_all(cuda)


@contextlib.contextmanager
def _statistics_kept(model: nn.Module) -> Iterator[None]:
    """Running means of batch norms: they move at the student's own pass alone."""
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    kept = [(buffer, buffer.clone()) for norm in norms for buffer in norm.buffers()]
    try:
        yield
    finally:
        for buffer, before in kept:
            buffer.copy_(before)


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


class _CopyOfStudent(ModelTeacher):
    """A copy that follows the student; a subclass says how. It is saved with each checkpoint and goes on from there."""

    def __init__(self) -> None:
        super().__init__(nn.Module())
        self._steps = 0

    def bind(self, setup: TeacherSetup) -> None:
        """Start from a copy of this student."""
        accelerator = self._accelerator
        ModelTeacher.__init__(self, self._copied(setup.student), processing_class=setup.processing_class)
        self._steps = 0
        super().bind(setup)
        if accelerator is not None:  # a new student of the same run
            self.to(accelerator)

    def prepare_inputs(self, student: nn.Module, task: Task, *, tokenizer: Any = None) -> None:
        """Nothing: it is given what the student is given, and reads it by the student's own config."""

    def to(self, accelerator: Accelerator) -> None:
        if accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED):
            raise SettingError(
                f"{type(self).__name__} with {accelerator.distributed_type.value}: no process holds the whole student, "
                "of which this is a copy. Use data parallelism (DDP)."
            )
        super().to(accelerator)

    @torch.no_grad()
    def on_step(self, student: nn.Module) -> None:
        self._steps += 1
        self._follow(getattr(student, "module", student))  # as DDP wraps it

    def state_dict(self) -> dict[str, Tensor]:
        """The copy, and how many steps it has seen."""
        tensors = {**dict(self.model.named_parameters()), **dict(self.model.named_buffers())}
        return {"steps": torch.tensor(self._steps), **{f"model.{name}": value for name, value in tensors.items()}}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Raises SettingError: of another student."""
        own = self.state_dict()
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

    paper = "tarvainen2017meanteacher"

    def __init__(self, *, decay: float = 0.999) -> None:
        if isinstance(decay, bool) or not isinstance(decay, (int, float)) or not 0 <= decay < 1:
            raise SettingError(f"MovingAverage: decay={decay!r}: must lie in [0, 1).")
        super().__init__()
        self.decay = float(decay)

    def describe(self) -> str:
        return f"a moving average of the student itself (decay {self.decay:g})"

    def __repr__(self) -> str:
        return f"MovingAverage(decay={self.decay:g})"

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

    paper = "yang2019snapshot"

    def __init__(self, *, every: int) -> None:
        if isinstance(every, bool) or not isinstance(every, int) or every < 1:
            raise SettingError(f"Snapshot: every={every!r}: give a whole number of optimizer steps, at least 1.")
        super().__init__()
        self.every = every

    def describe(self) -> str:
        return f"the student itself as it was at the last of every {self.every} optimizer steps"

    def __repr__(self) -> str:
        return f"Snapshot(every={self.every})"

    def _follow(self, student: nn.Module) -> None:
        if self._steps % self.every:
            return
        for of in (nn.Module.parameters, nn.Module.buffers):
            for kept, now in zip(of(self.model), of(student), strict=True):
                kept.copy_(now)
