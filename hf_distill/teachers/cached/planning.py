"""What a cache is to hold, found out from the first batch before the pass: the plan that its manifest grows from."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import DataCollatorWithPadding, PreTrainedTokenizerBase, default_data_collator
from transformers.feature_extraction_sequence_utils import SequenceFeatureExtractor

from hf_distill.errors import DataError, SettingError
from hf_distill.signals import Needs
from hf_distill.tasks import Batch, Task
from hf_distill.tasks.base import TEACHER_PREFIX
from hf_distill.tasks.infer import forward_names, unwrapped
from hf_distill.tasks.language import decoder_inputs
from hf_distill.teachers.cached import files, fingerprints, layout
from hf_distill.teachers.cached.keys import MASK, content_keys, key_columns, read_by_teacher
from hf_distill.teachers.cached.stores import Dense, Store, described
from hf_distill.teachers.cached.topk import TopK
from hf_distill.teachers.fitting import tokenizer_in
from hf_distill.teachers.model import ModelTeacher

logger = logging.getLogger(__name__)

SAMPLE = 64  # examples whose length is measured
SHARD_BYTES = 64_000_000
_LARGE = 4096  # columns from which not all are kept, unless asked for
_SEES_PADDING = 1e-3  # of the largest prediction; half precision alone makes more than rounding, see `_threshold`
_LABELS = ("labels", "label", "label_ids", "start_positions", "end_positions")


@dataclass(frozen=True)
class Source:
    """Who is asked about what.

    Attributes:
        teacher: the model. task: where predictions are. student: whose rule makes decoder inputs.
        dataset: examples as a collator takes them. collator: makes batches. processor: of the dataset's preprocessing.
    """

    teacher: ModelTeacher
    task: Task
    student: Any
    dataset: Any
    collator: Callable[..., Any]
    processor: Any

    @property
    def main(self) -> str:
        return str(getattr(unwrapped(self.teacher.model), "main_input_name", "input_ids"))

    def example(self, index: int) -> dict[str, Any]:
        """As Trainer would hand it to the collator: without columns that no forward takes."""
        example = self.dataset[index]
        names = forward_names(self.student)
        if not isinstance(example, Mapping) or not names or not self.teacher.inputs:
            return example  # whatever the collator takes
        known = {*names, *self.teacher.inputs, *_LABELS}
        return {k: v for k, v in example.items() if k in known or k.startswith(TEACHER_PREFIX)}

    def batch(self, indices: list[int]) -> dict[str, Any]:
        return dict(self.collator([self.example(index) for index in indices]))

    def ask(self, batch: Batch, device: Any) -> tuple[Tensor, dict[str, Any]]:
        """The teacher's own output for a collated batch, and the batch with what both models are given alike."""
        prepared = self.task.prepare(dict(batch), unwrapped(self.student))
        moved = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in prepared.items()}
        raw = self.teacher(layout.RawRead(self.task), moved, Needs(logits=True)).predictions()
        return raw, prepared

    def cut(self, raw: Tensor, batch: Batch, axis: layout.Axis) -> tuple[Tensor, np.ndarray]:
        """The real positions of what `ask` gave; those of the teacher's own input where it has one."""
        own = read_by_teacher(batch, self.main)
        along = raw.shape[1] if axis in ("input", "decoder") else None
        return layout.cut(raw, layout.real_positions(axis, own, length=along, task=self.task))


def default_collator(processor: Any) -> Callable[..., Any]:
    """The one that `Trainer` would take."""
    if isinstance(processor, (PreTrainedTokenizerBase, SequenceFeatureExtractor)):
        return DataCollatorWithPadding(processor)  # type: ignore[arg-type]  # as Trainer does
    return default_data_collator


def default_store(task: Task, columns: int) -> Store:
    """All columns of a small head; of a large vocabulary the likeliest, and the others as one."""
    return TopK() if task.matched_by == "vocabulary" and columns > _LARGE else Dense()


def kept_columns(source: Source, store: Store, width: int) -> int:
    """Of a head of this width: where only some are listed, without columns that pad a vocabulary."""
    tokenizer = tokenizer_in(source.processor)
    if not store.lists_columns or tokenizer is None:
        return width
    return min(width, int(max(tokenizer.get_vocab().values())) + 1)


def task_settings(task: Task) -> dict[str, Any]:
    """Settings of a task that change what is cached."""
    return {"pooling": vars(task)["_pooling"]} if task.kind == "embedding" else {}


