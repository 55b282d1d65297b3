"""L2: without kept rows a term is 0 and finite, and backward works."""

from __future__ import annotations

import math

import pytest
import torch

from tests.heads import HEADS, IGNORED
from tests.laws import measuring as m
from tests.laws.conformance import CASES, DIVERGENCE_ROWS, TASK_ROWS, walked

SILENT = [(name, divergence) for name, divergence in CASES if TASK_ROWS[HEADS[name].kind].silence]


@pytest.mark.parametrize(("name", "divergence"), walked(SILENT))
def test_no_kept_rows_give_zero_with_a_working_backward(name: str, divergence: str) -> None:
    head = HEADS[name]
    silence = TASK_ROWS[head.kind].silence
    assert silence is not None
    batch = silence(m.collated(name, head.examples(4)))
    # CTC's own loss is infinite for recordings too short for their labels; that is not this library's loss.
    alpha = 1.0 if head.kind == "ctc" else 0.5
    distiller = m.distiller_of(name, divergence, alpha=alpha, divergence_kwargs={})
    assert distiller.task.count(batch) == 0
    loss, gradient = m.step(distiller, m.student_of(name), [batch])
    assert loss == 0.0
    assert not gradient.any()  # NaN is truthy


@pytest.mark.parametrize(("name", "divergence"), walked(SILENT))
def test_a_silent_micro_batch_does_not_change_the_others(name: str, divergence: str) -> None:
    head = HEADS[name]
    silence = TASK_ROWS[head.kind].silence
    assert silence is not None
    alpha = 1.0 if head.kind == "ctc" else 0.5
    distiller = m.distiller_of(name, divergence, alpha=alpha)
    spoken, silent = m.collated(name, head.examples(4)), silence(m.collated(name, head.examples(4, seed=1)))
    loss, gradient = m.step(distiller, m.student_of(name), [spoken])
    both_loss, both_gradient = m.step(distiller, m.student_of(name), [silent, spoken])
    assert both_loss == pytest.approx(loss, rel=1e-9)
    assert m.difference(both_gradient, gradient) < 1e-9


@pytest.mark.parametrize("name", [name for name, head in HEADS.items() if head.may_ignore])
def test_unlabelled_examples_are_still_distilled(name: str) -> None:
    batch = m.collated(name, HEADS[name].examples(4))
    batch["labels"] = torch.full_like(batch["labels"], IGNORED)
    distiller, student = m.distiller_of(name), m.student_of(name)
    output = distiller(student, batch)
    assert output.terms["labels"] == 0
    assert output.terms["logits"] > 0.01
    student.zero_grad(set_to_none=True)
    output.loss.backward()
    gradient = m.gradient_of(student)
    assert math.isfinite(output.loss.item())
    assert torch.isfinite(gradient).all() and gradient.any()


@pytest.mark.parametrize("divergence", DIVERGENCE_ROWS)
def test_an_empty_batch_gives_zero(divergence: str) -> None:
    """Tasks that count every example have no rows only in an empty batch."""
    batch, student, teacher = m.read_logits("bert_single_label")
    nothing = {name: x[:0] for name, x in batch.items()}
    total, count, gradient = m.term(m.task_of("bert_single_label"), nothing, student[:0], teacher[:0], divergence)
    assert (total, count, gradient.numel()) == (0.0, 0, 0)
