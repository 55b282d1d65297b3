"""L7: a vocabulary head with additional padded columns gives the same number as one without."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from hf_distill import Distiller, ModelTeacher
from hf_distill.tasks import TASKS
from tests.heads import HEADS, VOCABULARY
from tests.laws import measuring as m
from tests.laws.conformance import CASES, DIVERGENCE_ROWS, TASK_ROWS, walked
from tests.tiny_tokenizers import tokenizer

WITH_VOCABULARY = [case for case in CASES if TASK_ROWS[HEADS[case[0]].kind].not_widened is None]


def widened(name: str, seed: int, width: int) -> Any:
    """Return the model of that seed with rows of noise after its vocabulary."""
    narrow, wide = HEADS[name].make(seed).double(), HEADS[name].make(seed + 100, vocab_size=width).double()
    values = narrow.state_dict()
    with torch.no_grad():
        for key, value in wide.state_dict().items():
            value[tuple(slice(size) for size in values[key].shape)] = values[key]
    return wide


def test_padded_heads_agree_with_the_table() -> None:
    assert {k for k, row in TASK_ROWS.items() if row.not_widened is None} == {
        kind for kind, task in TASKS.items() if task.matched_by == "vocabulary"
    }


@pytest.mark.parametrize(("name", "divergence"), walked(WITH_VOCABULARY))
def test_padded_columns_of_the_teacher_change_nothing(name: str, divergence: str) -> None:
    batch, student = m.collated(name, HEADS[name].examples()), m.student_of(name)
    found = []
    for width in (VOCABULARY, VOCABULARY + 8):
        teacher = ModelTeacher(widened(name, 2, width), processing_class=tokenizer(VOCABULARY))
        distiller = Distiller(
            student,
            teacher,
            divergence=divergence,
            divergence_kwargs=DIVERGENCE_ROWS[divergence].a_row_alone,
            processing_class=tokenizer(VOCABULARY),
        )
        found.append(m.step(distiller, student, [batch]))
    assert found[1][0] == pytest.approx(found[0][0], rel=1e-12)
    assert m.difference(found[1][1], found[0][1]) < 1e-9


@pytest.mark.parametrize("name", sorted({name for name, _ in WITH_VOCABULARY}))
def test_padded_columns_of_both_models_change_nothing(name: str) -> None:
    """The heads are padded to different widths. (The model's own loss on labels does include its padding.)"""
    batch = m.collated(name, HEADS[name].examples())
    found = []
    for widths in ((VOCABULARY, VOCABULARY), (VOCABULARY + 3, VOCABULARY + 8)):
        student = widened(name, 1, widths[0])
        teacher = ModelTeacher(widened(name, 2, widths[1]), processing_class=tokenizer(VOCABULARY))
        distiller = Distiller(student, teacher, alpha=1.0, processing_class=tokenizer(VOCABULARY))
        found.append(distiller(student, batch).loss.item())
    assert found[1] == pytest.approx(found[0], rel=1e-12)
