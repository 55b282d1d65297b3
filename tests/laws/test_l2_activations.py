"""L2 for activations: without valid positions every objective is 0 and finite, and backward works."""

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
    """Return the same batch without valid positions, or None if there is none, see `ALL_COUNT`."""
    if HEADS[case.head].kind == "seq2seq" and case.side is None:
        return {**batch, "labels": torch.full_like(batch["labels"], -100)}
    if "attention_mask" not in batch:
        return None
    mask = torch.zeros_like(batch["attention_mask"])
    if "input_values" in batch:
        mask[:, :3] = 1  # shorter than the first convolution, so there is no frame
    return {**batch, "attention_mask": mask}


SILENT = [case for case in INSIDE if silenced(case, HEADS[case.head].batch(1)) is not None]


def test_heads_without_silent_batches_are_the_stated_ones() -> None:
    assert {(case.head, case.side) for case in INSIDE} - {(case.head, case.side) for case in SILENT} == {
        ("vit_image_class", None),
        ("whisper_seq2seq", "encoder"),
    }


@pytest.mark.parametrize("case", walked(SILENT))
def test_no_valid_positions_give_zero_with_a_working_backward(case: Case) -> None:
    batch = silenced(case, m.collated(case.head, HEADS[case.head].examples(4)))
    distiller = m.distiller_for(case)
    assert distiller.begin_step([batch]).denominators[case.objective] == 0
    loss, gradient = m.step(distiller, m.deep_student_of(case.head), [batch])
    assert loss == 0.0
    assert not gradient.any()  # NaN is truthy


@pytest.mark.parametrize("case", walked([case for case in SILENT if case.head == "bert_tokens"]))
def test_a_silent_micro_batch_does_not_change_the_others(case: Case) -> None:
    head, student = HEADS[case.head], m.deep_student_of(case.head)
    distiller = m.distiller_for(case)
    spoken = m.collated(case.head, head.examples(4))
    silent: Any = silenced(case, m.collated(case.head, head.examples(4, seed=1)))
    loss, gradient = m.step(distiller, student, [spoken])
    both_loss, both_gradient = m.step(distiller, student, [silent, spoken])
    assert both_loss == pytest.approx(loss, rel=1e-9)
    assert m.difference(both_gradient, gradient) < 1e-9
