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
from transformers import DataCollatorWithPadding, PreTrainedTokenizerBase, default_data_collator
from transformers.feature_extraction_sequence_utils import SequenceFeatureExtractor

from hf_distill._types import Batch, Collator, Example, ProcessingClass
from hf_distill.data.columns import check_processed, columns_of, is_own_collator, why_not_collated
from hf_distill.data.labels import LabelReader
from hf_distill.errors import DataError, HfDistillError, SettingError, TeacherError
from hf_distill.models.positions import PositionRule
from hf_distill.signals import ActivationKey, Needs, SparseRows
from hf_distill.tasks import Task, make_task
from hf_distill.tasks.base import TEACHER_PREFIX, batch_size
from hf_distill.tasks.infer import config_of, forward_names, main_input_of, unwrapped
from hf_distill.tasks.language import decoder_inputs, decoder_rule
from hf_distill.teachers import fingerprints
from hf_distill.teachers.base import Teacher, TeacherSetup
from hf_distill.teachers.cache import keys, layout
from hf_distill.teachers.cache.files import Dtype, check_dtype
from hf_distill.teachers.cache.hidden import Objectives, StoredActivation, field_names, wanted_activations
from hf_distill.teachers.cache.keys import read_by_teacher
from hf_distill.teachers.load import as_dtype, kind_of_checkpoint, load_teacher
from hf_distill.teachers.model import ModelTeacher, tokenizer_in
from hf_distill.teachers.passes import differences
from hf_distill.teachers.quantised import QuantisedTeacher
from hf_distill.teachers.shards import Json

_LABELS = ("labels", "label", "label_ids", "start_positions", "end_positions")
_RANDOM = (
    "{what} changes examples randomly, and a cached teacher knows only the examples that the cache was built from. "
    "Change them once before training ({instead}) and build the cache from that, or use the live teacher.{or_else}"
)


@dataclass(frozen=True)
class BuildOptions:
    """Less common options of `TeacherCache.build`.

    Args:
        predictions: whether to keep predictions; without them the cache is for training on objectives only
            (`alpha=None`).
        activation_dtype: of activations on the disk, "float16", "bfloat16" or "float32".
        teacher_dtype: as in `DistillationArguments`, for a teacher that is loaded.
        shard_examples: examples of a file; at most these are lost when a pass is interrupted. The default is 256 or a
            thousandth of all, and no more than 64 MB.
        num_workers: processes that make batches.
        accelerator: gives processes and device; by default Accelerate finds them.
        announce: is called with each announcement; by default they are logged.

    Raises:
        SettingError: if a value is not allowed.
    """

    predictions: bool = True
    activation_dtype: Dtype = "float16"
    teacher_dtype: str | None = None
    shard_examples: int | None = None
    num_workers: int = 0
    accelerator: Accelerator | None = None
    announce: Callable[[str], None] | None = None

    def __post_init__(self) -> None:
        check_dtype("activation_dtype", self.activation_dtype)
        if self.shard_examples is not None and self.shard_examples < 1:
            raise SettingError(f"shard_examples={self.shard_examples}: must be at least 1.")


@dataclass(frozen=True)
class TrainingSetup:
    """What a build knows of the training: arguments of `TeacherCache.build`, which describes them."""

    student: nn.Module | None
    task: Task | str | None
    data_collator: Collator | None
    processing_class: ProcessingClass | None
    objectives: Objectives | None
    temperature: float | None


# Collators that change examples. The attributes are those of `AugmentingCollator`, also within other collators.


def check_not_random(collator: Collator) -> None:
    """Raise SettingError if a collator changes examples randomly, for student and teacher."""
    what, instead, or_else = "", "hf_distill.augment.augment_dataset", ""
    if getattr(collator, "mlm", False):
        what, instead = f"{type(collator).__name__}(mlm=True)", "mask the dataset with dataset.map and give it labels"
    elif getattr(collator, "student_only", None) is False and getattr(collator, "views", None) is None:
        what = "An augmentation"
        or_else = " Or pass AugmentingCollator(..., views=4), a fixed number of versions, or student_only=True."
    if what:
        raise SettingError(_RANDOM.format(what=what, instead=instead, or_else=or_else))


