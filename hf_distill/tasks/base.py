"""Task: the facts of one kind of head: where predictions are, which rows count, which labels it has; no losses.

Axes: b batch, t time, v columns, n rows; each example has r rows, so n = b · r.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar, Literal, TypeAlias

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from hf_distill._types import Batch as Batch
from hf_distill._types import Keywords
from hf_distill.errors import DataError, SettingError
from hf_distill.vocabulary import HeadAlignment, has_default_names, label_ids

Outputs: TypeAlias = Mapping[str, Any]
"""A model's outputs by name, as `ModelOutput` is."""

IGNORED = -100
TEACHER_PREFIX = "teacher_"
OWN_TASK = (
    "If a model predicts something else, such as a row for each pixel, query or box, pass task= an object of your own "
    "subclass of hf_distill.tasks.Task: read() returns the predictions with their columns on the last axis, select() "
    "flattens all other axes to rows, rows() counts them from the batch. docs/heads.md has such a class for "
    "segmentation."
)
MAIN_INPUTS = ("input_ids", "input_values", "input_features", "pixel_values", "inputs_embeds")


class Task:
    """One kind of head. A subclass says where its rows are; the rest follows from that.

    Attributes:
        kind: name in `TASKS`.
        matched_by: how the columns of student and teacher are aligned: by label names, vocabulary, positions in the
            input, or width alone.
        on_values: whether rows are values (regression, embeddings) rather than logits.
        needs_same_inputs: whether rows are positions of the input, so that both models must read the same input.
        label_names: columns that hold the labels.
        sums_over_examples: whether the head's own loss is a sum over examples, not a mean (CTC "sum").
        over_vocabulary: whether rows are predicted tokens, computed by an output head from hidden states of the same
            positions, with the cross-entropy of `targets` as the head's own loss.
        axis: axis of an example along which its rows lie; if None, nothing can be cached.
        has_classes: whether a row is a distribution over few classes.
        has_exits: whether such a head can be put on an earlier block (`ExitMatch`).
        reads_whole_input: whether there is one row for the whole input, so that padding may be read.
        has_decoder: whether the model reads decoder inputs, which are made from the labels.
        generates: whether the model generates text.
        reads_label_column: whether `LabelReader` converts the labels, which are one column.
        allows_unlabelled: whether examples may lack labels if the labels have no weight.
        auto_classes: Auto classes of transformers that load such a head.
        padding_collator: collator that also pads the labels, for messages.
        shifts_labels: whether the head predicts the next position's label.
        is_known: whether it is known where the predictions are; False only for `UnknownTask`.
        inferred: whether the library made the task, from the student's class or a name; then the teacher's class must
            be of its kind. The user's own task accepts any class of model.
    """

    kind: ClassVar[str]
    matched_by: ClassVar[Literal["labels", "vocabulary", "positions", "width"]]
    on_values: ClassVar[bool] = False
    needs_same_inputs: ClassVar[bool] = True
    label_names: ClassVar[tuple[str, ...]] = ("labels",)
    sums_over_examples: bool = False
    over_vocabulary: ClassVar[bool] = False
    axis: ClassVar[Literal["example", "input", "decoder", "frames"] | None] = None
    has_classes: ClassVar[bool] = False
    has_exits: ClassVar[bool] = False
    reads_whole_input: ClassVar[bool] = False
    has_decoder: ClassVar[bool] = False
    generates: ClassVar[bool] = False
    reads_label_column: ClassVar[bool] = False
    allows_unlabelled: ClassVar[bool] = False
    auto_classes: ClassVar[tuple[str, ...]] = ()
    padding_collator: ClassVar[str | None] = None
    shifts_labels: ClassVar[bool] = False
    is_known: ClassVar[bool] = True
    inferred: bool = False
    _label_names: Mapping[str, int] | None = None  # the teacher's, or else the dataset's

    @classmethod
    def from_model(cls, model: PreTrainedModel) -> Task:
        """Return the task of this student."""
        return cls()

    def __str__(self) -> str:
        return self.kind

    def __repr__(self) -> str:
        return f"{type(self).__name__}()"

    # Facts of a head that follow from a model or an output.

    def settings(self) -> Keywords:
        """Return the settings that change the predictions, for caches."""
        return {}

    def check_heads(self, student: PreTrainedModel, teacher: PreTrainedModel) -> None:
        """Raise `TeacherError` if the aligned columns of two heads have different meanings."""

    def raw_output(self, outputs: Outputs, batch: Batch) -> Tensor:
        """Return a model's own predictions `[b v]` or `[b t v]`, before alignment of columns."""
        logits = output_named("logits", outputs)
        return logits[:, None] if logits.dim() == 1 else logits

    def outputs_of_raw(self, raw: Tensor) -> dict[str, Tensor]:
        """Return outputs for `read`, from the result of `raw_output`."""
        return {"logits": raw}

    def raw_of_predictions(self, predictions: Tensor) -> Tensor:
        """Return the result of `raw_output`, from that of `read`."""
        return predictions

    # The rows, described by a subclass.

    def read(self, outputs: Outputs, batch: Batch, columns: HeadAlignment, *, teacher: bool) -> Tensor:
        """Return the predictions in a model's output, leading axes first, the compared columns last."""
        return pick(output_named("logits", outputs), columns, teacher=teacher)

    def select(self, x: Tensor, batch: Batch) -> Tensor:
        """Return the rows that are predictions, `[b t *]` → `[n *]`; only leading axes may change."""
        return x

    def keep(self, batch: Batch) -> Tensor | None:
        """Return the rows that count, `[n]` bool, from the batch alone, or None for all."""
        return None

    def rows(self, batch: Batch) -> int:
        """Return n, the number of rows, from the batch alone."""
        return batch_size(batch)

    def rows_are_distributions(self, batch: Batch) -> bool:
        """Return whether a softmax over a model's output columns gives a distribution for each row."""
        return not self.on_values

    def label_count(self, batch: Batch) -> Tensor:
        """Return the number of labels in the mean of the head's own loss, a scalar."""
        return (batch["labels"] != IGNORED).sum()

    def targets(self, batch: Batch) -> Tensor | None:
        """Return the label of each row `[n]`, -100 if unknown, or None if rows have no labels."""
        return None

    def learn_from(self, teacher_config: PreTrainedConfig | None) -> None:
        """Store the teacher's facts of the task that the student's config may lack."""
        if self.matched_by == "labels" and getattr(teacher_config, "id2label", None):
            names = label_ids(teacher_config)
            self._label_names = None if has_default_names(names) else names

    def learn_names(self, names: Sequence[str] | None) -> None:
        """Store the dataset's label names, in the order of the classes; a teacher's names take precedence."""
        if names is not None and self._label_names is None:
            self._label_names = {name: number for number, name in enumerate(names)}

    def write_to(self, config: PreTrainedConfig, batch: Batch) -> None:
        """Complete the student's config with label names and the like, from a training batch."""
        if self.matched_by == "labels" and getattr(config, "id2label", None):
            name_labels(config, self._label_names or {})

    def check_labels(self, batch: Batch) -> None:
        """Raise `DataError` if this head cannot take the labels of a batch. Called once an optimizer step."""

    def has_probabilities(self, batch: Batch) -> bool:
        """Return whether the labels are class probabilities, for which no head of transformers has a loss."""
        return False

    def label_fault(self, batch: Batch) -> str | None:
        """Return why these labels make the head's own loss infinite, or None if they do not."""
        return None

    def counted(self, batch: Batch) -> dict[str, Tensor]:
        """Return scalar counts of labelled examples by name, whose sums are logged."""
        return {}

    def as_outputs(self, x: Tensor, columns: HeadAlignment, width: int) -> tuple[Tensor, ...] | None:
        """Return the outputs of a student with the predictions `x`, or None if they cannot be derived.

        Args:
            x: predictions over the compared columns.
            columns: alignment of the two heads.
            width: number of the student's columns.
        """
        return (columns.as_student(x, width),)

    def prepare(self, batch: Keywords, student: PreTrainedModel) -> Keywords:
        """Return the batch with added inputs that both models share (decoder inputs)."""
        return batch

    def can_compare(self, batch: Batch) -> bool:
        """Return whether the rows of a batch are known without labels (not so for a decoder without inputs)."""
        return True

    # Derived from these.

    def count(self, batch: Batch) -> Tensor:
        """Return the number of rows that count, a scalar."""
        keep = self.keep(batch)
        if keep is None:
            return torch.tensor(self.rows(batch), device=first_tensor(batch).device)
        return keep.sum()

    def has_labels(self, batch: Batch) -> bool:
        return all(batch.get(name) is not None for name in self.label_names)

    def require_labels(self, columns: Batch) -> None:
        """Raise `DataError` if these columns hold no labels."""
        if self.has_labels(columns):
            return
        raise DataError(
            f"alpha < 1 weighs labels, but there is no {' and '.join(self.label_names)} in {sorted(columns)}. Give the "
            "dataset labels, or pass alpha=1 to learn from the teacher alone."
        )

    def without_labels(self, batch: Batch) -> Keywords:
        return {name: value for name, value in batch.items() if name not in self.label_names}

    def kept_rows(self, batch: Batch) -> Tensor | None:
        """Return the indices `[m]` of the rows that count, or None for all."""
        keep = self.keep(batch)
        return None if keep is None else keep.nonzero().squeeze(-1)


