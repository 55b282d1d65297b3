"""What a cache is built from: the teacher, the examples, and the collator between them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import DistributedType
from torch import Tensor, nn

from hf_distill.data.columns import why_not_collated
from hf_distill.data.labels import LabelReader
from hf_distill.errors import DataError, HfDistillError, SettingError, TeacherError
from hf_distill.models.positions import PositionRule
from hf_distill.signals import ActivationKey, Needs, Signals, SparseRows
from hf_distill.tasks import Batch, Task, make_task
from hf_distill.tasks.base import TEACHER_PREFIX, batch_size
from hf_distill.tasks.infer import forward_names, main_input_of, unwrapped
from hf_distill.teachers import fingerprints
from hf_distill.teachers.base import Collator, Teacher, TeacherSetup
from hf_distill.teachers.cache import keys, layout
from hf_distill.teachers.cache.hidden import StoredActivation, WantedActivations, field_names
from hf_distill.teachers.cache.keys import read_by_teacher
from hf_distill.teachers.load import as_dtype, kind_of_checkpoint, load_teacher
from hf_distill.teachers.model import ModelTeacher, tokenizer_in
from hf_distill.teachers.passes import differences
from hf_distill.teachers.quantised import QuantisedTeacher
from hf_distill.teachers.shards import Json

_LABELS = ("labels", "label", "label_ids", "start_positions", "end_positions")
_RANDOM = (
    "{what} changes examples randomly, and a cached teacher knows only the examples that the cache was built from. "
    "Change them once before training ({instead}) and build the cache from that, or use the live teacher."
)


# Collators that change examples. Attributes are those of `AugmentingCollator`, which is above this module.


def check_not_random(collator: Collator) -> None:
    """Raise SettingError if a collator changes examples randomly, for student and teacher."""
    if getattr(collator, "mlm", False):
        instead = "mask the dataset with dataset.map and give it labels"
        raise SettingError(_RANDOM.format(what=f"{type(collator).__name__}(mlm=True)", instead=instead))
    if getattr(collator, "student_only", None) is False and getattr(collator, "views", None) is None:
        raise SettingError(
            _RANDOM.format(what="An augmentation", instead="hf_distill.augment.augment_dataset")
            + " Or fix the number of versions of each example, AugmentingCollator(..., views=4), for the cache and the "
            "training; or pass student_only=True, so that the teacher reads the clean example."
        )


def augmentation_of(collator: Any) -> Json | None:
    """Return which fixed versions of examples a collator gives the teacher; None if it reads them unchanged."""
    views = getattr(collator, "views", None)
    if views is None or getattr(collator, "student_only", None) is not False:
        return None
    functions = [getattr(one, "function", one) for one in collator.augmentations]
    names = [getattr(one, "__name__", type(one).__name__) for one in functions]
    return {"views": views, "seed": collator.seed, "augmentations": names}


def check_same_versions(collator: Collator, there: Json | None) -> None:
    """Raise SettingError if the collator gives the teacher examples that the cache was not built from.

    Args:
        collator: of the training.
        there: the manifest's "augmentation".
    """
    now = augmentation_of(collator)
    if now is None:
        return
    if there is None:
        raise SettingError(
            f"the collator makes {now['views']} augmented versions of each example, and the cache was built from the "
            "examples themselves. Build it with this collator (data_collator=), or leave the augmentation out."
        )
    fewer = {**now, "views": there["views"]} if now["views"] <= there["views"] else now
    if fewer != there:
        raise SettingError(
            f"the cache was built from other versions of the examples: {'; '.join(differences(there, now))}. Train "
            "with the collator that it was built with, or build it with this one."
        )


class AugmentedVersions:
    """Every fixed version of every example: all first versions in the dataset's order, then all second versions."""

    def __init__(self, dataset: Any, count: int, column: str) -> None:
        self.dataset = dataset
        self.count = count
        self.column = column

    def __len__(self) -> int:
        return self.count * len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, Any]:
        version, place = divmod(index, len(self.dataset))
        return {**self.dataset[place], self.column: version}


