"""Fixed versions of examples that a collator augments: a dataset of all of them, and whether a cache knows them.

The collator is not known here: it says `views` (how many), `seed` and `view_column` (which version an example is).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import DistributedType
from torch import Tensor

from hf_distill.data.columns import why_not_collated
from hf_distill.data.labels import LabelReader
from hf_distill.errors import DataError, HfDistillError, SettingError, TeacherError
from hf_distill.models.positions import PositionRule
from hf_distill.signals import ActivationKey, Needs, SparseRows
from hf_distill.tasks import Batch, Task, make_task
from hf_distill.tasks.base import TEACHER_PREFIX, batch_size
from hf_distill.tasks.infer import forward_names, main_input_of, unwrapped
from hf_distill.teachers.base import Teacher, TeacherSetup
from hf_distill.teachers.cache import keys as fingerprints
from hf_distill.teachers.cache import layout
from hf_distill.teachers.cache import layout as inside_layout
from hf_distill.teachers.cache.hidden import StoredActivation, WantedActivations, field_names
from hf_distill.teachers.cache.keys import content_keys, key_columns, read_by_teacher
from hf_distill.teachers.load import as_dtype, kind_of_checkpoint, load_teacher
from hf_distill.teachers.model import ModelTeacher, tokenizer_in
from hf_distill.teachers.passes import differences


class Versions:
    """Each example as often as it has versions: all first ones in the dataset's order, then all second ones."""

    def __init__(self, dataset: Any, count: int, column: str) -> None:
        self.dataset = dataset
        self.count = count
        self.column = column

    def __len__(self) -> int:
        return self.count * len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, Any]:
        number, place = divmod(index, len(self.dataset))
        return {**self.dataset[place], self.column: number}


def with_versions(dataset: Any, collator: Any) -> Any:
    """The dataset, or all versions of it that the collator shows to the teacher."""
    if described(collator) is None or not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__"):
        return dataset
    return Versions(dataset, collator.views, collator.view_column)


def described(collator: Any) -> dict[str, Any] | None:
    """For the manifest; None: the teacher is shown the examples as they are."""
    views = getattr(collator, "views", None)
    if views is None or getattr(collator, "student_only", None) is not False:
        return None
    functions = [getattr(one, "function", one) for one in collator.augmentations]
    names = [getattr(one, "__name__", type(one).__name__) for one in functions]
    return {"views": views, "seed": collator.seed, "augmentations": names}


def check_same_versions(collator: Any, manifest: Any) -> None:
    """Raises:
    SettingError: the collator shows the teacher what the cache was not built of.
    """
    now, there = described(collator), manifest.get("views")
    if now is None:
        return
    if there is None:
        raise SettingError(
            f"the collator shows {now['views']} augmented versions of each example, and the cache was built of the "
            "examples as they are. Build it with this collator (data_collator=), or leave the augmentation out."
        )
    fewer = {**now, "views": there["views"]} if now["views"] <= there["views"] else now
    if fewer != there:
        raise SettingError(
            f"the cache was built of other versions of the examples: {'; '.join(differences(there, now))}. Train with "
            "the collator that it was built with, or build it with this one."
        )


@dataclass(frozen=True)
class Answer:
    """What was said of a batch.

    Attributes:
        raw: `[b v]` or `[b t v]`, see `layout.RawRead`; None: nothing, or sparse.
        inside: as `Signals` has it.
    """

    raw: Tensor | None
    sparse: SparseRows | None
    inside: Mapping[ActivationKey, Tensor]


