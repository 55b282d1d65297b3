"""L2 inside: where no position counts every objective's term is 0 and finite, and backward works."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.heads import HEADS
from tests.laws import measuring as m
from tests.laws.conformance import Batch
from tests.laws.objective_rows import INSIDE, Case, walked

ALL_COUNT = "nothing masks it: every patch, and every frame of Whisper's 30 seconds, counts"


def silenced(case: Case, batch: Batch) -> Batch | None:
    """The same batch without a position that counts; None: there is none such, see `ALL_COUNT`."""
    if HEADS[case.head].kind == "seq2seq" and case.side is None:
        return {**batch, "labels": torch.full_like(batch["labels"], -100)}
    if "attention_mask" not in batch:
        return None
    mask = torch.zeros_like(batch["attention_mask"])
    if "input_values" in batch:
        mask[:, :3] = 1  # shorter than the first convolution, so there is no frame
    return {**batch, "attention_mask": mask}


SILENT = [case for case in INSIDE if silenced(case, HEADS[case.head].batch(1)) is not None]


def test_what_cannot_be_silent() -> None:
    assert {(case.head, case.side) for case in INSIDE} - {(case.head, case.side) for case in SILENT} == {
        ("vit_image_class", None),
        ("whisper_seq2seq", "encoder"),
    }


@pytest.mark.parametrize("case", walked(SILENT))
def test_no_position_is_zero_with_a_backward(case: Case) -> None:
    batch = silenced(case, m.collated(case.head, HEADS[case.head].examples(4)))
    distiller = m.distiller_for(case)
    assert distiller.begin_step([batch]).denominators[case.objective] == 0
    loss, gradient = m.step(distiller, m.deep_student_of(case.head), [batch])
    assert loss == 0.0
    assert not gradient.any()  # NaN counts as something


@pytest.mark.parametrize("case", walked([case for case in SILENT if case.head == "bert_tokens"]))
def test_a_silent_micro_batch_changes_nothing_for_the_others(case: Case) -> None:
    head, student = HEADS[case.head], m.deep_student_of(case.head)
    distiller = m.distiller_for(case)
    spoken = m.collated(case.head, head.examples(4))
    silent: Any = silenced(case, m.collated(case.head, head.examples(4, seed=1)))
    loss, gradient = m.step(distiller, student, [spoken])
    both_loss, both_gradient = m.step(distiller, student, [silent, spoken])
    assert both_loss == pytest.approx(loss, rel=1e-9)
    assert m.difference(both_gradient, gradient) < 1e-9
