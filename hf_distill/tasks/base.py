"""Task: all that is known of a kind of head. Where predictions are, which rows count, what is labelled; no losses.

Axes: b batch, t time, v columns, n rows; r rows an example, the same number for each, so n = b · r.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from hf_distill.errors import DataError, SettingError
from hf_distill.vocabulary import HeadAlignment, has_default_names, label_ids

Batch = Mapping[str, Any]
IGNORED = -100
TEACHER_PREFIX = "teacher_"
OWN_TASK = (
    "Where a model predicts something else, such as a row a pixel, a query or a box, pass task= an object of your own "
    "class derived from hf_distill.tasks.Task: read() returns the predictions with their columns on the last axis, "
    "select() flattens all other axes to rows, rows() counts them from the batch. docs/heads.md has such a class for "
    "segmentation."
)
MAIN_INPUTS = ("input_ids", "input_values", "input_features", "pixel_values", "inputs_embeds")


class Task:
    """One kind of head. A subclass says where its rows are; the rest follows from that.

    Attributes:
        kind: the name in `TASKS`.
        matched_by: how the columns of student and teacher are aligned: by label names, vocabulary, positions in the
            input, or width alone.
        on_values: whether rows are values (regression, embeddings) rather than logits.
        needs_same_inputs: whether rows are positions of the input, so that both models must read the same one.
        label_names: the columns that hold the labels.
        sums_over_examples: whether the head's own loss is a sum over examples, not a mean (CTC "sum").
        over_vocabulary: whether rows are predicted tokens, computed by an output head from hidden states of the same
            positions,
            and the head's own loss is the cross-entropy of `targets`.
        axis: what the rows of an example run along; None if that is not known, and then nothing can be cached.
        has_classes: whether a row is a distribution over few classes.
        has_exits: whether a head like this can be put on an earlier block (`ExitMatch`).
        reads_whole_input: whether there is one row for the whole input, so that padding may be read.
        has_decoder: whether the model reads decoder inputs that are made of the labels.
        generates: whether the model writes text.
        reads_label_column: whether the labels are one column that `LabelReader` reads as the student numbers them.
        allows_unlabelled: whether examples without labels are read as such where labels weigh nothing.
        auto_classes: the Auto classes of transformers that load such a head.
        padding_collator: the collator that pads the labels too, for messages.
        shifts_labels: whether the head predicts the next position's label.
        is_known: whether it is known where the predictions are; False for `UnknownTask` alone.
        inferred: whether the library made it, from the student's class or by name; then a teacher's class must be of
            its kind. A Task of the user's own may read any class of model.
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
    _label_names: Mapping[str, int] | None = None  # the teacher's, or else the dataset's, where they have names

    @classmethod
    def from_model(cls, model: Any) -> Task:
        """Return the task of this student."""
        return cls()

    def __str__(self) -> str:
        return self.kind

    def __repr__(self) -> str:
        return f"{type(self).__name__}()"

    # Facts of a head that follow from a model or an output.

    def settings(self) -> dict[str, Any]:
        """Return the settings that change what a model predicts, for caches."""
        return {}

    def check_heads(self, student: Any, teacher: Any) -> None:
        """Check that two heads whose columns are aligned mean the same by them.

        Raises:
            TeacherError: if they do not.
        """

    def raw_output(self, outputs: Any, batch: Batch) -> Tensor:
        """Return a model's own predictions `[b v]` or `[b t v]`, before columns are aligned."""
        logits = output_named("logits", outputs)
        return logits[:, None] if logits.dim() == 1 else logits

    def outputs_of_raw(self, raw: Tensor) -> dict[str, Tensor]:
        """Return the outputs that `read` takes, from what `raw_output` returned."""
        return {"logits": raw}

    def raw_of_predictions(self, predictions: Tensor) -> Tensor:
        """Return what `raw_output` would return, from what `read` returned."""
        return predictions

    # The rows, which a subclass describes.

    def read(self, outputs: Any, batch: Batch, columns: HeadAlignment, *, teacher: bool) -> Tensor:
        """Return the predictions in a model's output, leading axes first, the compared columns last."""
        return pick(output_named("logits", outputs), columns, teacher=teacher)

    def select(self, x: Tensor, batch: Batch) -> Tensor:
        """Return the rows that are predictions, `[b t *]` → `[n *]`. Only leading axes may change."""
        return x

    def keep(self, batch: Batch) -> Tensor | None:
        """Return which rows count, `[n]` bool, from the batch alone; None means all."""
        return None

    def rows(self, batch: Batch) -> int:
        """Return n, the number of rows, from the batch alone."""
        return batch_size(batch)

    def rows_are_distributions(self, batch: Batch) -> bool:
        """Return whether a softmax over the columns of a model's output gives a distribution for each row."""
        return not self.on_values

    def label_count(self, batch: Batch) -> Tensor:
        """Return the number of labels that the head's own loss is a mean over, a scalar."""
        return (batch["labels"] != IGNORED).sum()

    def targets(self, batch: Batch) -> Tensor | None:
        """Return the label of each row `[n]`, -100 if unknown; None if rows have no labels."""
        return None

    def learn_from(self, teacher_config: Any) -> None:
        """Take what the teacher's config says of the task and the student's does not."""
        if self.matched_by == "labels" and getattr(teacher_config, "id2label", None):
            names = label_ids(teacher_config)
            self._label_names = None if has_default_names(names) else names

    def learn_names(self, names: Sequence[str] | None) -> None:
        """Take the dataset's names of the labels, in the order of the classes; a teacher's names take precedence."""
        if names is not None and self._label_names is None:
            self._label_names = {name: number for number, name in enumerate(names)}

    def write_to(self, config: Any, batch: Batch) -> None:
        """Write into the student's config what it is trained as, if the config does not say it yet.

        Args:
            config: the student's.
            batch: one of the training.
        """
        if self.matched_by == "labels" and getattr(config, "id2label", None):
            name_labels(config, self._label_names or {})

    def check_labels(self, batch: Batch) -> None:
        """Check the labels of a batch, once an optimizer step.

        Raises:
            DataError: if this head cannot take them.
        """

    def has_probabilities(self, batch: Batch) -> bool:
        """Return whether the labels are a probability for each class, for which no head of transformers has a loss."""
        return False

    def label_fault(self, batch: Batch) -> str | None:
        """Return why the head's own loss of these labels cannot be finite; None if the labels are not the cause."""
        return None

    def counted(self, batch: Batch) -> dict[str, Tensor]:
        """Return scalar counts of labelled examples by name; their sums since the last log are logged."""
        return {}

    def as_outputs(self, x: Tensor, columns: HeadAlignment, width: int) -> tuple[Tensor, ...] | None:
        """Return the outputs of a student that predicts `x`; None if they cannot be derived from it.

        Args:
            x: predictions over the shared columns.
            width: the student's columns.
        """
        return (columns.as_student(x, width),)

    def prepare(self, batch: dict[str, Any], student: Any) -> dict[str, Any]:
        """Return the batch with the inputs that both models must share (decoder inputs)."""
        return batch

    def can_compare(self, batch: Batch) -> bool:
        """Return whether a batch without labels shows where the rows are (for a decoder it may not)."""
        return True

    # What follows from these.

    def count(self, batch: Batch) -> Tensor:
        """Return the number of rows that count, a scalar."""
        keep = self.keep(batch)
        if keep is None:
            return torch.tensor(self.rows(batch), device=first_tensor(batch).device)
        return keep.sum()

    def has_labels(self, batch: Batch) -> bool:
        return all(batch.get(name) is not None for name in self.label_names)

    def require_labels(self, columns: Any) -> None:
        """Check that these columns hold labels.

        Raises:
            DataError: if they do not.
        """
        if self.has_labels(columns):
            return
        raise DataError(
            f"alpha < 1 weighs labels, but there is no {' and '.join(self.label_names)} in {sorted(columns)}. Give the "
            "dataset labels, or pass alpha=1 to learn from the teacher alone."
        )

    def without_labels(self, batch: Batch) -> dict[str, Any]:
        return {name: value for name, value in batch.items() if name not in self.label_names}

    def kept_rows(self, batch: Batch) -> Tensor | None:
        """Return the indices `[m]` of the rows that count; None means all."""
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


