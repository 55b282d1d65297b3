"""Rows of classification, token and span heads, and which of them count: by hand."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from hf_distill import DataError, SettingError
from hf_distill.tasks import Classification, MultipleChoice, Regression, Span, TokenClassification
from hf_distill.vocabulary import HeadAlignment

T, F = True, False


def classification(problem_type: str | None = None, num_labels: int = 3) -> Classification:
    return Classification(SimpleNamespace(problem_type=problem_type, num_labels=num_labels))


def read(
    task: Any, logits: Tensor, batch: dict[str, Any], columns: HeadAlignment | None = None, **outputs: Tensor
) -> Tensor:
    return task.read({"logits": logits, **outputs}, batch, columns or HeadAlignment(), teacher=False)


def test_single_label_has_one_row_per_example_with_or_without_labels() -> None:
    task, logits = classification(), torch.randn(3, 3)
    batch = {"input_ids": torch.ones(3, 5, dtype=torch.long), "labels": torch.tensor([2, -100, 0])}
    assert torch.equal(task.select(read(task, logits, batch), batch), logits)
    assert task.keep(batch) is None
    assert (task.rows(batch), task.count(batch), task.label_count(batch)) == (3, 3, 2)
    assert task.targets(batch).tolist() == [2, -100, 0]
    assert task.targets({"input_ids": batch["input_ids"]}) is None


@pytest.mark.parametrize(
    ("problem_type", "labels", "several"),
    [
        (None, torch.tensor([0, 1]), False),
        (None, torch.tensor([[1.0, 0.0, 1.0], [0.0, 0.0, 1.0]]), True),
        ("multi_label_classification", torch.tensor([[1, 0, 1], [0, 0, 1]]), True),
        ("single_label_classification", torch.tensor([[1.0, 0.0, 1.0]]), False),
        ("multi_label_classification", None, True),
        (None, None, False),
    ],
)
def test_multi_label_is_inferred_from_problem_type_and_labels(
    problem_type: str | None, labels: Any, several: bool
) -> None:
    assert classification(problem_type).is_multi_label({"labels": labels}) is several


def test_multi_label_has_one_bernoulli_row_per_label() -> None:
    task = classification("multi_label_classification")
    logits = torch.tensor([[1.0, -2.0, 0.5], [0.0, 3.0, -1.0]])
    batch = {"input_ids": torch.ones(2, 4, dtype=torch.long), "labels": torch.tensor([[1.0, 0, 1], [0, 0, 1]])}
    rows = task.select(read(task, logits, batch), batch)
    assert rows.shape == (6, 2)
    assert torch.allclose(rows.softmax(-1)[:, 0], logits.sigmoid().flatten())
    assert (task.rows(batch), task.count(batch), task.label_count(batch)) == (6, 6, 2)
    assert task.targets(batch) is None


@pytest.mark.parametrize(
    "task", [classification("multi_label_classification"), Regression()], ids=["multi_label", "value"]
)
def test_ignored_labels_raise_where_they_would_be_trained_as_values(task: Any) -> None:
    labels = (
        torch.tensor([[0.5, 1.0], [-100.0, 1.0]]) if isinstance(task, Classification) else torch.tensor([0.5, -100])
    )
    with pytest.raises(DataError, match=r"example 1 of the batch has label -100.*alpha=1"):
        task.check_labels({"labels": labels})
    task.check_labels({"labels": labels[:1]})


def test_alignment_selects_columns_of_both_models() -> None:
    task, logits = classification(), torch.tensor([[0.0, 1.0, 2.0]])
    columns = HeadAlignment(student=2, teacher=(2, 0))
    outputs = {"logits": logits}
    assert task.read(outputs, {}, columns, teacher=False).tolist() == [[0.0, 1.0]]
    assert task.read(outputs, {}, columns, teacher=True).tolist() == [[2.0, 0.0]]


def test_multiple_choice_has_one_row_per_question() -> None:
    task, logits = MultipleChoice(), torch.randn(2, 4)
    batch = {"input_ids": torch.ones(2, 4, 7, dtype=torch.long), "labels": torch.tensor([3, 0])}
    assert torch.equal(task.select(read(task, logits, batch), batch), logits)
    assert (task.count(batch), task.label_count(batch)) == (2, 2)
    assert task.targets(batch).tolist() == [3, 0]


def test_regression_has_one_row_of_values_per_example() -> None:
    task = Regression()
    batch = {"input_ids": torch.ones(2, 4, dtype=torch.long), "labels": torch.tensor([0.5, -0.5])}
    assert read(task, torch.tensor([[1.0], [2.0]]), batch).tolist() == [[1.0], [2.0]]
    assert read(task, torch.tensor([1.0, 2.0]), batch).tolist() == [[1.0], [2.0]]  # some heads squeeze the last axis
    assert (task.count(batch), task.label_count(batch)) == (2, 2)


TAGGED = {
    "input_ids": torch.tensor([[5, 6, 7, 0], [5, 6, 7, 8]]),
    "attention_mask": torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]]),
    "labels": torch.tensor([[-100, 1, -100, -100], [-100, 2, 0, -100]]),
}


@pytest.mark.parametrize(
    ("rows", "labelled", "kept"),
    [
        ("labelled", True, [F, T, F, F, F, T, T, F]),
        ("attended", True, [T, T, T, F, T, T, T, T]),
        ("labelled", False, [T, T, T, F, T, T, T, T]),
    ],
)
def test_token_rows_that_count(rows: str, labelled: bool, kept: list[bool]) -> None:
    task, logits = TokenClassification(rows=rows), torch.randn(2, 4, 3)
    batch = TAGGED if labelled else {k: v for k, v in TAGGED.items() if k != "labels"}
    assert task.keep(batch).tolist() == kept
    assert (task.rows(batch), task.count(batch)) == (8, sum(kept))
    assert torch.equal(task.select(logits, batch), logits.reshape(8, 3))
    assert task.kept_rows(batch).tolist() == [i for i, keep in enumerate(kept) if keep]
    if labelled:
        assert task.label_count(batch) == 3
        assert task.targets(batch).tolist() == [-100, 1, -100, -100, -100, 2, 0, -100]


def test_tokens_without_mask_and_labels_all_count() -> None:
    assert TokenClassification().keep({"input_ids": torch.ones(1, 3)}).tolist() == [T, T, T]
    with pytest.raises(DataError, match="the positions that count are unknown"):
        TokenClassification().keep({"something": torch.ones(1, 3)})


def test_an_unknown_choice_of_rows_raises() -> None:
    with pytest.raises(SettingError, match=r"rows='all': allowed are 'labelled' and 'attended'"):
        TokenClassification(rows="all")


SPAN = {
    "input_ids": torch.tensor([[5, 6, 7, 0], [5, 6, 7, 8], [5, 6, 0, 0]]),
    "attention_mask": torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1], [1, 1, 0, 0]]),
    "start_positions": torch.tensor([1, 0, 3]),  # the last is on padding
    "end_positions": torch.tensor([2, 4, 1]),  # the second is outside the input
}


def test_spans_have_two_rows_per_example_over_attended_positions() -> None:
    task, start, end = Span(), torch.randn(3, 4), torch.randn(3, 4)
    logits = task.read({"start_logits": start, "end_logits": end}, SPAN, HeadAlignment(), teacher=False)
    rows = task.select(logits, SPAN)
    assert rows.shape == (6, 4)
    assert torch.equal(rows[0, :3], start[0, :3]) and torch.equal(rows[1, :3], end[0, :3])
    assert torch.equal(rows[2], start[1])
    assert torch.isinf(rows[0, 3:]).all() and torch.isinf(rows[4:, 2:]).all()


def test_spans_outside_the_text_do_not_count() -> None:
    task = Span()
    assert task.keep(SPAN).tolist() == [T, T, T, F, F, T]
    assert (task.rows(SPAN), task.count(SPAN)) == (6, 4)
    assert task.targets(SPAN).tolist() == [1, 2, 0, -100, -100, 1]
    # transformers ignores only positions beyond the padded input
    assert task.label_count(SPAN) == 5
    negative = {**SPAN, "start_positions": torch.tensor([-1, 0, 0])}
    assert task.keep(negative).tolist()[0] is F


def test_spans_without_positions_all_count() -> None:
    batch = {k: v for k, v in SPAN.items() if not k.endswith("positions")}
    assert Span().keep(batch) is None
    assert Span().count(batch) == 6
    assert Span().targets(batch) is None
    assert not Span().has_labels(batch) and Span().has_labels(SPAN)


def test_span_positions_may_be_a_column_vector() -> None:
    batch = {
        **SPAN,
        "start_positions": SPAN["start_positions"][:, None],
        "end_positions": SPAN["end_positions"][:, None],
    }
    assert Span().keep(batch).tolist() == Span().keep(SPAN).tolist()