def all_versions(dataset: Any, collator: Any) -> Any:
    """Return the dataset, or all versions of its examples that the collator gives the teacher.

    Raises:
        DataError: if the dataset is empty or has no length.
    """
    if not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__"):
        raise DataError(
            f"a cache is built from a dataset with a length and numbered examples, not from a "
            f"{type(dataset).__name__}. Write the stream to a datasets.Dataset first."
        )
    if len(dataset) == 0:
        raise DataError("the dataset has no examples.")
    if augmentation_of(collator) is None:
        return dataset
    return AugmentedVersions(dataset, collator.views, collator.view_column)


class TeacherRunner:
    """Queries a teacher that is ready, batch by batch.

    Args:
        teacher: bound to a student, or a model that needs none.
        task: the task of the student.
        learner: the student, or the model itself if none is given.
        temperature: the temperature its predictions are for, or None if they are for any.

    Attributes:
        model: the model, if the teacher is a single one.
        main: the main input.
    """

    def __init__(self, teacher: Teacher, task: Task, learner: nn.Module, temperature: float | None) -> None:
        self.teacher = teacher
        self.task = task
        self.learner = learner
        self.temperature = temperature
        self.model = teacher.model if isinstance(teacher, ModelTeacher) else None
        self.main = main_input_of(learner if self.model is None else self.model)

    def to(self, accelerator: Accelerator | None, state: PartialState | Accelerator) -> None:
        """Move the teacher to the device of the batches, which `state` knows if there is no accelerator."""
        self.teacher.to(accelerator or _WholeOnEachProcess(state))

    def query(self, batch: Batch, *, predictions: bool, activations: frozenset[ActivationKey]) -> Signals:
        """Return raw predictions (see `RawRead`) and activations of a batch on the teacher's device."""
        needs = Needs(predictions, activations, self.temperature or 1.0)
        if self.model is not None:
            return self.teacher(layout.RawRead(self.task), batch, needs)
        signals = self.teacher(self.task, batch, needs)
        if signals.logits is None:
            return signals
        return replace(signals, logits=self.task.raw_of_predictions(signals.logits))

    def compared_width(self) -> int:
        """Return how many columns of the student are compared with a sparse teacher's."""
        compared = self.teacher.alignment.student
        return compared if isinstance(compared, int) else int(unwrapped(self.learner).config.vocab_size)

    def agreement(self, batch: Batch) -> str | None:
        """Return how a quantised teacher agrees with its full precision, in words; None if that is not measured."""
        if not isinstance(self.teacher, QuantisedTeacher):
            return None
        self.teacher(self.task, batch, Needs(logits=True))
        return None if self.teacher.agreement is None else str(self.teacher.agreement)

    def describe(self) -> Json:
        """Return who the teacher is, for the manifest."""
        found = fingerprints.describe_teacher(self.teacher)
        if self.model is not None:
            return found
        config, *others = (fingerprints.describe_config(model) for model in (self.learner, *self.teacher.models()))
        if others and config["problem_type"] is None:
            config["problem_type"] = others[0]["problem_type"]
        return {**found, "config": config}