def augmentation_of(collator: Any) -> Json | None:
    """Return which fixed versions of examples a collator gives the teacher; None if it reads them unchanged."""
    views = getattr(collator, "views", None)
    if views is None or getattr(collator, "student_only", None) is not False:
        return None
    functions = [getattr(one, "function", one) for one in collator.augmentations]
    names = [getattr(one, "__name__", type(one).__name__) for one in functions]
    return {"views": views, "seed": collator.seed, "augmentations": names}


def check_same_versions(collator: Collator, there: Json | None) -> None:
    """Raise SettingError if a collator gives the teacher other examples than the manifest's "augmentation" says."""
    now = augmentation_of(collator)
    if now is None:
        return
    if there is None:
        raise SettingError(
            f"the collator makes {now['views']} augmented versions of each example, and the cache was built from the "
            "examples themselves. Build it with this collator (data_collator=)."
        )
    fewer = {**now, "views": there["views"]} if now["views"] <= there["views"] else now
    if fewer != there:
        raise SettingError(
            f"the cache was built from other versions of the examples: {'; '.join(differences(there, now))}. Train "
            "with the collator that it was built with."
        )


class AugmentedVersions:
    """Every fixed version of every example: all first versions in the dataset's order, then all second versions."""

    def __init__(self, dataset: Any, count: int, column: str) -> None:
        self.dataset, self.count, self.column = dataset, count, column

    def __len__(self) -> int:
        return self.count * len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, Any]:
        version, place = divmod(index, len(self.dataset))
        return {**self.dataset[place], self.column: version}


# The teacher.


