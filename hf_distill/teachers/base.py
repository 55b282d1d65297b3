"""Teacher: the base class of everything that teaches, a model or not."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from accelerate import Accelerator
from torch import Tensor, nn

from hf_distill.errors import SettingError
from hf_distill.signals import Needs, Signals
from hf_distill.tasks import Batch, Task
from hf_distill.tasks.base import TEACHER_PREFIX
from hf_distill.vocabulary import HeadAlignment, LabelMatching

if TYPE_CHECKING:
    from hf_distill.models.capture import ActivationCapture
    from hf_distill.objectives import Objective

Collator = Callable[[list[Any]], Any]


@dataclass(frozen=True)
class TeacherSetup:
    """What a teacher is told of the student and the training before the first step.

    Attributes:
        student: the student, as the distiller was given it.
        task: the student's task.
        processing_class: the student's tokenizer or processor, or None if it is not known.
        compares_predictions: whether predictions are compared; if not, the teacher's head does not matter.
        same_inputs: whether an objective compares position with position, so that both must read the same input.
        slot: distinguishes the columns in which the answers of several cached teachers come with a batch.
    """

    student: nn.Module
    task: Task
    processing_class: Any = None
    compares_predictions: bool = True
    same_inputs: bool = False
    slot: str = ""


@dataclass(frozen=True)
class StudentBatch:
    """A micro-batch of the training, for a teacher that learns from the student.

    Attributes:
        student: the student's predictions, detached.
        task: the student's task.
        batch: the batch that the teacher was called with.
        temperature: that softens predictions now.
        progress: how much of the training is done, 0 → 1.
        uses_labels: whether the labels' term has a weight now.
        scale: what the loss is multiplied by because processes are averaged and Accelerate divides by its
            accumulation steps.
        loss_of: maps the teacher's own mean loss on the labels (or None) and its own predictions to the loss that the
            student would have with the roles exchanged, of labels and logits alone.
    """

    student: Signals
    task: Task
    batch: Batch
    temperature: float
    progress: float
    uses_labels: bool
    scale: float
    loss_of: Callable[[Tensor | None, Signals], Tensor]


class Teacher(ABC):
    """Turns a batch into signals, without gradient.

    A teacher of your own needs `__call__` alone; every other method has a default that does nothing.

    Attributes:
        inputs: the columns of a batch that it reads, so that a `Trainer` keeps them.
        alignment: which columns of the student's head are compared with which of the teacher's; known after `bind`.
        capture: reads hidden states and attentions of the teacher, or None if it can show none.
        is_sparse: whether it gives the most likely columns of each row only.
        reads_labels: whether its predictions depend on the labels.
        recorded: for a cached teacher, what the cache records about the teacher it was built from; else None.
        paper: the citation key of its paper in `hub/papers.bib`, a BibTeX entry, or None; for the model card.

    >>> import torch
    >>> from transformers import BertConfig, BertForSequenceClassification as Bert
    >>> from hf_distill import Distiller
    >>> class AlwaysYes(Teacher):
    ...     def __call__(self, task, batch, needs):
    ...         return Signals(logits=torch.tensor([[-4.0, 4.0]]).repeat(len(batch["input_ids"]), 1))
    >>> student = Bert(BertConfig(vocab_size=9, hidden_size=4, num_hidden_layers=1, num_attention_heads=1))
    >>> batch = {"input_ids": torch.tensor([[1, 2]]), "labels": torch.tensor([0])}
    >>> sorted(Distiller(student, AlwaysYes())(student, batch).terms)
    ['labels', 'logits']
    """

    inputs: tuple[str, ...] = ()
    alignment: HeadAlignment = HeadAlignment()
    capture: ActivationCapture | None = None
    is_sparse: bool = False
    reads_labels: bool = False
    recorded: Mapping[str, Any] | None = None
    paper: ClassVar[str | None] = None

    @abstractmethod
    def __call__(self, task: Task, batch: Batch, needs: Needs) -> Signals:
        """Return what `needs` names for this batch.

        Args:
            task: reads predictions from a model's outputs.
            batch: the student's inputs, labels, and `teacher_*` columns.
            needs: what is compared.
        """

    def configure(
        self, *, processing_class: Any = None, dtype: str | None = None, label_matching: LabelMatching = "by_name"
    ) -> None:
        """Take settings for members that are loaded later, as an `Ensemble` does.

        Raises:
            SettingError: if there is none, and a setting would have no effect.
        """
        if isinstance(processing_class, (list, tuple)):
            raise SettingError(
                f"teacher_processing_class is a list of {len(processing_class)}, which is for an Ensemble: one for "
                f"each of its teachers. Pass the one of this {type(self).__name__}."
            )
        if dtype is not None:
            raise SettingError(
                f"teacher_dtype={dtype!r} is for a model, a folder or a Hub id. This teacher is a "
                f"{type(self).__name__} already: give it its dtype where it is made."
            )

    def bind(self, setup: TeacherSetup) -> None:
        """Check that this teacher can teach the student, and align their heads. It trains nothing.

        Raises:
            TeacherError: if it cannot teach this student.
        """

    def check(self, needs: Needs, objectives: Iterable[Objective] = ()) -> None:
        """Check that the teacher can give what the training needs. Called after `bind`.

        Args:
            needs: of one moment of the training.
            objectives: everything that will read this teacher; empty if that is not known.

        Raises:
            SettingError: if it cannot.
        """

    def to(self, accelerator: Accelerator) -> None:
        """Move to where the batches are: device, FSDP, ZeRO."""

    def on_batch(self, batch: StudentBatch) -> None:
        """Learn from a micro-batch of the training; called after `__call__` if `learns_from_batches`."""

    def on_step(self, student: nn.Module) -> None:
        """Follow the student after an optimizer step."""

    def state_dict(self) -> dict[str, Tensor]:
        """Return what a checkpoint must hold of a teacher that training changes; empty for one that stays."""
        return {}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Continue from a checkpoint's `state_dict()`.

        Raises:
            SettingError: if the state is that of another teacher.
        """

    def wrap_collator(self, collator: Collator) -> Collator:
        """Return a collator that also fetches this teacher's answers, for the training's data loader."""
        return collator

    def models(self) -> list[nn.Module]:
        """Return the models that it runs, for cards and checks."""
        return []

    def members(self) -> list[Teacher]:
        """Return the teachers that this one is made of; itself if it is not made of others."""
        return [self]

    @property
    def learns_from_batches(self) -> bool:
        """Whether `on_batch` does something."""
        return type(self).on_batch is not Teacher.on_batch

    @property
    def changes_in_training(self) -> bool:
        """Whether its answers depend on how far the training is."""
        return self.learns_from_batches or type(self).state_dict is not Teacher.state_dict

    @property
    def fetches_with_collator(self) -> bool:
        """Whether its answers are fetched with the examples, by a collator."""
        return type(self).wrap_collator is not Teacher.wrap_collator

    @property
    def fixed_temperature(self) -> bool:
        """Whether predictions for one temperature say nothing about another. A model's logits hold for all."""
        return True

    def describe(self) -> str:
        """Return the teacher in words, for the model card."""
        return f"a {type(self).__name__}"

    def __repr__(self) -> str:
        return f"{type(self).__name__}()"


