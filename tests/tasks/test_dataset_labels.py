"""Dataset labels are converted to numbers: names, missing values, floats, other orders; errors name the bad value."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, List, Value
from transformers import BertConfig

from hf_distill import DataError
from hf_distill.data.labels import LabelReader
from hf_distill.tasks import (
    CTC,
    CausalLM,
    Classification,
    MultipleChoice,
    Regression,
    Seq2Seq,
    Span,
    TokenClassification,
)

NAMES = ["bad", "fair", "good"]
SINGLE, SEVERAL = "single_label_classification", "multi_label_classification"


STREAM = iter(())  # nothing is known of it before it is read


def config(names: list[str] | int = NAMES, **changed: Any) -> BertConfig:
    if isinstance(names, int):
        return BertConfig(num_labels=names, **changed)
    ids = {name: number for number, name in enumerate(names)}
    return BertConfig(id2label=dict(enumerate(names)), label2id=ids, **changed)


def reader(data: Any, *, names: list[str] | int = NAMES, task: Any = None, **settings: Any) -> LabelReader:
    own = {name: settings.pop(name) for name in list(settings) if name in ("problem_type",)}
    made = config(names, **own)
    return LabelReader(task or Classification(made), made, data, **settings)


def rows_of(labels: list[Any], column: str = "label") -> list[dict[str, Any]]:
    return [{"input_ids": [1, 2, 3], column: label} for label in labels]


def as_list(labels: list[Any], column: str = "label") -> list[dict[str, Any]]:
    return rows_of(labels, column)


def as_dataset(labels: list[Any], column: str = "label") -> Dataset:
    return Dataset.from_dict({"input_ids": [[1, 2, 3]] * len(labels), column: labels})


def shuffled(labels: list[Any], column: str = "label") -> Dataset:
    """Return the labels in the given order, through an indices mapping."""
    return as_dataset(["good", *labels][::-1] if isinstance(labels[0], str) else labels[::-1], column).select(
        range(len(labels) - 1, -1, -1)
    )


def read(found: LabelReader, data: Any, column: str = "label") -> list[Any]:
    return [row.get(column, row.get("labels")) for row in found([data[i] for i in range(len(data))])]


KINDS = {"list": as_list, "Dataset": as_dataset, "through indices": shuffled}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("column", ["label", "labels", "label_ids"])
def test_label_names_become_the_students_ids(kind: str, column: str) -> None:
    words = ["good", "bad", "good", "fair"]
    data = KINDS[kind](words, column)
    found = reader(data)
    assert read(found, data, column) == [2, 0, 2, 1]
    (remark,) = found.remarks
    assert f"{column!r} of the training data holds 3 different words" in remark and "'good' is 2" in remark
    assert [row[column] for row in (data[i] for i in range(4))] == words  # the dataset is unchanged


def test_spelling_variants_of_a_name_match() -> None:
    data = as_dataset([" Good", "BAD", "fair "])
    assert read(reader(data), data) == [2, 0, 1]


@pytest.mark.parametrize("kind", KINDS)
def test_an_unknown_name_is_reported_with_its_row_and_the_closest_name(kind: str) -> None:
    words = [
        "'label' of the training data holds 'god' (example 2): the student's labels are {bad, fair, good}. ",
        "Did you mean 'good'?",
    ]
    with pytest.raises(DataError) as raised:
        reader(KINDS[kind](["bad", "fair", "god", "god"]))
    assert str(raised.value) == "".join(words)


def test_the_error_for_a_student_without_names_shows_how_to_set_them() -> None:
    with pytest.raises(DataError, match=r"have no names of their own \(LABEL_0.*num_labels=len\(names\).*label2id="):
        reader(as_dataset(["bad", "good"]), names=2)


def test_numbers_stored_as_text_are_reported() -> None:
    with pytest.raises(DataError, match=r"holds '1' \(example 0\): it is a number written as text\. Cast the column"):
        reader(as_dataset(["1", "0"]))


@pytest.mark.parametrize("gap", [None, float("nan"), "", "  ", pd.NA, pd.NaT, -100], ids=repr)
def test_missing_values_become_ignored_labels(gap: Any) -> None:
    data: Any = rows_of(["good", gap, "bad"] if isinstance(gap, str) else [2, gap, 0])
    found = reader(data)
    assert read(found, data) == [2, -100, 0]
    assert found.remarks[-1].startswith("1 of 3 rows of the training data have no label. They are distilled")


def test_a_missing_key_becomes_an_ignored_label() -> None:
    data = [{"input_ids": [1], "label": 1}, {"input_ids": [2]}]
    found = reader(data)
    assert read(found, data) == [1, -100] and "1 of 2 rows" in found.remarks[0]


def test_a_pandas_csv_with_missing_values() -> None:
    """NaN among names, and a column that is float because of a missing value."""
    words = Dataset.from_pandas(pd.DataFrame({"label": ["good", None, "bad", float("nan")]}))
    numbers = Dataset.from_pandas(pd.DataFrame({"label": [2.0, None, 0.0, float("nan")]}))
    for data in (words, numbers):
        found = reader(data)
        labels = read(found, data)
        assert labels == [2, -100, 0, -100] and all(type(label) is int for label in labels)
        assert "2 of 4 rows" in found.remarks[-1]


def test_a_dataset_without_any_label() -> None:
    data = as_dataset([None, None])
    found = reader(data)
    assert read(found, data) == [-100, -100] and "2 of 2 rows" in found.remarks[0]


@pytest.mark.parametrize(
    "value", [1, 1.0, True, np.int64(1), np.float32(1), torch.tensor(1), torch.tensor(1.0)], ids=repr
)
def test_integers_of_any_type_are_accepted(value: Any) -> None:
    data = rows_of([value, 0 if not isinstance(value, bool) else False])
    (label, _) = read(reader(data), data)
    assert int(label) == 1 and not (isinstance(label, float) or (torch.is_tensor(label) and label.is_floating_point()))


def test_labels_that_are_already_valid_are_unchanged() -> None:
    for data in (as_dataset([0, 2, 1]), rows_of([0, 2, 1]), rows_of(list(np.array([0, 2, 1])))):
        found = reader(data)
        assert not found.changes and not found.remarks
        features = [data[i] for i in range(3)]
        assert found(features) is features


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([1, 3, 2], r"'label' of the training data runs from 1 to 3, and the head has 3 classes, 0 to 2 "
                    r"\(example 1 has 3\)\. Subtract 1: dataset\.map\(lambda row: \{'label': row\['label'\] - 1\}\)"),
        ([0, 1, 5, 4], r"runs from 0 to 5, and the head has 3 classes, 0 to 2 .*num_labels=6, or correct the labels"),
        ([0, -2, 1], r"holds -2 \(example 1\): the head has classes 0 to 2 \(-100, or nothing at all, is no label\)"),
        ([0.0, float("inf")], r"holds inf \(example 1\): the head has classes 0 to 2, whole numbers"),
        ([0.0, 0.5, 1.0], r"holds 0\.5 \(example 1\): the head has classes 0 to 2, whole numbers\. To predict values"),
    ],
)  # fmt: skip
def test_numbers_outside_the_classes_are_rejected(kind: str, labels: list[Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        reader(KINDS[kind](labels))


def test_a_column_of_mixed_types_is_rejected() -> None:
    with pytest.raises(DataError, match=r"holds 'goood' \(example 1\)"):
        reader(rows_of([1, "goood", 2]))
    data = rows_of([1, "good", None])
    assert read(reader(data), data) == [1, 2, -100]


def test_labels_for_a_custom_loss_are_not_checked() -> None:
    data = as_dataset([0.5, 7.0, 1.0])
    assert read(reader(data, own_loss=True), data) == [0.5, 7.0, 1.0]
    classes = named([0, 1, 2], ["good", "fair", "bad"])
    assert read(reader(classes, own_loss=True), classes) == [2, 1, 0]


# ClassLabel: the dataset has names of its own.


def named(labels: list[Any], names: list[str], *, tokens: bool = False) -> Dataset:
    kind = List(ClassLabel(names=names)) if tokens else ClassLabel(names=names)
    features = Features({"input_ids": List(Value("int64")), "label": kind})
    return Dataset.from_dict({"input_ids": [[1, 2, 3]] * len(labels), "label": labels}, features=features)


def test_class_labels_in_another_order_are_matched_by_name() -> None:
    data = named([0, 1, 2, 0], ["good", "fair", "bad"])
    found = reader(data)
    assert read(found, data) == [2, 1, 0, 2]
    assert found.remarks == [
        "Label 'good' is 0 in the training data and 2 in the student's label2id: labels are matched by name. "
        '(label_matching="by_index" takes the numbers as they are.)'
    ]
    assert read(reader(data.shuffle(seed=3)), data.shuffle(seed=3)) == [2 - n for n in data.shuffle(seed=3)["label"]]


def test_token_class_labels_in_another_order_are_matched_by_name() -> None:
    data = named([[0, -100, 2], [1, 1, 0]], ["good", "fair", "bad"], tokens=True)
    assert read(reader(data, task=TokenClassification()), data) == [[2, -100, 0], [1, 1, 2]]


def test_class_labels_may_differ_in_case_or_be_fewer() -> None:
    data = named([0, 1], ["GOOD", "Bad"])
    assert read(reader(data), data) == [2, 0]


def test_matching_by_index_keeps_the_numbers_without_a_warning() -> None:
    data = named([0, 1], ["good", "fair", "bad"])
    found = reader(data, label_matching="by_index")
    assert not found.changes and not found.remarks


@pytest.mark.parametrize("transformed", [False, True])
def test_a_warning_if_the_numbers_cannot_be_changed(transformed: bool) -> None:
    """alpha=0 must equal Trainer, and a transform may produce any labels."""
    data = named([0, 1], ["good", "fair", "bad"])
    if transformed:
        data.set_transform(lambda rows: rows)
    found = reader(data, as_trainer=not transformed)
    (remark,) = found.remarks
    assert "taken by their numbers" in remark and "dataset.align_labels_with_mapping(model.config.label2id" in remark
    assert read(found, [{"label": 0}, {"label": 1}]) == [0, 1]


def test_different_names_in_the_same_order_give_a_warning() -> None:
    found = reader(named([0, 1], ["schlecht", "mittel", "gut"]))
    assert not found.changes
    assert found.remarks == [
        "Labels are taken by their numbers, because their names differ: the training data {schlecht, mittel, gut}, the "
        "student {bad, fair, good}."
    ]


def test_partly_matching_names_at_other_indices_are_rejected() -> None:
    with pytest.raises(
        DataError, match=r"label 'good' is 0 in .* and 2 in .*no label 'so-so'.*label_matching=\"by_index\""
    ):
        reader(named([0, 1], ["good", "so-so", "bad"]))


def test_minus_one_in_a_class_label_column_is_ignored() -> None:
    data = named([-1, 2], NAMES)
    assert read(reader(data), data) == [-100, 2]


def test_a_student_without_names_accepts_those_of_the_dataset() -> None:
    assert reader(named([0, 1], ["a", "b"]), names=2).names == ("a", "b")
    assert reader(named([0, 1], ["a", "b"]), names=3).names is None
    assert reader(named([0, 1], ["a", "b"]), names=["x", "y"]).names is None


# Tokens, several labels, values.


def test_token_label_names_become_ids() -> None:
    data = as_dataset([["good", None, ""], ["bad", "fair", "good"], None])
    found = reader(data, task=TokenClassification())
    assert read(found, data) == [[2, -100, -100], [0, 1, 2], [-100, -100, -100]]
    assert "3 different words" in found.remarks[0]
    assert found.remarks[1].startswith("1 of 3 rows") and 'rows="attended"' in found.remarks[1]


def test_token_labels_get_the_column_name_that_collators_expect() -> None:
    (found,) = reader(as_dataset([[1, 2, 0]]), task=TokenClassification())([{"label": [1, 2, 0]}])
    assert found == {"labels": [1, 2, 0]}
    kept = reader(as_dataset([[1, 2, 0]], "labels"), task=TokenClassification())
    assert not kept.changes


def test_invalid_token_labels_are_rejected() -> None:
    tokens = TokenClassification()
    with pytest.raises(DataError, match=r"holds 'goof' \(example 1\).*Did you mean 'good'\?"):
        reader(as_dataset([["bad"], ["good", "goof"]]), task=tokens)
    with pytest.raises(DataError, match=r"runs from 0 to 3, .*\(example 1 has 3\)"):
        reader(as_dataset([[0, 1], [-100, 3]]), task=tokens)
    with pytest.raises(DataError, match=r"holds 'bad good' \(example 0\): the labels of an example are a list"):
        reader(as_dataset(["bad good"]), task=tokens)


def test_multi_label_targets_as_names_or_integers() -> None:
    words, numbers = as_dataset([["good", "bad"], []]), as_dataset([[1, 0, 1], [0, 0, 0]])
    for data in (words, numbers):
        found = reader(data, problem_type=SEVERAL)
        labels = read(found, data)
        assert labels == [[1.0, 0.0, 1.0], [0.0, 0.0, 0.0]] and all(type(x) is float for row in labels for x in row)
        with pytest.raises(DataError, match=r"several labels at once: set problem_type=\"multi_label_classification\""):
            reader(data)


@pytest.mark.parametrize("labels", [[[1.0, 0.0, 1.0], None], [[1.0, -100.0, 0.0], [0.0] * 3]], ids=str)
@pytest.mark.parametrize("problem", [SEVERAL, None])
def test_a_multi_label_row_cannot_be_ignored(labels: list[Any], problem: str | None) -> None:
    words = r"a head for several labels at once has no number that means 'no label'.*dataset\.filter.*alpha=1"
    with pytest.raises(DataError, match=words):
        reader(as_dataset(labels), problem_type=problem)
    found = reader(as_dataset(labels), problem_type=problem, needed=False)
    assert found(rows_of(labels)) == [{"input_ids": [1, 2, 3]}] * 2 and "left out" in found.remarks[0]


@pytest.mark.parametrize("one_hot", [False, True])
@pytest.mark.parametrize("kind", ["list", "Dataset"])
@pytest.mark.parametrize("needed", [True, False])
def test_rows_that_sum_to_one_require_a_declared_problem_type(kind: str, one_hot: bool, needed: bool) -> None:
    labels = [[0.0, 1.0, 0.0], [1.0, 0.0, 0.0]] if one_hot else [[0.2, 0.5, 0.3], [0.0, 0.1, 0.9]]
    data = KINDS[kind](labels)
    with pytest.raises(DataError, match=rf"add up to 1.*problem_type=\"{SINGLE}\" .*or problem_type=\"{SEVERAL}\""):
        reader(data, needed=needed)
    for problem in (SINGLE, SEVERAL):
        assert read(reader(data, problem_type=problem), data) == labels
    assert "alpha=0 trains as Trainer does" in reader(data, as_trainer=True).remarks[0]
    assert not reader(data, evaluates=True).remarks  # a few multi-label rows may also sum to one


def test_probabilities_may_have_missing_rows() -> None:
    data = as_dataset([[0.2, 0.5, 0.3], None])
    assert read(reader(data, problem_type=SINGLE), data) == [[0.2, 0.5, 0.3], [-100.0] * 3]


def test_rows_of_the_wrong_width_are_rejected() -> None:
    with pytest.raises(DataError, match=r"it has 2 numbers and the head 3 classes"):
        reader(as_dataset([[1.0, 1.0], [0.0, 1.0]]))


def test_regression_values() -> None:
    task = Regression()
    assert not reader(as_dataset([1, 2]), names=1, task=task).changes
    assert not reader(as_dataset([0.5, 2000.0]), names=1, task=task).changes
    for data in (as_dataset([0.5, None]), rows_of([0.5, float("nan")])):
        with pytest.raises(DataError, match=r"holds nothing \(example 1\): a head for regression has no number that"):
            reader(data, names=1, task=task)
    with pytest.raises(DataError, match=r"holds '0.5' \(example 0\): a head for regression learns numbers"):
        reader(as_dataset(["0.5"]), names=1, task=task)
    left_out = reader(as_dataset([0.5, None]), names=1, task=task, needed=False)
    assert left_out(rows_of([0.5, None])) == [{"input_ids": [1, 2, 3]}] * 2


def test_multiple_choice_labels() -> None:
    data = as_dataset([0, None, 3.0])
    assert read(reader(data, task=MultipleChoice()), data) == [0, -100, 3]
    with pytest.raises(DataError, match="the labels of this head are numbers"):
        reader(as_dataset(["b"]), task=MultipleChoice())


@pytest.mark.parametrize("task", [CausalLM(), Seq2Seq(), CTC(lambda x: x)], ids=lambda task: task.kind)
def test_token_id_labels_are_not_checked(task: Any) -> None:
    assert not reader(as_dataset([[1, 2], [3]], "labels"), task=task).changes
    with pytest.raises(DataError, match=r"holds 'hello' \(example 0\): the labels .*tokenizer\(text_target="):
        reader(as_dataset(["hello"], "labels"), task=task)
    with pytest.raises(DataError, match=rf"holds nothing \(example 1\): a {task.kind} head needs labels in every row"):
        reader(as_dataset([[1, 2], None], "labels"), task=task)


def test_missing_span_positions_raise() -> None:
    data = Dataset.from_dict({"start_positions": [1, None], "end_positions": [2, None]})
    with pytest.raises(DataError, match=r"'start_positions' of the training data holds nothing \(example 1\)"):
        reader(data, task=Span())


# Data that is only seen as it is collated.


def test_labels_of_a_stream_are_converted_in_the_collator() -> None:
    found = reader(STREAM)
    assert found.changes
    assert found([{"label": "good"}, {"label": None}]) == [{"label": 2}, {"label": -100}]
    with pytest.raises(DataError, match=r"'label' of the training data holds 'goo' \(example 1 of a batch\)"):
        found([{"label": "good"}, {"label": "goo"}])
    assert found(["no mapping"]) == ["no mapping"]
    rows = reader(STREAM, problem_type=SINGLE)([{"label": [0.2, 0.8, 0.0]}, {"label": None}])
    assert rows == [{"label": [0.2, 0.8, 0.0]}, {"label": [-100.0] * 3}]
    assert reader(STREAM)([{"input_ids": [1]}]) == [{"input_ids": [1]}]


def test_unusable_labels_are_dropped_if_they_have_no_weight() -> None:
    data = as_dataset(["good", "who knows"])
    found = reader(data, needed=False)
    assert found([data[0], data[1]]) == [{"input_ids": [1, 2, 3]}] * 2
    stream = reader(STREAM, needed=False)
    assert stream([{"label": "good", "a": 1}, {"label": "who", "a": 2}]) == [{"a": 1}, {"a": 2}]
