"""Labels as datasets hold them (words, gaps, floats, another order), converted to the numbers of the student's head.

A `LabelReader` belongs to one dataset. It surveys the label column once if that runs no code of the dataset's own, and
converts the labels of examples as they are collated. The dataset is not changed.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from transformers import PreTrainedConfig

from hf_distill._compat import arrow_blocks
from hf_distill._types import Data, Example
from hf_distill.data.columns import class_names, columns_of, is_list, is_text, is_transformed, label_column
from hf_distill.errors import DataError
from hf_distill.tasks.base import IGNORED, Task
from hf_distill.tasks.classification import SEVERAL, SINGLE
from hf_distill.vocabulary import has_default_names, label_ids, listed_names

_SHOWN = 5  # words in a message
_BLOCK_ROWS = 100_000  # rows of a list that are surveyed together
_SAY_SEVERAL = f'set problem_type="{SEVERAL}" in the student\'s config'
_TOLERANCE = 1e-3  # of the sum of probabilities


class _UnreadableError(ValueError):
    """A label that the head cannot take. The message gives the reason; the caller adds the place."""


class _OutOfRangeError(_UnreadableError):
    """A class number that the head does not have."""


class LabelReader:
    """Converts the labels of one dataset to the numbers that the student's head takes.

    Args:
        task: the student's task.
        config: the student's config, or None.
        data: a dataset, a list of examples, or any other source of examples.
        whose: name of the dataset in messages.
        aliases: the student's name of each label of the task, if its forward has other names for them.
        label_matching: "by_name" or "by_index": how the names of a `ClassLabel` are paired with the student's.
        as_trainer: whether the run equals `Trainer`'s (alpha=0, no objectives); then labels that `Trainer` can read are
            not changed.
        evaluates: whether the dataset is for evaluation.
        needed: whether the labels have a weight; if not, unreadable labels are dropped.
        own_loss: whether the user's own loss reads the labels; then numbers are not checked.
        own_collator: whether the user's own collator reads the labels; then words are not converted.

    Attributes:
        remarks: sentences for the log.
        changes: whether labels must be converted; if not, examples can be collated as they are.
        names: the dataset's label names in the order of the head's classes, if the student has no names.

    Raises:
        DataError: if a label cannot be read.
    """

    def __init__(
        self,
        task: Task,
        config: PreTrainedConfig | None,
        data: Data,
        *,
        whose: str = "the training data",
        aliases: Mapping[str, str] | None = None,
        label_matching: str = "by_name",
        as_trainer: bool = False,
        evaluates: bool = False,
        needed: bool = True,
        own_loss: bool = False,
        own_collator: bool = False,
    ) -> None:
        self.remarks: list[str] = []
        self.changes = False
        self.names: tuple[str, ...] | None = None
        self._of_tokens, self._of_values = task.axis == "input", task.on_values
        self._whose = whose
        self._as_trainer = as_trainer
        self._evaluates = evaluates
        self._needed = needed
        self._own_loss = own_loss
        self._own_collator = own_collator
        self._problem = getattr(task, "problem", None)
        self._count: int | None = getattr(config, "num_labels", None) if task.matched_by == "labels" else None
        self._ids = {} if self._count is None else label_ids(config)
        self._names = sorted(self._ids, key=self._ids.__getitem__)
        self._folded = {name.strip().casefold(): number for name, number in self._ids.items()}
        self._order: list[int] | None = None  # number of a label in the dataset → in the head
        self._of_class_label = False  # where -1 means no label
        self._width: int | None = None  # length of rows with several numbers each
        self._adds_up: bool | None = None  # whether rows of numbers are probabilities; None: no such rows
        self._leave_out = False
        self._all_tokens = vars(task).get("_rows") == "attended"
        columns = columns_of(data)
        self._aliases = aliases or {}
        self._own_column = self._aliases.get("labels")
        self._column = label_column(columns, self._own_column)
        if not task.reads_label_column:
            self._check_no_gaps(data, task, columns)
            return
        if self._count is not None and not task.on_values:
            self._match_names(data, label_matching)
        if columns is None or not isinstance(data, (datasets.Dataset, list, tuple)):
            self.changes = True  # the labels are known only when examples are made
            return
        if self._column is None:
            return
        self.changes = self._renames(self._column)
        try:
            self._survey(data)
        except DataError as error:
            if needed:
                raise
            self._leave_out = self.changes = True
            self.remarks = [f"The labels of {whose} weigh nothing and are left out, as they cannot be read: {error}"]
        self._check_clear_rows()

    # Converting labels, one by one.

    def __call__(self, features: Sequence[Any]) -> Sequence[Any]:
        """Return the examples of a batch with their labels converted.

        Raises:
            DataError: if a label cannot be read.
        """
        if not self.changes or not all(isinstance(feature, Mapping) for feature in features):
            return features
        self._column = self._column or label_column(
            (name for feature in features for name in feature), self._own_column
        )
        column = self._column
        if column is None:
            return features
        converted = []
        for place, feature in enumerate(features):
            label = feature.get(column)
            try:
                number = self._read(label, feature)
            except _UnreadableError as error:
                if self._needed:
                    raise self._error(label, f"example {place} of a batch", error) from error
                self._leave_out = True
                break
            converted.append({**feature, column: number})
            if self._renames(column):
                converted[-1]["labels"] = converted[-1].pop(column)
        if self._leave_out:
            return [{name: value for name, value in feature.items() if name != column} for feature in features]
        return converted

    def _renames(self, column: str | None) -> bool:
        """Return whether token labels are called "label", which collators turn into floats or do not pad."""
        return column == "label" and self._of_tokens and not self._own_collator

    def _read(self, label: object, feature: Example | None = None) -> object:
        """Return one example's label as the head takes it.

        Raises:
            _UnreadableError: if it cannot be converted.
        """
        match label:
            case torch.Tensor() | np.ndarray() | np.generic():
                plain = label.tolist()
                number = self._read(plain, feature)
                return label if _is_same(number, plain) else number
            case _ if self._of_tokens:
                return self._read_tokens(label, feature or {})
            case _ if self._of_values:
                return self._read_values(label)
            case list() | tuple():
                return self._read_row(label)
            case _:
                return self._read_gap() if self._is_gap(label) else self._read_class(label)

    def _read_class(self, label: object) -> str | float:
        match label:
            case str():
                return label if self._own_collator else self._number_of(label)
            case int() | float():
                is_whole = float(label).is_integer()
            case _:
                raise _UnreadableError(f"a label is a number or a word, not a {type(label).__name__}")
        if self._order is not None and is_whole and 0 <= label < len(self._order):
            return self._order[int(label)]
        if self._own_loss:
            return label
        classes = "classes from 0 on" if self._count is None else f"classes 0 to {self._count - 1}"
        if not is_whole:
            raise _UnreadableError(
                f"the head has {classes}, whole numbers. To predict values instead, load the student with num_labels=1 "
                'and problem_type="regression"'
            )
        number = int(label)
        if number < 0 or (self._count is not None and number >= self._count):
            raise _OutOfRangeError(f"the head has {classes} (-100, or nothing at all, is no label)")
        return number

    def _read_tokens(self, labels: object, feature: Example) -> list[object]:
        if isinstance(labels, (list, tuple)):
            return [IGNORED if self._is_gap(label) else self._read_class(label) for label in labels]
        if not self._is_gap(labels):
            raise _UnreadableError("the labels of an example are a list, one for each token")
        inputs = feature.get("input_ids", feature.get("inputs_embeds"))
        return [IGNORED] * (0 if inputs is None else len(inputs))

    def _read_values(self, label: object) -> object:
        if self._own_loss:
            return label
        for value in label if isinstance(label, (list, tuple)) else [label]:
            if self._is_gap(value):
                raise self._gap_error("regression")
            if isinstance(value, str) and not self._own_collator:
                raise _UnreadableError(
                    "a head for regression learns numbers. Cast the column (datasets.Value('float32')), or, if they "
                    "are classes, load the student with as many labels as there are (num_labels=)"
                )
        return label

    def _read_row(self, row: Sequence[Any]) -> Sequence[object]:
        """Return several labels at once, or a probability for each class."""
        if any(isinstance(value, str) for value in row) or (not row and self._problem == SEVERAL):
            return self._read_words(row)
        if any(map(self._is_gap, row)):
            return self._read_gap()
        if len(row) == 1 and self._problem != SEVERAL:
            return [self._read_class(row[0])]
        if self._count is not None and len(row) != self._count:
            raise _UnreadableError(
                f"it has {len(row)} numbers and the head {self._count} classes: give a number for each class, 1 where "
                "it applies and 0 where it does not"
            )
        if self._problem is None and not any(isinstance(value, float) for value in row):
            raise _UnreadableError(f"whole numbers in a row are several labels at once: {_SAY_SEVERAL}")
        self._width = len(row)
        return [float(value) for value in row]

    def _read_words(self, words: Sequence[object]) -> Sequence[object]:
        if self._own_collator:
            return words
        if self._problem != SEVERAL:
            raise _UnreadableError(f"words in a row are several labels at once: {_SAY_SEVERAL}")
        classes = {self._read_class(word) for word in words}
        return [float(number in classes) for number in range(self._count or 0)]

    def _read_gap(self) -> Any:
        if self._problem == SEVERAL or (self._width is not None and self._problem != SINGLE):
            raise self._gap_error("several labels at once")
        return IGNORED if self._width is None else [float(IGNORED)] * self._width

    def _gap_error(self, head: str) -> _UnreadableError:
        instead = "" if self._evaluates else ", or learn from the teacher alone (alpha=1)"
        return _UnreadableError(
            f"a head for {head} has no number that means 'no label'. Leave these rows out (dataset.filter){instead}"
        )

    def _is_gap(self, label: object) -> bool:
        """Return whether a value stands for a missing label."""
        match label:
            case str():
                return not label.strip() and not self._own_collator
            case int() | float():
                return label != label or label == IGNORED or (label == -1 and self._of_class_label)
        return label is None or type(label).__name__ in ("NAType", "NaTType")  # pandas'

    def _number_of(self, word: str) -> int:
        number = self._ids.get(word, self._folded.get(word.strip().casefold()))
        if number is not None:
            return number
        if word.strip().lstrip("+-").replace(".", "", 1).isdigit():
            raise _UnreadableError("it is a number written as text. Cast the column: datasets.Value('int64')")
        if not self._ids:
            raise _UnreadableError("the labels of this head are numbers")
        if has_default_names(self._ids):
            raise _UnreadableError(
                "the student's labels have no names of their own (LABEL_0, …). Name them when it is loaded: names = "
                f"sorted(set(dataset[{self._column!r}])); from_pretrained(..., num_labels=len(names), "
                "id2label=dict(enumerate(names)), label2id={name: i for i, name in enumerate(names)})"
            )
        close = difflib.get_close_matches(word, self._ids, 1, cutoff=0.5)
        hint = f". Did you mean {close[0]!r}?" if close else ""
        raise _UnreadableError(f"the student's labels are {listed_names(self._names)}{hint}")

    def _error(self, label: object, where: str, reason: object) -> DataError:
        shown = "nothing" if label is None else repr(label)
        shown = shown if len(shown) <= 100 else f"{shown[:100]}…"
        end = "" if str(reason).endswith("?") else "."
        return DataError(f"{self._column!r} of {self._whose} holds {shown} ({where}): {reason}{end}")

    # Surveying the column once.

    def _match_names(self, data: Data, label_matching: str) -> None:
        """Pair the names of a `ClassLabel` with the student's.

        Raises:
            DataError: if only some of the student's names occur, at other numbers.
        """
        column = self._column or label_column(getattr(data, "column_names", None), self._own_column)
        theirs = class_names(data, column)
        if theirs is None:
            return
        self._of_class_label = True
        if has_default_names(self._ids):
            has_names = not has_default_names({name: number for number, name in enumerate(theirs)})
            self.names = tuple(theirs) if has_names and len(theirs) == self._count else None
            return
        places = [self._ids.get(name, self._folded.get(name.strip().casefold())) for name in theirs]
        moved = [number for number, place in enumerate(places) if place not in (None, number)]
        if label_matching == "by_index" or places == list(range(len(places))):
            return
        both = f"{self._whose} {listed_names(theirs)}, the student {listed_names(self._names)}"
        if not moved:
            self.remarks.append(f"Labels are taken by their numbers, because their names differ: {both}.")
            return
        number = moved[0]
        differs = (
            f"label {theirs[number]!r} is {number} in {self._whose} and {places[number]} in the student's label2id"
        )
        if self._as_trainer or is_transformed(data):
            why = "alpha=0 trains as Trainer does" if self._as_trainer else "the dataset has a transform of its own"
            self.remarks.append(
                f"{differs[0].upper()}{differs[1:]}. Labels are taken by their numbers, because {why}. To match the "
                f"names: dataset.align_labels_with_mapping(model.config.label2id, {column!r})."
            )
            return
        if None in places:
            raise DataError(
                f"{column!r} of {self._whose} cannot be matched with the student's labels by name: {differs}, and "
                f"the student has no label {theirs[places.index(None)]!r} (labels of {both}). Give both the same "
                'names, or pass label_matching="by_index" if the numbers are right as they are.'
            )
        self._order = [place for place in places if place is not None]
        self.remarks.append(
            f'{differs[0].upper()}{differs[1:]}: labels are matched by name. (label_matching="by_index" takes the '
            "numbers as they are.)"
        )

    def _survey(self, data: Data) -> None:
        """Convert every distinct label once, and count rows, gaps and words.

        Raises:
            DataError: if a label cannot be read; it names the example.
        """
        rows = gaps = 0
        words: dict[str, None] = {}
        numbers: list[float] = []
        beyond: tuple[Any, int, _OutOfRangeError] | None = None
        for block in _blocks(data, self._column):
            for label, count in self._distinct(block):
                try:
                    self.changes |= not _is_same(self._read(label), label)
                except _UnreadableError as error:
                    row = rows + _first_row(block, label, of_token=count == 0)
                    found = label[0] if count == 0 else label
                    if not isinstance(error, _OutOfRangeError):
                        raise self._error(found, f"example {row}", error) from error
                    beyond = beyond or (found, row, error)  # the range of all labels decides on the advice
                gaps += count if self._is_gap(label) else 0
                entries = [one for one in (label if isinstance(label, list) else [label]) if not self._is_gap(one)]
                words |= dict.fromkeys(one for one in entries if isinstance(one, str))
                numbers = [*numbers, *(one for one in entries if isinstance(one, (int, float)))]
                numbers = [min(numbers), max(numbers)] if numbers else []
            rows += len(block)
        if beyond is not None:
            raise self._range_error(*beyond, *numbers)
        self._remark(rows, gaps, list(words))

    def _distinct(self, block: pa.Array | list[Any]) -> Iterator[tuple[Any, int]]:
        """Yield the labels of a block that must be checked, and the number of rows with each (0: a token's label).

        Rows of numbers without gaps need no check; only their sums are recorded.
        """
        is_rows = isinstance(block, pa.Array) and is_list(block.type)
        if isinstance(block, list) or (self._of_values and not _is_clean(block)):
            yield from ((label, 1) for label in (block if isinstance(block, list) else block.to_pylist()))
        elif self._of_values:
            return
        elif is_rows and self._of_tokens:
            if block.null_count:
                yield None, block.null_count
            yield from (([label], 0) for label, _ in _counted(block.flatten()))
        elif is_rows:
            yield from self._distinct_rows(block)
        else:
            yield from _counted(block)

    def _distinct_rows(self, block: pa.Array) -> Iterator[tuple[Any, int]]:
        flat, lengths = block.flatten(), pc.unique(pc.list_value_length(block.drop_null())).to_pylist()
        if is_text(flat.type) or lengths in ([], [1]):
            yield from ((label, 1) for label in block.to_pylist())
            return
        self._width = self._count
        if lengths == [self._count] and _is_clean(flat) and block.null_count == 0:
            matrix = flat.to_numpy(zero_copy_only=False).reshape(len(block), -1)
            self._record_sums(matrix)
            is_float = pa.types.is_floating(flat.type)
            if not (matrix == IGNORED).any() and (is_float or self._problem == SEVERAL):
                self.changes |= not is_float
                return
        else:
            for label in block.to_pylist():
                if label is not None and not any(map(self._is_gap, label)):
                    self._record_sums(np.array([label]))
        yield from ((label, 1) for label in block.to_pylist())

    def _record_sums(self, matrix: np.ndarray) -> None:
        """Record whether all rows so far are probabilities."""
        are_probabilities = (abs(matrix.sum(1) - 1) < _TOLERANCE).all() and (matrix >= 0).all()
        self._adds_up = bool(are_probabilities) and self._adds_up is not False

    def _range_error(
        self, label: object, row: int, reason: _OutOfRangeError, lowest: float, highest: float
    ) -> DataError:
        if self._count is None or lowest < 0:
            return self._error(label, f"example {row}", reason)
        if lowest == 1 and highest == self._count:
            advice = f"Subtract 1: dataset.map(lambda row: {{{self._column!r}: row[{self._column!r}] - 1}})"
        else:
            advice = f"Load the student with num_labels={int(highest) + 1}, or correct the labels"
        return DataError(
            f"{self._column!r} of {self._whose} runs from {lowest:g} to {highest:g}, and the head has {self._count} "
            f"classes, 0 to {self._count - 1} (example {row} has {label}). {advice}."
        )

    def _check_clear_rows(self) -> None:
        """Raise if rows add up to 1 and the student's config does not say whether they are probabilities."""
        if not self._adds_up or self._problem is not None or self._evaluates:  # few rows may add up by chance
            return
        problem = (
            f"the rows of {self._column!r} of {self._whose} add up to 1, so they are probabilities of the classes, but "
            "transformers takes rows of numbers for several labels at once. Declare them in the student's "
            f'config: problem_type="{SINGLE}" (probabilities) or problem_type="{SEVERAL}"'
        )
        if not self._as_trainer:
            raise DataError(f"{problem}.")
        if not self._own_loss:
            self.remarks.append(
                f"{problem[0].upper()}{problem[1:]}. alpha=0 trains as Trainer does: on several labels."
            )

    def _remark(self, rows: int, gaps: int, words: list[str]) -> None:
        if words and not self._own_collator:
            shown = ", ".join(f"{word!r} is {self._number_of(word)}" for word in words[:_SHOWN])
            self.remarks.append(
                f"{self._column!r} of {self._whose} holds {len(words):,} different words, which are numbered by the "
                f"student's label2id: {shown}{', …' if len(words) > _SHOWN else ''}."
            )
        if gaps and self._needed:
            self.remarks.append(f"{gaps:,} of {rows:,} rows of {self._whose} have no label. {self._use_of_gaps()}")

    def _use_of_gaps(self) -> str:
        if self._evaluates:
            return "The loss leaves them out, and compute_metrics gets -100 for them."
        if self._as_trainer:
            return "The loss leaves them out."
        if self._of_tokens and not self._all_tokens:
            return 'They teach nothing; task=TokenClassification(rows="attended") distils them.'
        return "They are distilled; the labels' term leaves them out."

    def _check_no_gaps(self, data: Data, task: Task, columns: list[str] | None) -> None:
        """Raise if labels that are token ids or positions hold text or gaps."""
        if not self._needed or columns is None or self._own_collator:
            return
        text = _UnreadableError(f"the labels of a {task} head are numbers, as tokenizer(text_target=...) makes them")
        gap = _UnreadableError(f"a {task} head needs labels in every row. Leave the others out (dataset.filter)")
        own = (self._aliases.get(name, name) for name in task.label_names)
        for column in (name for name in own if name in columns):
            self._column, rows = column, 0
            held = data.data.column(column) if isinstance(data, datasets.Dataset) else None
            if held is not None and not held.null_count and not is_text(held.type):
                continue
            for block in _blocks(data, column):
                for row, label in enumerate(block if isinstance(block, list) else block.to_pylist(), rows):
                    if label is None or isinstance(label, str):
                        raise self._error(label, f"example {row}", gap if label is None else text)
                rows += len(block)


def _blocks(data: Any, column: str | None) -> Iterator[pa.Array | list[Any]]:
    """Yield the labels of a dataset in order, as a list if no Arrow type holds them all."""
    assert column is not None
    if isinstance(data, datasets.Dataset):
        yield from arrow_blocks(data, column)
        return
    for start in range(0, len(data), _BLOCK_ROWS):
        labels = [row.get(column) for row in data[start : start + _BLOCK_ROWS]]
        labels = [x.tolist() if isinstance(x, (torch.Tensor, np.ndarray, np.generic)) else x for x in labels]
        try:
            yield pa.array(labels, from_pandas=True)
        except (pa.ArrowInvalid, pa.ArrowTypeError):  # words among numbers, tensors of several axes
            yield labels


def _counted(block: pa.Array) -> Iterator[tuple[Any, int]]:
    block = block.dictionary_decode() if pa.types.is_dictionary(block.type) else block
    for entry in pc.value_counts(block):
        yield entry["values"].as_py(), entry["counts"].as_py()


def _is_clean(block: pa.Array) -> bool:
    """Return whether these are numbers without a gap."""
    flat = block.flatten() if is_list(block.type) else block
    if block.null_count or flat.null_count or not (pa.types.is_floating(flat.type) or pa.types.is_integer(flat.type)):
        return False
    return pa.types.is_integer(flat.type) or not pc.any(pc.is_nan(flat)).as_py()


def _first_row(block: pa.Array | list[Any], label: Any, *, of_token: bool) -> int:
    """Return the first row with this label; with `of_token`, `[label]` is the label of a token."""
    for row, found in enumerate(block if isinstance(block, list) else block.to_pylist()):
        if (label[0] in (found or ())) if of_token else (found == label):
            return row
    return 0


def _is_same(converted: object, label: object) -> bool:
    """Return whether two labels are equal and of the same type."""
    if isinstance(converted, list) and isinstance(label, (list, tuple)):
        return len(converted) == len(label) and all(map(_is_same, converted, label))
    return type(converted) is type(label) and bool(converted == label)
