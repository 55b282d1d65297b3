"""What a task knows: where the predictions are, which rows count, what is labelled. No losses here.

Axes: b batch, t time, v columns, n rows; r rows an example, the same number for each, so n = b · r.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from hf_distill.errors import DataError
from hf_distill.vocabulary import Columns

Batch = Mapping[str, Any]
IGNORED = -100
TEACHER_PREFIX = "teacher_"
MAIN_INPUTS = ("input_ids", "input_values", "input_features", "pixel_values", "inputs_embeds")


class Task:
    """One family of heads. A subclass says where its rows are; what follows from that stands here.

    Attributes:
        kind: the name in `TASKS`.
        matched_by: what the columns of student and teacher are paired by: label names, vocabulary,
            positions in the input, or the mere width.
        on_values: rows are values (regression, embeddings) rather than logits.
        needs_same_inputs: rows are positions of the input, so both models must read the same one.
        label_names: the columns that hold the labels.
        sums_over_examples: the head's own loss is a sum over examples, not a mean (CTC "sum").
        over_vocabulary: rows are predicted tokens, made by an output head from hidden states of the same positions,
            and the head's own loss is the cross-entropy of `targets`.
    """

    kind: ClassVar[str]
    matched_by: ClassVar[Literal["labels", "vocabulary", "positions", "width"]]
    on_values: ClassVar[bool] = False
    needs_same_inputs: ClassVar[bool] = True
    label_names: ClassVar[tuple[str, ...]] = ("labels",)
    sums_over_examples: bool = False
    over_vocabulary: ClassVar[bool] = False

    @classmethod
    def from_model(cls, model: Any) -> Task:
        """The task of this student, with what must be known of it."""
        return cls()

    # What a subclass says of its rows.

    def read(self, outputs: Any, batch: Batch, columns: Columns, *, teacher: bool) -> Tensor:
        """The predictions in a model's output, leading axes first, with the shared columns last."""
        return pick(output_named("logits", outputs), columns, teacher=teacher)

    def select(self, x: Tensor, batch: Batch) -> Tensor:
        """`[b t *]` → `[n *]`: the rows that are predictions. Touches leading axes only."""
        return x

    def keep(self, batch: Batch) -> Tensor | None:
        """`[n]` bool: which rows count, from the batch alone; None: all of them."""
        return None

    def rows(self, batch: Batch) -> int:
        """n, from the batch alone."""
        return batch_size(batch)

    def label_count(self, batch: Batch) -> Tensor:
        """Scalar: over how many labels the head's own loss is a mean."""
        return (batch["labels"] != IGNORED).sum()

    def targets(self, batch: Batch) -> Tensor | None:
        """`[n]` the label of each row, -100 where unknown; None: no such thing here."""
        return None

    def learn_from(self, teacher_config: Any) -> None:
        """What a teacher's config tells of the task that the student's does not."""

    def check_labels(self, batch: Batch) -> None:
        """Raise `DataError` for labels that this head cannot take (called once an optimizer step)."""

    def label_fault(self, batch: Batch) -> str | None:
        """Why the head's own loss of these labels cannot be finite; None if the labels are not the cause."""
        return None

    def counted(self, batch: Batch) -> dict[str, Tensor]:
        """Scalar counts of labelled examples, to be logged as their sum since the last log."""
        return {}

    def as_outputs(self, x: Tensor, columns: Columns, width: int) -> tuple[Tensor, ...] | None:
        """The outputs of a student that predicts `x`, as `read` reads it; None if they cannot be told from it.

        Args:
            x: predictions over the shared columns. width: the student's columns.
        """
        return (columns.as_student(x, width),)

    def prepare(self, batch: dict[str, Any], student: Any) -> dict[str, Any]:
        """The batch with what both models must be given alike (decoder inputs)."""
        return batch

    def can_compare(self, batch: Batch) -> bool:
        """Whether a batch without labels shows where the rows are (it need not, for a decoder)."""
        return True

    # What follows.

    def count(self, batch: Batch) -> Tensor:
        """Scalar: how many rows count."""
        keep = self.keep(batch)
        if keep is None:
            return torch.tensor(self.rows(batch), device=first_tensor(batch).device)
        return keep.sum()

    def has_labels(self, batch: Batch) -> bool:
        return all(batch.get(name) is not None for name in self.label_names)

    def require_labels(self, columns: Any) -> None:
        """Raise `DataError` where these columns hold no labels."""
        if self.has_labels(columns):
            return
        raise DataError(
            f"alpha < 1 weighs labels, but there is no {' and '.join(self.label_names)} in {sorted(columns)}. Give the "
            "dataset labels, or pass alpha=1 to learn from the teacher alone."
        )

    def without_labels(self, batch: Batch) -> dict[str, Any]:
        return {name: value for name, value in batch.items() if name not in self.label_names}

    def kept_rows(self, batch: Batch) -> Tensor | None:
        """Indices `[m]` into the n rows of those that count; None: all of them."""
        keep = self.keep(batch)
        return None if keep is None else keep.nonzero().squeeze(-1)


class PositionTask(Task):
    """A row a position `[b t v]`; a subclass says by `keep` which positions count."""

    def select(self, x: Tensor, batch: Batch) -> Tensor:
        return x.flatten(0, 1)

    def rows(self, batch: Batch) -> int:
        keep = self.keep(batch)
        assert keep is not None  # every subclass says so
        return keep.numel()


def labels_of_rows(batch: Batch) -> Tensor | None:
    """`[n]` the labels, where each row has one; None without labels."""
    return None if batch.get("labels") is None else batch["labels"].flatten()


def pick(x: Tensor, columns: Columns, *, teacher: bool) -> Tensor:
    return columns.of_teacher(x) if teacher else columns.of_student(x)


def output_named(name: str, outputs: Any) -> Tensor:
    """A model's output by name.

    Raises:
        DataError: the model gave a tuple, or withheld it (fused losses that skip the logits).
    """
    found = outputs.get(name) if isinstance(outputs, Mapping) else None
    if found is None:
        given = f"only {sorted(outputs)}" if isinstance(outputs, Mapping) else f"a {type(outputs).__name__}"
        raise DataError(
            f"the model's output has no {name}: it gave {given}. Set return_dict=True, and leave out fused losses "
            "that skip the logits (use_liger_kernel)."
        )
    return found


def first_tensor(batch: Batch) -> Tensor:
    """A tensor with an entry an example: the main input where its name is known, else any."""
    for name in (*MAIN_INPUTS, *batch):
        value = batch.get(name)
        if isinstance(value, Tensor) and value.dim() > 0 and not name.startswith(TEACHER_PREFIX):
            return value
    raise DataError(f"the batch holds no tensor, only {sorted(batch)}. Check the data collator.")


def batch_size(batch: Batch) -> int:
    return first_tensor(batch).shape[0]


def attended(batch: Batch, mask: str, like: tuple[str, ...]) -> Tensor:
    """The named attention mask `[b t]` as bool; all True over the first of `like` that is present."""
    if batch.get(mask) is not None:
        return batch[mask].bool()
    for name in like:
        if batch.get(name) is not None:
            return torch.ones(batch[name].shape[:2], dtype=torch.bool, device=batch[name].device)
    raise DataError(
        f"which positions count cannot be told: the batch has neither labels nor {mask} nor {' nor '.join(like)}, "
        f"only {sorted(batch)}."
    )
