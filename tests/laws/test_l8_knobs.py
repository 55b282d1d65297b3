"""L8: every setting, when changed, changes the loss."""

from __future__ import annotations

import pytest

from hf_distill.functional import PROPERTIES
from hf_distill.tasks import TASKS
from tests.heads import HEADS
from tests.laws import measuring as m
from tests.laws.conformance import CASES, DIVERGENCE_ROWS, ON_VALUES, TASK_ROWS, TWO_COLUMNS, walked

KNOBS = [(name, divergence, knob) for name, divergence in CASES for knob in DIVERGENCE_ROWS[divergence].knobs]
SOFTENED = [(n, d) for n, d in CASES if PROPERTIES[d].softens and HEADS[n].kind not in ON_VALUES]
TASK_KNOBS = [(name, knob, value) for name, head in HEADS.items() for knob, value in TASK_ROWS[head.kind].knobs.items()]


@pytest.mark.parametrize(("name", "divergence", "knob"), walked(KNOBS))
def test_each_setting_of_a_divergence_changes_the_loss(name: str, divergence: str, knob: str) -> None:
    row = DIVERGENCE_ROWS[divergence]
    batch, student, teacher = m.read_logits(name)
    before, _, gradient_before = m.term(m.task_of(name), batch, student, teacher, divergence)
    settings = {knob: row.knobs[knob]}
    after, _, gradient_after = m.term(m.task_of(name), batch, student, teacher, divergence, **settings)
    if name in TWO_COLUMNS and knob in row.blind_on_two_columns:
        assert after == pytest.approx(before, rel=1e-12)
        return
    assert abs(after - before) > 1e-4 * abs(before)
    assert m.difference(gradient_after, gradient_before) > 1e-4 or row.no_gradient_on_two_columns


@pytest.mark.parametrize(("name", "divergence"), walked(SOFTENED))
def test_temperature_changes_the_loss(name: str, divergence: str) -> None:
    batch, task = m.collated(name, HEADS[name].examples()), m.task_of(name)
    losses = [
        m.distiller_of(name, divergence, temperature=t, task=task, divergence_kwargs={})(m.student_of(name), batch)
        for t in (1.0, 3.0)
    ]
    before, after = (found.loss.item() for found in losses)
    assert abs(after - before) > 1e-6 * abs(before)


@pytest.mark.parametrize("name", [name for name, head in HEADS.items() if head.label_names])
def test_alpha_changes_the_loss(name: str) -> None:
    batch, student = m.collated(name, HEADS[name].examples()), m.student_of(name)
    by_alpha = {alpha: m.distiller_of(name, alpha=alpha)(student, batch) for alpha in (0.0, 0.3, 0.7, 1.0)}
    losses = [found.loss.item() for found in by_alpha.values()]
    assert len(set(losses)) == 4
    labels, logits = by_alpha[0.3].terms["labels"].item(), by_alpha[0.3].terms["logits"].item()
    assert losses == pytest.approx([labels, 0.7 * labels + 0.3 * logits, 0.3 * labels + 0.7 * logits, logits])
    assert set(by_alpha[0.0].terms) == {"labels"} and set(by_alpha[1.0].terms) == {"logits"}


@pytest.mark.parametrize(("name", "knob", "value"), TASK_KNOBS)
def test_each_setting_of_a_task_changes_the_loss(name: str, knob: str, value: str) -> None:
    batch, student = m.collated(name, HEADS[name].examples()), m.student_of(name)
    changed = TASKS[HEADS[name].kind](**{knob: value})
    before = m.distiller_of(name)(student, batch).terms["logits"].item()
    after = m.distiller_of(name, task=changed)(student, batch).terms["logits"].item()
    assert abs(after - before) > 1e-4 * abs(before)


@pytest.mark.parametrize("name", HEADS)
def test_schedules_move_the_loss_with_progress(name: str) -> None:
    labels = bool(HEADS[name].label_names)
    batch, student = m.collated(name, HEADS[name].examples()), m.student_of(name)
    distiller = m.distiller_of(
        name,
        alpha=(lambda progress: 0.2 + 0.6 * progress) if labels else 1.0,
        temperature=lambda progress: 1.0 + 3 * progress,
    )
    losses = {distiller(student, batch, distiller.begin_step([batch], progress=p)).loss.item() for p in (0.0, 0.5, 1.0)}
    moves = labels or HEADS[name].kind not in ON_VALUES
    assert len(losses) == (3 if moves else 1)
