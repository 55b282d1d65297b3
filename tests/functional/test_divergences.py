"""Divergences against numpy references, by finite differences, and by their limits, bounds and invariances."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from hf_distill import SettingError
from hf_distill.functional import DIVERGENCES, PROPERTIES, forward_kl, mean_squared_error, reverse_kl
from hf_distill.functional.divergences import sorted_distance
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
def test_value_matches_the_reference(name: str, settings: dict[str, Any], spread: float) -> None:
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
def test_blocked_columns_are_left_out(name: str, settings: dict[str, Any]) -> None:
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


def test_gradient_of_dist_with_both_parts() -> None:
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


def test_references_on_known_numbers() -> None:
    """By hand: p = (3/4, 1/4), q = (1/2, 1/2)."""
    p, q = np.log([0.75, 0.25]), np.log([0.5, 0.5])
    assert references.forward_kl(q, p) == pytest.approx(0.75 * np.log(1.5) + 0.25 * np.log(0.5))
    assert references.reverse_kl(q, p) == pytest.approx(0.5 * np.log(2 / 3) + 0.5 * np.log(2))
    assert references.total_variation(q, p) == pytest.approx(0.25)
    assert references.hard(q, p) == pytest.approx(np.log(2))


LOW = (torch.bfloat16, torch.float16)


def call(name: str, student: Tensor, teacher: Tensor, **settings: Any) -> Tensor:
    return DIVERGENCES[name](student, teacher, **settings)


@pytest.mark.parametrize("name", DIVERGENCES)
@pytest.mark.parametrize("side", ["student", "teacher", "both"])
def test_fully_blocked_rows_do_not_give_nan(name: str, side: str) -> None:
    student, teacher = rows()
    if side != "teacher":
        student[2] = -torch.inf
    if side != "student":
        teacher[2] = -torch.inf
    student.requires_grad_()
    found = call(name, student, teacher)
    assert torch.isfinite(found).all()
    found.sum().backward()
    assert torch.isfinite(student.grad).all()
    assert not student.grad[2].any()


@pytest.mark.parametrize("name", DIVERGENCES)
def test_a_single_live_column_does_not_give_nan(name: str) -> None:
    student, teacher = rows(v=3)
    student[0, 0], teacher[0, 2] = -torch.inf, -torch.inf
    student.requires_grad_()
    found = call(name, student, teacher)
    found.sum().backward()
    assert torch.isfinite(found).all() and torch.isfinite(student.grad).all()


@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("name", DIVERGENCES)
def test_low_precision_is_computed_in_fp32(name: str, dtype: torch.dtype) -> None:
    student, teacher = (x.to(dtype) for x in rows(v=50, spread=6.0))
    found = call(name, student, teacher)
    assert found.dtype == torch.float32
    assert torch.equal(found, call(name, student.float(), teacher.float()))
    assert torch.equal(call(name, student, teacher.float()), found)  # each side on its own
    leaf = student.clone().requires_grad_()
    call(name, leaf, teacher).sum().backward()
    assert leaf.grad.dtype == dtype and torch.isfinite(leaf.grad).all()


@pytest.mark.parametrize("name", DIVERGENCES)
def test_large_logits_in_fp32_stay_finite(name: str) -> None:
    student, teacher = (x.float() for x in rows(spread=1e4))
    leaf = student.requires_grad_()
    found = call(name, leaf, teacher)
    found.sum().backward()
    assert torch.isfinite(found).all() and torch.isfinite(leaf.grad).all()


@pytest.mark.parametrize("name", DIVERGENCES)
def test_no_rows(name: str) -> None:
    student = torch.zeros(0, 5, requires_grad=True)
    found = call(name, student, torch.zeros(0, 5))
    assert found.shape == (0,)
    found.sum().backward()
    assert student.grad.shape == (0, 5)


@pytest.mark.parametrize("name", DIVERGENCES)
@pytest.mark.parametrize("what", [float("nan"), float("inf")])
def test_nan_and_inf_in_the_teacher_are_not_hidden(name: str, what: float) -> None:
    """Never a plausible value: the distiller looks for this and names the example."""
    student, teacher = rows()
    teacher[3, 1] = what
    found = call(name, student, teacher, **({"intra_weight": 0.0} if name == "dist" else {}))
    assert not torch.isfinite(found[3])
    others = torch.arange(7) != 3
    assert torch.isfinite(found[others]).all()


@pytest.mark.parametrize("name", DIVERGENCES)
def test_positive_and_zero_at_equality(name: str) -> None:
    student, teacher = rows(spread=4.0)
    assert (call(name, student, teacher) > 0).all()
    at_equality = call(name, teacher, teacher)
    if PROPERTIES[name].zero_at_equality:
        assert at_equality.abs().max() < 1e-12
    else:
        assert (at_equality > 0).all()
        one_hot = torch.full((3, 4), -torch.inf).index_fill(1, torch.tensor(2), 0.0)
        assert not call(name, one_hot, one_hot).any()


@pytest.mark.parametrize("name", DIVERGENCES)
def test_order_of_columns_has_no_effect(name: str) -> None:
    student, teacher = rows()
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    assert torch.allclose(call(name, student[:, order], teacher[:, order]), call(name, student, teacher), rtol=1e-12)


@pytest.mark.parametrize("name", [name for name in DIVERGENCES if name != "mean_squared_error"])
def test_logits_are_compared_up_to_a_constant(name: str) -> None:
    student, teacher = rows()
    shifts = torch.arange(7.0, dtype=torch.float64)[:, None]
    assert torch.allclose(call(name, student + shifts, teacher - shifts), call(name, student, teacher), rtol=1e-9)


@pytest.mark.parametrize("name", [name for name, stated in PROPERTIES.items() if not stated.couples_rows])
def test_rows_are_independent_unless_coupled(name: str) -> None:
    student, teacher = rows()
    alone = torch.cat([call(name, s[None], t[None]) for s, t in zip(student, teacher, strict=True)])
    assert torch.allclose(alone, call(name, student, teacher), rtol=1e-12)


@pytest.mark.parametrize("name", [name for name, stated in PROPERTIES.items() if stated.temperature_power])
def test_temperature_power_is_the_stated_one(name: str) -> None:
    """T^p times the divergence of logits / T has a limit; with p one less it vanishes, with one more it grows."""
    student, teacher = rows()
    power = PROPERTIES[name].temperature_power
    scaled = [t**power * call(name, student / t, teacher / t).sum().item() for t in (1e3, 2e3)]
    assert scaled[1] == pytest.approx(scaled[0], rel=0.01)
    assert scaled[0] > 1e-3


# One by one.


def test_limits_of_jensen_shannon_are_the_two_kls() -> None:
    student, teacher = rows()
    assert torch.equal(call("jensen_shannon", student, teacher, beta=0.0), call("forward_kl", student, teacher))
    assert torch.equal(call("jensen_shannon", student, teacher, beta=1.0), call("reverse_kl", student, teacher))
    near = 1e-6
    forward = call("jensen_shannon", student, teacher, beta=near) / near
    backward = call("jensen_shannon", student, teacher, beta=1 - near) / near
    assert torch.allclose(forward, call("forward_kl", student, teacher), rtol=1e-3)
    assert torch.allclose(backward, call("reverse_kl", student, teacher), rtol=1e-3)


def test_jensen_shannon_is_symmetric_and_bounded_at_one_half() -> None:
    student, teacher = rows(spread=50.0)
    found = call("jensen_shannon", student, teacher)
    assert torch.allclose(found, call("jensen_shannon", teacher, student), rtol=1e-9)
    assert (found <= math.log(2) + 1e-12).all() and found.max() > 0.69


def test_total_variation_is_within_0_and_1_and_pinskers_bound() -> None:
    student, teacher = rows(spread=5.0)
    found = call("total_variation", student, teacher)
    assert ((found >= 0) & (found <= 1)).all()
    assert (found <= (call("forward_kl", student, teacher) / 2).sqrt()).all()
    apart = torch.tensor([[0.0, -torch.inf, 9.0]]), torch.tensor([[400.0, 0.0, 0.0]])
    assert call("total_variation", *apart).item() == pytest.approx(1.0, abs=2e-4)


def test_skew_0_is_the_kl() -> None:
    student, teacher = rows()
    assert torch.equal(call("skewed_forward_kl", student, teacher, skew=0.0), call("forward_kl", student, teacher))
    assert torch.equal(call("skewed_reverse_kl", student, teacher, skew=0.0), call("reverse_kl", student, teacher))


def test_skewed_kl_is_at_most_minus_log_skew() -> None:
    """Ko et al. 2024: KL(p ‖ λp + (1 − λ)q) ≤ −log λ, however far apart."""
    student, teacher = rows(spread=1e3)
    for name in ("skewed_forward_kl", "skewed_reverse_kl"):
        assert (call(name, student, teacher, skew=0.1) <= -math.log(0.1) + 1e-9).all()


def test_decoupled_with_the_papers_weight_is_forward_kl() -> None:
    """Zhao et al. 2022, equation 7: KL = TCKD + (1 − p_t) NCKD, a row at a time as the weight is the row's."""
    student, teacher = rows()
    for s, t in zip(student.split(1), teacher.split(1), strict=True):
        for target in range(6):
            weight = 1 - t.softmax(-1)[0, target].item()
            label = torch.tensor([target])
            found = DIVERGENCES["decoupled"](s, t, label, target_weight=1.0, others_weight=weight)
            assert found.item() == pytest.approx(call("forward_kl", s, t).item(), rel=1e-9)


