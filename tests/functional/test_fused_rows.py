"""The in-place softmax against one in longer numbers: large logits, long rows, −inf, NaN.

With u = 2⁻²⁴, m a row's largest logit and M its largest magnitude: a column's exponent is x · log₂e − m · log₂e. The
rounding of the last term is the same in every column, and falls out. That of the first is M u, where it is not fused
with the difference; that of the difference is |x − m| u; and log₂e is wrong by a fifth of u, which acts on |x − m|.
The sum has as much M u, and less of the rest, as its large terms have |x − m| near 0. Beside it 2ˣ, pairwise sums, the
reciprocal and the product add a few u each. In fp64 (u = 2⁻⁵³) x less the log of the normaliser is taken, of which the
rounding is that of a number like M.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from hf_distill.functional.fused.rows import softmax_

A_FEW = 8
LEAST = 1e-30  # of probabilities that are compared by their ratio


def exactly(rows: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Log-probabilities `[r v]` and the log of the normaliser `[r 1]`, in numpy's longest numbers."""
    x = rows.numpy().astype(np.longdouble)
    largest = x.max(-1, keepdims=True)
    log_normaliser = largest + np.log(np.exp(x - largest).sum(-1, keepdims=True))
    return x - log_normaliser, log_normaliser


def drawn(v: int, offset: float, spread: float, dtype: torch.dtype = torch.float32) -> Tensor:
    g = torch.Generator().manual_seed(v)
    return (offset + spread * torch.randn(3, v, generator=g, dtype=torch.float64)).to(dtype)


def fused(dtype: torch.dtype) -> bool:
    """Whether this processor multiplies and adds with one rounding: (1 + 2⁻¹²)² has a last bit that fp32 drops."""
    x = torch.full((64,), 1 + 2**-12, dtype=torch.float32)
    return dtype == torch.float32 and bool((torch.add(-(x * x), x, alpha=1 + 2**-12) != 0).all())


@pytest.mark.parametrize("spread", [0.0, 1.0, 60.0])
@pytest.mark.parametrize("offset", [0.0, 100.0, -100.0, 1000.0, -1000.0])
@pytest.mark.parametrize("v", [1, 7, 301, 40_000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_softmax_of_large_logits_and_long_rows(v: int, offset: float, spread: float, dtype: torch.dtype) -> None:
    rows = drawn(v, offset, spread, dtype)
    log_p, right = exactly(rows)
    x = rows.clone()
    found = softmax_(x)
    assert found.dtype == x.dtype == dtype and found.shape == (3, 1)

    u = torch.finfo(dtype).eps / 2
    given, once = rows.double().numpy(), 0.0 if fused(dtype) else 1.0
    size = np.abs(given).max(-1, keepdims=True)
    bound = u * (2 * once * size + 1.25 * np.abs(given - given.max(-1, keepdims=True)) + A_FEW)
    ratio = np.abs(x.numpy() / np.exp(log_p) - 1)
    likely = log_p > math.log(LEAST)
    assert (ratio <= bound)[likely].all()
    assert (x.numpy()[~likely] < 2 * LEAST).all()
    # One unit in the last place for the last rounding, and one for that of m · log₂e · ln 2 where it is not fused.
    assert (np.abs(found.numpy() - right) <= (1 + once) * 2 * u * (size + math.log(v) + 1)).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("offset", [0.0, 1000.0])
def test_blocked_columns_get_probability_0_and_have_no_effect(offset: float, dtype: torch.dtype) -> None:
    rows = drawn(301, offset, 3.0, dtype)
    blocked = torch.zeros_like(rows, dtype=torch.bool)
    blocked[0, ::2] = blocked[1, 1:] = blocked[2, -1] = True
    x = rows.masked_fill(blocked, -math.inf)
    found = softmax_(x)
    assert not x[blocked].any()
    for row, log_normaliser, given, gone in zip(x, found, rows, blocked, strict=True):
        log_p, right = exactly(given[~gone][None])
        close = 2e-6 if fused(dtype) else 5e-4 if dtype == torch.float32 else 1e-12
        assert row[~gone].numpy() == pytest.approx(np.exp(log_p)[0].astype(float), rel=close, abs=0.0)
        assert log_normaliser.item() == pytest.approx(float(right[0, 0]), rel=3e-7)
    assert x[1, 0] == 1.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_nan_stays_within_its_row(dtype: torch.dtype) -> None:
    rows = drawn(301, 0.0, 3.0, dtype)
    expected, found = rows.clone(), rows.clone()
    normalisers = softmax_(expected)
    found[1, 7] = math.nan
    log_normaliser = softmax_(found)
    assert found[1].isnan().all() and log_normaliser[1].isnan().all()
    for row in (0, 2):
        assert found[row].equal(expected[row]) and log_normaliser[row].equal(normalisers[row])


def test_writes_only_its_own_part_of_a_larger_block() -> None:
    whole = drawn(301, 0.0, 3.0)
    before, part = whole.clone(), whole[1:, 3:40]
    log_p, _ = exactly(part)
    softmax_(part)
    np.testing.assert_allclose(part.numpy(), np.exp(log_p).astype(float), rtol=2e-6)
    part.copy_(before[1:, 3:40])
    assert whole.equal(before)
