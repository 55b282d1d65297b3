"""Sparse rows: merged outcomes and weighted samples against their definitions in float64, and draws of columns."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from hf_distill.functional import DIVERGENCES
from hf_distill.functional.sparse import (
    OUTCOME_DIVERGENCES,
    draw_columns,
    merge_repeats,
    sampled_forward_kl,
    student_outcomes,
    teacher_outcomes,
)


def merged_by_hand(log_p, ids):
    """By hand: row by row, python sums."""
    out = []
    for row, listed in zip(log_p.exp().tolist(), ids.tolist(), strict=True):
        known = [row[i] if i >= 0 else 0.0 for i in listed]
        rest = sum(p for i, p in enumerate(row) if i not in listed)
        out.append([*known, rest])
    return torch.tensor(out, dtype=torch.float64)


def rows(n=6, v=9, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, v, generator=g, dtype=torch.float64) * 2


def test_student_outcomes_merge_the_other_columns():
    q = rows()
    ids = q.topk(3).indices
    ids[0, 2] = -1
    ids[1] = -1
    got = student_outcomes(q, ids).softmax(-1)
    torch.testing.assert_close(got, merged_by_hand(q.log_softmax(-1), ids), rtol=1e-12, atol=1e-14)
    q.requires_grad_()
    (gradient,) = torch.autograd.grad(student_outcomes(q, ids)[1:2, :3].sum(), q)
    assert (gradient == 0).all()  # none is listed, so none is moved


@pytest.mark.parametrize("name", OUTCOME_DIVERGENCES)
def test_listing_all_columns_is_the_plain_divergence(name):
    q, p = rows(seed=1).requires_grad_(), rows(seed=2)
    ids = p.argsort(-1, descending=True)
    lp = p.log_softmax(-1).gather(-1, ids)
    f = DIVERGENCES[name]
    want = f(q, p)
    (gw,) = torch.autograd.grad(want.sum(), q)
    got = f(student_outcomes(q, ids), teacher_outcomes(lp, torch.full((6,), -torch.inf, dtype=torch.float64)))
    (gg,) = torch.autograd.grad(got.sum(), q)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(gg, gw, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("name", OUTCOME_DIVERGENCES)
def test_merged_divergence_is_bounded_and_its_gradient_moves_the_bucket_as_a_whole(name):
    q, p = rows(seed=1).requires_grad_(), rows(seed=2)
    ids = p.topk(3).indices
    log_p = p.log_softmax(-1)
    lp = log_p.gather(-1, ids)
    tail = (1 - lp.exp().sum(-1)).log()
    f = DIVERGENCES[name]
    got = f(student_outcomes(q, ids), teacher_outcomes(lp, tail))
    assert (got <= f(q, p) + 1e-12).all()
    (g,) = torch.autograd.grad(got.sum(), q)
    torch.testing.assert_close(g.sum(-1), torch.zeros(6, dtype=torch.float64), atol=1e-12, rtol=0)
    # within the tail the gradient is in proportion to the student's own probabilities
    share = g / q.softmax(-1)
    t = torch.ones_like(q, dtype=torch.bool).scatter(-1, ids, False)
    for r, m in zip(share, t, strict=True):
        assert (r[m].max() - r[m].min()).abs() < 1e-10
    assert torch.autograd.gradcheck(lambda x: f(student_outcomes(x, ids), teacher_outcomes(lp, tail)), q)
    # equality
    q2 = p.clone().requires_grad_()
    z = f(student_outcomes(q2, ids), teacher_outcomes(lp, tail))
    (g2,) = torch.autograd.grad(z.sum(), q2)
    assert z.abs().max() < 1e-12 and (name == "total_variation" or g2.abs().max() < 1e-8)


def test_student_outcomes_with_a_blocked_column():
    q = rows().clone()
    q[:, 4] = -torch.inf
    q.requires_grad_()
    ids = torch.tensor([[4, 0]] * 6)
    b = student_outcomes(q, ids)
    assert b[:, 0].eq(-torch.inf).all()
    v = DIVERGENCES["forward_kl"](
        b, teacher_outcomes(torch.tensor([[0.5, 0.25]] * 6).double().log(), torch.full((6,), 0.25).double().log())
    )
    v.sum().backward()
    assert torch.isfinite(q.grad).all() and torch.isfinite(v).all()
    e = DIVERGENCES["forward_kl"](
        student_outcomes(torch.zeros(0, 5), torch.zeros(0, 2, dtype=torch.long)), torch.zeros(0, 3)
    )
    assert e.shape == (0,)


def value_and_gradient(q, ids, lp, weights):
    q = q.detach().requires_grad_()
    value = sampled_forward_kl(q, ids, lp, weights)
    return value.detach(), torch.autograd.grad(value.sum(), q)[0]


def test_sampled_forward_kl_is_unbiased():
    """Exactly: the mean over every outcome of one draw, each as often as drawn. Proposals r ∝ p^0.5, weights p / r."""
    q, p = rows(seed=1).requires_grad_(), rows(seed=2)
    log_p = p.log_softmax(-1)
    want = DIVERGENCES["forward_kl"](q, p)
    (gw,) = torch.autograd.grad(want.sum(), q)
    proposal = (0.5 * log_p).softmax(-1)
    values, gradients = torch.zeros(6, dtype=torch.float64), torch.zeros_like(gw)
    for column in range(9):
        ids = torch.full((6, 1), column)
        weights = log_p.exp()[:, column, None] / proposal[:, column, None]
        value, gradient = value_and_gradient(q, ids, log_p[:, column, None], weights)
        values += proposal[:, column] * value
        gradients += proposal[:, column, None] * gradient
    torch.testing.assert_close(values, want.detach(), rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(gradients, gw, rtol=1e-12, atol=1e-13)


def test_sampled_forward_kl_skips_missing_and_blocked_columns():
    q, p = rows(seed=1), rows(seed=2)
    log_p = p.log_softmax(-1)
    ids, weights = p.topk(3).indices, torch.full((6, 3), 1 / 3, dtype=torch.float64)
    lp = log_p.gather(-1, ids)
    want = value_and_gradient(q, ids, lp, weights)
    padded = [torch.cat([x, torch.full((6, 2), fill, dtype=x.dtype)], -1) for x, fill in ((ids, -1), (lp, -torch.inf))]
    got = value_and_gradient(q, *padded, torch.cat([weights, torch.zeros(6, 2, dtype=torch.float64)], -1))
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-13, atol=1e-15)
    blocked = q.scatter(-1, ids[:, :1], -torch.inf)
    value, gradient = value_and_gradient(blocked, ids, lp, weights)
    rest = value_and_gradient(blocked, ids[:, 1:], lp[:, 1:], weights[:, 1:])
    assert torch.isfinite(value).all() and (gradient.gather(-1, ids[:, :1]) == 0).all()
    torch.testing.assert_close((value, gradient), rest, rtol=1e-13, atol=1e-15)


def uniforms(n, k, seed=0):
    return torch.rand(n, k, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("stratified", [True, False])
def test_draw_frequencies_match_the_weights(stratified):
    """Counts over 4000 rows of 5 draws against 5 · share: within 4.5 standard errors, of a binomial's 20000 draws.

    (Stratified draws vary less, so the same bound holds.) By normal tails 4.5 is passed once in 20000 columns.
    """
    weights = torch.tensor([3.0, 0.0, 1.0, 5.0, 0.5, 0.5, 0.0])
    share = (weights / weights.sum()).double()
    ids = draw_columns(weights.expand(4000, -1), uniforms(4000, 5), stratified=stratified)
    assert (ids[:, 1:] >= ids[:, :-1]).all()
    found = torch.bincount(ids.flatten(), minlength=7)
    assert found[1] == found[6] == 0
    assert ((found - 20000 * share).abs() <= 4.5 * (20000 * share * (1 - share)).sqrt()).all()
    each = (ids == 3).sum(1)  # half of the row, that is at least 1 and at most 3 of the 5 parts and what they share
    spread = each.double().var().item()
    assert spread == pytest.approx(5 * 0.5 * 0.5, rel=0.15) if not stratified else spread < 0.5


def test_stratified_draws_contain_each_column_that_fills_whole_parts():
    weights = torch.tensor([[0.1, 0.6, 0.3]])  # of ten parts 1 to 6 are the second's
    for row in uniforms(50, 10):
        ids = draw_columns(weights, row[None])[0]
        assert ids.tolist() == [0] + [1] * 6 + [2] * 3


@pytest.mark.parametrize("stratified", [True, False])
def test_long_rows_match_one_cumulative_sum(stratified):
    """The inverse of the cumulative sum in float64, column by column; blocks of columns without weight between."""
    weights = torch.rand(40, 1000, generator=torch.Generator().manual_seed(1)) ** 8
    weights[:, 100:500] = 0.0
    u = uniforms(40, 16)
    at = (torch.arange(16) + u) / 16 if stratified else u.sort(-1).values
    up_to = weights.double().cumsum(-1)
    expected = torch.searchsorted(up_to, at * up_to[:, -1:], right=True)
    found = draw_columns(weights, u, stratified=stratified)
    assert (found == expected).float().mean() > 0.99  # float32 sums of blocks: a draw at a border may fall to the next
    assert (weights.gather(-1, found) > 0).all() and (found[:, 1:] >= found[:, :-1]).all()


def test_draws_at_the_ends_of_a_row():
    """The smallest and the largest number there are; columns without weight at both ends; a row without any."""
    weights = torch.tensor([[0.0, 1e-30, 1.0, 1e-9, 0.0], [0.0] * 5, [1e30, 0.0, 0.0, 0.0, 0.0]])
    ends = torch.tensor([[0.0, 1 - 2.0**-53]], dtype=torch.float64).expand(3, -1)
    for stratified in (True, False):
        ids = draw_columns(weights, ends, stratified=stratified)
        assert ids[0].tolist() == [1, 3] and ids[1].tolist() == [4, 4] and ids[2].tolist() == [0, 0]


def test_merge_repeats_matches_a_count_by_hand():
    ids = draw_columns(torch.rand(30, 6, generator=torch.Generator().manual_seed(1)), uniforms(30, 9)).view(5, 6, 9)
    weights = torch.rand(5, 6, 9, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    found, sums = merge_repeats(ids, weights)
    for row, of_row, listed, total in zip(
        ids.view(-1, 9).tolist(), weights.view(-1, 9).tolist(), found.view(-1, 9).tolist(), sums.view(-1, 9).tolist(),
        strict=True,
    ):  # fmt: skip
        expected: Counter = Counter()
        for column, weight in zip(row, of_row, strict=True):
            expected[column] += weight
        assert listed == sorted(expected) + [-1] * (9 - len(expected))
        assert total == pytest.approx([expected[c] for c in sorted(expected)] + [0.0] * (9 - len(expected)))
