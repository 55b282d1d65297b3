"""Building a cache: what is planned, and the pass of the teacher over the dataset that fills it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import DataCollatorWithPadding, PreTrainedTokenizerBase, default_data_collator
from transformers.feature_extraction_sequence_utils import SequenceFeatureExtractor

from hf_distill._compat import processes
from hf_distill.data.columns import check_processed, columns_of, is_own_collator
from hf_distill.data.labels import LabelReader
from hf_distill.errors import DataError, SettingError, TeacherError
from hf_distill.tasks import Batch, Task
from hf_distill.tasks.base import TEACHER_PREFIX
from hf_distill.tasks.infer import unwrapped
from hf_distill.tasks.language import decoder_inputs, decoder_rule
from hf_distill.teachers.cache import files, size
from hf_distill.teachers.cache import keys as fingerprints
from hf_distill.teachers.cache import source as versions
from hf_distill.teachers.cache.card import card_of
from hf_distill.teachers.cache.files import POSITIONS
from hf_distill.teachers.cache.hidden import StoredActivation, by_axis, itemsize, kept_reads, of_inside, wanted
from hf_distill.teachers.cache.keys import MASK, read_by_teacher
from hf_distill.teachers.cache.layout import stored
from hf_distill.teachers.cache.source import (
    Source,
    TeacherOutputs,
    TeacherRunner,
    examples_named,
    make_runner,
    with_versions,
)
from hf_distill.teachers.cache.stores import (
    Dense,
    NoPredictions,
    Store,
    TopK,
    TopKFromServer,
    described,
    rounding_error,
    store_from,
)
from hf_distill.teachers.model import tokenizer_in
from hf_distill.teachers.passes import ResumablePass, ShardFolder, checksum, read_arrow, shard_name, write_arrow

_UNITS = {"example": "examples", "input": "tokens", "decoder": "tokens", "frames": "frames"}


class PassProgress:
    """Counts batches and the positions in them; shows nothing where it is not to be shown.

    Args:
        total: batches in all.
        finished: those of an earlier pass.
        axis: what the predictions run along, which says what a position is.
    """

    def __init__(self, *, total: int, axis: str, finished: int = 0, shown: bool = True) -> None:
        self._progress = Progress(
            TextColumn("asking the teacher"),
            BarColumn(bar_width=30),
            MofNCompleteColumn(),
            TextColumn("{task.fields[speed]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            disable=not shown,
        )
        self._task = self._progress.add_task("", total=total, completed=finished, speed="")
        self._positions = 0
        self._unit = _UNITS[axis]

    def __enter__(self) -> PassProgress:
        self._progress.start()
        return self

    def __exit__(self, *error: Any) -> None:
        self._progress.stop()

    def advance(self, counts: np.ndarray) -> None:
        """A batch is done, of examples with so many positions."""
        self._positions += int(counts.sum())
        elapsed = self._progress.tasks[0].elapsed or 0.0
        speed = f"{self._positions / elapsed:,.0f} {self._unit}/s" if elapsed > 0 else ""
        self._progress.update(self._task, advance=1, speed=speed)


_DRAWN = (
    "{what} changes examples anew each time, and a cached teacher knows only examples that it was asked about. Change "
    "them once before training ({instead}) and build the cache of that, or use the live teacher."
)


def check_deterministic(collator: Any) -> None:
    """Raises:
    SettingError: see `CachedCollator`.
    """
    if getattr(collator, "mlm", False):
        instead = "mask the dataset with dataset.map and give it labels"
        raise SettingError(_DRAWN.format(what=f"{type(collator).__name__}(mlm=True)", instead=instead))
    if getattr(collator, "student_only", None) is False and getattr(collator, "views", None) is None:
        raise SettingError(
            _DRAWN.format(what="An augmentation", instead="hf_distill.augment.augment_dataset")
            + " Or fix how many versions an example has, AugmentingCollator(..., views=4), for the cache and the "
            "training alike; or with student_only=True show the teacher the clean example, which a cache knows."
        )


logger = logging.getLogger(__name__)

SAMPLE = 64  # examples whose length is measured
SHARD_BYTES = 64_000_000
SHARD_EXAMPLES = 256  # or a thousandth of all: so much is lost at most where a pass is interrupted
_ROUNDED = 0.01  # of what the rows differ by: more is told
_LARGE = 4096  # columns from which not all are kept, unless asked for
_SEES_PADDING = 1e-3  # of the largest prediction; half precision alone makes more than rounding, see `_threshold`


def label_reader(asked: TeacherRunner, dataset: Any, collator: Any) -> LabelReader:
    """Of the dataset of a pass. Most teachers are told no labels: those that cannot be read are then left out."""
    config, needed = (
        getattr(unwrapped(asked.learner), "config", None),
        asked.reads_labels or asked.task.has_decoder,
    )
    return LabelReader(
        asked.task,
        config,
        dataset,
        whose="the dataset",
        needed=needed,
        as_trainer=not needed,
        own_collator=is_own_collator(collator),
    )


def check_processed_data(asked: TeacherRunner, dataset: Any, collator: Any) -> None:
    """Raises DataError: text that was not tokenized, and no column of the teacher's own either."""
    if not any(name.startswith(TEACHER_PREFIX) for name in columns_of(dataset) or ()):
        check_processed(dataset, asked.learner, whose="the dataset", collator=collator)


