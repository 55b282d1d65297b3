"""Other inputs of the fused loss than hidden rows: the teacher's logits with −inf, sparse targets, or no teacher."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from hf_distill.functional import DIVERGENCES, PROPERTIES
from hf_distill.functional.fused.inputs import Head, TeacherHidden, TeacherLogits, TeacherSparse, Terms, fusable
from hf_distill.functional.fused.loss import fused_linear_distillation
from hf_distill.functional.sparse import OUTCOME_DIVERGENCES, sampled_forward_kl, student_outcomes, teacher_outcomes
from tests.functional.test_fused_linear import EVERY, FAMILY, compare, logits_of, setting


def given_logits(name: str = "forward_kl", settings: dict[str, Any] | None = None, **options: Any) -> Any:
    case = setting(name, settings, **options)
    assert isinstance(case.teacher, TeacherHidden)
    case.teacher = TeacherLogits(logits_of(case.teacher.hidden, case.teacher.head).detach())
    return case


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(("name", "settings"), EVERY)
def test_given_logits_match_the_plain_path_and_are_not_changed(
    name: str, settings: dict[str, Any], dtype: torch.dtype
) -> None:
    case = given_logits(name, settings, dtype=dtype, padding=(0, 2))
    before = case.teacher.logits.clone()
    compare(case, rtol=1e-9 if dtype == torch.float64 else 1e-4, atol=1e-11 if dtype == torch.float64 else 2e-5)
    assert torch.equal(case.teacher.logits, before)


@pytest.mark.parametrize(("name", "settings"), EVERY)
def test_blocked_columns_on_either_side(name: str, settings: dict[str, Any]) -> None:
    """−inf in some teacher logits and in the student's bias, a column that neither model can predict."""
    case = given_logits(name, settings, bias=True)
    for row, column in ((0, 1), (2, 0), (3, 4), (5, 5), (5, 0)):
        case.teacher.logits[row, column] = -math.inf
    with torch.no_grad():
        case.head.bias[8] = -math.inf
    case.labels = replace(case.labels, ids=torch.tensor([1, -100, 3, 4, 0, 5, 7]))
    compare(case)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_nan_in_a_teacher_row_counts_only_if_its_weight_is_not_0(bad: float) -> None:
    for name in fusable():
        case = given_logits(name)
        case.teacher.logits[3, 1] = bad
        found = case.run()
        assert not torch.isfinite(found.loss) and not torch.isfinite(found.divergence_rows[3])
        assert torch.isfinite(found.divergence_rows[torch.arange(7) != 3]).all()
        weights = torch.ones(7, dtype=torch.float64)
        weights[3] = 0.0
        found = case.run(row_weights=weights)
        assert torch.isfinite(found.loss)
        assert all(torch.isfinite(gradient).all() for gradient in case.gradients(found.loss))


def test_equal_heads_and_rows_give_0() -> None:
    rows = torch.randn(5, 4, requires_grad=True)
    head = Head(torch.randn(300, 4, requires_grad=True), torch.randn(300))
    teacher = TeacherHidden(rows.detach(), Head(head.weight.detach(), head.bias))
    for name, settings in (case.values for case in FAMILY):
        loss = fused_linear_distillation(rows, head, teacher=teacher, terms=Terms(name, settings, temperature=2.0)).loss
        gradients = torch.autograd.grad(loss, (rows, head.weight))
        assert abs(loss.item()) < 1e-6
        assert max(gradient.abs().max().item() for gradient in gradients) < 1e-6


def test_labels_alone() -> None:
    case = setting(bias=True, smoothing=0.2)
    case.teacher = None
    compare(case)
    assert case.run().divergence_rows is None and case.run().divergence_total == 0


def coarse(rows: Tensor, ids: Tensor) -> Tensor:
    """`[n v]` logits to `[n k + 1]`: the listed columns, and the log of the sum of the others'."""
    listed = torch.zeros_like(rows, dtype=torch.bool).scatter(1, ids, True)
    return torch.cat((rows.gather(1, ids), rows.masked_fill(listed, -math.inf).logsumexp(-1, keepdim=True)), 1)