class TeacherRunner:
    """A teacher as a pass asks it.

    Args:
        teacher: put to use and placed by `place`.
        learner: the student, or the model itself where none is given.
        temperature: that its predictions are for; None: for any.

    Attributes:
        inputs: what it reads of a batch.
        main: the main input of them. config: as a model's.
        reads_labels: what it says depends on the labels.
    """

    def __init__(self, teacher: Teacher, task: Task, learner: Any, temperature: float | None) -> None:
        self.teacher = teacher
        self.task = task
        self.learner = learner
        self.temperature = temperature
        self.model = teacher.model if isinstance(teacher, ModelTeacher) else None
        self.reads_labels = teacher.reads_labels
        self.main = main_input_of(learner if self.model is None else self.model)

    @property
    def inputs(self) -> tuple[str, ...]:
        return tuple(self.teacher.inputs)

    @property
    def capture(self) -> Any:
        return self.teacher.capture

    def to(self, accelerator: Any, state: Any) -> None:
        """Move the teacher to where the batches are; without accelerator, `state` (a `PartialState`) says where."""
        self.teacher.to(accelerator or _Here(state))

    def ask(self, batch: Batch, *, predictions: bool, reads: frozenset[ActivationKey]) -> Answer:
        needs = Needs(predictions, reads, self.temperature or 1.0)
        read = layout.RawRead(self.task) if self.model is not None else self.task
        said = self.teacher(read, batch, needs)
        raw = said.logits
        if raw is not None and self.model is None:
            raw = self.task.raw_of_predictions(raw)
        return Answer(raw, said.sparse, said.activations)

    def compared_width(self) -> int:
        """How many columns of the student are compared."""
        compared = self.teacher.alignment.student
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
        models = [one for one in self.teacher.models() if hasattr(unwrapped(one), "config")]
        if models and config["problem_type"] is None:
            config["problem_type"] = getattr(unwrapped(models[0]).config, "problem_type", None)
        return {**found, "config": config}


def make_runner(
    teacher: Any,
    *,
    student: Any,
    task: Task | str | None,
    dtype: str | None,
    temperature: float | None,
    processor: Any,
    predictions: bool,
) -> TeacherRunner:
    """The teacher that `TeacherCache.build` was given, ready but for its place.

    Raises:
        SettingError, TeacherError: see the messages.
    """
    if isinstance(teacher, (torch.nn.Module, str, Path, ModelTeacher)):
        if isinstance(teacher, ModelTeacher):
            _check_stays(teacher)
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
        return TeacherRunner(model, made, learner, None)
    _check_can_run(teacher, student, dtype)
    made = make_task(student, task)
    teacher.bind(TeacherSetup(student, made, processing_class=processor, compares_predictions=predictions))
    if isinstance(teacher.alignment.student, tuple) and made.matched_by == "vocabulary":
        raise TeacherError(
            f"the vocabulary of this {type(teacher).__name__} has tokens that the student's has not, or in another "
            "order; a cache would have to remember which. Use teachers with the student's tokenizer."
        )
    _check_stays(teacher)
    return TeacherRunner(teacher, made, student, _temperature_of(teacher, made, temperature))


def _check_stays(teacher: Teacher) -> None:
    if teacher.changes_in_training:
        raise TeacherError(
            f"the {type(teacher).__name__} changes while the student is trained, so nothing of it can be kept. Use it "
            "live."
        )


def _temperature_of(teacher: Teacher, task: Task, temperature: float | None) -> float | None:
    """What its predictions are for; None: for any."""
    if not teacher.fixed_temperature or task.on_values:
        if temperature is not None:
            raise SettingError(
                f"temperature={temperature:g}: what this {type(teacher).__name__} says is the same at every one. Leave "
                "it out."
            )
        return None
    if temperature is None:
        raise SettingError(
            f"what the {type(teacher).__name__} says holds for one temperature alone: pass temperature=, that of the "
            "training."
        )
    if not temperature > 0:
        raise SettingError(f"temperature={temperature!r}: must be above 0.")
    teacher.check(Needs(logits=True, temperature=temperature))
    return float(temperature)


def _check_can_run(teacher: Any, student: Any, dtype: str | None) -> None:
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
        kind = task if isinstance(task, str) else str(make_task(student, task))
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


_LABELS = ("labels", "label", "label_ids", "start_positions", "end_positions")