def test_decoupled_without_label_uses_the_teachers_class() -> None:
    student, teacher = rows()
    likely = teacher.argmax(-1)
    known = DIVERGENCES["decoupled"](student, teacher, likely)
    assert torch.equal(call("decoupled", student, teacher), known)
    half = torch.where(torch.arange(7) < 3, likely, -100)
    assert torch.equal(DIVERGENCES["decoupled"](student, teacher, half), known)


def test_decoupled_with_a_blocked_target_is_finite() -> None:
    student, teacher = rows()
    teacher[:, 2] = -torch.inf
    student.requires_grad_()
    found = DIVERGENCES["decoupled"](student, teacher, torch.full((7,), 2))
    found.sum().backward()
    assert torch.isfinite(found).all() and torch.isfinite(student.grad).all()


def test_dist_ignores_scale() -> None:
    """At high temperatures probabilities are linear in the logits, and a correlation does not see a factor."""
    student, teacher = rows()
    found = [call("dist", student / t, teacher / t) for t in (1e4, 2e4)]
    assert torch.allclose(found[0], found[1], rtol=1e-3)
    assert torch.allclose(call("dist", 7 * student / 1e4, teacher / 1e4), found[0], rtol=1e-2)


def test_dist_of_a_single_row_has_only_the_inter_part() -> None:
    student, teacher = (x[:1] for x in rows())
    assert torch.equal(call("dist", student, teacher), call("dist", student, teacher, intra_weight=0.0))


