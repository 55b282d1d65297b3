"""The base class of all teachers, and the batch that each of several teachers reads."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from accelerate import Accelerator
from torch import Tensor, nn
from transformers import PreTrainedConfig

from hf_distill._types import Collator, Keywords, ProcessingClass
from hf_distill.errors import SettingError
from hf_distill.signals import Needs, Signals
from hf_distill.tasks import Batch, Task
from hf_distill.tasks.base import TEACHER_PREFIX
from hf_distill.tasks.infer import config_of, unwrapped
from hf_distill.vocabulary import HeadAlignment, LabelMatching

if TYPE_CHECKING:
    from hf_distill.models.capture import ActivationCapture
    from hf_distill.objectives import Objective

Processors = ProcessingClass | Sequence[ProcessingClass | None] | None
"""A teacher's processing class, or one for each member of an `Ensemble`."""


@dataclass(frozen=True)
class TeacherSetup:
    """The student and the training that a teacher is bound to before the first step.

    Attributes:
        student: the student, as the distiller received it.
        task: the student's task.
        processing_class: the student's tokenizer or processor, or None if unknown.
        compares_predictions: whether predictions are compared; if not, the teacher's head does not matter.
        same_inputs: whether an objective compares positions, so that both models must read the same input.
        slot: distinguishes the batch columns of several cached teachers.
    """

    student: nn.Module
    task: Task
    processing_class: ProcessingClass | None = None
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
        temperature: the current temperature.
        progress: how much of the training is done, 0 → 1.
        uses_labels: whether the labels' term has a weight now.
        scale: the factor on the loss that makes up for averaging over processes and accumulation steps.
        loss_of: maps the teacher's mean label loss (or None) and its predictions to the loss that it would have in the
            student's place, from labels and logits only.
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

    A custom teacher needs only `__call__`; every other method has a default.

    Attributes:
        inputs: the columns of a batch that it reads, so that a `Trainer` keeps them.
        alignment: which columns of the student's head are compared with which of the teacher's; known after `bind`.
        capture: reads the teacher's hidden states and attentions; None if it has none.
        is_sparse: whether it gives only the most likely columns of each row.
        reads_labels: whether its predictions depend on the labels.
        recorded: the cache's record of the teacher it was built from; None if this is not a cached teacher.
        parts: the teachers that it runs, to which the hooks of this class are forwarded by default.
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
    parts: Sequence[Teacher] = ()
    paper: ClassVar[str | None] = None

    @abstractmethod
    def __call__(self, task: Task, batch: Batch, needs: Needs) -> Signals:
        """Return the signals that `needs` names for this batch.

        Args:
            task: reads predictions from a model's outputs.
            batch: the student's inputs, labels, and `teacher_*` columns.
            needs: which signals to compute.
        """

    def configure(
        self,
        *,
        processing_class: Processors = None,
        dtype: str | None = None,
        label_matching: LabelMatching = "by_name",
    ) -> None:
        """Take settings for members that are loaded later, as an `Ensemble` does.

        Raises:
            SettingError: if a setting would have no effect.
        """
        one_processor(processing_class, type(self).__name__)
        if dtype is not None:
            name = type(self).__name__
            raise SettingError(
                f"teacher_dtype={dtype!r}. This teacher is a {name} already: give it its dtype where it is made."
            )

    def bind(self, setup: TeacherSetup) -> None:
        """Check that this teacher can teach the student, and align their heads.

        Raises:
            TeacherError: if it cannot teach this student.
        """

    def check(self, needs: Needs, objectives: Iterable[Objective] = ()) -> None:
        """Check that the teacher can give these needs. Called after `bind`.

        Args:
            needs: the signals needed at some point of the training.
            objectives: all objectives that will read this teacher; empty if not known.

        Raises:
            SettingError: if the teacher cannot give it.
        """

    def to(self, accelerator: Accelerator) -> None:
        """Move to the device of the batches, sharded if FSDP or ZeRO shards."""
        for part in self.parts:
            part.to(accelerator)

    def on_batch(self, batch: StudentBatch) -> None:
        """Learn from a training micro-batch; called after `__call__` if `learns_from_batches`."""
        for part in self.parts:
            part.on_batch(batch)

    def on_step(self, student: nn.Module) -> None:
        """Follow the student after an optimizer step."""
        for part in self.parts:
            part.on_step(student)

    def state_dict(self) -> dict[str, Tensor]:
        """Return the state that a checkpoint must hold; empty if training does not change this teacher."""
        return {}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Continue from a checkpoint's `state_dict()`.

        Raises:
            SettingError: if the state belongs to another teacher.
        """

    def wrap_collator(self, collator: Collator) -> Collator:
        """Return a collator that also fetches this teacher's predictions."""
        for part in self.parts:
            collator = part.wrap_collator(collator)
        return collator

    def models(self) -> list[nn.Module]:
        """Return the models that this teacher runs, for cards and checks."""
        return [model for part in self.parts for model in part.models()]

    def members(self) -> list[Teacher]:
        """Return the members of a composite teacher, or the teacher itself."""
        return [member for part in self.parts for member in part.members()] or [self]

    @property
    def learns_from_batches(self) -> bool:
        """Whether `on_batch` does something."""
        return type(self).on_batch is not Teacher.on_batch or any(part.learns_from_batches for part in self.parts)

    @property
    def changes_in_training(self) -> bool:
        """Whether its predictions change while the student trains."""
        if self.parts:
            return any(part.changes_in_training for part in self.parts)
        return self.learns_from_batches or type(self).state_dict is not Teacher.state_dict

    @property
    def fetches_with_collator(self) -> bool:
        """Whether a collator fetches its predictions with the examples."""
        overrides = type(self).wrap_collator is not Teacher.wrap_collator
        return any(part.fetches_with_collator for part in self.parts) if self.parts else overrides

    @property
    def fixed_temperature(self) -> bool:
        """Whether its predictions hold for one temperature only; a model's logits hold for all."""
        return True

    def describe(self) -> str:
        """Return a description for the model card."""
        return f"a {type(self).__name__}"

    def __repr__(self) -> str:
        return f"{type(self).__name__}()"