class _WholeOnEachProcess:
    """The part of an `Accelerator` that `Teacher.to` reads, without training: every process has the whole teacher."""

    distributed_type = DistributedType.NO
    is_fsdp2 = False

    def __init__(self, state: PartialState | Accelerator) -> None:
        self._state = state

    def __getattr__(self, name: str) -> Any:
        return getattr(self._state, name)

    def autocast(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()


def make_runner(
    teacher: Teacher | nn.Module | str | Path,
    *,
    student: nn.Module | None,
    task: Task | str | None,
    dtype: str | None,
    temperature: float | None,
    processing_class: Any,
    predictions: bool,
) -> TeacherRunner:
    """Return the teacher that `TeacherCache.build` was given, ready except for its device.

    Raises:
        SettingError: if a setting is missing or has no effect.
        TeacherError: if no cache can be built from this teacher.
    """
    if isinstance(teacher, (nn.Module, str, Path, ModelTeacher)):
        if isinstance(teacher, ModelTeacher):
            _check_constant(teacher)
        if temperature is not None:
            raise SettingError(
                f"temperature={temperature:g}: a model's logits are kept and softened in the training, so it has no "
                "effect. Leave it out. (TopK has temperatures of its own.)"
            )
        model = _as_model_teacher(teacher, student, task, dtype)
        learner = student if student is not None else model.model
        made = make_task(learner, task)
        made.learn_from(getattr(model.model, "config", None))
        model.prepare_inputs(learner, made, tokenizer=model.tokenizer or tokenizer_in(processing_class))
        return TeacherRunner(model, made, learner, None)
    name = type(teacher).__name__
    if not isinstance(teacher, Teacher):
        raise TeacherError(
            f"a cache is built from a teacher, not from a {name}. Give a model, a folder or a Hub id, or a teacher "
            "(hf_distill.teachers: Ensemble, Specialists, ServedTeacher, ...)."
        )
    if teacher.recorded is not None:
        raise TeacherError(f"the {name} is a cache already. To merge several caches, give an Ensemble of them.")
    if student is None:
        raise SettingError(
            f"the {name} has no head of its own: it predicts the labels or the vocabulary of a student. Pass student=."
        )
    if dtype is not None:
        raise SettingError(
            f"teacher_dtype={dtype!r} is for one model. Give the teachers of this {name} theirs where they are made."
        )
    made = make_task(student, task)
    teacher.bind(TeacherSetup(student, made, processing_class=processing_class, compares_predictions=predictions))
    if isinstance(teacher.alignment.student, tuple) and made.matched_by == "vocabulary":
        raise TeacherError(
            f"the vocabulary of this {name} has other tokens than the student's, or another order. Use teachers with "
            "the student's tokenizer."
        )
    _check_constant(teacher)
    return TeacherRunner(teacher, made, student, _temperature_of(teacher, made, temperature))


def _check_constant(teacher: Teacher) -> None:
    if teacher.changes_in_training:
        raise TeacherError(
            f"the {type(teacher).__name__} changes while the student is trained, so no cache can be built from it. Use "
            "it live."
        )


def _temperature_of(teacher: Teacher, task: Task, temperature: float | None) -> float | None:
    """Return the temperature that the teacher's predictions are for, or None if they are for any."""
    name = type(teacher).__name__
    if not teacher.fixed_temperature or task.on_values:
        if temperature is not None:
            raise SettingError(
                f"temperature={temperature:g}: the predictions of this {name} are the same at every temperature. Leave "
                "it out."
            )
        return None
    if temperature is None:
        raise SettingError(
            f"the predictions of the {name} are for one temperature only: pass temperature=, that of the training."
        )
    if not temperature > 0:
        raise SettingError(f"temperature={temperature!r}: must be above 0.")
    teacher.check(Needs(logits=True, temperature=temperature))
    return float(temperature)


def _as_model_teacher(
    teacher: ModelTeacher | nn.Module | str | Path,
    student: nn.Module | None,
    task: Task | str | None,
    dtype: str | None,
) -> ModelTeacher:
    if isinstance(teacher, ModelTeacher):
        return teacher
    if isinstance(teacher, nn.Module):
        return ModelTeacher(teacher, dtype=as_dtype(dtype))
    if student is None and task is None:
        kind = kind_of_checkpoint(teacher)
        if kind is None:
            raise SettingError(
                f"teacher={str(teacher)!r}: its config.json names no class of a known kind. Pass student= or task=."
            )
    else:
        kind = task if isinstance(task, str) else str(make_task(student, task))
    return ModelTeacher(load_teacher(teacher, kind, dtype=dtype), dtype=as_dtype(dtype))


@dataclass(frozen=True)
class TeacherOutputs:
    """What the teacher computes of a batch, at real positions only.

    Attributes:
        counts: `[b]`, rows of predictions of each example.
        rows: `[p v]` predictions, or None if there are none or they are sparse.
        sparse: the predictions of a sparse teacher, with leading axis p.
        activations: for each activation, `[p d]` and how many positions each example has `[b]`.
        prepared: the batch with everything that student and teacher are given.
    """

    counts: np.ndarray
    rows: Tensor | None
    sparse: SparseRows | None
    activations: dict[StoredActivation, tuple[Tensor, np.ndarray]]
    prepared: Batch

    @property
    def width(self) -> int:
        """The number of columns of the predictions."""
        return 0 if self.rows is None else int(self.rows.shape[1])


@dataclass(frozen=True)
class Source:
    """A teacher and the examples it is queried for.

    Attributes:
        runner: the teacher, with the task and the student whose rule makes decoder inputs.
        dataset: examples as a collator takes them.
        collator: makes batches.
        processing_class: the one that preprocessed the dataset, or None if it is not known.
        wanted: the activations that are kept, or None.
        predictions: whether predictions are kept.
        labels: reads the labels of the dataset.
    """

    runner: TeacherRunner
    dataset: Any
    collator: Callable[..., Any]
    processing_class: Any
    wanted: WantedActivations | None
    predictions: bool
    labels: LabelReader

    @property
    def task(self) -> Task:
        return self.runner.task

    @property
    def main(self) -> str:
        return self.runner.main

    @property
    def student(self) -> Any:
        return unwrapped(self.runner.learner)

    @property
    def axis(self) -> layout.Axis:
        """What the predictions run along; if there are none, one empty row stands for each example."""
        return layout.axis_of(self.task) if self.predictions else "example"

    # Examples and batches.

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Any:
        """Return an example as Trainer gives it to the collator: without columns that no forward takes."""
        example = self.dataset[index]
        names, inputs = forward_names(self.runner.learner), self.runner.teacher.inputs
        if not isinstance(example, Mapping) or not names or not inputs:
            return example  # whatever the collator takes
        known = {*names, *inputs, *_LABELS, getattr(self.collator, "view_column", None)}
        return {k: v for k, v in example.items() if k in known or k.startswith(TEACHER_PREFIX)}

    def batch(self, indices: Sequence[int]) -> dict[str, Any]:
        return self.collate([self[index] for index in indices])

    def first_batch(self, size: int) -> dict[str, Any]:
        return self.batch(range(min(size, len(self))))

    def collate(self, features: Sequence[Any]) -> dict[str, Any]:
        """Return the batch that the collator makes of examples.

        Raises:
            DataError: if labels cannot be read, nothing pads, or the collator packs several examples into a row.
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
                f"the collator makes {len(main)} row(s) of {len(features)} examples: it packs them, and a cache keeps "
                "each example by itself. Build it with a collator that pads (DataCollatorForSeq2Seq(tokenizer), "
                "DataCollatorWithPadding(tokenizer)), and train with such a collator, or with the live teacher."
            )
        return batch

    def key_columns(self, batch: Batch) -> tuple[str, ...]:
        teacher = self.runner.teacher
        found = keys.key_columns(batch, main=self.main, inputs=teacher.inputs, decodes=self.task.has_decoder)
        labels = self.task.label_names if teacher.reads_labels else ()
        return tuple(sorted({*found, *(name for name in labels if name in batch)}))

    def keys(self, batch: Batch, columns: Sequence[str]) -> np.ndarray:
        return keys.content_keys(batch, columns, main=self.main)

    def prepared(self, batch: Batch) -> dict[str, Any]:
        return self.task.prepare(dict(batch), self.student)

    # Querying the teacher.

    def query(self, batch: Batch, device: torch.device) -> TeacherOutputs:
        """Return what the teacher computes of a collated batch."""
        prepared = self.prepared(batch)
        activations = frozenset(self.wanted.keys) if self.wanted is not None else frozenset()
        signals = self.runner.query(_on(prepared, device), predictions=self.predictions, activations=activations)
        kept = dict(self._activations(signals.activations, prepared))
        if signals.sparse is not None:
            sparse, counts = self._cut_sparse(signals.sparse, prepared)
            return TeacherOutputs(counts, None, sparse, kept, prepared)
        if signals.logits is None:
            return TeacherOutputs(np.ones(batch_size(prepared), dtype=np.int64), None, None, kept, prepared)
        layout.check_axes(signals.logits, self.axis, self.task)
        rows, counts = self._cut(signals.logits, prepared)
        return TeacherOutputs(counts, rows, None, kept, prepared)

    def agreement(self, batch: Batch, device: torch.device) -> str | None:
        return self.runner.agreement(_on(self.prepared(batch), device)) if self.predictions else None

    def _cut(self, raw: Tensor, batch: Batch) -> tuple[Tensor, np.ndarray]:
        """Keep real positions, those of the teacher's own input if it has one."""
        if self.axis == "example":
            return raw, np.ones(len(raw), dtype=np.int64)
        own = read_by_teacher(batch, self.main)
        length = None if self.axis == "frames" else raw.shape[1]
        real = layout.real_positions(self.axis, own, length=length, task=self.task)
        return layout.cut(raw, real, len(raw))

    def _cut_sparse(self, sparse: SparseRows, batch: Batch) -> tuple[SparseRows, np.ndarray]:
        if sparse.weights is not None:
            raise DataError("the predictions of this teacher are weighted samples already, which a cache cannot keep.")
        parts = (sparse.ids, sparse.log_probabilities, sparse.log_tail)
        (ids, counts), (log_p, _), (tail, _) = (self._cut(part, batch) for part in parts)
        return replace(sparse, ids=ids, log_probabilities=log_p, log_tail=tail), counts

    def _activations(
        self, found: Mapping[ActivationKey, Tensor], batch: Batch
    ) -> Iterator[tuple[StoredActivation, tuple[Tensor, np.ndarray]]]:
        if self.wanted is None:
            return
        own = read_by_teacher(batch, self.main)
        for (key, pooling), name in zip(self.wanted.keys.items(), field_names(self.wanted), strict=True):
            blocks, x = self.wanted.blocks(key), found[key]
            axis, real = self._positions(self.wanted, key, own)
            kept = StoredActivation(name, key.what, key.layer, blocks.path, pooling, axis, int(x.shape[-1]))
            yield kept, layout.cut(x, real, batch_size(batch), pooling)

    def _positions(self, wanted: WantedActivations, key: ActivationKey, own: Batch) -> tuple[str, Tensor | None]:
        """Return what an activation runs along, and which positions are real."""
        of_decoder = wanted.blocks(key).of_decoder
        rule = PositionRule(self.runner.model, self.task, of_decoder=of_decoder)  # the teacher's
        axis = layout.axis_of_hidden(own, rule, task=self.task, of_decoder=of_decoder)
        return axis, rule.keep(own) if axis == "frames" else layout.real_positions(axis, own)

    def count_positions(self, batch: Batch) -> dict[str, float]:
        """Return how many positions this batch has along each axis, as far as that is known without the teacher."""
        own = read_by_teacher(self.prepared(batch), self.main)
        real = layout.real_positions(self.axis, own, task=self.task)
        found = {"predictions": float(batch_size(batch) if real is None else real.sum())}
        if self.wanted is not None:
            for key in self.wanted.keys:
                axis, real = self._positions(self.wanted, key, own)
                if real is not None:
                    found[axis] = float(real.sum())
        return found


@contextlib.contextmanager
def naming_examples(indices: Sequence[int]) -> Iterator[None]:
    """Add to the errors inside which examples of the dataset they are about."""
    try:
        yield
    except (DataError, TeacherError) as error:
        raise type(error)(f"examples {indices[0]} to {indices[-1]} of the dataset: {error}") from error


def _on(batch: Batch, device: torch.device) -> dict[str, Any]:
    return {name: value.to(device) if isinstance(value, Tensor) else value for name, value in batch.items()}