class PositionTask(Task):
    """One row for each position `[b t v]`; `keep` of a subclass says which positions count."""

    def select(self, x: Tensor, batch: Batch) -> Tensor:
        return x.flatten(0, 1)

    def rows(self, batch: Batch) -> int:
        keep = self.keep(batch)
        assert keep is not None  # every subclass says so
        return keep.numel()


def name_labels(config: PreTrainedConfig, names: Mapping[str, int]) -> None:
    """Name the classes of a config if they have no names: with these, or with those of the other of its two tables.

    LABEL_0, LABEL_1, … in another order count as names, because heads are aligned by them.

    >>> from transformers import BertConfig
    >>> config = BertConfig(num_labels=2)
    >>> name_labels(config, {"no": 0, "yes": 1})
    >>> config.id2label
    {0: 'no', 1: 'yes'}
    """
    ids = label_ids(config)
    if has_default_names(ids) and len(names) == len(ids) and set(names) != set(ids):
        ids = {name: names[name] for name in sorted(names, key=lambda name: names[name])}
    if has_default_names(ids):
        return
    if has_default_names({name: int(index) for index, name in (config.id2label or {}).items()}):
        config.id2label = {index: name for name, index in ids.items()}
    if has_default_names({name: int(index) for name, index in (config.label2id or {}).items()}):
        config.label2id = dict(ids)


