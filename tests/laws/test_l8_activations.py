"""L8 for activations: every setting of an objective, when changed, changes the loss."""

from __future__ import annotations

from typing import Any

import pytest

from hf_distill.objectives import OBJECTIVES
from tests.heads import HEADS
from tests.laws import measuring as m
from tests.laws.objective_rows import INSIDE, OBJECTIVE_ROWS, Case, walked

HEADS_OF_KNOBS = ("bert_tokens", "wav2vec2_ctc_mean", "vit_image_class")
KNOBS = [
    pytest.param(name, objective, knob, marks=pytest.mark.slow if name in HEADS_OF_KNOBS[1:] else ())
    for objective, row in OBJECTIVE_ROWS.items()
    for knob, changed in row.knobs.items()
    for name in ((changed.on,) if changed.on else HEADS_OF_KNOBS)
]
FIRST = [case for case in INSIDE if case.side is None and case == next(c for c in INSIDE if c[:2] == case[:2])]


def loss_of(name: str, objective: str, settings: Any, *, same_width: bool) -> float:
    teacher = m.wide_teacher_of(name, 16 if same_width else 24)
    distiller = m.inside_distiller(name, OBJECTIVES[objective](**settings), teacher=teacher)
    return distiller(m.deep_student_of(name), m.collated(name, HEADS[name].examples(4))).loss.item()


@pytest.mark.parametrize(("name", "objective", "knob"), KNOBS)
def test_each_setting_of_an_objective_changes_the_loss(name: str, objective: str, knob: str) -> None:
    changed, settings, same_width, _ = OBJECTIVE_ROWS[objective].knobs[knob]
    before = loss_of(name, objective, settings, same_width=same_width)
    after = loss_of(name, objective, {**settings, **changed}, same_width=same_width)
    assert abs(after - before) > 1e-3 * abs(before)
    if knob == "weight":
        assert after == pytest.approx(2 * before, rel=1e-12)


def test_a_shared_projection_is_one_matrix() -> None:
    """For several pairs of layers; for one pair it equals "auto"."""
    auto, shared = (
        m.inside_distiller("bert_tokens", OBJECTIVES["hidden"](layers="first_last", projection=kind))
        for kind in ("auto", "shared")
    )
    assert len(list(auto.learned.parameters())) == 2 and len(list(shared.learned.parameters())) == 1
    batch, student = m.collated("bert_tokens", HEADS["bert_tokens"].examples(4)), m.deep_student_of("bert_tokens")
    assert auto(student, batch).loss.item() != pytest.approx(shared(student, batch).loss.item(), rel=1e-3)


def test_the_seed_determines_initial_projections() -> None:
    def projection(**settings: Any) -> Any:
        distiller = m.inside_distiller("bert_tokens", OBJECTIVES["hidden"](), **settings)
        return next(iter(distiller.learned.parameters()))

    assert projection(seed=1).equal(projection(seed=1))
    assert not projection(seed=1).equal(projection(seed=2))


@pytest.mark.parametrize("case", walked(FIRST))
def test_schedules_of_weights_move_the_loss_with_progress(case: Case) -> None:
    distiller = m.inside_distiller(case.head, case.make(weight=lambda progress: 1.0 + 2 * progress))
    student, batch = m.deep_student_of(case.head), m.collated(case.head, HEADS[case.head].examples(2))
    start, end = (
        distiller(student, batch, distiller.begin_step([batch], progress=progress)) for progress in (0.0, 1.0)
    )
    assert start.loss.item() == pytest.approx(start.terms[case.objective].item())
    assert end.loss.item() == pytest.approx(3 * start.loss.item())
    assert end.terms[case.objective] == start.terms[case.objective]  # terms are reported without their weight


@pytest.mark.parametrize("objective", [name for name, row in OBJECTIVE_ROWS.items() if row.variants])
def test_weights_are_added_to_alphas_terms(objective: str) -> None:
    """loss = (1 - alpha) · labels + alpha · logits + weight · objective, without normalization."""
    name = "bert_tokens"
    distiller = m.inside_distiller(name, OBJECTIVES[objective](weight=3.0), alpha=0.25)
    found = distiller(m.deep_student_of(name), m.collated(name, HEADS[name].examples(4)))
    terms = {key: value.item() for key, value in found.terms.items()}
    assert set(terms) == {"labels", "logits", objective}
    expected = 0.75 * terms["labels"] + 0.25 * terms["logits"] + 3 * terms[objective]
    assert found.loss.item() == pytest.approx(expected, rel=1e-12)
