"""Columns of a dataset: which of them a model reads, which holds the labels, and which are not padded."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.compute as pc
from torch import nn
from transformers import DataCollatorWithPadding, PreTrainedConfig, default_data_collator

from hf_distill._compat import arrow_blocks
from hf_distill._types import Collator, Data
from hf_distill.errors import DataError
from hf_distill.tasks.base import TEACHER_PREFIX, Task
from hf_distill.tasks.infer import forward_names, main_input_of, unwrapped
from hf_distill.vocabulary import has_default_names, label_ids

LABEL_COLUMNS = ("labels", "label", "label_ids")  # the names that transformers' collators take for labels
_OWN_WORDS = (
    "{column!r} holds words, and the data_collator, which is your own, failed on them. Convert them in it, or before: "
    "dataset.map(lambda row: {{{column!r}: model.config.label2id[row[{column!r}]]}})."
)
_SAMPLED_ROWS = 100_000  # for guessing which column holds the labels


def columns_of(data: Data | None) -> list[str] | None:
    """Return the columns of a dataset, or of the examples in a list; None if they are unknown before iteration."""
    if isinstance(data, (list, tuple)):
        columns: dict[str, None] = {}
        for row in data:
            if type(row) is not dict and not isinstance(row, Mapping):  # the first test alone is quick
                return None
            if not row.keys() <= columns.keys():
                columns |= dict.fromkeys(row)
        return list(columns)
    names = None if is_transformed(data) else getattr(data, "column_names", None)
    return list(names) if isinstance(names, (list, tuple)) else None


def is_transformed(data: Data | None) -> bool:
    """Return whether `set_transform` makes the examples of a dataset, which then differ from its table."""
    return isinstance(data, datasets.Dataset) and data.format["type"] == "custom"


def label_column(columns: Iterable[str] | None, own: str | None = None) -> str | None:
    """Return the column of labels: `own`, the student's name for them, or else a name that transformers knows."""
    there = set(columns or ())
    return next((name for name in (own, *LABEL_COLUMNS) if name in there), None)


def class_names(data: Data, column: str | None) -> list[str] | None:
    """Return the names of a column of `ClassLabel`s or of lists of them; None for other columns."""
    feature = (getattr(data, "features", None) or {}).get(column)
    feature = getattr(feature, "feature", feature)
    return list(feature.names) if isinstance(feature, datasets.ClassLabel) else None


def check_processed(
    data: Data, model: nn.Module, *, whose: str, collator: Collator | None = None, drops_columns: bool = True
) -> None:
    """Raise if no column of a dataset is an input of the model, usually because its text was not tokenized.

    Args:
        data: the dataset.
        model: the model that reads it.
        whose: name of the dataset in the message.
        collator: the user's own, which may make inputs from any column that reaches it.
        drops_columns: whether columns that the model does not read are removed before collation.

    Raises:
        DataError: if the columns are known and none is an input.
    """
    columns, inputs = columns_of(data), set(forward_names(model)) - {"labels"}
    if not columns or not inputs or inputs & set(columns) or (collator is not None and not drops_columns):
        return
    raw = [name for name in columns if name not in LABEL_COLUMNS and not name.startswith(TEACHER_PREFIX)]
    main = main_input_of(model)
    if collator is not None:
        advice = (
            "The data_collator does not get them either: remove_unused_columns=True removes what the model does not "
            "read. Pass remove_unused_columns=False if it makes the inputs."
        )
    elif main == "input_ids":
        words = {name: len(_distinct(data, name, str) or ()) for name in raw}
        text = max(words, key=lambda name: words[name], default="text")
        advice = (
            f"Tokenize the text first: dataset.map(lambda rows: tokenizer(rows[{text!r}], truncation=True), "
            "batched=True), and pass processing_class=tokenizer."
        )
    else:
        advice = f"Make {main} of them first: dataset.map with the model's processor."
    kind = type(unwrapped(model)).__name__
    raise DataError(f"{whose} has the columns {columns}, and none that the {kind} reads ({main}). {advice}")


def require_label_column(data: Data, task: Task, config: PreTrainedConfig | None, *, whose: str) -> None:
    """Raise if the columns of a dataset are known and none holds the labels.

    Args:
        data: the dataset.
        task: the student's task, which names the columns.
        config: the student's config; its label names show which column is probably meant.
        whose: name of the dataset in the message.

    Raises:
        DataError: if the labels are missing; it names the column that probably holds them.
    """
    columns = columns_of(data)
    if columns is None or task.has_labels(dict.fromkeys(columns, True)):
        return
    if task.label_names == ("labels",) and label_column(columns) is not None:
        return
    found = _probable_label_column(data, columns, task, config)
    if found is not None:
        name, content = found
        raise DataError(
            f"alpha < 1 weighs labels, and {whose} has no column called label or labels. {name!r} holds {content}: "
            f"rename it, dataset.rename_column({name!r}, 'label')."
        )
    task.require_labels(dict.fromkeys(columns, True))