def labels_of_rows(batch: Batch) -> Tensor | None:
    """Return the labels `[n]` of a task with one label a row, or None without labels."""
    return None if batch.get("labels") is None else batch["labels"].flatten()


def pick(x: Tensor, columns: HeadAlignment, *, teacher: bool) -> Tensor:
    """Return the compared columns of a model's predictions."""
    if (columns.teacher if teacher else columns.student) is None:
        return x
    return columns.of_teacher(x) if teacher else columns.of_student(x)


def require_axes(x: Tensor, axes: tuple[str, ...], *, what: str, teacher: bool, hint: str = "") -> None:
    """Raise `SettingError` if a model's output does not have the axes that the task reads.

    Args:
        x: the output.
        axes: names of the expected axes.
        what: name of the output.
        teacher: whether it is the teacher's output.
        hint: sentence about the axes of `x` for the message.
    """
    if x.dim() == len(axes):
        return
    whose = "teacher" if teacher else "student"
    raise SettingError(
        f"the {whose}'s {what} are {list(x.shape)}, this task reads [{', '.join(axes)}]. {hint}{OWN_TASK}"
    )


def rows_of(predictions: Tensor, task: Task, batch: Batch, *, whose: str, columns: bool = True) -> Tensor:
    """Return the rows that a task selects from predictions: `[n v]`, or `[n]` for numbers without columns.

    Args:
        predictions: the result of `task.read`, or numbers with the same leading axes.
        task: the task.
        batch: the batch of these predictions.
        whose: "student" or "teacher", for the message.
        columns: whether a row has columns.

    Raises:
        SettingError: if the selected rows have other axes.
    """
    rows = task.select(predictions, batch)
    if rows.dim() == 1 + columns:
        return rows
    shape, last = list(rows.shape), rows.dim() - 1
    wrong = "an axis is missing"
    if rows.dim() > 2:
        between = " and ".join(f"axis {axis} ({shape[axis]} long)" for axis in range(1, last))
        wrong = f"axis {last} ({shape[last]} long) would be taken for the columns, and {between} would be left over"
    raise SettingError(
        f"a task selects rows [rows, columns], one distribution a row. The {task} task ({type(task).__name__}) "
        f"selected {shape} of the {whose}'s predictions {list(predictions.shape)}: {wrong}. {OWN_TASK}"
    )


