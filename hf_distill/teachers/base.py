"""Teacher: what the rest of the library asks of one, a model or not."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from torch import Tensor, nn

from hf_distill.signals import Needs, Signals
from hf_distill.tasks import Batch, Task
from hf_distill.tasks.base import TEACHER_PREFIX
from hf_distill.vocabulary import HeadAlignment


@runtime_checkable
class Teacher(Protocol):
    """Anything that turns a batch into signals without gradient.

    Attributes:
        inputs: what it reads of a batch, so that a `Trainer` does not drop these columns.
        columns: which columns of the student's head are compared with which of its own; known after `fit`.

    It may have more: `inside` (an `ActivationCapture`), where it can show what its blocks compute; `check_needs(needs)`, which
    raises SettingError for what it cannot be asked; `collator(collator)`, where its answers can be fetched by the data
    loader's workers; `state()` and `load_state(state)` (name → tensor), where training changes it: then a checkpoint
    holds it, and a resumed run goes on from there; `hear(lesson)`, where it learns of each micro-batch of the training,
    after it was asked (`StudentBatch`); `check_objectives(objectives)`, which is told all that will ask it, once they are
    fitted; `bound_to_temperature`, `reads_labels`: whether what it says depends on them, for a cache of it.
    """

    inputs: tuple[str, ...]
    columns: HeadAlignment

    def __call__(self, task: Task, batch: Batch, needs: Needs) -> Signals: ...

    def fit(
        self,
        student: nn.Module,
        task: Task,
        *,
        student_processor: Any = None,
        compares_predictions: bool = True,
        same_inputs: bool = False,
    ) -> None:
        """Check that it can teach this student, and pair the columns of their heads.

        Args:
            compares_predictions: False: only its inside is asked for, so its head does not matter.
            same_inputs: an objective compares position with position.
        """
        ...

    def place(self, accelerator: Any) -> None:
        """Go where the batches are: device, FSDP, ZeRO."""
        ...

    def after_step(self, student: nn.Module) -> None:
        """After an optimizer step: an average moves; a frozen teacher does nothing."""
        ...


@dataclass(frozen=True)
class StudentBatch:
    """A micro-batch of the training, for a teacher that learns of it.

    Attributes:
        student: its predictions, detached. task, batch: as the teacher was asked with.
        temperature: that predictions are softened with now. progress: of the training, 0 → 1.
        uses_labels: whether labels weigh something now.
        scale: in `loss_of`: because processes are averaged and Accelerate divides by its accumulation steps.
        loss_of: its own mean loss on the labels (None where they weigh nothing) and its own predictions → what the
            student's loss would be with the roles exchanged, of labels and logits alone.
    """

    student: Signals
    task: Task
    batch: Batch
    temperature: float
    progress: float
    uses_labels: bool
    scale: float
    loss_of: Callable[[Tensor | None, Signals], Tensor]


RAW = ("text", "text_pair", "prompt", "audio", "image")  # what a processing class makes inputs of
_NUMBERED = re.compile(rf"{TEACHER_PREFIX}(\d+)_(.+)")


def of_member(batch: Batch, number: int) -> dict[str, Any]:
    """The batch as one of several teachers is given it: its own columns as `teacher_*`, and no other's.

    Where it has columns of its own, those that all share are not for it; without any it reads these, or the student's.

    >>> sorted(of_member({"input_ids": 1, "teacher_0_input_ids": 2, "teacher_1_input_ids": 3}, 1).items())
    [('input_ids', 1), ('teacher_input_ids', 3)]
    """
    own: dict[str, Any] = {}
    shared: dict[str, Any] = {}
    for name, value in batch.items():
        found = _NUMBERED.fullmatch(name)
        if found is None:
            shared[name] = value
        elif int(found[1]) == number:
            own[f"{TEACHER_PREFIX}{found[2]}"] = value
    cached = f"{TEACHER_PREFIX}cached_"
    if own:
        shared = {k: v for k, v in shared.items() if not k.startswith(TEACHER_PREFIX) or k.startswith(cached)}
    return {**shared, **own}


def numbered(names: Iterable[str], number: int) -> list[str]:
    """The same inputs as columns of one teacher, without the prefix.

    >>> numbered(["input_ids"], 1)
    ['1_input_ids', '1_text', '1_text_pair', '1_prompt', '1_audio', '1_image']
    """
    return [f"{number}_{name}" for name in (*names, *RAW)]