def name_labels(config: Any, names: Mapping[str, int]) -> None:
    """Give the classes of a config names if they have none: these, or those of its other table.

    LABEL_0, LABEL_1, … in another order count as names, because heads were aligned by them.

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
    if has_default_names({name: int(index) for index, name in config.id2label.items()}):
        config.id2label = {index: name for name, index in ids.items()}
    if has_default_names({name: int(index) for name, index in config.label2id.items()}):
        config.label2id = dict(ids)


def labels_of_rows(batch: Batch) -> Tensor | None:
    """Return the labels `[n]` of a task with one label a row; None without labels."""
    return None if batch.get("labels") is None else batch["labels"].flatten()


def pick(x: Tensor, columns: HeadAlignment, *, teacher: bool) -> Tensor:
    """Return the compared columns of a model's predictions."""
    if (columns.teacher if teacher else columns.student) is None:
        return x
    return columns.of_teacher(x) if teacher else columns.of_student(x)


def require_axes(x: Tensor, axes: tuple[str, ...], *, what: str, teacher: bool, hint: str = "") -> None:
    """Check that a model's output has the axes that the task reads.

    Args:
        x: the output.
        axes: what each axis is, for the message.
        what: the name of the output.
        teacher: whose output it is.
        hint: what else the message says of the axes that came.
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
        predictions: what `task.read` returned, or numbers with the same leading axes.
        task: the task.
        batch: the batch that they were predicted from.
        whose: "student" or "teacher", for the message.
        columns: whether a row has columns.

    Raises:
        SettingError: if the selected rows have other axes: the last one would be taken for the columns.
    """
    rows = task.select(predictions, batch)
    if rows.dim() == 1 + columns:
        return rows
    shape, last = list(rows.shape), rows.dim() - 1
    if rows.dim() > 2:
        between = " and ".join(f"axis {axis} ({shape[axis]} long)" for axis in range(1, last))
        wrong = f"axis {last} ({shape[last]} long) would be taken for the columns, and {between} would be left over"
    else:
        wrong = "an axis is missing"
    raise SettingError(
        f"a task selects rows [rows, columns], one distribution a row. The {task} task ({type(task).__name__}) "
        f"selected {shape} of the {whose}'s predictions {list(predictions.shape)}: {wrong}. {OWN_TASK}"
    )