def default_collator(processor: Any) -> Callable[..., Any]:
    """The one that `Trainer` would take."""
    if isinstance(processor, (PreTrainedTokenizerBase, SequenceFeatureExtractor)):
        return DataCollatorWithPadding(processor)  # type: ignore[arg-type]  # as Trainer does
    return default_data_collator


def default_store(task: Task, columns: int, temperature: float | None = None) -> Store:
    """All columns of a small head, values in full; of a large vocabulary the likeliest, and the others as one.

    Args:
        temperature: that the predictions are for; None: for any.
    """
    if task.on_values:
        return Dense("float32")  # of large values, half precision would round away what they differ by
    if task.matched_by != "vocabulary" or columns <= _LARGE:
        return Dense()
    return TopK() if temperature is None else TopK(temperatures=(temperature,))


def kept_columns(source: Source, store: Store, width: int) -> int:
    """Of a head of this width: where only some are listed, without columns that pad a vocabulary."""
    tokenizer = tokenizer_in(source.processor)
    if not store.is_sparse or tokenizer is None:
        return width
    return min(width, int(max(tokenizer.get_vocab().values())) + 1)


def shared_decoder_rule(task: Task, student: Any, teacher: Any) -> list[int] | None:
    """What the student makes of the labels 5, 6, 7 where the teacher is given just that.

    None where nothing is decoded, and where each model of the teacher makes its own decoder inputs.

    Raises:
        DataError: neither has a rule.
    """
    if not task.has_decoder:
        return None
    models = teacher.models()
    if models and all(decoder_rule(unwrapped(model)) is not None for model in models):
        return None
    return decoder_inputs(torch.tensor([[5, 6, 7]]), student)[0].tolist()


def made_plan(source: Source, *, store: Store | None, batch_size: int, device: Any) -> dict[str, Any]:
    """What the manifest says of the cache, but for the shards themselves.

    Raises:
        DataError: the dataset is empty or has no length, or the collator makes something else of it each time.
        SettingError: a task of which a cache does not know what it predicts along.
    """
    axis = source.axis
    count = _length(source.dataset)
    first = list(range(min(batch_size, count)))
    with examples_named(first):
        batch = source.batch(first)
    columns = source.key_columns(batch)
    keys = source.keys(batch, columns)
    if not np.array_equal(keys, source.keys(source.batch(first), columns)):
        raise SettingError(
            "the collator made something else of the same examples the second time: it draws masks, crops or "
            "augmentation anew. A cache knows examples by their content, so draw once before: dataset.map, or "
            "hf_distill.augment.augment_dataset, with a collator that only pads."
        )
    with examples_named(first):
        said = source.said(batch, device)
    chosen = _chosen_store(source, said, store)
    return {
        "format": files.FORMAT,
        "format_version": files.FORMAT_VERSION,
        "teacher": source.asked.described(),
        "processor": fingerprints.of_processor(source.processor),
        "task": {"kind": str(source.task), **source.task.settings()},
        "store": described(chosen),
        "inputs": {
            "main": source.main,
            "columns": list(columns),
            "masked": MASK in read_by_teacher(batch, source.main),
            "decoder": shared_decoder_rule(source.task, source.student, source.asked.teacher),
        },
        "predictions": {
            "axis": axis,
            "columns": kept_columns(source, chosen, _width(source, said)),
            "temperature": source.asked.temperature,
        },
        "inside": None if source.wanted is None else of_inside(source.wanted, said.inside),
        "views": versions.described(source.collator),
        "preprocessing": fingerprints.of_collator(source.collator),
        "padding": {"batch_size": batch_size, "side": _padding_side(batch, source.main)},
        "dataset": {"examples": count, "first": fingerprints.of_keys(keys[:1])},
        "versions": fingerprints.versions(),
    }