class WholeOnEachProcess:
    """The part of an `Accelerator` that `Teacher.to` reads, without training: every process has the whole teacher."""

    distributed_type = DistributedType.NO
    is_fsdp2 = False

    def __init__(self, state: PartialState | Accelerator) -> None:
        self._state = state

    def __getattr__(self, name: str) -> Any:
        return getattr(self._state, name)

    def autocast(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()


def make_ready(
    teacher: Teacher | nn.Module | str | Path, setup: TrainingSetup, options: BuildOptions
) -> tuple[Teacher, Task, nn.Module, float | None]:
    """Return teacher, task, learner and temperature of a `Source`; raise if no cache can be built from the teacher."""
    student, temperature, dtype = setup.student, setup.temperature, options.teacher_dtype
    if isinstance(teacher, (nn.Module, str, Path, ModelTeacher)):
        if isinstance(teacher, ModelTeacher):
            _check_constant(teacher)
        if temperature is not None:
            raise SettingError(
                f"temperature={temperature:g}: a model's logits are kept and softened in the training. Leave it out. "
                "(TopK has temperatures of its own.)"
            )
        model = _as_model_teacher(teacher, setup, dtype)
        learner = student if student is not None else model.model
        made = make_task(learner, setup.task)
        made.learn_from(config_of(model.model))
        model.prepare_inputs(learner, made, tokenizer=model.tokenizer or tokenizer_in(setup.processing_class))
        return model, made, learner, None
    name = type(teacher).__name__
    if not isinstance(teacher, Teacher):
        raise TeacherError(
            f"a cache is built from a teacher, not from a {name}. Give a model, a folder or a Hub id, or a teacher of "
            "hf_distill.teachers."
        )
    if teacher.recorded is not None:
        raise TeacherError(f"the {name} is a cache already. To merge several caches, give an Ensemble of them.")
    if student is None:
        raise SettingError(f"the {name} has no head of its own: it predicts what a student does. Pass student=.")
    if dtype is not None:
        raise SettingError(f"teacher_dtype={dtype!r} is for one model. Give the teachers of this {name} theirs.")
    made = make_task(student, setup.task)
    bound = TeacherSetup(
        student, made, processing_class=setup.processing_class, compares_predictions=options.predictions
    )
    teacher.bind(bound)
    if isinstance(teacher.alignment.student, tuple) and made.matched_by == "vocabulary":
        raise TeacherError(f"the vocabulary of this {name} is not the student's. Use teachers with its tokenizer.")
    _check_constant(teacher)
    return teacher, made, student, _temperature_of(teacher, made, temperature)


def _check_constant(teacher: Teacher) -> None:
    if teacher.changes_in_training:
        raise TeacherError(f"the {type(teacher).__name__} changes while the student is trained. Use it live.")


def _temperature_of(teacher: Teacher, task: Task, temperature: float | None) -> float | None:
    """Return the temperature that the teacher's predictions are for, or None if they are for any."""
    name = type(teacher).__name__
    if not teacher.fixed_temperature or task.on_values:
        if temperature is not None:
            raise SettingError(
                f"temperature={temperature:g}: this {name} predicts the same at every temperature. Leave it out."
            )
        return None
    if temperature is None:
        raise SettingError(f"the {name} predicts for one temperature only: pass temperature=, that of the training.")
    if not temperature > 0:
        raise SettingError(f"temperature={temperature!r}: must be above 0.")
    teacher.check(Needs(logits=True, temperature=temperature))
    return float(temperature)


def _as_model_teacher(
    teacher: ModelTeacher | nn.Module | str | Path, setup: TrainingSetup, dtype: str | None
) -> ModelTeacher:
    match teacher:
        case ModelTeacher():
            return teacher
        case nn.Module():
            return ModelTeacher(teacher, dtype=as_dtype(dtype))
    if isinstance(setup.task, str):
        kind: str | None = setup.task
    elif setup.student is not None or setup.task is not None:
        kind = str(make_task(setup.student, setup.task))
    else:
        kind = kind_of_checkpoint(teacher)
    if kind is None:
        raise SettingError(
            f"teacher={str(teacher)!r}: its config.json names no class of a known kind. Pass student= or task=."
        )
    return ModelTeacher(load_teacher(teacher, kind, dtype=dtype), dtype=as_dtype(dtype))


# Teacher and examples.


@dataclass(frozen=True)
class TeacherOutputs:
    """What the teacher computes of a batch, at real positions only.

    Attributes:
        counts: `[b]`, rows of predictions of each example.
        rows: `[p v]` predictions, or None if there are none or they are sparse.
        sparse: the predictions of a sparse teacher, with leading axis p.
        activations: for each activation, `[p d]` and how many positions each example has `[b]`.
    """

    counts: np.ndarray
    rows: Tensor | None
    sparse: SparseRows | None
    activations: dict[StoredActivation, tuple[Tensor, np.ndarray]]

    @property
    def width(self) -> int:
        """The number of columns of the predictions."""
        return 0 if self.rows is None else int(self.rows.shape[1])


class Source:
    """A teacher and the examples that it is queried for.

    Attributes:
        teacher: ready except for its device.
        task: the student's task.
        learner: the student, or the teacher's model if there is no student.
        temperature: the temperature that the predictions are for, or None if they are for any.
        model: the teacher's model, if it is one.
        main: the main input.
        wanted: the activations that are kept, or None.
        axis: what the predictions run along; if there are none, one empty row stands for each example.

    Raises:
        DataError: if no cache can be built from this dataset.
        SettingError: if a setting is not allowed.
        TeacherError: if no cache can be built from this teacher.
    """

    def __init__(
        self, teacher: Teacher | nn.Module | str | Path, dataset: Any, setup: TrainingSetup, options: BuildOptions
    ) -> None:
        self.processing_class = setup.processing_class
        self.predictions = options.predictions
        self.collator = setup.data_collator or _default_collator(setup.processing_class)
        check_not_random(self.collator)
        self.teacher, self.task, self.learner, self.temperature = make_ready(teacher, setup, options)
        self.model = self.teacher.model if isinstance(self.teacher, ModelTeacher) else None
        self.main = main_input_of(self.learner if self.model is None else self.model)
        self.wanted = wanted_activations(
            self.teacher.capture,
            objectives=setup.objectives,
            student=setup.student,
            task=self.task,
            dtype=options.activation_dtype,
        )
        if self.wanted is None and not self.predictions:
            raise SettingError("predictions=False keeps nothing without objectives=. Pass those of the training.")
        self.axis: layout.Axis = layout.axis_of(self.task) if self.predictions else "example"
        self.dataset = self._all_versions(dataset)
        needed = self.teacher.reads_labels or self.task.has_decoder
        self._labels = LabelReader(
            self.task,
            config_of(self.student),
            dataset,
            whose="the dataset",
            needed=needed,
            as_trainer=not needed,  # labels that nothing reads may be unreadable
            own_collator=is_own_collator(self.collator),
        )
        if not any(name.startswith(TEACHER_PREFIX) for name in columns_of(dataset) or ()):
            check_processed(dataset, self.learner, whose="the dataset", collator=setup.data_collator)

    @property
    def student(self) -> Any:
        """The learner without wrappers."""
        return unwrapped(self.learner)

    # Examples and batches.

    def _all_versions(self, dataset: Any) -> Any:
        """Return the dataset, or all versions of its examples that the collator gives the teacher."""
        if not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__"):
            raise DataError(
                f"a cache is built from a dataset with a length and numbered examples, not from a "
                f"{type(dataset).__name__}. Write the stream to a datasets.Dataset first."
            )
        if len(dataset) == 0:
            raise DataError("the dataset has no examples.")
        if augmentation_of(self.collator) is None:
            return dataset
        collator: Any = self.collator
        return AugmentedVersions(dataset, collator.views, collator.view_column)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Example:
        """Return an example as Trainer gives it to the collator: without columns that no forward takes."""
        example: Example = self.dataset[index]
        names, inputs = forward_names(self.learner), self.teacher.inputs
        if not isinstance(example, Mapping) or not names or not inputs:
            return example  # whatever the collator takes
        known = {*names, *inputs, *_LABELS, getattr(self.collator, "view_column", None)}
        return {k: v for k, v in example.items() if k in known or k.startswith(TEACHER_PREFIX)}

    def batch(self, indices: Sequence[int]) -> dict[str, Any]:
        return self.collate([self[index] for index in indices])

    def collate(self, features: Sequence[Example]) -> dict[str, Any]:
        """Return the batch that the collator makes of examples; raise DataError if it cannot, or packs them."""
        features = self._labels(features)
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
                "each example by itself. Build it and train with a collator that pads (DataCollatorWithPadding)."
            )
        return batch

    def key_columns(self, batch: Batch) -> tuple[str, ...]:
        """Return the columns that decide what the teacher computes."""
        decodes = self.task.has_decoder
        found = keys.key_columns(batch, main=self.main, inputs=self.teacher.inputs, decodes=decodes)
        labels = self.task.label_names if self.teacher.reads_labels else ()
        return tuple(sorted({*found, *(name for name in labels if name in batch)}))

    def keys(self, batch: Batch, columns: Sequence[str]) -> np.ndarray:
        """Return the keys of a batch, `[b 2]`."""
        return keys.content_keys(batch, columns, main=self.main)

    def prepared(self, batch: Batch) -> dict[str, Any]:
        """Return a collated batch with everything that student and teacher are given."""
        return self.task.prepare(dict(batch), self.student)

    # The teacher.

    def describe(self) -> Json:
        """Return who the teacher is, for the manifest."""
        found = fingerprints.describe_teacher(self.teacher)
        if self.model is not None:
            return found
        config, *others = (fingerprints.describe_config(model) for model in (self.learner, *self.teacher.models()))
        if others and config["problem_type"] is None:
            config["problem_type"] = others[0]["problem_type"]
        return {**found, "config": config}

    def decoder_rule(self) -> list[int] | None:
        """Return the decoder inputs that the student makes of the labels 5, 6, 7, if the teacher is given the same.

        None if nothing is decoded, or if each model of the teacher makes its own decoder inputs.
        """
        if not self.task.has_decoder:
            return None
        models = self.teacher.models()
        if models and all(decoder_rule(unwrapped(model)) is not None for model in models):
            return None
        rule: list[int] = decoder_inputs(torch.tensor([[5, 6, 7]]), self.student)[0].tolist()
        return rule

    def query(self, batch: Batch, device: torch.device) -> TeacherOutputs:
        """Return what the teacher computes of a collated batch."""
        prepared = self.prepared(batch)
        activations = frozenset(() if self.wanted is None else self.wanted.keys)
        needs = Needs(self.predictions, activations, self.temperature or 1.0)
        reader = self.task if self.model is None else layout.RawRead(self.task)
        signals = self.teacher(reader, _on(prepared, device), needs)
        kept = dict(self._activations(signals.activations, prepared))
        if signals.sparse is not None:
            sparse, counts = self._cut_sparse(signals.sparse, prepared)
            return TeacherOutputs(counts, None, sparse, kept)
        if signals.logits is None:
            return TeacherOutputs(np.ones(batch_size(prepared), dtype=np.int64), None, None, kept)
        raw = signals.logits if self.model is not None else self.task.raw_of_predictions(signals.logits)
        layout.check_axes(raw, self.axis, self.task)
        rows, counts = self._cut(raw, prepared)
        return TeacherOutputs(counts, rows, None, kept)

    def agreement(self, batch: Batch, device: torch.device) -> str | None:
        """Return how a quantised teacher agrees with its full precision, in words; None if that is not measured."""
        if not (self.predictions and isinstance(self.teacher, QuantisedTeacher)):
            return None
        self.teacher(self.task, _on(self.prepared(batch), device), Needs(logits=True))
        return None if self.teacher.agreement is None else str(self.teacher.agreement)

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
            x, (axis, real) = found[key], self._positions(key, own)
            path = self.wanted.blocks(key).path
            kept = StoredActivation(name, key.what, key.layer, path, pooling, axis, int(x.shape[-1]))
            yield kept, layout.cut(x, real, batch_size(batch), pooling)

    def _positions(self, key: ActivationKey, own: Batch) -> tuple[str, Tensor | None]:
        """Return what an activation runs along, and which positions are real."""
        assert self.wanted is not None  # the key is one of them
        of_decoder = self.wanted.blocks(key).of_decoder
        rule = PositionRule(self.model, self.task, of_decoder=of_decoder)  # the teacher's
        axis = layout.axis_of_hidden(own, rule, task=self.task, of_decoder=of_decoder)
        return axis, rule.keep(own) if axis == "frames" else layout.real_positions(axis, own)

    def count_positions(self, batch: Batch) -> dict[str, float]:
        """Return how many positions this batch has along each axis, as far as that is known without the teacher."""
        own = read_by_teacher(self.prepared(batch), self.main)
        real = layout.real_positions(self.axis, own, task=self.task)
        found = {"predictions": float(batch_size(batch) if real is None else real.sum())}
        for key in () if self.wanted is None else self.wanted.keys:
            axis, real = self._positions(key, own)
            if real is not None:
                found[axis] = float(real.sum())
        return found


def _default_collator(processing_class: ProcessingClass | None) -> Collator:
    """Return the collator that `Trainer` would use."""
    if isinstance(processing_class, (PreTrainedTokenizerBase, SequenceFeatureExtractor)):
        return DataCollatorWithPadding(processing_class)  # type: ignore[arg-type]  # as Trainer does
    return default_data_collator


@contextlib.contextmanager
def naming_examples(indices: Sequence[int]) -> Iterator[None]:
    """Add to the errors inside which examples of the dataset they are about."""
    try:
        yield
    except (DataError, TeacherError) as error:
        raise type(error)(f"examples {indices[0]} to {indices[-1]} of the dataset: {error}") from error


def _on(batch: Batch, device: torch.device) -> dict[str, Any]:
    return {name: value.to(device) if isinstance(value, Tensor) else value for name, value in batch.items()}
