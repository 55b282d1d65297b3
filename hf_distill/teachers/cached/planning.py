"""What a cache is to hold, found out from the first batch before the pass: the plan that its manifest grows from."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import DataCollatorWithPadding, PreTrainedTokenizerBase, default_data_collator
from transformers.feature_extraction_sequence_utils import SequenceFeatureExtractor

from hf_distill.errors import DataError, SettingError
from hf_distill.tasks import Batch, Task
from hf_distill.tasks.base import TEACHER_PREFIX
from hf_distill.tasks.dataset_columns import columns_of, is_own_collator, refuse_unprocessed
from hf_distill.tasks.dataset_labels import LabelReader
from hf_distill.tasks.infer import unwrapped
from hf_distill.tasks.language import decoder_inputs, decoder_rule
from hf_distill.teachers.cached import files, fingerprints, size, versions
from hf_distill.teachers.cached.asking import Asked, models_of
from hf_distill.teachers.cached.inside import by_axis, itemsize, of_inside
from hf_distill.teachers.cached.keys import MASK, read_by_teacher
from hf_distill.teachers.cached.listed import Listed
from hf_distill.teachers.cached.nothing import Nothing
from hf_distill.teachers.cached.source import Said, Source, examples_named
from hf_distill.teachers.cached.stores import Dense, Store, described, rounding_error, store_from
from hf_distill.teachers.cached.topk import TopK
from hf_distill.teachers.fitting import tokenizer_in

logger = logging.getLogger(__name__)

SAMPLE = 64  # examples whose length is measured
SHARD_BYTES = 64_000_000
SHARD_EXAMPLES = 256  # or a thousandth of all: so much is lost at most where a pass is interrupted
_ROUNDED = 0.01  # of what the rows differ by: more is told
_LARGE = 4096  # columns from which not all are kept, unless asked for
_SEES_PADDING = 1e-3  # of the largest prediction; half precision alone makes more than rounding, see `_threshold`


def label_reader(asked: Asked, dataset: Any, collator: Any) -> LabelReader:
    """Of the dataset of a pass. Most teachers are told no labels: those that cannot be read are then left out."""
    config, needed = (
        getattr(unwrapped(asked.learner), "config", None),
        asked.reads_labels or asked.task.kind == "seq2seq",
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


def refuse_unprocessed_data(asked: Asked, dataset: Any, collator: Any) -> None:
    """Raises DataError: text that was not tokenized, and no column of the teacher's own either."""
    if not any(name.startswith(TEACHER_PREFIX) for name in columns_of(dataset) or ()):
        refuse_unprocessed(dataset, asked.learner, whose="the dataset", collator=collator)


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
    if not store.lists_columns or tokenizer is None:
        return width
    return min(width, int(max(tokenizer.get_vocab().values())) + 1)


def task_settings(task: Task) -> dict[str, Any]:
    """Settings of a task that change what is cached."""
    return {"pooling": vars(task)["pooling"]} if task.kind == "embedding" else {}


def shared_decoder_rule(task: Task, student: Any, teacher: Any) -> list[int] | None:
    """What the student makes of the labels 5, 6, 7 where the teacher is given just that.

    None where nothing is decoded, and where each model of the teacher makes its own decoder inputs.

    Raises:
        DataError: neither has a rule.
    """
    if task.kind != "seq2seq":
        return None
    models = models_of(teacher)
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
            "hf_distill.views.augment_dataset, with a collator that only pads."
        )
    with examples_named(first):
        said = source.said(batch, device)
    chosen = _chosen_store(source, said, store)
    return {
        "format": files.FORMAT,
        "format_version": files.FORMAT_VERSION,
        "teacher": source.asked.described(),
        "processor": fingerprints.of_processor(source.processor),
        "task": {"kind": source.task.kind, **task_settings(source.task)},
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


def _chosen_store(source: Source, said: Said, store: Store | None) -> Store:
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
        return Listed(k=int(said.listed.ids.shape[-1]), temperature=said.listed.temperature)
    if said.rows is None:
        if store is not None:
            raise SettingError(f"store={store!r} is for predictions, and predictions=False keeps none. Leave one out.")
        return Nothing()
    chosen = store or default_store(source.task, said.width, source.asked.temperature)
    if chosen.lists_columns and source.task.matched_by != "vocabulary":
        raise SettingError(
            f"{type(chosen).__name__} lists tokens of a vocabulary, and {source.task.kind} has none. Use store=Dense()."
        )
    if source.asked.temperature is not None:
        chosen.check_temperature(source.asked.temperature, said.width)
    if isinstance(chosen, Dense) and chosen.keeps_largest is None:
        halves = chosen.dtype != "float32" and source.task.rows_are_distributions(said.prepared)
        chosen = replace(chosen, keeps_largest=halves)
    return chosen


def _width(source: Source, said: Said) -> int:
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
