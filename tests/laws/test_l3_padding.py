"""L3: more padding, or another value in a row that is not kept, changes neither the value nor the gradient."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hf_distill.functional import PROPERTIES
from tests.heads import HEADS
from tests.laws import measuring as m
from tests.laws.conformance import CASES, DIVERGENCE_ROWS, TASK_ROWS, Batch, walked

PADDED = [case for case in CASES if HEADS[case[0]].pads]
WITH_OTHER_ROWS = [case for case in CASES if TASK_ROWS[HEADS[case[0]].kind].silence]


@pytest.mark.parametrize(("name", "divergence"), walked(PADDED))
def test_more_padding_changes_nothing(name: str, divergence: str) -> None:
    head = HEADS[name]
    # Span QA's loss in transformers includes padded positions in its softmax, so only the divergence is tested there.
    alpha = 1.0 if head.labels_see_padding or not head.label_names else 0.5
    # Even a divergence that couples rows must not couple them with padding, so its defaults are used here.
    distiller = m.distiller_of(name, divergence, alpha=alpha, divergence_kwargs={})
    examples, student = head.examples(), m.student_of(name)
    loss, gradient = m.step(distiller, student, [m.collated(name, examples)])
    padded_loss, padded_gradient = m.step(distiller, student, [m.collated(name, examples, head.longest + 9)])
    assert padded_loss == pytest.approx(loss, rel=1e-7)
    assert m.difference(padded_gradient, gradient) < 1e-6


# The length of a decoder follows from its labels or inputs, so seq2seq always has one of them.
UNLABELLED = [name for name, head in HEADS.items() if head.pads and head.kind != "seq2seq"]


@pytest.mark.parametrize("name", UNLABELLED)
def test_more_padding_changes_nothing_without_labels(name: str) -> None:
    head, student, distiller = HEADS[name], m.student_of(name), m.distiller_of(name, alpha=1.0)
    examples = head.examples(labelled=False)
    assert not set(head.label_names) & set(examples[0])
    loss, gradient = m.step(distiller, student, [m.collated(name, examples)])
    padded_loss, padded_gradient = m.step(distiller, student, [m.collated(name, examples, head.longest + 9)])
    assert loss > 1e-3
    assert padded_loss == pytest.approx(loss, rel=1e-7)
    assert m.difference(padded_gradient, gradient) < 1e-6


def test_the_labels_term_of_span_qa_depends_on_padding() -> None:
    """A known limit: it is transformers' own loss, as in `Trainer`. The divergence does not depend on padding."""
    examples = HEADS["bert_span"].examples()
    distiller = m.distiller_of("bert_span")
    short, long = (
        distiller(m.student_of("bert_span"), m.collated("bert_span", examples, pad_to)).terms for pad_to in (None, 20)
    )
    assert abs(short["labels"] - long["labels"]) > 0.1
    assert short["logits"].item() == pytest.approx(long["logits"].item(), rel=1e-12)


@pytest.mark.parametrize("labelled", [True, False])
def test_more_left_padding_changes_nothing(labelled: bool) -> None:
    """For the divergence: in transformers' loss the last padded position predicts the first real token.

    With Llama, whose positions are relative: left padding moves absolute positions.
    """
    name = "llama_causal_lm"
    distiller, student = m.distiller_of(name, alpha=1.0), m.student_of(name)
    right = m.collated(name, HEADS[name].examples(labelled=False))
    if labelled:  # the first token too
        right["labels"] = right["input_ids"].masked_fill(right["attention_mask"] == 0, -100)
    expected, gradient = m.step(distiller, student, [right])
    left = {key: x.clone() for key, x in right.items()}
    for row, length in enumerate(right["attention_mask"].sum(-1).tolist()):
        for x in left.values():
            x[row] = x[row].roll(x.shape[1] - length)
    fill = {"input_ids": 0, "attention_mask": 0, "labels": -100}
    for batch in (left, {key: torch.nn.functional.pad(x, (5, 0), value=fill[key]) for key, x in left.items()}):
        loss, found = m.step(distiller, student, [batch])
        assert loss == pytest.approx(expected, rel=1e-5)  # rotary positions are computed in fp32
        assert m.difference(found, gradient) < 1e-4


@pytest.mark.parametrize("garbage", [float("nan"), float("inf"), 1e4], ids=["nan", "inf", "large"])
@pytest.mark.parametrize(("name", "divergence"), walked(WITH_OTHER_ROWS))
def test_rows_that_are_not_kept_are_never_read(name: str, divergence: str, garbage: float) -> None:
    task = m.task_of(name)
    batch, student, teacher = m.read_logits(name)
    other = ~kept_positions(name, batch, student)
    assert other.any()
    total, count, gradient = m.term(task, batch, student, teacher, divergence)
    spoilt = [x.masked_fill(other, garbage) for x in (student, teacher)]
    found, found_count, found_gradient = m.term(task, batch, *spoilt, divergence)
    assert (found, found_count) == (total, count)  # bit for bit
    assert torch.equal(found_gradient, gradient)
    assert not gradient.masked_select(other).any()


def kept_positions(name: str, batch: Batch, logits: Tensor) -> Tensor:
    """Return bool `[b t 1]`: the positions of the rows that count, found by selecting numbered positions."""
    task = m.task_of(name)
    leading = logits.shape[:-1]
    numbers = torch.arange(leading.numel()).view(*leading, 1)
    kept = torch.zeros(leading.numel(), dtype=torch.bool)
    kept[task.select(numbers, batch).flatten()[task.kept_rows(batch)]] = True
    return kept.view(*leading, 1)


@pytest.mark.parametrize("divergence", DIVERGENCE_ROWS)
def test_couples_rows_is_correct(divergence: str) -> None:
    """Compares a row's result alone and among other rows. With the table's settings rows are never coupled."""
    batch, student, teacher = m.read_logits("bert_single_label")
    task = m.task_of("bert_single_label")
    one = {name: x[:1] for name, x in batch.items()}
    two = {name: x[1:] for name, x in batch.items()}

    def together_and_apart(**settings: float) -> tuple[float, float]:
        whole, _, _ = m.term(task, batch, student, teacher, divergence, **settings)
        first, _, _ = m.term(task, one, student[:1], teacher[:1], divergence, **settings)
        rest, _, _ = m.term(task, two, student[1:], teacher[1:], divergence, **settings)
        return whole, first + rest

    whole, apart = together_and_apart()
    assert (abs(whole - apart) > 1e-3) == PROPERTIES[divergence].couples_rows
    whole, apart = together_and_apart(**DIVERGENCE_ROWS[divergence].a_row_alone)
    assert whole == pytest.approx(apart, rel=1e-12)
