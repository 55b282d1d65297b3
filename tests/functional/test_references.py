"""Each divergence against its numpy reference, blocked columns included; gradients by finite differences."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from hf_distill.functional import DIVERGENCES, forward_kl, mean_squared_error, reverse_kl
from tests.functional import references

ALONE = {"dist": {"intra_weight": 0.0}}
SETTINGS: list[tuple[str, dict[str, Any]]] = [
    *((name, ALONE.get(name, {})) for name in DIVERGENCES),
    ("jensen_shannon", {"beta": 0.1}),
    ("jensen_shannon", {"beta": 0.9}),
    ("skewed_forward_kl", {"skew": 0.5}),
    ("skewed_forward_kl", {"skew": 0.0}),
    ("skewed_reverse_kl", {"skew": 0.9}),
    ("decoupled", {"target_weight": 2.0, "others_weight": 0.5}),
]
EVERY = [pytest.param(name, settings, id=f"{name}{list(settings.values())}") for name, settings in SETTINGS]


def rows(n: int = 7, v: int = 6, *, spread: float = 2.0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    drawn = spread * torch.randn(2, n, v, generator=generator, dtype=torch.float64)
    return drawn[0], drawn[1]


def of_reference(name: str, student: Tensor, teacher: Tensor, settings: dict[str, Any]) -> list[float]:
    known = {k: v for k, v in settings.items() if k != "intra_weight"}
    return [references.A_ROW[name](s.numpy(), t.numpy(), **known) for s, t in zip(student, teacher, strict=True)]


def test_every_divergence_has_a_reference() -> None:
    assert set(references.A_ROW) == set(DIVERGENCES)


@pytest.mark.parametrize("spread", [0.01, 2.0, 30.0])
@pytest.mark.parametrize(("name", "settings"), EVERY)
def test_value(name: str, settings: dict[str, Any], spread: float) -> None:
    if name == "dist" and spread == 30.0:
        spread = 10.0  # beyond, whole rows round to one-hot, where no correlation is defined
    student, teacher = rows(spread=spread)
    found = DIVERGENCES[name](student, teacher, **settings)
    assert found.shape == (7,) and found.dtype == torch.float64
    assert found.tolist() == pytest.approx(of_reference(name, student, teacher, settings), rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("target", [0, 3, -100])
def test_decoupled_with_a_label(target: int) -> None:
    student, teacher = rows()
    found = DIVERGENCES["decoupled"](student, teacher, torch.full((7,), target))
    expected = [references.decoupled(s.numpy(), t.numpy(), target) for s, t in zip(student, teacher, strict=True)]
    assert found.tolist() == pytest.approx(expected, rel=1e-9)


def test_dist_down_the_columns() -> None:
    student, teacher = rows()
    both = DIVERGENCES["dist"](student, teacher, inter_weight=0.5, intra_weight=2.0)
    down = references.intra(student.numpy(), teacher.numpy())
    across = of_reference("dist", student, teacher, {})
    assert both.tolist() == pytest.approx([0.5 * x + 2 * down for x in across], rel=1e-9)


def blocked_rows() -> tuple[Tensor, Tensor, Tensor]:
    """With −inf in the student's rows, the teacher's, both, and in other columns in every row."""
    student, teacher = rows()
    for row, column in ((0, 1), (1, 5), (2, 0), (4, 2), (4, 3)):
        student[row, column] = -torch.inf
    for row, column in ((1, 2), (2, 0), (3, 4), (5, 5), (5, 0)):
        teacher[row, column] = -torch.inf
    return student, teacher, torch.isinf(student) | torch.isinf(teacher)


@pytest.mark.parametrize(("name", "settings"), EVERY)
def test_a_blocked_column_is_as_if_it_were_not_there(name: str, settings: dict[str, Any]) -> None:
    student, teacher, blocked = blocked_rows()
    expected = []
    for s, t, gone in zip(student, teacher, blocked, strict=True):
        expected += of_reference(name, s[~gone][None], t[~gone][None], settings)
    student.requires_grad_()
    found = DIVERGENCES[name](student, teacher, **settings)
    assert found.tolist() == pytest.approx(expected, rel=1e-9)
    found.sum().backward()
    assert torch.isfinite(student.grad).all()
    assert not student.grad[blocked].any()


@pytest.mark.parametrize(("name", "settings"), EVERY)
def test_gradient_by_finite_differences(name: str, settings: dict[str, Any]) -> None:
    student, teacher = rows(n=4, v=5)
    student.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: DIVERGENCES[name](x, teacher, **settings), (student,))


def test_gradient_of_the_whole_of_dist() -> None:
    student, teacher = rows(n=4, v=5)
    student.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: DIVERGENCES["dist"](x, teacher), (student,))


@pytest.mark.parametrize("name", [name for name in DIVERGENCES if name != "dist"])
def test_gradient_with_blocked_columns_by_finite_differences(name: str) -> None:
    """Of the columns that are left: −inf cannot be moved by a small step."""
    student, teacher, blocked = blocked_rows()
    free = torch.zeros_like(student).masked_fill(blocked, 0.0).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: DIVERGENCES[name](student + x, teacher), (free,))


def test_gradients_by_hand() -> None:
    student, teacher = rows()
    q, p = student.softmax(-1), teacher.softmax(-1)
    for divergence, expected in (
        (forward_kl, q - p),
        (reverse_kl, q * ((q / p).log() - (q * (q / p).log()).sum(-1, keepdim=True))),
        (mean_squared_error, 2 * (student - teacher) / student.shape[-1]),
    ):
        leaf = student.clone().requires_grad_()
        divergence(leaf, teacher).sum().backward()
        assert torch.allclose(leaf.grad, expected, rtol=1e-9, atol=1e-12)


def test_the_references_themselves_on_known_numbers() -> None:
    """By hand: p = (3/4, 1/4), q = (1/2, 1/2)."""
    p, q = np.log([0.75, 0.25]), np.log([0.5, 0.5])
    assert references.forward_kl(q, p) == pytest.approx(0.75 * np.log(1.5) + 0.25 * np.log(0.5))
    assert references.reverse_kl(q, p) == pytest.approx(0.5 * np.log(2 / 3) + 0.5 * np.log(2))
    assert references.total_variation(q, p) == pytest.approx(0.25)
    assert references.hard(q, p) == pytest.approx(np.log(2))
