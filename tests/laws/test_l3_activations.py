"""L3 for activations: more padding changes neither value nor gradient; padded positions are never read."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from hf_distill.models.capture import AttentionRecord
from hf_distill.signals import ATTENTION, Signals
from tests.heads import HEADS
from tests.laws import measuring as m
from tests.laws.objective_rows import INSIDE, Case, walked

DIFFERENT = ("bert_tokens", "t5_seq2seq", "wav2vec2_ctc_mean")  # they count tokens, decoder positions, frames
PADDED = [case for case in INSIDE if HEADS[case.head].pads]


@pytest.mark.parametrize("case", walked(PADDED))
def test_more_padding_changes_nothing(case: Case) -> None:
    head, student = HEADS[case.head], m.deep_student_of(case.head)
    distiller, examples = m.distiller_for(case), head.examples(4)
    loss, gradient = m.step(distiller, student, [m.collated(case.head, examples)])
    padded_loss, padded = m.step(distiller, student, [m.collated(case.head, examples, head.longest + 9)])
    assert padded_loss == pytest.approx(loss, rel=1e-7)
    assert m.difference(padded, gradient) < 1e-6


@pytest.mark.parametrize("case", walked([case for case in INSIDE if case.variant in ("embeddings", "plain", "all")]))
def test_valid_positions_do_not_depend_on_labels(case: Case) -> None:
    """Every attended token counts, labelled or not; only a decoder needs labels, from which its inputs are made."""
    head = HEADS[case.head]
    if head.kind == "seq2seq":
        return
    distiller = m.distiller_for(case)
    with_labels, without = (
        m.step(distiller, m.deep_student_of(case.head), [m.collated(case.head, head.examples(4, labelled=labelled))])
        for labelled in (True, False)
    )
    assert with_labels[0] == without[0]
    assert torch.equal(with_labels[1], without[1])


def with_garbage(signals: Signals, keep: Tensor, garbage: float) -> Signals:
    """Put garbage into all activations at every position that does not count."""

    def spoil(what: str, value: Any) -> Any:
        if what != ATTENTION:
            return value.masked_fill(~keep[..., None], garbage)
        of_heads = ~keep[:, None, :, None]
        return dataclasses.replace(
            value, queries=value.queries.masked_fill(of_heads, garbage), keys=value.keys.masked_fill(of_heads, garbage)
        )

    return Signals(None, activations={read: spoil(read.what, value) for read, value in signals.activations.items()})


def with_gradient(signals: Signals) -> tuple[Signals, list[Tensor]]:
    """Return the same values as leaves."""
    inside: dict[Any, Any] = {}
    leaves = []
    for read, value in signals.activations.items():
        if isinstance(value, AttentionRecord):
            pair = [x.detach().clone().requires_grad_() for x in (value.queries, value.keys)]
            inside[read] = dataclasses.replace(value, queries=pair[0], keys=pair[1])
            leaves += pair
        else:
            inside[read] = value.detach().clone().requires_grad_()
            leaves.append(inside[read])
    return Signals(None, activations=inside), leaves


def measured(distiller: Any, case: Case, batch: Any, ours: Signals, theirs: Signals) -> tuple[float, int, list[Tensor]]:
    student, leaves = with_gradient(ours)
    found = distiller.objectives[case.objective](student, theirs, distiller.task, batch)
    found.value.backward()
    return found.value.item(), int(found.count), [x.grad for x in leaves]


@pytest.mark.parametrize("garbage", [float("nan"), float("inf"), 1e4], ids=["nan", "inf", "large"])
@pytest.mark.parametrize("case", walked([case for case in PADDED if case.head in DIFFERENT]))
def test_invalid_positions_are_never_read(case: Case, garbage: float) -> None:
    batch = m.collated(case.head, HEADS[case.head].examples(4))
    distiller = m.distiller_for(case)
    batch, ours, theirs = m.shown(distiller, case.head, batch)
    keep = distiller.objectives[case.objective]._positions.keep(batch)
    assert not keep.all()
    total, count, gradients = measured(distiller, case, batch, ours, theirs)
    found, found_count, found_gradients = measured(
        distiller, case, batch, *(with_garbage(signals, keep, garbage) for signals in (ours, theirs))
    )
    exact = case.objective != "attention"  # its products are summed in another order
    assert found_count == count
    assert found == total if exact else found == pytest.approx(total, rel=1e-12)
    for before, after in zip(gradients, found_gradients, strict=True):
        assert torch.equal(after, before) if exact else torch.allclose(after, before, rtol=1e-12, atol=1e-14)