def _chosen_store(source: Source, said: TeacherOutputs, store: Store | None) -> Store:
    """The user's, or the default.

    Raises:
        SettingError: it does not fit what the teacher says.
    """
    if said.listed is not None:
        if store is not None:
            raise SettingError(
                f"store={store!r}: this teacher tells its likeliest columns and the rest as one, which is kept as it "
                "is. Leave store= out."
            )
        return TopKFromServer(k=int(said.listed.ids.shape[-1]), temperature=said.listed.temperature)
    if said.rows is None:
        if store is not None:
            raise SettingError(f"store={store!r} is for predictions, and predictions=False keeps none. Leave one out.")
        return NoPredictions()
    chosen = store or default_store(source.task, said.width, source.asked.temperature)
    if chosen.is_sparse and source.task.matched_by != "vocabulary":
        raise SettingError(
            f"{type(chosen).__name__} lists tokens of a vocabulary, and {source.task} has none. Use store=Dense()."
        )
    if source.asked.temperature is not None:
        chosen.check_temperature(source.asked.temperature, said.width)
    if isinstance(chosen, Dense) and chosen.keeps_largest is None:
        halves = chosen.dtype != "float32" and source.task.rows_are_distributions(said.prepared)
        chosen = replace(chosen, keeps_largest=halves)
    return chosen


def _width(source: Source, said: TeacherOutputs) -> int:
    """Columns of the teacher's predictions."""
    return source.asked.compared_width() if said.listed is not None else said.width


def size_of(source: Source, plan: Mapping[str, Any], *, batch_size: int) -> size.Size:
    """What it takes, from a sample of examples spread over the dataset; the teacher is not asked."""
    count = _length(source.dataset)
    indices = np.linspace(0, count - 1, min(SAMPLE, count)).astype(int).tolist()
    starts = range(0, len(indices), batch_size)
    sampled = [source.counted(source.batch(indices[start : start + batch_size])) for start in starts]
    means = {axis: sum(one[axis] for one in sampled) / len(indices) for axis in sampled[0]}
    fields = store_from(plan["store"]).fields(plan["predictions"]["columns"])
    inside = []
    for axis, kept in by_axis(plan["inside"]).items():
        each = sum(one.width for one in kept) * itemsize(plan["inside"]["dtype"])
        inside.append(size.Part(axis, means.get(axis) or plan["inside"]["positions"].get(axis, 1.0), each))
    return size.Size(count, means["predictions"], size.bytes_a_position(fields), tuple(inside), source.axis)


def change_by_padding(source: Source, *, batch_size: int, device: Any) -> float | None:
    """By how much the teacher says something else of an example when it is padded, relative to its largest prediction.

    Of the most padded example of the first batch; of its inside where no predictions are kept. None: nothing is padded
    there, no mask tells, or the teacher lists some columns.
    """
    batch = source.batch(list(range(min(batch_size, _length(source.dataset)))))
    mask = batch.get(MASK)
    if mask is None or mask.dim() != 2 or bool(mask.all()) or source.main not in batch:
        return None
    row = int(mask.sum(1).argmin())
    real = mask[row].bool()
    alone = {
        name: value[row : row + 1, real] if value.shape[1:2] == mask.shape[1:2] else value[row : row + 1]
        for name, value in batch.items()
        if isinstance(value, Tensor)
    }
    pieces = []
    for one in (batch, alone):
        said = source.said(one, device)
        found = (said.rows, said.counts) if said.rows is not None else next(iter(said.inside.values()), None)
        if found is None:
            return None
        at = row if one is batch else 0
        end = int(found[1][: at + 1].sum())
        pieces.append(found[0][end - int(found[1][at]) : end].float())
    if pieces[0].shape != pieces[1].shape or pieces[0].numel() == 0:
        return None
    difference = (pieces[0] - pieces[1]).abs().nan_to_num().max() / pieces[1].abs().max().clamp(min=1e-12)
    return float(f"{difference.item():.2g}")