def test_hard_is_cross_entropy_with_the_teachers_class() -> None:
    student, teacher = rows()
    expected = torch.nn.functional.cross_entropy(student, teacher.argmax(-1), reduction="none")
    assert torch.allclose(call("hard", student, teacher), expected, rtol=1e-12)


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("jensen_shannon", {"beta": -0.1}, r"beta=-0.1: must lie in \[0, 1\]"),
        ("jensen_shannon", {"beta": 1.1}, r"beta=1.1: must lie in \[0, 1\]"),
        ("jensen_shannon", {"beta": math.nan}, r"beta=nan: must lie in \[0, 1\]"),
        ("skewed_forward_kl", {"skew": 1.0}, r"skew=1.0: must lie in \[0, 1\)"),
        ("skewed_reverse_kl", {"skew": -0.1}, r"skew=-0.1: must lie in \[0, 1\)"),
        ("skewed_reverse_kl", {"skew": math.nan}, r"skew=nan: must lie in \[0, 1\)"),
        ("dist", {"inter_weight": -1.0}, r"inter_weight=-1.0: must lie in \[0, inf\)"),
        ("dist", {"intra_weight": -1.0}, r"intra_weight=-1.0: must lie in \[0, inf\)"),
        ("dist", {"intra_weight": math.inf}, r"intra_weight=inf: must lie in \[0, inf\)"),
        ("decoupled", {"target_weight": -1.0}, r"target_weight=-1.0: must"),
        ("decoupled", {"others_weight": math.nan}, r"others_weight=nan: must"),
        ("decoupled", {"others_weight": math.inf}, r"others_weight=inf: must"),
    ],
)
def test_invalid_settings_raise(name: str, settings: dict[str, float], message: str) -> None:
    student, teacher = rows()
    with pytest.raises(SettingError, match=message):
        call(name, student, teacher, **settings)


def logits(v: int, seed: int) -> torch.Tensor:
    return 2 * torch.randn(6, v, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_sorted_distance_matches_the_papers_formula() -> None:
    for v, w in ((7, 7), (5, 9), (9, 5)):
        student, teacher = logits(v, 1), logits(w, 2)
        expected = [references.sorted_distance(q, p) for q, p in zip(student.tolist(), teacher.tolist(), strict=True)]
        torch.testing.assert_close(sorted_distance(student, teacher).tolist(), expected)


def test_sorted_distance_gradient_and_0_at_equality() -> None:
    student, teacher = logits(5, 3).requires_grad_(), logits(7, 4)
    assert torch.autograd.gradcheck(sorted_distance, (student, teacher))
    for v in (5, 33, 1000):  # widths that fill no vector, and several
        student = logits(v, 3).requires_grad_()
        found = sorted_distance(student, student.detach()[:, torch.randperm(v)])
        (gradient,) = torch.autograd.grad(found.sum(), student)
        # A kink: one bit between two equal probabilities would be a gradient as large as any.
        assert found.abs().max() == 0 and gradient.abs().max() == 0


def test_sorted_distance_ignores_order_and_impossible_columns() -> None:
    student, teacher = logits(6, 5), logits(6, 6)
    found = sorted_distance(student, teacher)
    torch.testing.assert_close(sorted_distance(student[:, torch.randperm(6)], teacher), found)
    never = torch.full((6, 2), -torch.inf, dtype=torch.float64)
    torch.testing.assert_close(sorted_distance(student, torch.cat([teacher, never], 1)), found)
    one, other = torch.tensor([[50.0, 0.0]]), torch.zeros(1, 200)
    assert 1.98 < sorted_distance(one, other).item() < 2  # the largest that it can be is 2
