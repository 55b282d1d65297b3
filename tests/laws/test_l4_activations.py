"""L4 for activations: accumulation changes neither the student's gradient nor that of learned projections.

Several processes: tests/trainer/test_two_processes.py.
"""

from __future__ import annotations

import pytest
import torch

from tests.heads import HEADS
from tests.laws import measuring as m
from tests.laws.objective_rows import APART, COUPLED, INSIDE, Case, walked
from tests.laws.test_l4_accumulation import split

LEARNS = ("hidden", "cosine")


@pytest.mark.parametrize("case", walked(APART))
def test_accumulation_changes_nothing(case: Case) -> None:
    student, distiller = m.deep_student_of(case.head), m.distiller_for(case)
    assert bool(distiller.learned) == (case.objective in LEARNS)  # so the gradient includes projections
    loss, gradient = m.step(distiller, student, split(case.head, 1))
    assert gradient.norm() > 1e-4
    for parts in (2, 4, 8) if case == first_of(case.objective) else (4,):
        found_loss, found = m.step(distiller, student, split(case.head, parts))
        assert m.difference(found, gradient) < 1e-6, f"{parts} micro-batches"
        assert found_loss == pytest.approx(loss, rel=1e-6)


def first_of(objective: str) -> Case:
    return next(case for case in INSIDE if case.objective == objective)


@pytest.mark.parametrize("case", walked([case for case in APART if case.head == "bert_tokens"]))
def test_the_projections_gradient_is_exact(case: Case) -> None:
    """Tested alone, because an error could be hidden by the student's larger gradient."""
    student, distiller = m.deep_student_of(case.head), m.distiller_for(case)
    if not distiller.learned:
        return
    found = []
    for parts in (1, 2, 8):
        m.step(distiller, student, split(case.head, parts))
        found.append(m.gradient_of(distiller.learned.module))
    assert found[0].norm() > 1e-2
    assert all(m.difference(gradient, found[0]) < 1e-9 for gradient in found[1:])


@pytest.mark.parametrize("case", walked([case for case in APART if case.head == "bert_tokens"]))
def test_a_mean_of_means_is_wrong_on_these_examples(case: Case) -> None:
    """Otherwise the law above would prove nothing."""
    student, distiller = m.deep_student_of(case.head), m.distiller_for(case)
    if case.variant in ("first", "last"):  # examples count once whatever their length, so 8 = 4 × 2 proves nothing
        return
    micro_batches = split(case.head, 4)
    _, gradient = m.step(distiller, student, micro_batches)
    of_means = sum((m.step(distiller, student, [batch])[1] for batch in micro_batches), torch.zeros_like(gradient))
    assert m.difference(of_means / 4, gradient) > 0.02


@pytest.mark.parametrize("case", walked(COUPLED))
def test_coupled_examples_give_the_example_weighted_mean_over_micro_batches(case: Case) -> None:
    """A known limit: it differs from the large batch's value."""
    head, student = HEADS[case.head], m.deep_student_of(case.head)
    distiller, examples = m.distiller_for(case), head.examples(8)
    parts = [m.collated(case.head, part) for part in (examples[:5], examples[5:])]
    loss, gradient = m.step(distiller, student, parts)
    alone = [m.step(distiller, student, [part]) for part in parts]
    shares = (5 / 8, 3 / 8)
    expected = sum(share * found for share, (_, found) in zip(shares, alone, strict=True))
    assert m.difference(gradient, expected) < 1e-6  # T5 and Llama compute their norms in fp32
    assert loss == pytest.approx(sum(share * one for share, (one, _) in zip(shares, alone, strict=True)), rel=1e-9)
    _, whole = m.step(distiller, student, [m.collated(case.head, examples)])
    assert m.difference(gradient, whole) > 0.01


@pytest.mark.parametrize("case", walked([case for case in INSIDE if case.head == "bert_tokens"]))
def test_couples_examples_is_correct(case: Case) -> None:
    """Compares the sum over a batch with that over its two halves."""
    distiller = m.distiller_for(case)
    objective = distiller.objectives[case.objective]
    totals = []
    for parts in (1, 2):
        signals = [m.shown(distiller, case.head, batch) for batch in split(case.head, parts)]
        totals.append(sum(objective(ours, theirs, distiller.task, b).value.item() for b, ours, theirs in signals))
    assert (abs(totals[1] - totals[0]) > 1e-3 * abs(totals[0])) == objective.couples_examples


ONE_OF_A_KIND = {head.kind: name for name, head in HEADS.items() if head.label_names}.values()


@pytest.mark.parametrize("name", list(ONE_OF_A_KIND))
def test_accumulation_is_exact_with_labels_and_logits(name: str) -> None:
    """All three kinds of term in one loss, each with its own count."""
    objectives = [
        next(c for c in APART if c.head == name and c.objective == one).make() for one in ("hidden", "relations")
    ]
    student, distiller = m.deep_student_of(name), m.inside_distiller(name, objectives, alpha=0.5)
    loss, gradient = m.step(distiller, student, split(name, 1))
    for parts in (4,):
        found_loss, found = m.step(distiller, student, split(name, parts))
        assert m.difference(found, gradient) < 1e-6, f"{parts} micro-batches"
        assert found_loss == pytest.approx(loss, rel=1e-6)