def rounding_errors(source: Source, plan: Mapping[str, Any], *, batch_size: int, device: Any) -> dict[str, float]:
    """What is kept in half precision → how much that changes it, see `rounding_error`; of the first batch."""
    store, found = store_from(plan["store"]), {}
    inside = plan["inside"]["dtype"] if plan["inside"] is not None else "float32"
    dtype = store.dtype if isinstance(store, Dense) and not store.keeps_largest else "float32"
    if (inside, dtype) == ("float32", "float32"):
        return {}
    said = source.said(source.batch(list(range(min(batch_size, _length(source.dataset))))), device)
    if dtype != "float32" and said.rows is not None and bool(said.rows.isfinite().all()):
        found["predictions"] = rounding_error(said.rows, dtype)
    if inside != "float32":
        found |= {one.field: rounding_error(rows, inside) for one, (rows, _) in said.inside.items()}
    return {name: float(f"{error:.2g}") for name, error in found.items()}


def rounding_remark(errors: Mapping[str, float], plan: Mapping[str, Any]) -> str | None:
    """What to tell of `rounding_errors`; None: they are small."""
    if not errors or max(errors.values()) <= _ROUNDED:
        return None
    name, error = max(errors.items(), key=lambda one: one[1])
    dtype = plan["store"]["dtype"] if name == "predictions" else plan["inside"]["dtype"]
    instead = 'store=Dense("float32")' if name == "predictions" else 'inside_dtype="float32"'
    return (
        f"rounding to {dtype} changes {name} by {error:.2g} of what they differ by between positions (root mean "
        f"squares, in the first batch): they are large beside their differences. Pass {instead}."
    )


def padding_remark(change: float | None, plan: Mapping[str, Any]) -> str | None:
    """What to tell of `change_by_padding`; None: it is rounding."""
    exact = plan["teacher"]["dtype"] in ("float32", "float64")
    if change is None or change <= (_SEES_PADDING if exact else 0.05):
        return None
    return (
        f"what this teacher says of an example depends on how far its batch is padded: by {change:.2g} of its largest "
        f"prediction here. The cache holds what it says in batches of {plan['padding']['batch_size']} consecutive "
        "examples; a live teacher would say something else in other batches. Pad to one fixed length, for both the "
        "cache and the training, to make it one thing."
    )


