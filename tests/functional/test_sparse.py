"""Rows of k + 1 outcomes against the definition, in float64."""

import pytest
import torch

from hf_distill.functional import DIVERGENCES
from hf_distill.functional.sparse import OUTCOME_DIVERGENCES, sampled_forward_kl, student_outcomes, teacher_outcomes


def merged(log_p, ids):
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


def test_merge():
    q = rows()
    ids = q.topk(3).indices
    ids[0, 2] = -1
    ids[1] = -1
    got = student_outcomes(q, ids).softmax(-1)
    torch.testing.assert_close(got, merged(q.log_softmax(-1), ids), rtol=1e-12, atol=1e-14)
    q.requires_grad_()
    (gradient,) = torch.autograd.grad(student_outcomes(q, ids)[1:2, :3].sum(), q)
    assert (gradient == 0).all()  # none is listed, so none is moved


@pytest.mark.parametrize("name", OUTCOME_DIVERGENCES)
def test_all_columns(name):
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
def test_bound_equality_gradient(name):
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


def test_blocked():
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


def test_weighted_samples_are_forward_kl_on_average():
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


def test_weighted_samples_where_nothing_is_listed_or_the_student_blocks():
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
