"""L1: for a student equal to its teacher, without dropout, the term and its gradient are 0."""

from __future__ import annotations

import pytest
import torch

from tests.heads import HEADS
from tests.laws import measuring as m
from tests.laws.conformance import CASES, DIVERGENCE_ROWS, walked

# The gradient of a sum of squares or logarithms at its minimum: rounding, times the rows and the weights.
ROUNDING = 1e-9


@pytest.mark.parametrize(("name", "divergence"), walked(CASES))
def test_equal_models_have_zero_loss_and_gradient(name: str, divergence: str) -> None:
    if DIVERGENCE_ROWS[divergence].not_zero_at_equality:
        return equal_and_one_hot(name, divergence)
    twin = m.new_student(name)
    distiller = m.distiller_of(name, divergence, teacher=twin, alpha=1.0, divergence_kwargs={})
    loss, gradient = m.step(distiller, m.student_of(name), [m.collated(name, HEADS[name].examples())])
    assert abs(loss) < ROUNDING
    if DIVERGENCE_ROWS[divergence].kinked:
        batch, logits, _ = m.read_logits(name)
        _, _, gradient = m.term(m.task_of(name), batch, logits, logits, divergence)
    assert gradient.norm() < ROUNDING * 100


def equal_and_one_hot(name: str, divergence: str) -> None:
    """A cross-entropy with the teacher's class is 0 at equality only if both models are certain."""
    batch, logits, _ = m.read_logits(name)
    certain = logits * 1e7
    total, count, gradient = m.term(m.task_of(name), batch, certain, certain, divergence)
    assert count > 0
    assert abs(total) < ROUNDING and gradient.abs().max() < ROUNDING
    unsure, _, _ = m.term(m.task_of(name), batch, logits, logits, divergence)
    assert unsure > 0.01


@pytest.mark.parametrize(("name", "divergence"), walked(CASES))
def test_different_models_have_nonzero_loss_and_gradient(name: str, divergence: str) -> None:
    """Otherwise the law above could hold because the term is always 0."""
    batch, student, teacher = m.read_logits(name)
    total, _, gradient = m.term(m.task_of(name), batch, student, teacher, divergence)
    assert total > 1e-3
    assert torch.isfinite(gradient).all() and gradient.norm() > 1e-4