def shard_size(asked: int | None, bytes_an_example: float, count: int, batch_size: int) -> int:
    """Examples in a shard, whole batches, so that no batch is cut by its end."""
    few = max(SHARD_EXAMPLES, count // 1000)
    wanted = asked if asked is not None else min(few, int(SHARD_BYTES / max(1.0, bytes_an_example)))
    return max(1, min(wanted, count) // batch_size) * batch_size


def _length(dataset: Any) -> int:
    if not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__"):
        raise DataError(
            f"a cache is built of a dataset with a length and numbered examples, not of a {type(dataset).__name__}. "
            "Write the stream to a datasets.Dataset first."
        )
    if len(dataset) == 0:
        raise DataError("the dataset has no examples.")
    return len(dataset)


def _padding_side(batch: Batch, main: str) -> str | None:
    """None: nothing is padded in the first batch."""
    mask = read_by_teacher(batch, main).get(MASK)
    if mask is None or mask.dim() != 2 or bool(mask.all()):
        return None
    return "right" if bool(mask[:, 0].all()) else "left"


_MEASURED = "measured"  # in the plan: what a resumed pass takes over and does not measure again


@dataclass(frozen=True)
class BuildOptions:
    """How the pass is made; see `TeacherCache.build`."""

    batch_size: int
    store: Store | None
    shard_examples: int | None
    num_workers: int
    say: Callable[[str], None] | None
    progress: bool


@dataclass(frozen=True)
class CacheContents:
    """What is kept of what the teacher says; see `TeacherCache.build`."""

    predictions: bool
    temperature: float | None
    objectives: Any
    reads: Any
    inside_dtype: str


@dataclass(frozen=True)
class TrainingSetup:
    """What is known of the training; see `TeacherCache.build`."""

    student: Any
    task: Task | str | None
    collator: Callable[..., Any] | None
    processor: Any
    dtype: str | None
    accelerator: Any


class CachePass(ResumablePass):
    """A pass of the teacher over a dataset. A shard has the same bytes in whatever process and after whatever pass.

    Args:
        source: the teacher, the dataset and the collator.
        path: of the cache.
        state: the processes.
        options: how the pass is made.
    """

    def __init__(self, source: Source, path: Path, state: Any, options: BuildOptions) -> None:
        folder = ShardFolder(
            path, finished="a cache", unfinished="an unfinished cache", manifest=files.MANIFEST, plan=files.PLAN
        )
        super().__init__(folder, state)
        self.source = source
        self.options = options
        self._now: dict[str, Any] | None = None

    @classmethod
    def prepared(
        cls, teacher: Any, dataset: Any, folder: Path, given: TrainingSetup, kept: CacheContents, options: BuildOptions
    ) -> CachePass:
        """Raises:
        SettingError, TeacherError: see the messages; nothing is written.
        """
        if options.batch_size < 1 or (options.shard_examples or 1) < 1:
            raise SettingError(f"batch_size={options.batch_size}, shard_examples={options.shard_examples}: at least 1.")
        state = given.accelerator or processes()
        chosen = given.collator or default_collator(given.processor)
        check_deterministic(chosen)
        asked = make_runner(
            teacher,
            student=given.student,
            task=given.task,
            dtype=given.dtype,
            temperature=kept.temperature,
            processor=given.processor,
            predictions=kept.predictions,
        )
        inside = wanted(
            asked.capture,
            objectives=kept.objectives,
            reads=kept.reads,
            student=given.student,
            task=asked.task,
            dtype=kept.inside_dtype,
        )
        if inside is None and not kept.predictions:
            raise SettingError(
                "predictions=False and nothing of the inside: say what is to be kept, objectives= or reads=."
            )
        asked.to(given.accelerator, state)
        labels = label_reader(asked, dataset, chosen)
        check_processed_data(asked, dataset, given.collator)
        every = with_versions(dataset, chosen)
        source = Source(asked, every, chosen, given.processor, inside, kept.predictions, labels)
        return cls(source, folder, state, options)

    # What is planned.

    def check_finished(self, manifest: dict[str, Any]) -> None:
        """Check that the finished cache is of the same teacher, settings and examples.

        Raises:
            DataError: if it is of something else.
        """
        # Neither the versions that made it matter any more, nor an older format.
        ignored = ("versions", "format_version", "store.keeps_largest: None", "dataset.content")
        self.folder.check_same(manifest, self._planned(), finished=True, ignored=ignored)
        if self._content(manifest) != manifest["dataset"]["content"]:
            raise DataError(
                f"{self.folder.path} holds a cache of other examples, or of the same in another order. To train on "
                "part of what it holds, or in another order, open it: TeacherCache(folder). For other examples choose "
                "another folder, or delete this one."
            )
        self._say(f"{self.folder.path} is built already.")

    def begun_plan(self, plan: dict[str, Any]) -> dict[str, Any]:
        self.folder.check_same(plan, self._planned(), finished=False, ignored=("dataset.content",))
        return plan

    def new_plan(self) -> dict[str, Any]:
        """Announce the size, measure what depends on padding and rounding, and cut the dataset into shards."""
        plan = self._planned()
        batch_size, count = self.options.batch_size, plan["dataset"]["examples"]
        found = size_of(self.source, plan, batch_size=batch_size)
        free = size.free_bytes(self.folder.path)
        self._say(f"The teacher's cache takes {size.announced(found, self.folder.path, free=free)}.")
        size.check_fits(found, self.folder.path, free=free)
        change = change_by_padding(self.source, batch_size=batch_size, device=self.state.device)
        remark = padding_remark(change, plan)
        if remark is not None:
            logger.warning(f"About the teacher's cache: {remark}")
        examples = shard_size(self.options.shard_examples, found.total / count, count, batch_size)
        measured: dict[str, Any] = {"positions_an_example": found.positions, "change_by_padding": change}
        errors = rounding_errors(self.source, plan, batch_size=batch_size, device=self.state.device)
        if errors:
            measured["rounding"] = errors
            remark = rounding_remark(errors, plan)
            if remark is not None:
                logger.warning(f"About the teacher's cache: {remark}")
        agreement = self.source.measured_agreement(
            self.source.batch(list(range(min(batch_size, count)))), self.state.device
        )
        if agreement is not None:
            measured["agreement_with_full_precision"] = agreement
        return {**plan, "shard_examples": examples, "shard_count": -(-count // examples), _MEASURED: measured}

    def _planned(self) -> dict[str, Any]:
        """What is asked for now, found out once."""
        if self._now is None:
            plan = made_plan(
                self.source,
                store=self.options.store,
                batch_size=self.options.batch_size,
                device=self.state.device,
            )
            self._now = {**plan, "shard_asked": self.options.shard_examples}
        return self._now

    # The shards.

    def _indices(self, plan: Mapping[str, Any], shard: int) -> range:
        start, count = shard * plan["shard_examples"], plan["dataset"]["examples"]
        return range(start, min(count, start + plan["shard_examples"]))

    def _batches(self, plan: Mapping[str, Any], shards: Iterable[int]) -> list[list[int]]:
        """Return the batches; none reaches over the end of a shard, so they are the same in every pass."""
        each, ranges = plan["padding"]["batch_size"], [self._indices(plan, shard) for shard in shards]
        return [list(r[at : at + each]) for r in ranges for at in range(0, len(r), each)]

    def _loaded(self, plan: Mapping[str, Any], shards: Iterable[int]) -> Iterator[dict[str, Any]]:
        loader: DataLoader[Any] = DataLoader(
            _Examples(self.source),  # type: ignore[arg-type]  # what a Dataset must have, it has
            batch_sampler=self._batches(plan, shards),
            collate_fn=self.source.collated,
            num_workers=self.options.num_workers,
            generator=torch.Generator(),  # that of the training is left alone
        )
        return iter(loader)

    def is_done(self, shard: int) -> bool:
        if self.folder.receipt(shard) is None:
            return False
        written = read_arrow(self.folder.path / shard_name(shard))
        there = np.stack([files.numbers(written.column("high")), files.numbers(written.column("low"))], 1)
        now = np.concatenate([self._keys(self.plan, batch) for batch in self._loaded(self.plan, [shard])])
        if not np.array_equal(there, now):
            at = int(np.flatnonzero((there != now).any(1))[0]) + self._indices(self.plan, shard)[0]
            raise DataError(
                f"example {at} of the dataset is another one than when {self.folder.path} was begun. Give the dataset "
                "that it was begun with, or choose another folder."
            )
        return True

    def _content(self, plan: Mapping[str, Any]) -> str:
        """Return the fingerprint of all examples as the dataset now has them; the teacher is not run."""
        batches = self._loaded(plan, range(plan["shard_count"]))
        return fingerprints.of_keys(np.concatenate([self._keys(plan, batch) for batch in batches]))

    def _keys(self, plan: Mapping[str, Any], batch: dict[str, Any]) -> np.ndarray:
        return self.source.keys(batch, plan["inputs"]["columns"])

    def make(self, shards: list[int], *, done: list[int]) -> None:
        """Run the teacher on the examples of these shards."""
        store, activations = store_from(self.plan["store"]), kept_reads(self.plan.get("inside"))
        batches = self._loaded(self.plan, shards)
        before = len(self._batches(self.plan, done))
        total = before + len(self._batches(self.plan, shards))
        shown = self.options.progress and self.state.is_main_process and bool(shards)
        with PassProgress(total=total, axis=self.source.axis, finished=before, shown=shown) as bar:
            for shard in shards:
                parts = []
                for indices in self._batches(self.plan, [shard]):
                    with examples_named(indices):
                        parts.append(self._part(next(batches), store, activations))
                    bar.advance(parts[-1]["positions"])
                self._write(shard, parts, activations)

    def _part(self, batch: dict[str, Any], store: Store, activations: list[StoredActivation]) -> dict[str, np.ndarray]:
        keys, said = self._keys(self.plan, batch), self.source.said(batch, self.state.device)
        fields = {**self._predictions(said, keys, store), **self._activations(said, activations)}
        return {"high": keys[:, 0], "low": keys[:, 1], POSITIONS: said.counts.astype(np.int32), **fields}

    def _predictions(self, said: TeacherOutputs, keys: np.ndarray, store: Store) -> dict[str, np.ndarray]:
        if said.listed is not None and isinstance(store, TopKFromServer):
            return store.encode_listed(said.listed)
        if said.rows is None:
            return {}
        rows, columns = said.rows, self.plan["predictions"]["columns"]
        if store.is_sparse:
            rows = rows[:, :columns]
        _check_finite(rows, said.counts)
        if rows.shape[1] != columns:
            raise DataError(
                f"the teacher predicts {rows.shape[1]} columns here and {columns} at the start: examples must have "
                "equally many (choices)."
            )
        return store.encode(rows, keys, said.counts)

    def _activations(self, said: TeacherOutputs, activations: list[StoredActivation]) -> dict[str, np.ndarray]:
        fields: dict[str, np.ndarray] = {}
        for now, there in zip(said.inside, activations, strict=True):
            if now != there:
                raise DataError(
                    f"the teacher's {there} are {there.width} wide along {there.axis} at the start, and {now.width} "
                    f"along {now.axis} in a later batch. Make batches alike."
                )
            rows, counts = said.inside[now]
            fields[there.counts] = counts.astype(np.int32)
            fields[there.field] = stored(rows, there, self.plan["inside"]["dtype"])
        return fields

    def _write(self, shard: int, parts: list[dict[str, np.ndarray]], activations: list[StoredActivation]) -> None:
        whole = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        along = {one.field: one.counts for one in activations}
        plain = ("high", "low", POSITIONS, *along.values())
        columns = {name: files.plain_array(whole[name]) for name in whole if name in plain}
        for name in whole:
            if name not in plain:
                counts = whole[along.get(name, POSITIONS)]
                columns[name] = files.list_array(whole[name], counts * whole[name].shape[1])
        examples, positions = len(whole[POSITIONS]), int(whole[POSITIONS].sum())
        self.folder.write_shard(shard, columns, examples=examples, positions=positions)

    # The end.

    def finalize(self, receipts: list[dict[str, Any]]) -> None:
        """Write index, dataset files, card and manifest."""
        index = self.folder.path / files.INDEX
        content = fingerprints.of_keys(_write_index(self.folder.path, receipts))
        manifest = {
            **self.plan,
            "dataset": {**self.plan["dataset"], "content": content},
            "positions": sum(one["positions"] for one in receipts),
            "shards": receipts,
            "index": {"file": index.name, "bytes": index.stat().st_size, "blake2b": checksum(index)},
        }
        self.folder.finish(manifest, receipts, fingerprint=content[:16], card=card_of(manifest))

    def kept(self) -> str:
        kept, planned = self.folder.written("examples"), self.plan["dataset"]["examples"]
        return f"{kept:,} of {planned:,} examples are kept in {self.folder.path}"

    def _say(self, text: str) -> None:
        if self.state.is_main_process:
            (self.options.say or logger.info)(text)


def _check_finite(rows: torch.Tensor, counts: np.ndarray) -> None:
    wrong = (rows.isnan() | (rows == torch.inf)).any(-1)
    if bool(wrong.any()):
        position = int(wrong.nonzero()[0])
        example = int(np.searchsorted(np.cumsum(counts), position, side="right"))
        raise TeacherError(
            f"the teacher's logits hold NaN or infinity in example {example} of a batch, at position {position} of "
            "it all. Look at that input; a half-precision teacher may overflow: try dtype='float32' or 'bfloat16'."
        )


class _Examples:
    """A map-style dataset of what the collator takes."""

    def __init__(self, source: Source) -> None:
        self.source = source

    def __len__(self) -> int:
        return len(self.source.dataset)

    def __getitem__(self, index: int) -> Any:
        return self.source.example(index)


def _write_index(folder: Path, receipts: list[dict[str, Any]]) -> np.ndarray:
    """All keys in order, each with where its example lies. Returns the keys `[n 2]` in the dataset's order."""
    keys, shards, rows = [], [], []
    for number, one in enumerate(receipts):
        batch = read_arrow(folder / one["file"])
        keys.append(np.stack([files.numbers(batch.column("high")), files.numbers(batch.column("low"))], 1))
        shards.append(np.full(one["examples"], number, dtype=np.int32))
        rows.append(np.arange(one["examples"], dtype=np.int32))
    every = np.concatenate(keys)
    order = np.lexsort((every[:, 1], every[:, 0]))  # stable: of equal examples the first is found
    columns = {
        "high": every[order, 0],
        "low": every[order, 1],
        "shard": np.concatenate(shards)[order],
        "row": np.concatenate(rows)[order],
    }
    write_arrow(folder / files.INDEX, {name: files.plain_array(values) for name, values in columns.items()})
    return every