def decoder_rule(task: Task, student: Any) -> list[int] | None:
    """What a student makes of the labels 5, 6, 7; None where nothing is decoded.

    Raises:
        DataError: it has no rule.
    """
    return decoder_inputs(torch.tensor([[5, 6, 7]]), student)[0].tolist() if task.kind == "seq2seq" else None


def made_plan(source: Source, *, store: Store | None, batch_size: int, device: Any) -> dict[str, Any]:
    """What the manifest says of the cache, but for the shards themselves.

    Raises:
        DataError: the dataset is empty or has no length, or the collator makes something else of it each time.
        SettingError: a task of which a cache does not know what it predicts along.
    """
    axis = layout.axis_of(source.task)
    count = _length(source.dataset)
    first = list(range(min(batch_size, count)))
    batch = source.batch(first)
    raw, prepared = source.ask(batch, device)
    columns = key_columns(batch, main=source.main, inputs=source.teacher.inputs, decodes=source.task.kind == "seq2seq")
    keys = content_keys(batch, columns, main=source.main)
    if not np.array_equal(keys, content_keys(source.batch(first), columns, main=source.main)):
        raise SettingError(
            "the collator made something else of the same examples the second time: it draws masks, crops or "
            "augmentation anew. A cache knows examples by their content, so draw once before: dataset.map, or "
            "hf_distill.views.augment_dataset, with a collator that only pads."
        )
    rows, _ = source.cut(raw, prepared, axis)
    chosen = store or default_store(source.task, rows.shape[1])
    if chosen.lists_columns and source.task.matched_by != "vocabulary":
        raise SettingError(
            f"{type(chosen).__name__} lists tokens of a vocabulary, and {source.task.kind} has none. Use store=Dense()."
        )
    return {
        "format": files.FORMAT,
        "format_version": files.FORMAT_VERSION,
        "teacher": fingerprints.of_teacher(source.teacher.model),
        "processor": fingerprints.of_processor(source.processor),
        "task": {"kind": source.task.kind, **task_settings(source.task)},
        "store": described(chosen),
        "inputs": {
            "main": source.main,
            "columns": list(columns),
            "masked": MASK in read_by_teacher(batch, source.main),
            "decoder": decoder_rule(source.task, unwrapped(source.student)),
        },
        "predictions": {"axis": axis, "columns": kept_columns(source, chosen, int(rows.shape[1]))},
        "preprocessing": fingerprints.of_collator(source.collator),
        "padding": {"batch_size": batch_size, "side": _padding_side(batch, source.main)},
        "dataset": {"examples": count, "first": fingerprints.of_keys(keys[:1])},
        "versions": fingerprints.versions(),
    }


def positions_of_an_example(source: Source, axis: layout.Axis, *, batch_size: int) -> float:
    """A mean over examples spread over the dataset; the teacher is not asked."""
    if axis == "example":
        return 1.0
    count = _length(source.dataset)
    indices = np.linspace(0, count - 1, min(SAMPLE, count)).astype(int).tolist()
    total = 0
    for start in range(0, len(indices), batch_size):
        batch = source.task.prepare(source.batch(indices[start : start + batch_size]), unwrapped(source.student))
        real = layout.real_positions(axis, read_by_teacher(batch, source.main), task=source.task)
        assert real is not None  # there is an axis
        total += int(real.sum())
    return total / len(indices)


def change_by_padding(source: Source, axis: layout.Axis, *, batch_size: int, device: Any) -> float | None:
    """By how much the teacher says something else of an example when it is padded, relative to its largest prediction.

    Of the most padded example of the first batch. None: nothing is padded there, or no mask tells.
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
    said = []
    for one in (batch, alone):
        raw, prepared = source.ask(one, device)
        rows, counts = source.cut(raw, prepared, axis)
        at = row if one is batch else 0
        end = int(counts[: at + 1].sum())
        said.append(rows[end - int(counts[at]) : end].float())
    if said[0].shape != said[1].shape or said[0].numel() == 0:
        return None
    difference = (said[0] - said[1]).abs().nan_to_num().max() / said[1].abs().max().clamp(min=1e-12)
    return float(f"{difference.item():.2g}")


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
    wanted = asked if asked is not None else int(SHARD_BYTES / max(1.0, bytes_an_example))
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