RAW_INPUTS = ("text", "text_pair", "prompt", "audio", "image")  # a processing class turns these into model inputs
_NUMBERED = re.compile(rf"{TEACHER_PREFIX}(\d+)_(.+)")


def teacher_inputs(batch: Batch, index: int) -> dict[str, Any]:
    """Return the batch for one of several teachers: its own columns as `teacher_*`, without those of the others.

    A teacher with columns of its own does not read the shared ones; a teacher without reads these, or the student's.

    Args:
        batch: with columns such as `teacher_0_input_ids`.
        index: which teacher, from 0.

    >>> sorted(teacher_inputs({"input_ids": 1, "teacher_0_input_ids": 2, "teacher_1_input_ids": 3}, 1).items())
    [('input_ids', 1), ('teacher_input_ids', 3)]
    """
    own: dict[str, Any] = {}
    shared: dict[str, Any] = {}
    for name, value in batch.items():
        found = _NUMBERED.fullmatch(name)
        if found is None:
            shared[name] = value
        elif int(found[1]) == index:
            own[f"{TEACHER_PREFIX}{found[2]}"] = value
    cached = f"{TEACHER_PREFIX}cached_"
    if own:
        shared = {k: v for k, v in shared.items() if not k.startswith(TEACHER_PREFIX) or k.startswith(cached)}
    return {**shared, **own}


def numbered_inputs(names: Iterable[str], index: int) -> list[str]:
    """Return the names of one teacher's own columns, without the prefix `teacher_`.

    >>> numbered_inputs(["input_ids"], 1)
    ['1_input_ids', '1_text', '1_text_pair', '1_prompt', '1_audio', '1_image']
    """
    return [f"{index}_{name}" for name in (*names, *RAW_INPUTS)]