@pytest.mark.parametrize("k", [1, 3, 10, 11])
@pytest.mark.parametrize("name", OUTCOME_DIVERGENCES)
def test_sparse_matches_the_divergence_of_merged_outcomes(name: str, k: int) -> None:
    """At k = v it is that of all columns. No target is passed, as the labels' ids are not outcomes."""
    case = given_logits(name, labels=False, bias=True, row_weights=True)
    t, logits = case.terms.temperature, case.teacher.logits
    ids = logits.topk(k).indices
    expected_outcomes = coarse(logits / t, ids)
    case.teacher = TeacherSparse(ids, logits.gather(1, ids), expected_outcomes[:, -1])
    found = case.run()
    student = logits_of(case.hidden, case.head) / t
    ours = coarse(student, ids) if k < 11 else student.gather(1, ids)
    expected = DIVERGENCES[name](ours, expected_outcomes[:, : ours.shape[1]])
    total = (expected * case.row_weights).sum()
    loss = 0.7 * t ** PROPERTIES[name].temperature_power * total
    torch.testing.assert_close(found.loss, loss, rtol=1e-9, atol=1e-12)
    for mine, plain in zip(case.gradients(found.loss), case.gradients(loss), strict=True):
        torch.testing.assert_close(mine, plain, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", [*OUTCOME_DIVERGENCES, "samples"])
def test_sparse_rows_of_unequal_length_match_the_plain_path(name: str, dtype: torch.dtype) -> None:
    """L6: rows that list 3, 2, 1 and no columns, beside labels, at sizes that chunks do not divide."""
    divergence = "forward_kl" if name == "samples" else name
    case = setting(divergence, n=13, v=301, dtype=dtype, row_weights=True, bias=True)
    t, full = case.terms.temperature, torch.float32 if dtype == torch.bfloat16 else dtype
    teacher = case.teacher
    assert isinstance(teacher, TeacherHidden)
    log_p = (logits_of(teacher.hidden, teacher.head).to(full) / t).log_softmax(-1)
    top = log_p.topk(3)
    none = torch.arange(3) >= 3 - (torch.arange(13) % 4)[:, None]
    ids, listed = top.indices.masked_fill(none, -1), top.values.masked_fill(none, -math.inf)
    tail = torch.log1p(-listed.exp().sum(-1))
    weights = None if name != "samples" else listed.exp() + 0.1 * ~none
    case.teacher = TeacherSparse(ids, listed * t, tail, weights)
    found = case.run(budget_bytes=5 * 301 * case.hidden.element_size())

    student = logits_of(case.hidden, case.head).to(full)
    of_labels = F.cross_entropy(student, case.labels.ids, reduction="none") * case.labels.weights
    if weights is None:
        rows = DIVERGENCES[divergence](student_outcomes(student / t, ids), teacher_outcomes(listed, tail))
    else:
        rows = sampled_forward_kl(student / t, ids, listed, weights)
    power = t ** PROPERTIES[divergence].temperature_power
    loss = 0.3 * of_labels.sum() + 0.7 * power * (rows * case.row_weights).sum()
    close = {"rtol": 1e-9, "atol": 1e-11}
    if dtype != torch.float64:
        close = {"rtol": 1e-4, "atol": 2e-5} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 5e-3}
    torch.testing.assert_close(found.loss, loss, rtol=min(close["rtol"], 1e-4), atol=0.0)
    torch.testing.assert_close(found.divergence_rows, rows.detach(), **close)
    for mine, plain in zip(case.gradients(found.loss), case.gradients(loss), strict=True):
        torch.testing.assert_close(mine, plain, **close)


def test_head_dtype_sets_the_dtype_of_products() -> None:
    """A teacher that stays in fp32 under autocast; and, without autocast, a head in another dtype than its rows."""
    case = setting(dtype=torch.float32, n=9, v=149, labels=False)
    teacher = case.teacher
    assert isinstance(teacher, TeacherHidden)
    given = TeacherLogits(logits_of(teacher.hidden, teacher.head))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        case.teacher = replace(teacher, head=replace(teacher.head, dtype=torch.float32))
        named = case.run().divergence_rows
        case.teacher = given
        torch.testing.assert_close(case.run().divergence_rows, named, rtol=1e-5, atol=1e-6)
        case.teacher = teacher
        assert (case.run().divergence_rows - named).abs().max() > 1e-4
    case.hidden, case.head = case.hidden.detach().bfloat16().float(), Head(case.head.weight.detach())
    rows = case.run().divergence_rows
    case.hidden, case.head = case.hidden.bfloat16(), replace(case.head, dtype=torch.float32)
    torch.testing.assert_close(case.run().divergence_rows, rows)


def test_sparse_log_probabilities_without_a_tail() -> None:
    case = given_logits("forward_kl", temperature=1.0)
    log_p = case.teacher.logits.log_softmax(-1)
    top = log_p.topk(3)
    whole = TeacherSparse(top.indices, top.values, coarse(log_p, top.indices)[:, -1])
    case.teacher = whole
    expected = case.run()
    case.teacher = replace(whole, tail=None)
    torch.testing.assert_close(case.run().loss, expected.loss, rtol=1e-9, atol=0.0)
    case.teacher = TeacherSparse(top.indices, top.values.exp().div(top.values.exp().sum(-1, keepdim=True)).log())
    assert torch.isfinite(case.run().loss)  # the probabilities sum to 1: the tail is a rounding error


def test_autocast_gives_fp32_gradients() -> None:
    case = setting(dtype=torch.float32, n=40, v=149, bias=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = case.run()
        student = F.linear(case.hidden, case.head.weight, case.head.bias)
        assert student.dtype == torch.bfloat16
    gradients = case.gradients(found.loss)
    exact = case.gradients(case.run().loss)
    for gradient, right in zip(gradients, exact, strict=True):
        assert gradient.dtype == torch.float32
        assert 0 < (gradient - right).norm() / right.norm() < 0.02


def test_second_backward_raises_and_tied_weight_gets_both_gradients() -> None:
    weight = torch.randn(6, 4, dtype=torch.float64, requires_grad=True)
    hidden = 2 * weight[:3]  # as embeddings
    labels = torch.tensor([1, 2, 5])
    loss = fused_linear_distillation(hidden, Head(weight), teacher=None, terms=Terms(), labels=labels).loss
    plain = F.cross_entropy(hidden @ weight.T, labels, reduction="sum")
    (expected,) = torch.autograd.grad(plain, weight, retain_graph=True)
    (found,) = torch.autograd.grad(loss, weight, retain_graph=True)
    torch.testing.assert_close(found, expected)
    with pytest.raises(RuntimeError, match="released its gradients in its first backward"):
        loss.backward()
