"""What holds of all divergences, and what of one: limits, bounds, invariances, precision, settings that cannot be."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from hf_distill import SettingError
from hf_distill.functional import DIVERGENCES, PROPERTIES
from tests.functional.test_references import rows

LOW = (torch.bfloat16, torch.float16)


def call(name: str, student: Tensor, teacher: Tensor, **settings: Any) -> Tensor:
    return DIVERGENCES[name](student, teacher, **settings)


@pytest.mark.parametrize("name", DIVERGENCES)
@pytest.mark.parametrize("side", ["student", "teacher", "both"])
def test_rows_of_which_everything_is_blocked_are_no_nan(name: str, side: str) -> None:
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
def test_one_column_left_is_no_nan(name: str) -> None:
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
def test_a_teacher_that_says_no_number_is_heard(name: str, what: float) -> None:
    """Never a plausible value: the distiller looks for this and names the example."""
    student, teacher = rows()
    teacher[3, 1] = what
    found = call(name, student, teacher, **({"intra_weight": 0.0} if name == "dist" else {}))
    assert not torch.isfinite(found[3])
    others = torch.arange(7) != 3
    assert torch.isfinite(found[others]).all()


@pytest.mark.parametrize("name", DIVERGENCES)
def test_never_below_zero_and_zero_at_equality(name: str) -> None:
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
def test_the_order_of_the_columns_does_not_matter(name: str) -> None:
    student, teacher = rows()
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    assert torch.allclose(call(name, student[:, order], teacher[:, order]), call(name, student, teacher), rtol=1e-12)


@pytest.mark.parametrize("name", [name for name in DIVERGENCES if name != "mean_squared_error"])
def test_logits_are_compared_up_to_a_constant(name: str) -> None:
    student, teacher = rows()
    shifts = torch.arange(7.0, dtype=torch.float64)[:, None]
    assert torch.allclose(call(name, student + shifts, teacher - shifts), call(name, student, teacher), rtol=1e-9)


@pytest.mark.parametrize("name", [name for name, stated in PROPERTIES.items() if not stated.couples_rows])
def test_a_row_does_not_hear_of_the_others(name: str) -> None:
    student, teacher = rows()
    alone = torch.cat([call(name, s[None], t[None]) for s, t in zip(student, teacher, strict=True)])
    assert torch.allclose(alone, call(name, student, teacher), rtol=1e-12)


@pytest.mark.parametrize("name", [name for name, stated in PROPERTIES.items() if stated.temperature_power])
def test_the_stated_power_of_the_temperature_and_no_other(name: str) -> None:
    """T^p times the divergence of logits / T has a limit; with p one less it vanishes, with one more it grows."""
    student, teacher = rows()
    power = PROPERTIES[name].temperature_power
    scaled = [t**power * call(name, student / t, teacher / t).sum().item() for t in (1e3, 2e3)]
    assert scaled[1] == pytest.approx(scaled[0], rel=0.01)
    assert scaled[0] > 1e-3


# One by one.


def test_jensen_shannon_has_the_two_kls_as_limits() -> None:
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


def test_total_variation_lies_between_zero_and_one_and_below_pinskers_bound() -> None:
    student, teacher = rows(spread=5.0)
    found = call("total_variation", student, teacher)
    assert ((found >= 0) & (found <= 1)).all()
    assert (found <= (call("forward_kl", student, teacher) / 2).sqrt()).all()
    apart = torch.tensor([[0.0, -torch.inf, 9.0]]), torch.tensor([[400.0, 0.0, 0.0]])
    assert call("total_variation", *apart).item() == pytest.approx(1.0, abs=2e-4)


def test_a_skew_of_zero_is_the_kl_itself() -> None:
    student, teacher = rows()
    assert torch.equal(call("skewed_forward_kl", student, teacher, skew=0.0), call("forward_kl", student, teacher))
    assert torch.equal(call("skewed_reverse_kl", student, teacher, skew=0.0), call("reverse_kl", student, teacher))


def test_a_skew_keeps_it_below_minus_its_logarithm() -> None:
    """Ko et al. 2024: KL(p ‖ λp + (1 − λ)q) ≤ −log λ, however far apart."""
    student, teacher = rows(spread=1e3)
    for name in ("skewed_forward_kl", "skewed_reverse_kl"):
        assert (call(name, student, teacher, skew=0.1) <= -math.log(0.1) + 1e-9).all()


def test_decoupled_is_the_forward_kl_with_the_papers_weight() -> None:
    """Zhao et al. 2022, equation 7: KL = TCKD + (1 − p_t) NCKD, a row at a time as the weight is the row's."""
    student, teacher = rows()
    for s, t in zip(student.split(1), teacher.split(1), strict=True):
        for target in range(6):
            weight = 1 - t.softmax(-1)[0, target].item()
            label = torch.tensor([target])
            found = DIVERGENCES["decoupled"](s, t, label, target_weight=1.0, others_weight=weight)
            assert found.item() == pytest.approx(call("forward_kl", s, t).item(), rel=1e-9)


def test_decoupled_without_a_label_takes_the_teachers_choice() -> None:
    student, teacher = rows()
    likely = teacher.argmax(-1)
    known = DIVERGENCES["decoupled"](student, teacher, likely)
    assert torch.equal(call("decoupled", student, teacher), known)
    half = torch.where(torch.arange(7) < 3, likely, -100)
    assert torch.equal(DIVERGENCES["decoupled"](student, teacher, half), known)


def test_decoupled_with_a_blocked_target_is_no_nan() -> None:
    student, teacher = rows()
    teacher[:, 2] = -torch.inf
    student.requires_grad_()
    found = DIVERGENCES["decoupled"](student, teacher, torch.full((7,), 2))
    found.sum().backward()
    assert torch.isfinite(found).all() and torch.isfinite(student.grad).all()


def test_dist_hears_of_order_and_not_of_scale() -> None:
    """At high temperatures probabilities are linear in the logits, and a correlation does not see a factor."""
    student, teacher = rows()
    found = [call("dist", student / t, teacher / t) for t in (1e4, 2e4)]
    assert torch.allclose(found[0], found[1], rtol=1e-3)
    assert torch.allclose(call("dist", 7 * student / 1e4, teacher / 1e4), found[0], rtol=1e-2)


def test_dist_of_a_single_row_is_the_part_within_it() -> None:
    student, teacher = (x[:1] for x in rows())
    assert torch.equal(call("dist", student, teacher), call("dist", student, teacher, intra_weight=0.0))


def test_hard_is_the_cross_entropy_with_the_teachers_choice() -> None:
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
def test_settings_that_cannot_be(name: str, settings: dict[str, float], message: str) -> None:
    student, teacher = rows()
    with pytest.raises(SettingError, match=message):
        call(name, student, teacher, **settings)