def is_own_collator(collator: Collator | None) -> bool:
    """Return whether a collator is the user's own code, which may read columns that transformers' collators cannot."""
    collator = _innermost(collator)
    kind = collator if hasattr(collator, "__qualname__") else type(collator)
    return collator is not None and kind.__module__.partition(".")[0] not in ("transformers", "trl", "hf_distill")


def _innermost(collator: Any) -> Any:
    """Return the user's collator from within this library's wrappers."""
    while type(collator).__module__.partition(".")[0] == "hf_distill" and hasattr(collator, "collator"):
        collator = collator.collator
    return collator


def why_not_collated(features: Sequence[Any], collator: Collator, task: Task) -> str | None:
    """Return why a collator failed on these examples: words for labels or unequal lengths; None for other causes.

    Args:
        features: the examples.
        collator: the collator that failed, or a wrapper around it.
        task: the student's task.
    """
    if not all(isinstance(feature, Mapping) for feature in features):
        return None
    collator, column = _innermost(collator), label_column(features[0])
    if is_own_collator(collator):
        is_word = column is not None and isinstance(features[0][column], str)
        return _OWN_WORDS.format(column=column) if is_word else None
    unequal = {}
    for name in features[0]:
        lengths = {len(f[name]) for f in features if isinstance(f.get(name), Sequence) and not isinstance(f[name], str)}
        if len(lengths) > 1:
            unequal[name] = lengths
    if not unequal:
        return None
    name, lengths = next(iter(unequal.items()))
    cause = f"The examples of a batch are of unequal length ({name}: {min(lengths)} to {max(lengths)}), and "
    has_labels = label_column(unequal) is not None
    if collator is default_data_collator:
        instead = (
            f" (here data_collator={task.padding_collator or ''}, which pads labels as well)" if has_labels else ""
        )
        return f"{cause}nothing pads them. Pass processing_class=tokenizer{instead}, or pad to one fixed length."
    if isinstance(collator, DataCollatorWithPadding) and has_labels and task.padding_collator:
        return f"{cause}DataCollatorWithPadding does not pad labels. Pass data_collator={task.padding_collator}."
    return None


def _probable_label_column(
    data: Data, columns: list[str], task: Task, config: PreTrainedConfig | None
) -> tuple[str, str] | None:
    """Return the column that probably holds the labels, and a description of its content."""
    count = getattr(config, "num_labels", None)
    if task.matched_by != "labels" or task.on_values or not count:
        return None
    ids = label_ids(config)
    names = {name.strip().casefold() for name in ids}
    for column in columns:
        words = class_names(data, column) or _distinct(data, column, str)
        if words and {word.strip().casefold() for word in words} <= names:
            return column, f"{len(words)} words that are the student's labels"
        if words and has_default_names(ids) and len(words) == count:
            return column, f"{count} different words, as many as the student has labels"
    if task.axis == "example":
        for column in columns:
            if _distinct(data, column, int) == set(range(count)):
                return column, f"each number from 0 to {count - 1}, as the student numbers its labels"
    return None


def _distinct(data: Data, column: str, kind: type) -> set[Any] | None:
    """Return the distinct values in the first rows of a column; None if some are of another kind, or it is unreadable.

    Words are also found in lists.
    """
    if isinstance(data, datasets.Dataset):
        block = next(arrow_blocks(data, column, rows=_SAMPLED_ROWS), pa.array([]))
        block = block.flatten() if kind is str and is_list(block.type) else block
        if not is_text(block.type) and not pa.types.is_integer(block.type):
            return None
        values = pc.unique(block).to_pylist()
    elif isinstance(data, (list, tuple)):
        values = [row.get(column) for row in data[:_SAMPLED_ROWS]]
        if kind is str:
            values = [word for cell in values for word in (cell if isinstance(cell, (list, tuple)) else [cell])]
    else:
        return None
    kinds = {type(value) for value in values} - {type(None)}
    return {value for value in values if value is not None} if kinds <= {kind} else None


def is_text(kind: pa.DataType) -> bool:
    return pa.types.is_string(kind) or pa.types.is_large_string(kind)


def is_list(kind: pa.DataType) -> bool:
    return pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