class MissingOutputError(DataError):
    """A model's output lacks what a task reads. `reading_outputs_of` adds the model's class to the message."""


def output_named(name: str, outputs: Any) -> Tensor:
    """Return a model's output by name.

    Raises:
        MissingOutputError: if it is not there; the message names the likely cause.
    """
    found = outputs.get(name) if isinstance(outputs, Mapping) else None
    if found is not None:
        return found
    kind = type(outputs).__name__
    if not isinstance(outputs, Mapping):
        way_out = (
            "Set return_dict=True." if isinstance(outputs, tuple) else 'Wrap it, so that it returns {"logits": ...}.'
        )
        raise MissingOutputError(f"its forward returned a {kind}, which names nothing, and {name} is read. {way_out}")
    held = ", ".join(sorted(outputs)) or "nothing"
    if hasattr(outputs, name):  # a field of this class of outputs
        fused = " A fused loss skips the logits: leave out use_liger_kernel." if name == "logits" else ""
        raise MissingOutputError(f"its output ({kind}) has {name} left out this time, and holds {held}.{fused}")
    raise MissingOutputError(
        f"its output ({kind}) holds {held}, and no {name}, which this task reads. If one of these is what should be "
        "compared, pass task= an object of your own class derived from hf_distill.tasks.Task, whose read() returns it."
    )


@contextlib.contextmanager
def reading_outputs_of(model: Any, whose: str) -> Iterator[None]:
    """Report an output that a task's `read` does not find together with the model's class.

    Raises:
        DataError: if the output lacks what the task reads.
    """
    try:
        yield
    except MissingOutputError as error:
        raise DataError(f"the {whose} ({type(model).__name__}): {error}") from error


def first_tensor(batch: Batch) -> Tensor:
    """Return a tensor with one entry an example: the main input if its name is known, else any."""
    for name in (*MAIN_INPUTS, *batch):
        value = batch.get(name)
        if isinstance(value, Tensor) and value.dim() > 0 and not name.startswith(TEACHER_PREFIX):
            return value
    raise DataError(f"the batch holds no tensor, only {sorted(batch)}. Check the data collator.")


def own_copies(inputs: Batch, labels: Sequence[str] = ()) -> dict[str, Any]:
    """Return the inputs of one model, with copies of whatever it may write into.

    Features are copied (Whisper's SpecAugment writes into them) and labels (some heads for question answering do).
    Token ids and masks are not.

    Args:
        inputs: of the model.
        labels: the names of the labels.
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
