"""The sorted distance of two distributions: numbers by hand, a slow reference, and what it does not see."""

from __future__ import annotations

import numpy as np
import torch

from hf_distill.functional.divergences import sorted_distance


def slow(student: list[float], teacher: list[float]) -> float:
    """Boizard et al. 2024, section 3: the Wasserstein-1 distance in closed form, a number at a time."""
    q, p = (sorted(np.exp(np.array(row)) / np.exp(np.array(row)).sum(), reverse=True) for row in (student, teacher))
    longest = max(len(q), len(p))
    q, p = ([*row, *[0.0] * (longest - len(row))] for row in (q, p))
    return float(sum(abs(a - b) for a, b in zip(q, p, strict=True)))


def rows(v: int, seed: int) -> torch.Tensor:
    return 2 * torch.randn(6, v, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_it_is_the_papers_formula_for_vocabularies_of_any_two_sizes() -> None:
    for v, w in ((7, 7), (5, 9), (9, 5)):
        student, teacher = rows(v, 1), rows(w, 2)
        expected = [slow(q, p) for q, p in zip(student.tolist(), teacher.tolist(), strict=True)]
        torch.testing.assert_close(sorted_distance(student, teacher).tolist(), expected)


def test_the_gradient_is_that_of_finite_differences_and_0_at_equality() -> None:
    student, teacher = rows(5, 3).requires_grad_(), rows(7, 4)
    assert torch.autograd.gradcheck(sorted_distance, (student, teacher))
    for v in (5, 33, 1000):  # widths that fill no vector, and several
        student = rows(v, 3).requires_grad_()
        found = sorted_distance(student, student.detach()[:, torch.randperm(v)])
        (gradient,) = torch.autograd.grad(found.sum(), student)
        # A kink: one bit between two equal probabilities would be a gradient as large as any.
        assert found.abs().max() == 0 and gradient.abs().max() == 0


def test_names_of_columns_and_columns_that_cannot_be_do_not_matter() -> None:
    student, teacher = rows(6, 5), rows(6, 6)
    found = sorted_distance(student, teacher)
    torch.testing.assert_close(sorted_distance(student[:, torch.randperm(6)], teacher), found)
    never = torch.full((6, 2), -torch.inf, dtype=torch.float64)
    torch.testing.assert_close(sorted_distance(student, torch.cat([teacher, never], 1)), found)
    one, other = torch.tensor([[50.0, 0.0]]), torch.zeros(1, 200)
    assert 1.98 < sorted_distance(one, other).item() < 2  # the largest that it can be is 2
