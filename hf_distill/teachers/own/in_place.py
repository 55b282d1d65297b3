"""The student itself as its teacher, without a second copy: its adapters off, or once more with other dropout."""

from __future__ import annotations

import contextlib
import hashlib
import random
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from hf_distill.errors import SettingError, TeacherError
from hf_distill.inside.recorder import Inside
from hf_distill.signals import Needs, Signals
from hf_distill.tasks import Batch, Task
from hf_distill.teachers.model import ModelTeacher
from hf_distill.vocabulary import Columns


class _StudentItself(ABC):
    """What is asked is the student; it is neither frozen nor moved nor copied."""

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
        self._check(student)
        self._teacher = _Unfrozen(student)

    def place(self, accelerator: Any) -> None:
        self._known().use(accelerator)

    def after_step(self, student: nn.Module) -> None:  # noqa: B027  # all there is to do
        """Nothing: what moves is the student."""

    @abstractmethod
    def _check(self, student: Any) -> None:
        """Refuse a student that cannot be asked so."""

    def _known(self) -> _Unfrozen:
        assert self._teacher is not None  # `fit` comes first
        return self._teacher


class AdaptersOff(_StudentItself):
    """The base model of a PEFT student, its adapters switched off for the moment: a teacher without a second copy.

    The student's forward is unchanged: modes and adapters are as they were afterwards, also when the forward raises.
    What `modules_to_save` trains (a fresh head) is switched off as well: the teacher speaks with the base's own head,
    so use it where that head knows something (language models, fine-tuned classifiers).

    Raises:
        TeacherError: the student is no PEFT model.
    """

    def described(self) -> str:
        """For the card."""
        return "the base model itself, its adapters switched off"

    def __call__(self, task: Task, batch: Batch, needs: Needs) -> Signals:
        teacher = self._known()
        with _as_it_was(teacher.model), teacher.model.disable_adapter():
            teacher.model.eval()
            return teacher(task, batch, needs)

    def _check(self, student: Any) -> None:
        if not hasattr(student, "disable_adapter"):
            raise TeacherError(
                f"AdaptersOff: the student is a {type(student).__name__}, which has no adapters to switch off. "
                "Make it a PEFT model (peft.get_peft_model), or pass a teacher."
            )


class SecondPass(_StudentItself):
    """The student once more, with other dropout: two passes over an example should agree (R-Drop).

    Liang et al. 2021 (section 2) take gradients through both passes, of
    `-log p1(y) - log p2(y) + α · ½ (KL(p1 ‖ p2) + KL(p2 ‖ p1))`. Here the second pass has none. The passes are drawn
    alike, so each half of the paper's gradient has the same expectation, and the gradient of `divergence="jeffreys"`
    (the sum of both directions) at temperature 1 is the paper's in expectation. The paper's labels' term is of two
    passes, so its loss is, in expectation, (2 + α) times that of this blend at alpha = α / (2 + α): `SecondPass.alpha`
    (with Adam the factor does not matter). It costs a forward, no backward and no memory of one; the paper's way costs
    a forward and a backward more, and its gradient is less noisy.

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
    ...     student, SecondPass(), divergence="jeffreys", temperature=1.0, alpha=SecondPass.alpha(1.0)
    ... )
    >>> batch = {"input_ids": torch.tensor([[1, 2]]), "labels": torch.tensor([0])}
    >>> distiller(student, batch).terms["logits"].item() > 0
    True
    """

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

        >>> SecondPass.alpha(2.0)
        0.5
        """
        if not 0 <= paper_weight < float("inf"):
            raise SettingError(f"SecondPass.alpha: paper_weight={paper_weight!r}: must be at least 0 and finite.")
        return paper_weight / (2 + paper_weight)

    def described(self) -> str:
        """For the card."""
        return "the student itself, a second pass with other dropout"

    def __call__(self, task: Task, batch: Batch, needs: Needs) -> Signals:
        teacher = self._known()
        drawn = hashlib.blake2b(f"{self.seed} {self._process} {self._passes}".encode(), digest_size=4).digest()
        with _statistics_kept(teacher.model), _drawing_from(int.from_bytes(drawn, "big")):
            found = teacher(task, batch, needs)
        if torch.is_grad_enabled():  # in training: what an evaluation asks changes nothing
            self._passes += 1
        return found

    def place(self, accelerator: Any) -> None:
        super().place(accelerator)
        self._process = accelerator.process_index

    def state(self) -> dict[str, Tensor]:
        """How many passes there were, on each process alike."""
        return {"passes": torch.tensor(self._passes)}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Raises SettingError: of another kind of teacher."""
        if set(state) != {"passes"}:
            raise SettingError(
                f"the checkpoint's teacher ({', '.join(sorted(state)[:3])}, ...) is no SecondPass. Resume with the "
                "teacher of that run."
            )
        self._passes = int(state["passes"])

    def _check(self, student: Any) -> None:
        self._passes = 0
        if not _draws(student):
            raise SettingError(
                f"SecondPass: nothing in the student ({type(student).__name__}) is drawn at random: no dropout is "
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
