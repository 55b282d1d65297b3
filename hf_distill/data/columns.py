"""What the columns of a dataset are for: which a model reads, which holds the labels, and which nobody pads."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.compute as pc
from transformers import DataCollatorWithPadding, default_data_collator

from hf_distill._compat import arrow_blocks
from hf_distill.errors import DataError
from hf_distill.tasks.base import TEACHER_PREFIX, Task
from hf_distill.tasks.infer import forward_names, unwrapped
from hf_distill.vocabulary import has_default_names, label_ids

LABEL_COLUMNS = ("labels", "label", "label_ids")  # what the collators of transformers take for labels
_OWN_WORDS = (
    "{column!r} holds words, and the data_collator, which is your own, is given them as they are and failed. Let it "
    "read them, or read them before: dataset.map(lambda row: {{{column!r}: model.config.label2id[row[{column!r}]]}})."
)
_LOOKED_AT = 100_000  # rows, where it is only guessed which column was meant


def columns_of(data: Any) -> list[str] | None:
    """The columns of a dataset, or of the examples in a list; None where they show only when examples are made."""
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


def is_transformed(data: Any) -> bool:
    """Whether `set_transform` makes the examples of a dataset: then its table does not show what they hold."""
    return isinstance(data, datasets.Dataset) and data.format["type"] == "custom"


def label_column(columns: Iterable[str] | None, own: str | None = None) -> str | None:
    """Return the column of labels: `own`, the student's name for them, or else a name that transformers knows."""
    there = set(columns or ())
    return next((name for name in (own, *LABEL_COLUMNS) if name in there), None)


def check_processed(data: Any, model: Any, *, whose: str, collator: Any = None, drops_columns: bool = True) -> None:
    """Raise `DataError` where no column of a dataset is an input of the model: text that was not tokenized, as a rule.

    Args:
        data: the dataset.
        model: the model that is to read it.
        whose: what the message calls the dataset.
        collator: the user's own, which may make inputs of any column that reaches it.
        drops_columns: columns that the model does not read are removed before the collator sees them.
    """
    columns, read = columns_of(data), set(forward_names(model)) - {"labels"}
    if not columns or not read or read & set(columns) or (collator is not None and not drops_columns):
        return
    raw = [name for name in columns if name not in LABEL_COLUMNS and not name.startswith(TEACHER_PREFIX)]
    main = getattr(unwrapped(model), "main_input_name", "input_ids")
    if collator is not None:
        do = (
            "The data_collator is not given them either, because remove_unused_columns=True removes what the model "
            "does not read: pass remove_unused_columns=False if it makes the inputs."
        )
    elif main == "input_ids":
        words = {name: len(_distinct_words(data, name) or ()) for name in raw}
        text = max(words, key=lambda name: words[name], default="text")
        do = (
            f"Tokenize the text first: dataset.map(lambda rows: tokenizer(rows[{text!r}], truncation=True), "
            "batched=True), and pass processing_class=tokenizer."
        )
    else:
        do = f"Make {main} of them first: dataset.map with the model's processor."
    raise DataError(
        f"{whose} has the columns {columns}, and none that the {type(unwrapped(model)).__name__} reads ({main}). {do}"
    )


def require_label_column(data: Any, task: Task, config: Any, *, whose: str) -> None:
    """Raise `DataError` where a dataset whose columns are known has none for the labels.

    Args:
        data: the dataset.
        task: the student's task, which names the columns.
        config: the student's config: its label names tell which column was meant.
        whose: what the message calls the dataset.
    """
    columns = columns_of(data)
    if columns is None or task.has_labels(dict.fromkeys(columns, True)):
        return
    if task.label_names == ("labels",) and label_column(columns) is not None:
        return
    found = _meant_column(data, columns, task, config)
    if found is not None:
        name, what = found
        raise DataError(
            f"alpha < 1 weighs labels, and {whose} has no column called label or labels. {name!r} holds {what}: rename "
            f"it, dataset.rename_column({name!r}, 'label')."
        )
    task.require_labels(dict.fromkeys(columns, True))


