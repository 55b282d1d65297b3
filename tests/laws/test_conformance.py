"""Every member of every catalogue has a row in the conformance tables, and every exception has a reason."""

from __future__ import annotations

import inspect

import pytest

from hf_distill import Distiller, SettingError
from hf_distill.functional import DIVERGENCES, PROPERTIES
from hf_distill.functional.features import DISTANCE_PROPERTIES, DISTANCES
from hf_distill.functional.similarity import SIMILARITIES, SIMILARITY_PROPERTIES
from hf_distill.objectives import OBJECTIVES
from hf_distill.schedules import SCHEDULES
from hf_distill.tasks import TASKS
from tests.heads import HEADS
from tests.laws import conformance as table
from tests.laws.objective_rows import OBJECTIVE_ROWS


@pytest.mark.parametrize(
    ("catalogue", "rows"),
    [
        (TASKS, table.TASK_ROWS),
        (DIVERGENCES, table.DIVERGENCE_ROWS),
        (OBJECTIVES, OBJECTIVE_ROWS),
        (SCHEDULES, table.SCHEDULE_ROWS),
    ],
    ids=["tasks", "divergences", "objectives", "schedules"],
)
def test_every_member_has_a_row(catalogue: dict, rows: dict) -> None:
    assert set(rows) == set(catalogue)


def test_every_task_has_a_test_head() -> None:
    assert {head.kind for head in HEADS.values()} == set(TASKS)


@pytest.mark.parametrize("name", DIVERGENCES)
def test_every_setting_of_a_divergence_has_a_second_value(name: str) -> None:
    row = table.DIVERGENCE_ROWS[name]
    knobs = inspect.signature(DIVERGENCES[name]).parameters.values()
    defaults = {knob.name: knob.default for knob in knobs if knob.kind is knob.KEYWORD_ONLY}
    assert set(row.knobs) == set(defaults)
    assert all(row.knobs[knob] != default for knob, default in defaults.items())


@pytest.mark.parametrize("kind", TASKS)
def test_every_setting_of_a_task_has_a_second_value_or_a_reason(kind: str) -> None:
    row = table.TASK_ROWS[kind]
    constructor = TASKS[kind].__init__
    knobs = set() if constructor is object.__init__ else set(inspect.signature(constructor).parameters) - {"self"}
    assert set(row.knobs) | set(row.not_knobs) == knobs


@pytest.mark.parametrize("kind", TASKS)
def test_every_task_has_silent_batches_or_a_reason(kind: str) -> None:
    row = table.TASK_ROWS[kind]
    assert (row.silence is None) == (row.all_rows_count is not None)


@pytest.mark.parametrize("name", DIVERGENCES)
def test_rows_agree_with_the_librarys_properties(name: str) -> None:
    row, stated = table.DIVERGENCE_ROWS[name], PROPERTIES[name]
    assert stated.zero_at_equality == (row.not_zero_at_equality is None)
    assert stated.couples_rows == bool(row.a_row_alone)
    assert stated.on_values == (name in table.VALUE_DIVERGENCES)
    assert stated.paper


@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_setting_of_an_objective_has_a_second_value_or_a_reason(name: str) -> None:
    row = OBJECTIVE_ROWS[name]
    if row.tested_elsewhere is not None:
        return
    knobs = set(inspect.signature(OBJECTIVES[name].__init__).parameters) - {"self"}
    assert set(row.knobs) | set(row.not_knobs) == knobs
    assert not set(row.knobs) & set(row.not_knobs)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_attributes_of_objectives_agree_with_the_table(name: str) -> None:
    row = OBJECTIVE_ROWS[name]
    assert bool(row.variants) == (row.tested_elsewhere is None)
    for make in row.variants.values():
        objective = make()
        assert type(objective) is OBJECTIVES[name] and objective.name == name
        assert objective.couples_examples == (row.couples_examples is not None)
        assert objective.needs_same_inputs


@pytest.mark.parametrize(
    ("catalogue", "stated"), [(DISTANCES, DISTANCE_PROPERTIES), (SIMILARITIES, SIMILARITY_PROPERTIES)]
)
def test_every_distance_and_similarity_is_a_variant(catalogue: dict, stated: dict) -> None:
    rows = OBJECTIVE_ROWS["hidden" if catalogue is DISTANCES else "similarity"]
    assert set(catalogue) <= set(rows.variants)
    assert set(rows.at_equality) == {name for name in catalogue if not getattr(stated[name], "zero_at_equality", True)}


@pytest.mark.parametrize("kind", TASKS)
def test_tasks_agree_with_the_table_on_value_heads(kind: str) -> None:
    assert TASKS[kind].on_values == (kind in table.ON_VALUES)


@pytest.mark.parametrize(("name", "divergence"), table.REFUSED)
def test_a_divergence_of_distributions_raises_on_values(name: str, divergence: str) -> None:
    head = HEADS[name]
    with pytest.raises(SettingError, match=f"'{divergence}' compares distributions, but {head.kind} predicts values"):
        Distiller(head.make(1), head.make(2), divergence=divergence)


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedules_have_the_values_of_the_table(name: str) -> None:
    settings, values = table.SCHEDULE_ROWS[name]
    schedule = SCHEDULES[name](*settings)
    assert [schedule(p) for p in (0.0, 0.5, 1.0)] == pytest.approx(values)
