"""L5: at temperatures far above the logits, the gradient of a term does not depend on T, as it includes T^p.

For every task, with whole logits. The fused loss, with its handwritten backward, is in
tests/functional/test_fused_temperature.py; finite differences of everything else are in tests/functional too.
"""

from __future__ import annotations

import pytest

from hf_distill.functional import PROPERTIES
from tests.laws import measuring as m
from tests.laws.conformance import CASES, DIVERGENCE_ROWS, TWO_COLUMNS, walked


@pytest.mark.parametrize(("name", "divergence"), walked(CASES))
def test_gradient_is_independent_of_a_high_temperature(name: str, divergence: str) -> None:
    batch, student, teacher = m.read_logits(name)
    task = m.task_of(name)
    gradients = [
        m.term(task, batch, student, teacher, divergence, temperature=t, **DIVERGENCE_ROWS[divergence].a_row_alone)[2]
        for t in (1e3, 4e3)
    ]
    if name in TWO_COLUMNS and DIVERGENCE_ROWS[divergence].no_gradient_on_two_columns:
        assert all(gradient.norm() < 1e-3 for gradient in gradients)
        return
    assert gradients[0].norm() > 1e-4
    assert m.difference(gradients[1], gradients[0]) < 0.01


@pytest.mark.parametrize("divergence", [name for name, p in PROPERTIES.items() if not p.softens])
def test_unsoftened_divergences_ignore_the_temperature(divergence: str) -> None:
    batch, student, teacher = m.read_logits("bert_single_label")
    task = m.task_of("bert_single_label")
    cold = m.term(task, batch, student, teacher, divergence, temperature=1.0)
    hot = m.term(task, batch, student, teacher, divergence, temperature=7.0)
    assert cold[0] == hot[0]
    assert cold[2].equal(hot[2])


@pytest.mark.parametrize("name", ["bert_regression", "bert_embedding"])
def test_values_are_not_softened(name: str) -> None:
    batch, student, teacher = m.read_logits(name)
    cold = m.term(m.task_of(name), batch, student, teacher, None, temperature=1.0)
    hot = m.term(m.task_of(name), batch, student, teacher, None, temperature=7.0)
    assert cold[0] == hot[0]
