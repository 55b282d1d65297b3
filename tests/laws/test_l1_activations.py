"""L1 for activations: for equal models each objective is 0, or the value in its row; its gradient is 0."""

from __future__ import annotations

from typing import Any

import pytest

from hf_distill.signals import Signals
from tests.heads import HEADS
from tests.laws import measuring as m
from tests.laws.objective_rows import INSIDE, OBJECTIVE_ROWS, Case, walked

ROUNDING = 1e-9


@pytest.mark.parametrize("case", walked(INSIDE))
def test_equal_models_have_the_stated_loss_and_zero_gradient(case: Case) -> None:
    if case.variant in OBJECTIVE_ROWS[case.objective].at_equality:
        return equal_and_as_stated(case)
    student = m.deep_student_of(case.head)
    settings = {"layers": [(0, 0), (1, 1)]} if case.variant in ("pairs", "values") else {}
    if case.variant == "swapped":  # crossed heads are not equal
        settings["heads"] = (0, 1)
    distiller = m.inside_distiller(case.head, case.make(**settings), teacher=m.new_deep_student(case.head))
    assert not distiller.learned  # equal widths need no projection
    loss, gradient = m.step(distiller, student, [m.collated(case.head, HEADS[case.head].examples(4))])
    assert abs(loss) < ROUNDING
    assert gradient.norm() < ROUNDING * 100


def equal_and_as_stated(case: Case) -> None:
    """Not 0, and with a kink: rounding would have its full slope, so both models get the same bits."""
    distiller = m.inside_distiller(case.head, case.make(), teacher=m.new_deep_student(case.head))
    batch, ours, _ = m.shown(distiller, case.head, m.collated(case.head, HEADS[case.head].examples(4)))
    leaves = {read: x.clone().requires_grad_() for read, x in ours.activations.items()}
    objective: Any = distiller.objectives[case.objective]
    found = objective(Signals(None, activations=leaves), ours, distiller.task, batch)
    found.value.backward()
    expected, _ = OBJECTIVE_ROWS[case.objective].at_equality[case.variant]
    assert (found.value / found.count).item() == pytest.approx(expected * len(leaves), rel=1e-12)
    assert all(x.grad.abs().max() < ROUNDING for x in leaves.values())


@pytest.mark.parametrize("case", walked(INSIDE))
def test_different_models_have_nonzero_loss_and_gradient(case: Case) -> None:
    """Otherwise the law above could hold because the term is always 0."""
    batch = m.collated(case.head, HEADS[case.head].examples(4))
    loss, gradient = m.step(m.distiller_for(case), m.deep_student_of(case.head), [batch])
    assert loss > 2e-5
    assert gradient.isfinite().all() and gradient.norm() > 1e-4
