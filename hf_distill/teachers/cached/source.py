"""Who is asked about what in a pass: examples as a Trainer would hand them over, and what is said of a batch of them.

Axes: b batch, t time, p positions of all examples one after the other, v columns, d width.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hf_distill.errors import DataError, HfDistillError, TeacherError
from hf_distill.inside.positions import Positions
from hf_distill.signals import Read, SparseRows
from hf_distill.tasks import Batch, Task
from hf_distill.tasks.base import TEACHER_PREFIX, batch_size
from hf_distill.tasks.dataset_columns import why_not_collated
from hf_distill.tasks.dataset_labels import LabelReader
from hf_distill.tasks.infer import forward_names, unwrapped
from hf_distill.teachers.cached import inside_layout, layout
from hf_distill.teachers.cached.asking import Asked
from hf_distill.teachers.cached.inside import KeptRead, Wanted, field_names
from hf_distill.teachers.cached.keys import content_keys, key_columns, read_by_teacher

_LABELS = ("labels", "label", "label_ids", "start_positions", "end_positions")


@dataclass(frozen=True)
class Said:
    """What was said of a batch, real positions alone.

    Attributes:
        counts: `[b]` rows of predictions of each example. rows: `[p v]` predictions; None: none, or listed.
        listed: of a teacher that lists some columns, leading axis p. inside: for each read, as it is kept,
        `[p d]` and how many positions each example has `[b]`. prepared: the batch with what both models are given.
    """

    counts: np.ndarray
    rows: Tensor | None
    listed: SparseRows | None
    inside: dict[KeptRead, tuple[Tensor, np.ndarray]]
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
        dataset: examples as a collator takes them. collator: makes batches. processor: of the dataset's preprocessing.
        wanted: of its inside; None: nothing. predictions: whether they are kept.
        labels: reads those of the dataset.
    """

    asked: Asked
    dataset: Any
    collator: Callable[..., Any]
    processor: Any
    wanted: Wanted | None
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
            why = why_not_collated(features, self.collator, self.task.kind)
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
        found = key_columns(batch, main=self.main, inputs=self.asked.inputs, decodes=self.task.kind == "seq2seq")
        labels = self.task.label_names if self.asked.reads_labels else ()
        return tuple(sorted({*found, *(name for name in labels if name in batch)}))

    def keys(self, batch: Batch, columns: list[str] | tuple[str, ...]) -> np.ndarray:
        return content_keys(batch, columns, main=self.main)

    def said(self, batch: Batch, device: Any) -> Said:
        """What the teacher says of a collated batch."""
        prepared = self.prepared(batch)
        reads = frozenset(self.wanted.reads) if self.wanted is not None else frozenset()
        answer = self.asked.ask(_on(prepared, device), predictions=self.predictions, reads=reads)
        inside = dict(self._inside(answer.inside, prepared))
        if answer.sparse is not None:
            listed, counts = self._listed(answer.sparse, prepared)
            return Said(counts, None, listed, inside, prepared)
        if answer.raw is None:
            return Said(np.ones(batch_size(prepared), dtype=np.int64), None, None, inside, prepared)
        layout.refuse_other_axes(answer.raw, self.axis, self.task.kind)
        rows, counts = self._cut(answer.raw, prepared)
        return Said(counts, rows, None, inside, prepared)

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
        self, seen: Mapping[Read, Tensor], batch: Batch
    ) -> Iterator[tuple[KeptRead, tuple[Tensor, np.ndarray]]]:
        if self.wanted is None:
            return
        own = read_by_teacher(batch, self.main)
        for (read, pools), name in zip(self.wanted.reads.items(), field_names(self.wanted), strict=True):
            blocks, x = self.wanted.blocks(read), seen[read]
            axis = self.axis_of(read, own)
            mask = self.positions(read).keep(own) if axis == "frames" else inside_layout.mask_of(axis, own)
            kept = KeptRead(name, read.what, read.layer, blocks.path, pools, axis, int(x.shape[-1]))
            yield kept, inside_layout.cut_hidden(x, mask, pools, batch_size(batch))

    def axis_of(self, read: Read, own: Mapping[str, Any]) -> str:
        assert self.wanted is not None
        of_decoder = self.wanted.blocks(read).of_decoder
        return inside_layout.axis_of_hidden(own, self.positions(read), kind=self.task.kind, of_decoder=of_decoder)

    def positions(self, read: Read) -> Positions:
        """Of the teacher, whose hidden states they are."""
        assert self.wanted is not None
        return Positions(self.asked.model, self.task, of_decoder=self.wanted.blocks(read).of_decoder)

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