class MissingOutputError(DataError):
    """A model's output lacks a value that a task reads. `reading_outputs_of` adds the model's class to the message."""


def output_named(name: str, outputs: object) -> Tensor:
    """Return a model's output by name.

    Raises:
        MissingOutputError: if it is missing; the message gives the likely cause.
    """
    kind = type(outputs).__name__
    if not isinstance(outputs, Mapping):
        advice = "Set return_dict=True." if isinstance(outputs, tuple) else 'Wrap it to return {"logits": ...}.'
        raise MissingOutputError(f"its forward returned a {kind}, which has no names, and {name} is read. {advice}")
    found = outputs.get(name)
    if found is not None:
        return found
    present = ", ".join(sorted(outputs)) or "nothing"
    if hasattr(outputs, name):  # a field of this class of outputs
        fused = " A fused loss skips the logits: leave out use_liger_kernel." if name == "logits" else ""
        raise MissingOutputError(f"its output ({kind}) holds {present}, and its field {name} is empty.{fused}")
    raise MissingOutputError(
        f"its output ({kind}) holds {present}, and no {name}, which this task reads. To compare another output, pass "
        "task= an object of your own subclass of hf_distill.tasks.Task, whose read() returns it."
    )


@contextlib.contextmanager
def reading_outputs_of(model: object, whose: str) -> Iterator[None]:
    """Add the model's class to the error if a task finds an output missing.

    Raises:
        DataError: if the output lacks what the task reads.
    """
    try:
        yield
    except MissingOutputError as error:
        raise DataError(f"the {whose} ({type(model).__name__}): {error}") from error


def first_tensor(batch: Batch) -> Tensor:
    """Return a tensor with one entry an example: the main input if its name is known, else any other."""
    for name in (*MAIN_INPUTS, *batch):
        value = batch.get(name)
        if isinstance(value, Tensor) and value.dim() > 0 and not name.startswith(TEACHER_PREFIX):
            return value
    raise DataError(f"the batch holds no tensor, only {sorted(batch)}. Check the data collator.")


def own_copies(inputs: Batch, labels: Sequence[str] = ()) -> Keywords:
    """Return the inputs of one model, with copies of those that it may write into.

    These are features (Whisper's SpecAugment writes into them) and labels (some heads for question answering do), but
    not token ids and masks.

    Args:
        inputs: inputs of the model.
        labels: names of the labels.
    """
    copies = dict(inputs)
    for name, value in inputs.items():
        is_feature = isinstance(value, Tensor) and value.is_floating_point() and not name.endswith("mask")
        if is_feature or (name in labels and isinstance(value, Tensor)):
            copies[name] = value.clone()
    return copies


def batch_size(batch: Batch) -> int:
    return first_tensor(batch).shape[0]


def attended(batch: Batch, mask: str, like: tuple[str, ...]) -> Tensor:
    """Return the named attention mask `[b t]` as bool, or all True in the shape of the first of `like` in the batch."""
    if batch.get(mask) is not None:
        return batch[mask].bool()
    for name in like:
        if batch.get(name) is not None:
            return torch.ones(batch[name].shape[:2], dtype=torch.bool, device=batch[name].device)
    raise DataError(
        f"the positions that count are unknown: the batch has neither labels nor {mask} nor {' nor '.join(like)}, only "
        f"{sorted(batch)}."
    )