@dataclass(frozen=True)
class TeacherOutputs:
    """What was said of a batch, real positions alone.

    Attributes:
        counts: `[b]` rows of predictions of each example.
        rows: `[p v]` predictions; None: none, or listed.
        listed: of a teacher that lists some columns, leading axis p.
        inside: for each read, as it is kept, `[p d]` and how many positions each example has `[b]`.
        prepared: the batch with what both models are given.
    """

    counts: np.ndarray
    rows: Tensor | None
    listed: SparseRows | None
    inside: dict[StoredActivation, tuple[Tensor, np.ndarray]]
    prepared: Batch

    @property
    def width(self) -> int:
        """Columns of the predictions."""
        return 0 if self.rows is None else int(self.rows.shape[1])


@dataclass(frozen=True)
class Source:
    """Who is asked about what.

    Attributes:
        asked: the teacher, with the task and the student whose rule makes decoder inputs.
        dataset: examples as a collator takes them.
        collator: makes batches.
        processor: of the dataset's preprocessing.
        wanted: of its inside; None: nothing.
        predictions: whether they are kept.
        labels: reads those of the dataset.
    """

    asked: TeacherRunner
    dataset: Any
    collator: Callable[..., Any]
    processor: Any
    wanted: WantedActivations | None
    predictions: bool
    labels: LabelReader

    @property
    def task(self) -> Task:
        return self.asked.task

    @property
    def main(self) -> str:
        return self.asked.main

    @property
    def student(self) -> Any:
        return unwrapped(self.asked.learner)

    @property
    def axis(self) -> layout.Axis:
        """Of the predictions; where there are none, a row an example stands for them."""
        return layout.axis_of(self.task) if self.predictions else "example"

    def example(self, index: int) -> dict[str, Any]:
        """As Trainer would hand it to the collator: without columns that no forward takes."""
        example = self.dataset[index]
        names = forward_names(self.asked.learner)
        if not isinstance(example, Mapping) or not names or not self.asked.inputs:
            return example  # whatever the collator takes
        known = {*names, *self.asked.inputs, *_LABELS, getattr(self.collator, "view_column", None)}
        return {k: v for k, v in example.items() if k in known or k.startswith(TEACHER_PREFIX)}

    def batch(self, indices: list[int]) -> dict[str, Any]:
        return self.collated([self.example(index) for index in indices])

    def collated(self, features: Sequence[Any]) -> dict[str, Any]:
        """The batch that the collator makes of examples.

        Raises:
            DataError: labels that cannot be read, nothing that pads, or a collator that packs examples into a row.
        """
        features = self.labels(features)
        try:
            batch = dict(self.collator(features))
        except HfDistillError:
            raise
        except (ValueError, TypeError) as error:
            why = why_not_collated(features, self.collator, self.task)
            if why is None:
                raise
            raise DataError(why) from error
        main = read_by_teacher(batch, self.main).get(self.main)
        if isinstance(main, Tensor) and len(main) != len(features):
            raise DataError(
                f"the collator makes {len(main)} row(s) of {len(features)} examples: it packs them. A cache keeps what "
                "the teacher says of each example by itself. Build it with a collator that pads "
                "(DataCollatorForSeq2Seq(tokenizer), DataCollatorWithPadding(tokenizer)), and train with one, or with "
                "the live teacher."
            )
        return batch

    def key_columns(self, batch: Batch) -> tuple[str, ...]:
        found = key_columns(batch, main=self.main, inputs=self.asked.inputs, decodes=self.task.has_decoder)
        labels = self.task.label_names if self.asked.reads_labels else ()
        return tuple(sorted({*found, *(name for name in labels if name in batch)}))

    def keys(self, batch: Batch, columns: list[str] | tuple[str, ...]) -> np.ndarray:
        return content_keys(batch, columns, main=self.main)

    def said(self, batch: Batch, device: Any) -> TeacherOutputs:
        """What the teacher says of a collated batch."""
        prepared = self.prepared(batch)
        reads = frozenset(self.wanted.reads) if self.wanted is not None else frozenset()
        answer = self.asked.ask(_on(prepared, device), predictions=self.predictions, reads=reads)
        inside = dict(self._inside(answer.inside, prepared))
        if answer.sparse is not None:
            listed, counts = self._listed(answer.sparse, prepared)
            return TeacherOutputs(counts, None, listed, inside, prepared)
        if answer.raw is None:
            return TeacherOutputs(np.ones(batch_size(prepared), dtype=np.int64), None, None, inside, prepared)
        layout.check_axes(answer.raw, self.axis, self.task)
        rows, counts = self._cut(answer.raw, prepared)
        return TeacherOutputs(counts, rows, None, inside, prepared)

    def prepared(self, batch: Batch) -> dict[str, Any]:
        return self.task.prepare(dict(batch), self.student)

    def measured_agreement(self, batch: Batch, device: Any) -> str | None:
        return self.asked.measure(_on(self.prepared(batch), device)) if self.predictions else None

    def _cut(self, raw: Tensor, batch: Batch) -> tuple[Tensor, np.ndarray]:
        """The real positions; those of the teacher's own input where it has one."""
        own = read_by_teacher(batch, self.main)
        along = raw.shape[1] if self.axis in ("input", "decoder") else None
        return layout.cut(raw, layout.real_positions(self.axis, own, length=along, task=self.task))

    def _listed(self, sparse: SparseRows, batch: Batch) -> tuple[SparseRows, np.ndarray]:
        if sparse.weights is not None:
            raise DataError("a teacher that answers with weighted samples has nothing to be kept of it but these.")
        parts = (sparse.ids, sparse.log_probabilities, sparse.log_tail)
        (ids, counts), (log_p, _), (tail, _) = (self._cut(part, batch) for part in parts)
        return replace(sparse, ids=ids, log_probabilities=log_p, log_tail=tail), counts

    def _inside(
        self, seen: Mapping[ActivationKey, Tensor], batch: Batch
    ) -> Iterator[tuple[StoredActivation, tuple[Tensor, np.ndarray]]]:
        if self.wanted is None:
            return
        own = read_by_teacher(batch, self.main)
        for (read, pools), name in zip(self.wanted.reads.items(), field_names(self.wanted), strict=True):
            blocks, x = self.wanted.blocks(read), seen[read]
            axis = self.axis_of(read, own)
            mask = self.positions(read).keep(own) if axis == "frames" else inside_layout.mask_of(axis, own)
            kept = StoredActivation(name, read.what, read.layer, blocks.path, pools, axis, int(x.shape[-1]))
            yield kept, inside_layout.cut_hidden(x, mask, pools, batch_size(batch))

    def axis_of(self, read: ActivationKey, own: Mapping[str, Any]) -> str:
        assert self.wanted is not None
        of_decoder = self.wanted.blocks(read).of_decoder
        return inside_layout.axis_of_hidden(own, self.positions(read), task=self.task, of_decoder=of_decoder)

    def positions(self, read: ActivationKey) -> PositionRule:
        """Of the teacher, whose hidden states they are."""
        assert self.wanted is not None
        return PositionRule(self.asked.model, self.task, of_decoder=self.wanted.blocks(read).of_decoder)

    def counted(self, batch: Batch) -> dict[str, float]:
        """Axis → positions in all of this batch, as far as they are known without asking the teacher."""
        own, found = read_by_teacher(self.prepared(batch), self.main), {}
        real = None if self.axis == "example" else layout.real_positions(self.axis, own, task=self.task)
        found["predictions"] = float(batch_size(batch) if real is None else real.sum())
        for read in self.wanted.reads if self.wanted is not None else ():
            axis = self.axis_of(read, own)
            mask = self.positions(read).keep(own) if axis == "frames" else inside_layout.mask_of(axis, own)
            if mask is not None:
                found[axis] = float(mask.sum())
        return found


@contextlib.contextmanager
def examples_named(indices: Sequence[int]) -> Iterator[None]:
    """Around what is done with a batch: an error says which examples of the dataset it was about."""
    try:
        yield
    except (DataError, TeacherError) as error:
        raise type(error)(f"examples {indices[0]} to {indices[-1]} of the dataset: {error}") from error


def _on(batch: Mapping[str, Any], device: Any) -> dict[str, Any]:
    return {name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in batch.items()}