def text_config_of(model: nn.Module, *, decoder: bool = False) -> PreTrainedConfig | None:
    """Return the config of a model's text part (or of its text decoder), as `config_of`."""
    config = config_of(model)
    return config.get_text_config(decoder=decoder or None) if isinstance(config, PreTrainedConfig) else config


def output_head_of(model: nn.Module) -> nn.Module | None:
    """Return the output head of a model over a vocabulary, or None if it has none."""
    find = getattr(model, "get_output_embeddings", None)
    return None if find is None else find()


def embedded_tokens(model: nn.Module) -> int | None:
    """Return how many token ids a model embeds, or None if that is not known."""
    try:
        embeddings = unwrapped(model).get_input_embeddings()
    except (AttributeError, NotImplementedError):  # not of transformers; or two towers, as CLIP has
        return None
    weight = getattr(embeddings, "weight", None)
    return getattr(embeddings, "num_embeddings", None) or (None if weight is None else int(weight.shape[0]))


def one_processor(processing_class: Processors, teacher: str) -> ProcessingClass | None:
    """Return the processing class of a single teacher.

    Raises:
        SettingError: if it is a list, as for an `Ensemble`.
    """
    if isinstance(processing_class, Sequence):
        count = len(processing_class)
        raise SettingError(f"teacher_processing_class is a list of {count}, which is for an Ensemble. Give one.")
    return processing_class


RAW_INPUTS = ("text", "text_pair", "prompt", "audio", "image")  # a processing class turns these into model inputs
_NUMBERED = re.compile(rf"{TEACHER_PREFIX}(\d+)_(.+)")


def teacher_inputs(batch: Batch, index: int) -> Keywords:
    """Return the batch for one of several teachers: its own columns as `teacher_*`, without those of the others.

    A teacher with its own columns does not read the shared ones; a teacher without reads those, or the student's.

    Args:
        batch: has columns such as `teacher_0_input_ids`.
        index: the teacher's place, from 0.

    >>> sorted(teacher_inputs({"input_ids": 1, "teacher_0_input_ids": 2, "teacher_1_input_ids": 3}, 1).items())
    [('input_ids', 1), ('teacher_input_ids', 3)]
    """
    own: Keywords = {}
    shared: Keywords = {}
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