def is_own_collator(collator: Any) -> bool:
    """Whether a collator is of the user's own code, and may read columns as no collator of transformers does."""
    collator = _innermost(collator)
    kind = collator if hasattr(collator, "__qualname__") else type(collator)
    return collator is not None and kind.__module__.partition(".")[0] not in ("transformers", "trl", "hf_distill")


def _innermost(collator: Any) -> Any:
    """The user's collator, in the ones that this library puts around it."""
    while type(collator).__module__.partition(".")[0] == "hf_distill" and hasattr(collator, "collator"):
        collator = collator.collator
    return collator


def why_not_collated(features: Sequence[Any], collator: Any, task: Task) -> str | None:
    """Why a collator fails on examples: words that it cannot read, unequal lengths. None: that is not the cause.

    Args:
        features: the examples.
        collator: the collator that failed, or one around it.
        task: the student's.
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
    said = f"The examples of a batch are of unequal length ({name}: {min(lengths)} to {max(lengths)}), and "
    if collator is default_data_collator:
        instead = ""
        if label_column(unequal):
            instead = f" (here data_collator={task.padding_collator or ''}, which pads labels as well)"
        return f"{said}nothing pads them. Pass processing_class=tokenizer{instead}, or pad to one fixed length."
    if isinstance(collator, DataCollatorWithPadding) and label_column(unequal) and task.padding_collator:
        return f"{said}DataCollatorWithPadding does not pad labels. Pass data_collator={task.padding_collator}."
    return None


def _meant_column(data: Any, columns: list[str], task: Task, config: Any) -> tuple[str, str] | None:
    """The column that seems to hold the labels, and what it holds."""
    count = getattr(config, "num_labels", None)
    if task.matched_by != "labels" or task.on_values or not count:
        return None
    ids = label_ids(config)
    named, numbered = {name.strip().casefold() for name in ids}, has_default_names(ids)
    for name in columns:
        words = _distinct_words(data, name)
        if words and {word.strip().casefold() for word in words} <= named:
            return name, f"{len(words)} words that are the student's labels"
        if words and numbered and len(words) == count:
            return name, f"{count} different words, as many as the student has labels"
    if task.axis == "example":
        for name in columns:
            whole = _distinct_integers(data, name)
            if whole == set(range(count)):
                return name, f"each number from 0 to {count - 1}, as the student numbers its labels"
    return None


def _distinct_integers(data: Any, column: str) -> set[int] | None:
    """The whole numbers in a column, as far as it is looked at; None: it holds something else."""
    if isinstance(data, datasets.Dataset):
        block = next(arrow_blocks(data, column, rows=_LOOKED_AT), pa.array([]))
        values = pc.unique(block).to_pylist() if pa.types.is_integer(block.type) else [None]
    elif isinstance(data, (list, tuple)):
        values = [row.get(column) for row in data[:_LOOKED_AT]]
    else:
        return None
    known = [value for value in values if value is not None]
    return set(known) if all(isinstance(one, int) and not isinstance(one, bool) for one in known) else None


def _distinct_words(data: Any, column: str) -> set[str] | None:
    """The words in a column, as far as it is looked at; None: it holds something else, or cannot be looked at."""
    feature = (getattr(data, "features", None) or {}).get(column)
    feature = getattr(feature, "feature", feature)
    if isinstance(feature, datasets.ClassLabel):
        return set(feature.names)
    if isinstance(data, datasets.Dataset):
        block = next(arrow_blocks(data, column, rows=_LOOKED_AT), pa.array([]))
        block = block.flatten() if pa.types.is_list(block.type) or pa.types.is_large_list(block.type) else block
        is_text = pa.types.is_string(block.type) or pa.types.is_large_string(block.type)
        values = pc.unique(block).to_pylist() if is_text else [0]
    elif isinstance(data, (list, tuple)):
        cells = [row.get(column) for row in data[:_LOOKED_AT]]
        values = [value for cell in cells for value in (cell if isinstance(cell, (list, tuple)) else [cell])]
    else:
        return None
    words = {value for value in values if isinstance(value, str)}
    return words if all(value is None or isinstance(value, str) for value in values) else None
