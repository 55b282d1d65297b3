"""Who is asked in a pass: one model, whose own predictions are kept; or any other teacher, as it would teach a student.

An ensemble, specialists, a served teacher have no head of their own: they say what they say over the columns of the
student, and many at one temperature alone. What of it is written stands in `stores.py`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import DistributedType
from torch import Tensor

from hf_distill.errors import SettingError, TeacherError
from hf_distill.signals import Needs, Read, SparseRows
from hf_distill.tasks import Batch, Task, make_task
from hf_distill.tasks.infer import main_input_of, unwrapped
from hf_distill.teachers.base import Teacher
from hf_distill.teachers.cached import fingerprints, layout
from hf_distill.teachers.fitting import tokenizer_in
from hf_distill.teachers.load import as_dtype, kind_of_checkpoint, load_teacher
from hf_distill.teachers.model import ModelTeacher


@dataclass(frozen=True)
class Answer:
    """What was said of a batch.

    Attributes:
        raw: `[b v]` or `[b t v]`, see `layout.RawRead`; None: nothing, or sparse. inside: as `Signals` has it.
    """

    raw: Tensor | None
    sparse: SparseRows | None
    inside: Mapping[Read, Tensor]


class Asked:
    """A teacher as a pass asks it.

    Args:
        teacher: put to use and placed by `place`. learner: the student, or the model itself where none is given.
        temperature: that its predictions are for; None: for any.

    Attributes:
        inputs: what it reads of a batch. main: the main input of them. config: as a model's.
        reads_labels: what it says depends on the labels.
    """

    def __init__(self, teacher: Any, task: Task, learner: Any, temperature: float | None) -> None:
        self.teacher = teacher
        self.task = task
        self.learner = learner
        self.temperature = temperature
        self.model = teacher.model if isinstance(teacher, ModelTeacher) else None
        self.reads_labels = bool(getattr(teacher, "reads_labels", False))
        self.main = main_input_of(learner if self.model is None else self.model)

    @property
    def inputs(self) -> tuple[str, ...]:
        return tuple(self.teacher.inputs)

    @property
    def inside(self) -> Any:
        return getattr(self.teacher, "inside", None)

    def place(self, accelerator: Any, state: Any) -> None:
        """Args: accelerator: None: `state` (a `PartialState`) alone says where the batches are."""
        self.teacher.place(accelerator or _Here(state))

    def ask(self, batch: Batch, *, predictions: bool, reads: frozenset[Read]) -> Answer:
        needs = Needs(predictions, reads, self.temperature or 1.0)
        read = layout.RawRead(self.task) if self.model is not None else self.task
        said = self.teacher(read, batch, needs)
        raw = said.logits
        if raw is not None and self.model is None:
            raw = layout.as_raw(self.task, raw)
        return Answer(raw, said.sparse, said.inside)

    def compared_width(self) -> int:
        """How many columns of the student are compared."""
        compared = self.teacher.columns.student
        return compared if isinstance(compared, int) else int(unwrapped(self.learner).config.vocab_size)

    def measure(self, batch: Batch) -> str | None:
        """How a quantised teacher agrees with its full precision, in words; None: it is none, or was not compared."""
        if not hasattr(self.teacher, "agreement"):
            return None
        self.teacher(self.task, batch, Needs(logits=True))
        return None if self.teacher.agreement is None else str(self.teacher.agreement)

    def described(self) -> dict[str, Any]:
        """For the manifest: who it is."""
        if self.model is not None:
            return fingerprints.of_teacher(self.model)
        found = fingerprints.of_several(self.teacher)
        config = dict(fingerprints.of_config(getattr(unwrapped(self.learner), "config", None)))
        models = [one for one in models_of(self.teacher) if hasattr(unwrapped(one), "config")]
        if models and config["problem_type"] is None:
            config["problem_type"] = getattr(unwrapped(models[0]).config, "problem_type", None)
        return {**found, "config": config}


def asked_of(
    teacher: Any,
    *,
    student: Any,
    task: Task | str | None,
    dtype: str | None,
    temperature: float | None,
    processor: Any,
    predictions: bool,
) -> Asked:
    """The teacher that `TeacherCache.build` was given, ready but for its place.

    Raises:
        SettingError, TeacherError: see the messages.
    """
    if isinstance(teacher, (torch.nn.Module, str, Path, ModelTeacher)):
        _refuse_moving(teacher, hasattr(teacher, "state") or hasattr(teacher, "hear"))
        model = _as_model_teacher(teacher, student, task, dtype)
        if temperature is not None:
            raise SettingError(
                f"temperature={temperature:g}: a model's logits are kept as they are and softened while training. It "
                "is for teachers of several models; leave it out. (TopK has temperatures of its own.)"
            )
        learner = student if student is not None else model.model
        made = make_task(learner, task)
        made.learn_from(getattr(model.model, "config", None))
        model.prepare_inputs(learner, made, tokenizer=model.tokenizer or tokenizer_in(processor))
        return Asked(model, made, learner, None)
    _refuse_what_cannot_be_asked(teacher, student, dtype)
    made = make_task(student, task)
    teacher.fit(student, made, student_processor=processor, compares_predictions=predictions)
    if isinstance(teacher.columns.student, tuple) and made.matched_by == "vocabulary":
        raise TeacherError(
            f"the vocabulary of this {type(teacher).__name__} has tokens that the student's has not, or in another "
            "order; a cache would have to remember which. Use teachers with the student's tokenizer."
        )
    _refuse_moving(teacher, getattr(teacher, "state", dict)() or getattr(teacher, "hear", None) is not None)
    return Asked(teacher, made, student, _temperature_of(teacher, made, temperature))


def models_of(teacher: Any) -> list[Any]:
    """The models in a teacher of several, as far as it shows them."""
    if isinstance(teacher, ModelTeacher):
        return [teacher.model]
    return [model for one in getattr(teacher, "teachers", ()) for model in models_of(one)]


def is_bound(teacher: Any) -> bool:
    """Whether what a teacher says at one temperature says nothing of another; of one that does not tell, it is."""
    return not isinstance(teacher, ModelTeacher) and bool(getattr(teacher, "bound_to_temperature", True))


def _refuse_moving(teacher: Any, moves: Any) -> None:
    if moves and not isinstance(teacher, torch.nn.Module):
        raise TeacherError(
            f"the {type(teacher).__name__} changes while the student is trained, so nothing of it can be kept. Use it "
            "live."
        )


def _temperature_of(teacher: Any, task: Task, temperature: float | None) -> float | None:
    """What its predictions are for; None: for any."""
    if not is_bound(teacher) or task.on_values:
        if temperature is not None:
            raise SettingError(
                f"temperature={temperature:g}: what this {type(teacher).__name__} says is the same at every one. Leave "
                "it out."
            )
        return None
    check = getattr(teacher, "check_needs", None)
    if temperature is None:
        raise SettingError(
            f"what the {type(teacher).__name__} says holds for one temperature alone: pass temperature=, that of the "
            "training."
        )
    if not temperature > 0:
        raise SettingError(f"temperature={temperature!r}: must be above 0.")
    if check is not None:
        check(Needs(logits=True, temperature=temperature))
    return float(temperature)


def _refuse_what_cannot_be_asked(teacher: Any, student: Any, dtype: str | None) -> None:
    name = type(teacher).__name__
    if hasattr(teacher, "manifest") or hasattr(teacher, "cache"):
        raise TeacherError(f"the {name} is a cache already. Several of them become one in an Ensemble.")
    if not isinstance(teacher, Teacher):
        raise TeacherError(
            f"a cache is built of a teacher, not of this {name}. Give a model, a folder or a Hub id, or a teacher "
            "(hf_distill.teachers: Ensemble, Specialists, ServedTeacher, ...)."
        )
    if student is None:
        raise SettingError(
            f"the {name} has no head of its own: it says what it says over the labels or the vocabulary of a student. "
            "Pass student=."
        )
    if dtype is not None:
        raise SettingError(
            f"dtype={dtype!r} is for one model. Give the teachers of this {name} theirs where they are made."
        )


def _as_model_teacher(teacher: Any, student: Any, task: Task | str | None, dtype: str | None) -> ModelTeacher:
    if isinstance(teacher, ModelTeacher):
        return teacher
    if isinstance(teacher, torch.nn.Module):
        return ModelTeacher(teacher, dtype=as_dtype(dtype))
    if student is None and task is None:
        kind = kind_of_checkpoint(teacher)
        if kind is None:
            raise SettingError(
                f"teacher={str(teacher)!r}: which head it is to be loaded with is not known: its config.json names no "
                "class of a known kind. Pass student= or task=."
            )
    else:
        kind = task if isinstance(task, str) else make_task(student, task).kind
    return ModelTeacher(load_teacher(teacher, kind, dtype=dtype), dtype=as_dtype(dtype))


class _Here:
    """As much of an `Accelerator` as a teacher asks for where nothing is trained: every process has all of it."""

    distributed_type = DistributedType.NO
    is_fsdp2 = False

    def __init__(self, state: Any) -> None:
        self._state = state

    def __getattr__(self, name: str) -> Any:
        return getattr(self._state, name)

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        return contextlib.nullcontext()
