"""The fused loss where rounding or a slope could go wrong: small factors in fp16, long sums, finite differences.

The temperature (L5) is in test_fused_temperature.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from hf_distill.functional.fused import loss as fused
from hf_distill.functional.fused.inputs import Head, Terms
from tests.functional.test_fused_linear import EVERY, in_float64, plainly, rows_to_bytes, setting


def test_a_small_factor_does_not_vanish_in_fp16() -> None:
    """1e-7 · (q − p) of a row is below fp16's smallest number; a scaled loss brings it back."""
    case = setting(dtype=torch.float16, v=149, labels=False)
    case.terms = replace(case.terms, divergence_factor=1e-7)
    scaled = case.gradients(2.0**16 * case.run().loss)
    case.terms = replace(case.terms, divergence_factor=1e-7 * 2.0**16)
    for small, large in zip(scaled, case.gradients(case.run().loss), strict=True):
        assert large.abs().sum() > 0
        torch.testing.assert_close(small, large)


def test_the_sum_over_many_chunks_keeps_what_16_bits_would_lose() -> None:
    """1,024 equal rows in chunks of one: a running sum in bf16 stands still at 256 times one row's gradient."""
    row = torch.randn(1, 5, generator=torch.Generator().manual_seed(1)).bfloat16()
    weight = torch.randn(8, 5, generator=torch.Generator().manual_seed(2)).bfloat16().requires_grad_()
    labels, found = torch.zeros(1024, dtype=torch.long), []
    for n in (1, 1024):
        loss = fused.fused_linear_distillation(
            row.repeat(n, 1), Head(weight), teacher=None, terms=Terms(), labels=labels[:n], budget_bytes=16
        ).loss
        found.append(torch.autograd.grad(loss, weight)[0].float())
    torch.testing.assert_close(found[1], 1024 * found[0], rtol=1e-2, atol=0.0)


@pytest.mark.parametrize(("name", "settings"), EVERY)
def test_the_gradient_at_the_rows_is_rounded_no_more_often_than_with_whole_logits(
    name: str, settings: dict[str, Any]
) -> None:
    """Twice: at the logits, and the product. Once more would be a tenth to a quarter further from float64.

    Without labels, whose gradient at the logits the plain path rounds by itself.
    """
    case = setting(name, settings, n=201, v=149, temperature=3.0, dtype=torch.bfloat16, labels=False)
    exact = in_float64(case)
    (right, *_), (plain, *_) = (one.gradients(plainly(one)[0]) for one in (exact, case))
    ours, *_ = case.gradients(case.run(budget_bytes=rows_to_bytes(case, 32)).loss)
    errors = [(x.double() - right).norm() for x in (ours, plain)]
    assert errors[0] < 1.05 * errors[1]


@pytest.mark.parametrize(("name", "settings"), EVERY)
def test_gradient_by_finite_differences(name: str, settings: dict[str, Any]) -> None:
    """Central differences of the loss itself, along random directions through all three leaves."""
    case = setting(name, settings, n=3, v=4, bias=True, row_weights=True, softcap=4.0)
    leaves, gradients = case.leaves(), case.gradients(case.run().loss)
    for seed in range(3):
        g = torch.Generator().manual_seed(seed)
        steps = [1e-5 * torch.randn(x.shape, generator=g, dtype=torch.float64) for x in leaves]
        ends = []
        for sign in (1, -1):
            with torch.no_grad():
                for leaf, step in zip(leaves, steps, strict=True):
                    leaf.add_(sign * step)
                ends.append(case.run().loss.item())
                for leaf, step in zip(leaves, steps, strict=True):
                    leaf.sub_(sign * step)
        slope = sum((gradient * step).sum().item() for gradient, step in zip(gradients, steps, strict=True))
        assert (ends[0] - ends[1]) / 2 == pytest.approx(slope, rel=1e-5, abs=1e-12)
