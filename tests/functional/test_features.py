"""Distances of vectors: numbers by hand, slow references, invariances, and zero vectors."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from hf_distill import SettingError
from hf_distill.functional.features import DISTANCE_PROPERTIES, DISTANCES, unit_vectors

Vector = list[float]
SCALE_FREE = ("cosine", "normalized_squared", "standardized_squared")  # only the direction of a vector matters
KINKED = ("l1_cosine",)  # no derivative at equality


def vectors(n: int = 5, d: int = 6, *, spread: float = 2.0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    drawn = spread * torch.randn(2, n, d, generator=generator, dtype=torch.float64)
    return drawn[0], drawn[1]


# Each distance once more, a number at a time.


def length(x: Vector) -> float:
    return math.sqrt(sum(a * a for a in x))


def cosine_of(x: Vector, y: Vector) -> float:
    return sum(a * b for a, b in zip(x, y, strict=True)) / (length(x) * length(y))


def mean_squared(x: Vector, y: Vector) -> float:
    return sum((a - b) ** 2 for a, b in zip(x, y, strict=True)) / len(x)


def normalized_squared(x: Vector, y: Vector) -> float:
    return sum((a / length(x) - b / length(y)) ** 2 for a, b in zip(x, y, strict=True))


def standard(x: Vector) -> Vector:
    mean = sum(x) / len(x)
    deviation = math.sqrt(sum((a - mean) ** 2 for a in x) / len(x))
    return [(a - mean) / deviation for a in x]


def smooth_l1(x: Vector, y: Vector, beta: float = 1.0) -> float:
    gaps = [abs(a - b) for a, b in zip(x, y, strict=True)]
    return sum(gap**2 / (2 * beta) if gap < beta else gap - beta / 2 for gap in gaps) / len(x)


def l1_cosine(x: Vector, y: Vector, cosine_weight: float = 1.0) -> float:
    l1 = sum(abs(a - b) for a, b in zip(x, y, strict=True)) / len(x)
    return l1 - cosine_weight * math.log(1 / (1 + math.exp(-cosine_of(x, y))))


REFERENCES: dict[str, Callable[..., float]] = {
    "mean_squared": mean_squared,
    "cosine": lambda x, y: 1 - cosine_of(x, y),
    "normalized_squared": normalized_squared,
    "standardized_squared": lambda x, y: mean_squared(standard(x), standard(y)),
    "smooth_l1": smooth_l1,
    "l1_cosine": l1_cosine,
}
SETTINGS: list[tuple[str, dict[str, float]]] = [
    *((name, {}) for name in DISTANCES),
    ("smooth_l1", {"beta": 0.3}),
    ("l1_cosine", {"cosine_weight": 2.5}),
    ("l1_cosine", {"cosine_weight": 0.0}),
]
EVERY = [pytest.param(name, settings, id=f"{name}{list(settings.values())}") for name, settings in SETTINGS]


def test_every_distance_has_a_reference_a_paper_and_default_settings() -> None:
    assert set(REFERENCES) == set(DISTANCES) == set(DISTANCE_PROPERTIES)
    for name, distance in DISTANCES.items():
        given = inspect.signature(distance).parameters.values()
        options = [option for option in given if option.kind is inspect.Parameter.KEYWORD_ONLY]
        assert all(option.default is not inspect.Parameter.empty for option in options)
        assert DISTANCE_PROPERTIES[name].paper


@pytest.mark.parametrize(
    ("name", "settings", "expected"),
    [
        # s = (1, 2, 2), t = (4, 4, 2). s − t = (−3, −2, 0): (9 + 4 + 0) / 3.
        ("mean_squared", {}, 13 / 3),
        # |s| = 3, |t| = 6, s · t = 4 + 8 + 4 = 16, the cosine 16 / 18 = 8 / 9.
        ("cosine", {}, 1 / 9),
        ("normalized_squared", {}, 2 - 2 * 8 / 9),
        # Less the means 5/3 and 10/3: (−2, 1, 1) / 3 and (2, 2, −4) / 3. Squared lengths 6/9 and 24/9, product
        # (−4 + 2 − 4) / 9 = −6/9, so the correlation is −6 / √(6 · 24) = −1/2, and 2 − 2 · (−1/2) = 3.
        ("standardized_squared", {}, 3.0),
        # (3 − 1/2 + 2 − 1/2 + 0) / 3; with beta = 4 all are below it: (9 + 4) / 8 / 3.
        ("smooth_l1", {}, 4 / 3),
        ("smooth_l1", {"beta": 4.0}, 13 / 24),
        # (3 + 2 + 0) / 3, and −log(1 / (1 + e^(−8/9))).
        ("l1_cosine", {}, 5 / 3 + math.log(1 + math.exp(-8 / 9))),
        ("l1_cosine", {"cosine_weight": 2.0}, 5 / 3 + 2 * math.log(1 + math.exp(-8 / 9))),
    ],
)
def test_by_hand(name: str, settings: dict[str, float], expected: float) -> None:
    s, t = (torch.tensor([x], dtype=torch.float64) for x in ((1.0, 2.0, 2.0), (4.0, 4.0, 2.0)))
    found = DISTANCES[name](s, t, **settings)
    assert found.dtype == torch.float64
    assert found.tolist() == pytest.approx([expected], rel=1e-12)


@pytest.mark.parametrize("spread", [0.01, 2.0, 100.0])
@pytest.mark.parametrize(("name", "settings"), EVERY)
def test_matches_the_slow_reference(name: str, settings: dict[str, float], spread: float) -> None:
    student, teacher = vectors(spread=spread)
    student[0], teacher[1] = -student[0].abs(), -teacher[1].abs()
    pairs = zip(student.tolist(), teacher.tolist(), strict=True)
    expected = [REFERENCES[name](x, y, **settings) for x, y in pairs]
    assert DISTANCES[name](student, teacher, **settings).tolist() == pytest.approx(expected, rel=1e-9)


def test_matches_torch_where_torch_has_it() -> None:
    student, teacher = vectors()
    expected = F.cosine_embedding_loss(student, teacher, torch.ones(5, dtype=torch.float64), reduction="none")
    assert torch.allclose(DISTANCES["cosine"](student, teacher), expected, rtol=1e-12)
    norms = [F.layer_norm(side, (6,), eps=0.0) for side in (student, teacher)]
    expected = F.mse_loss(*norms, reduction="none").mean(-1)
    assert torch.allclose(DISTANCES["standardized_squared"](student, teacher), expected, rtol=1e-12)


@pytest.mark.parametrize(("name", "settings"), EVERY)
def test_gradient_by_finite_differences(name: str, settings: dict[str, float]) -> None:
    student, teacher = (x.requires_grad_() for x in vectors(n=3, d=4))
    assert torch.autograd.gradcheck(lambda s, t: DISTANCES[name](s, t, **settings), (student, teacher))


@pytest.mark.parametrize("name", DISTANCES)
def test_value_and_gradient_at_equality(name: str) -> None:
    student, _ = vectors()
    leaf = student.clone().requires_grad_()
    found = DISTANCES[name](leaf, student)
    found.sum().backward()
    assert leaf.grad is not None and leaf.grad.abs().max() < 1e-15
    stated = DISTANCE_PROPERTIES[name]
    if stated.zero_at_equality:
        assert not found.any()
    else:
        assert (found > 0.1).all()
    away = vectors()[1]
    rises = [(DISTANCES[name](student + e * away, student) - found).sum().item() for e in (1e-4, 2e-4)]
    power = 1 if name in KINKED else 2  # linear at a kink, else quadratic
    assert rises[1] / rises[0] == pytest.approx(2**power, rel=0.01)


@pytest.mark.parametrize("name", DISTANCES)
def test_values_are_positive_and_rows_are_independent(name: str) -> None:
    student, teacher = vectors()
    found = DISTANCES[name](student, teacher)
    assert (found > 0).all()
    alone = [DISTANCES[name](s[None], t[None]) for s, t in zip(student, teacher, strict=True)]
    torch.testing.assert_close(torch.cat(alone), found)


@pytest.mark.parametrize("name", DISTANCES)
def test_only_scale_free_distances_ignore_length(name: str) -> None:
    student, teacher = vectors()
    found, scaled = DISTANCES[name](student, teacher), DISTANCES[name](7 * student, teacher)
    assert torch.allclose(found, scaled, rtol=1e-12) is (name in SCALE_FREE)


def test_a_shift_changes_cosine_but_not_standardized_squared() -> None:
    student, teacher = vectors()
    for name, same in (("standardized_squared", True), ("cosine", False)):
        found, shifted = DISTANCES[name](student, teacher), DISTANCES[name](student + 3, teacher - 2)
        assert torch.allclose(found, shifted, rtol=1e-10) is same


@pytest.mark.parametrize(
    ("name", "option", "values"), [("smooth_l1", "beta", (0.5, 1.0)), ("l1_cosine", "cosine_weight", (0.0, 1.0))]
)
def test_every_setting_changes_value_and_gradient(name: str, option: str, values: tuple[float, float]) -> None:
    student, teacher = vectors()
    found, pulls = [], []
    for value in values:
        leaf = student.clone().requires_grad_()
        found.append(DISTANCES[name](leaf, teacher, **{option: value}))
        found[-1].sum().backward()
        pulls.append(leaf.grad)
    assert (found[0] - found[1]).abs().min() > 1e-3
    assert not torch.allclose(*pulls)


@pytest.mark.parametrize("name", DISTANCES)
@pytest.mark.parametrize("which", ["student", "teacher", "both"])
@pytest.mark.parametrize("what", [0.0, 1e-45, 0.3])
def test_zero_and_constant_vectors_do_not_give_nan(name: str, which: str, what: float) -> None:
    """0.3 in every entry has no variance, though its mean is rounded; 1 / 1e-45 is beyond fp32, while 1e-45 is not."""
    student, teacher = (x.float() for x in vectors())
    if which != "teacher":
        student[1] = what
    if which != "student":
        teacher[1] = what
    leaf = student.requires_grad_()
    found = DISTANCES[name](leaf, teacher)
    found.sum().backward()
    assert torch.isfinite(found).all() and torch.isfinite(leaf.grad).all()
    flat = what == 0.3 and name == "standardized_squared"
    if which != "teacher" and name in SCALE_FREE and (what < 0.1 or flat):
        assert not leaf.grad[1].any()
    if which == "both" and DISTANCE_PROPERTIES[name].zero_at_equality:
        assert found[1] == 0


@pytest.mark.parametrize(
    ("name", "expected"), [("cosine", 1.0), ("normalized_squared", 2.0), ("standardized_squared", 2.0)]
)
def test_a_zero_vector_counts_as_orthogonal(name: str, expected: float) -> None:
    student, teacher = vectors()
    zero = torch.zeros_like(student)
    assert DISTANCES[name](zero, teacher).tolist() == pytest.approx([expected] * 5, rel=1e-12)
    assert DISTANCES[name](student, zero).tolist() == pytest.approx([expected] * 5, rel=1e-12)


@pytest.mark.parametrize("name", SCALE_FREE)
@pytest.mark.parametrize("scale", [1e-25, 1e25])
def test_squares_that_leave_the_range_of_fp32_do_not_matter(name: str, scale: float) -> None:
    student, teacher = (x.float() for x in vectors())
    leaf = (student * scale).requires_grad_()
    found = DISTANCES[name](leaf, teacher * scale)
    found.sum().backward()
    assert torch.allclose(found, DISTANCES[name](student, teacher), rtol=1e-5)
    assert torch.isfinite(leaf.grad).all() and leaf.grad.any()


@pytest.mark.parametrize("name", DISTANCES)
@pytest.mark.parametrize("what", [math.nan, math.inf])
def test_nan_and_inf_are_not_hidden(name: str, what: float) -> None:
    for side in (0, 1):
        pair: Any = [x.float() for x in vectors()]
        pair[side][2, 1] = what
        found = DISTANCES[name](*pair)
        assert not torch.isfinite(found[2])
        assert torch.isfinite(found[torch.arange(5) != 2]).all()


@pytest.mark.parametrize("name", DISTANCES)
def test_no_rows(name: str) -> None:
    student = torch.zeros(0, 4, requires_grad=True)
    found = DISTANCES[name](student, torch.zeros(0, 4))
    assert found.shape == (0,)
    found.sum().backward()
    assert student.grad is not None and student.grad.shape == (0, 4)


@pytest.mark.parametrize("name", DISTANCES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_computed_in_fp32(name: str, dtype: torch.dtype) -> None:
    student, teacher = (x.to(dtype) for x in vectors())
    leaf = student.clone().requires_grad_()
    found = DISTANCES[name](leaf, teacher)
    assert found.dtype == torch.float32
    assert torch.equal(found, DISTANCES[name](student.float(), teacher.float()))
    assert torch.equal(found, DISTANCES[name](student, teacher.float()))  # each side on its own
    found.sum().backward()
    assert leaf.grad is not None and leaf.grad.dtype == dtype and torch.isfinite(leaf.grad).all()


def test_unit_vectors_by_hand() -> None:
    found = unit_vectors(torch.tensor([[3.0, 4.0], [0.0, 0.0], [0.0, -2.0]], dtype=torch.float64))
    assert found.tolist() == [pytest.approx([0.6, 0.8], rel=1e-15), [0.0, 0.0], [0.0, -1.0]]


@pytest.mark.parametrize("name", DISTANCES)
def test_unequal_widths_raise(name: str) -> None:
    """[5 1] would be broadcast silently."""
    message = r"student vectors are \[5, 1\], teacher vectors \[5, 6\].*project the student's features to the teacher"
    with pytest.raises(SettingError, match=message):
        DISTANCES[name](vectors(d=1)[0], vectors()[1])


@pytest.mark.parametrize("shape", [(6,), (2, 5, 6), (2, 3, 4, 6)])
@pytest.mark.parametrize("name", DISTANCES)
def test_inputs_that_are_not_matrices_raise(name: str, shape: tuple[int, ...]) -> None:
    """The last axis would be mistaken for the features, and the result would not be one number a vector."""
    with pytest.raises(SettingError, match=r"both must have one shape \[n d\]\. Flatten all axes but the features"):
        DISTANCES[name](torch.randn(shape), torch.randn(shape))


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("smooth_l1", {"beta": 0.0}, r"beta=0.0: must lie in \(0, inf\)"),
        ("smooth_l1", {"beta": -1.0}, r"beta=-1.0: must"),
        ("smooth_l1", {"beta": math.nan}, r"beta=nan: must"),
        ("smooth_l1", {"beta": math.inf}, r"beta=inf: must"),
        ("l1_cosine", {"cosine_weight": -0.5}, r"cosine_weight=-0.5: must lie in \[0, inf\)"),
        ("l1_cosine", {"cosine_weight": math.nan}, r"cosine_weight=nan: must"),
    ],
)
def test_invalid_settings_raise(name: str, settings: dict[str, float], message: str) -> None:
    with pytest.raises(SettingError, match=message):
        DISTANCES[name](*vectors(), **settings)
