"""Relations between examples: numbers by hand, slow references, invariances, and too few or equal rows."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from hf_distill import SettingError
from hf_distill.functional.similarity import SIMILARITIES, SIMILARITY_PROPERTIES

Rows = list[list[float]]
EVEN = [[0.0, 0.0], [1.0, 0.0], [0.5, math.sqrt(0.75)]]  # an equilateral triangle


def rows(n: int = 6, d_s: int = 4, d_t: int = 7, *, spread: float = 2.0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(13)
    drawn = [spread * torch.randn(n, d, generator=generator, dtype=torch.float64) for d in (d_s, d_t)]
    return drawn[0], drawn[1]


def double(*sides: Rows) -> tuple[Tensor, ...]:
    return tuple(torch.tensor(side, dtype=torch.float64) for side in sides)


# Each once more, the whole loss of the paper, a number at a time.


def dot(x: list[float], y: list[float]) -> float:
    return sum(a * b for a, b in zip(x, y, strict=True))


def minus(x: list[float], y: list[float]) -> list[float]:
    return [a - b for a, b in zip(x, y, strict=True)]


def huber(x: float, y: float) -> float:
    gap = abs(x - y)
    return gap**2 / 2 if gap <= 1 else gap - 0.5


def slow_similarity_preserving(student: Rows, teacher: Rows) -> float:
    """1 / n² of the squared Frobenius norm."""
    total = 0.0
    for i in range(len(student)):
        gram = [[dot(side[i], other) for other in side] for side in (student, teacher)]
        unit = [[a / math.sqrt(dot(row, row)) for a in row] for row in gram]
        total += sum((a - b) ** 2 for a, b in zip(*unit, strict=True))
    return total / len(student) ** 2


def slow_distances(student: Rows, teacher: Rows) -> float:
    """The mean over ordered pairs of distinct examples."""
    pairs = list(itertools.permutations(range(len(student)), 2))
    apart = [[math.dist(side[i], side[j]) for i, j in pairs] for side in (student, teacher)]
    in_means = [[a / (sum(side) / len(pairs)) for a in side] for side in apart]
    return sum(huber(a, b) for a, b in zip(*in_means, strict=True)) / len(pairs)


def slow_angles(student: Rows, teacher: Rows) -> float:
    """The mean over ordered triples of distinct examples; the angle is at the second."""

    def cosine(side: Rows, i: int, j: int, k: int) -> float:
        x, y = minus(side[i], side[j]), minus(side[k], side[j])
        return dot(x, y) / math.sqrt(dot(x, x) * dot(y, y))

    triples = list(itertools.permutations(range(len(student)), 3))
    return sum(huber(cosine(student, *one), cosine(teacher, *one)) for one in triples) / len(triples)


def slow_alignment(student: Rows, teacher: Rows) -> float:
    """Kornblith et al.: ‖Yᵀ X‖² / (‖Xᵀ X‖ ‖Yᵀ Y‖) of the centred features, Frobenius norms; no n × n table."""
    x, y = (np.array(side) - np.mean(side, axis=0) for side in (student, teacher))
    return float(1 - np.linalg.norm(y.T @ x) ** 2 / (np.linalg.norm(x.T @ x) * np.linalg.norm(y.T @ y)))


SLOW: dict[str, Callable[[Rows, Rows], float]] = {
    "similarity_preserving": slow_similarity_preserving,
    "distance_relations": slow_distances,
    "angle_relations": slow_angles,
    "centered_kernel_alignment": slow_alignment,
}


def test_every_similarity_has_a_reference_and_properties() -> None:
    assert set(SLOW) == set(SIMILARITIES) == set(SIMILARITY_PROPERTIES)


@pytest.mark.parametrize("name", SIMILARITIES)
@pytest.mark.parametrize(("n", "spread"), [(3, 1.0), (6, 2.0), (6, 1e-3), (9, 1e4)])
def test_sum_over_n_is_the_loss_of_the_paper(name: str, n: int, spread: float) -> None:
    student, teacher = rows(n, spread=spread)
    found = SIMILARITIES[name](student, teacher)
    assert found.shape == (n,) and found.dtype == torch.float64
    assert (found >= 0).all()
    expected = SLOW[name](student.tolist(), teacher.tolist())
    assert found.sum().item() / n == pytest.approx(expected, rel=1e-9)
    assert expected > 1e-3


def test_similarity_preserving_by_hand() -> None:
    """Student (1, 0), (0, 1): the table is I, rows (1, 0), (0, 1). Teacher 3, 4: ((9, 12), (12, 16)), both rows
    (3/5, 4/5). (2/5)² + (4/5)² = 4/5 in the first row and (3/5)² + (1/5)² = 2/5 in the second, over n = 2."""
    found = SIMILARITIES["similarity_preserving"](*double([[1.0, 0.0], [0.0, 1.0]], [[3.0], [4.0]]))
    assert found.tolist() == pytest.approx([0.4, 0.2], rel=1e-12)


def test_distances_by_hand() -> None:
    """Student at 0, 1, 3: distances 1 (01), 3 (02), 2 (12), mean 2, so 1/2, 3/2, 1. Teacher at 0, 1, 2: 1, 2, 1, mean
    4/3, so 3/4, 3/2, 3/4. Gaps −1/4, 0, 1/4, Huber 1/32, 0, 1/32. Means over two partners: 1/64, 1/32, 1/64."""
    found = SIMILARITIES["distance_relations"](*double([[0.0], [1.0], [3.0]], [[0.0], [1.0], [2.0]]))
    assert found.tolist() == pytest.approx([1 / 64, 1 / 32, 1 / 64], rel=1e-12)


def test_distances_by_hand_beyond_the_kink() -> None:
    """Student: five at 0 and one at 1. 5 of the 15 distances are 1, mean 1/3: they become 3, the others 0. Teacher: the
    six corners of a simplex, every distance 1. Gaps 2 (Huber 3/2) and 1 (Huber 1/2). The far one: 3/2. The others: one
    gap of 2 and four of 1 among five, (3/2 + 4/2) / 5 = 7/10."""
    student = [[0.0]] * 5 + [[1.0]]
    found = SIMILARITIES["distance_relations"](*double(student, torch.eye(6).tolist()))
    assert found.tolist() == pytest.approx([0.7] * 5 + [1.5], rel=1e-12)


def test_angles_by_hand() -> None:
    """Student: a right angle at the first, 45° at the others: cosines 0, √½, √½. Teacher: 60° everywhere, 1/2. Half the
    squared gap is 1/8, and (√½ − ½)² / 2 = (3/4 − √½) / 2; both ordered pairs at a corner give the same."""
    found = SIMILARITIES["angle_relations"](*double([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]], EVEN))
    other = (0.75 - math.sqrt(0.5)) / 2
    assert found.tolist() == pytest.approx([1 / 8, other, other], rel=1e-12)


def test_angles_by_hand_when_two_examples_coincide() -> None:
    """Student: two at one place, the third elsewhere. Seen from either of the two, the other is in no direction: 0.
    From the third both are in one: 1. Teacher: 60° everywhere, 1/2. Gaps of 1/2 all, Huber 1/8."""
    found = SIMILARITIES["angle_relations"](*double([[0.0, 0.0], [0.0, 0.0], [1.0, 0.0]], EVEN))
    assert found.tolist() == pytest.approx([1 / 8] * 3, rel=1e-12)


def test_alignment_by_hand() -> None:
    """Centred already: x = (1, −1, 0), y = (1, 0, −1). (x · y)² / (|x|² |y|²) = 1 / (2 · 2), so 1 − CKA = 3/4. The
    tables x xᵀ / 2 and y yᵀ / 2 differ by ½ in two places of each row: shares of 3/2 · 2 · ¼ = 3/4 each."""
    for shift in (0.0, 5.0):
        student, teacher = double([[1.0], [-1.0], [0.0]], [[1.0], [0.0], [-1.0]])
        found = SIMILARITIES["centered_kernel_alignment"](student + shift, 3 * teacher - 2 * shift)
        assert found.tolist() == pytest.approx([0.75] * 3, rel=1e-12)


# Invariances.


@pytest.mark.parametrize("name", SIMILARITIES)
def test_invariant_to_scale_and_rotation(name: str) -> None:
    student, teacher = rows()
    turn = torch.linalg.qr(torch.randn(4, 4, dtype=torch.float64)).Q
    other = torch.linalg.qr(torch.randn(7, 7, dtype=torch.float64)).Q
    found = SIMILARITIES[name](student, teacher)
    assert torch.allclose(SIMILARITIES[name](3 * student @ turn, teacher @ other / 5), found, rtol=1e-9)
    wider = torch.cat((student, torch.zeros(6, 3, dtype=torch.float64)), 1)
    assert torch.allclose(SIMILARITIES[name](wider, teacher), found, rtol=1e-9)
    stretched = student * torch.tensor([1.0, 3.0, 1.0, 0.2])
    assert not torch.allclose(SIMILARITIES[name](stretched, teacher), found, rtol=1e-2)


@pytest.mark.parametrize("name", SIMILARITIES)
def test_a_shift_changes_only_similarity_preserving(name: str) -> None:
    student, teacher = rows()
    shifted = SIMILARITIES[name](student + 4, teacher)
    assert torch.allclose(shifted, SIMILARITIES[name](student, teacher), rtol=1e-9) is (name != "similarity_preserving")


@pytest.mark.parametrize("name", SIMILARITIES)
def test_shares_follow_their_examples_and_depend_on_the_others(name: str) -> None:
    student, teacher = rows()
    found = SIMILARITIES[name](student, teacher)
    order = torch.tensor([4, 0, 5, 2, 1, 3])
    assert torch.allclose(SIMILARITIES[name](student[order], teacher[order]), found[order], rtol=1e-9)
    student[0] *= -2
    assert ((SIMILARITIES[name](student, teacher) - found)[1:].abs() > 1e-6).all()


@pytest.mark.parametrize("name", SIMILARITIES)
def test_value_and_gradient_at_equality(name: str) -> None:
    student, _ = rows()
    for other in (student, student @ torch.linalg.qr(torch.randn(4, 4, dtype=torch.float64)).Q * 3):
        leaf = student.clone().requires_grad_()
        found = SIMILARITIES[name](leaf, other)
        found.sum().backward()
        assert found.abs().max() < 1e-24
        assert leaf.grad is not None and leaf.grad.abs().max() < 1e-14
    assert not SIMILARITIES[name](student.float(), student.float()).any()


@pytest.mark.parametrize("name", SIMILARITIES)
def test_gradient_by_finite_differences(name: str) -> None:
    student, teacher = (x.requires_grad_() for x in rows(5, 3, 4))
    assert torch.autograd.gradcheck(SIMILARITIES[name], (student, teacher))


@pytest.mark.parametrize("name", SIMILARITIES)
@pytest.mark.parametrize("n", [0, 1, 2])
def test_too_few_examples_give_zero_with_a_graph(name: str, n: int) -> None:
    student, teacher = rows(n)
    student.requires_grad_()
    found = SIMILARITIES[name](student, teacher)
    assert found.shape == (n,)
    found.sum().backward()
    assert student.grad is not None and torch.isfinite(student.grad).all()
    if n < (3 if name == "angle_relations" else 2):
        assert not found.any() and not student.grad.any()


def test_two_examples_have_equal_distances_and_always_align() -> None:
    """Both sides then have one distance, 1, and the centred table ((1, −1), (−1, 1)) / 2; inner products differ."""
    for name in ("distance_relations", "centered_kernel_alignment"):
        assert SIMILARITIES[name](*rows(2)).abs().max() < 1e-24
    assert SIMILARITIES["similarity_preserving"](*rows(2)).min() > 1e-4


@pytest.mark.parametrize("name", SIMILARITIES)
@pytest.mark.parametrize("which", ["student", "teacher", "both"])
@pytest.mark.parametrize("what", [0.0, 1e-45, 0.3])
def test_equal_rows_do_not_give_nan(name: str, which: str, what: float) -> None:
    student, teacher = (x.float() for x in rows())
    if which != "teacher":
        student = torch.full_like(student, what)
    if which != "student":
        teacher = torch.full_like(teacher, what)
    leaf = student.requires_grad_()
    found = SIMILARITIES[name](leaf, teacher)
    found.sum().backward()
    assert torch.isfinite(found).all() and torch.isfinite(leaf.grad).all()
    if which == "both":
        assert found.abs().max() < 1e-12
    if which != "teacher" and (what < 0.1 or name != "similarity_preserving"):
        assert not leaf.grad.any()  # no direction leads away from where all are one


@pytest.mark.parametrize("name", SIMILARITIES)
def test_some_equal_and_some_zero_rows_do_not_give_nan(name: str) -> None:
    student, teacher = (x.float() for x in rows())
    student[1] = student[0]
    student[2] = 0
    teacher[3] = teacher[4]
    leaf = student.requires_grad_()
    found = SIMILARITIES[name](leaf, teacher)
    found.sum().backward()
    assert torch.isfinite(found).all() and torch.isfinite(leaf.grad).all() and leaf.grad[3:].any(-1).all()


def test_alignment_with_equal_rows_is_0() -> None:
    student, flat = rows()[0], torch.full((6, 2), 0.1, dtype=torch.float64)
    for pair in ((flat, student), (student, flat)):
        assert SIMILARITIES["centered_kernel_alignment"](*pair).mean().item() == pytest.approx(1.0, rel=1e-12)


@pytest.mark.parametrize("name", SIMILARITIES)
@pytest.mark.parametrize("scale", [1e-25, 1e20])
def test_squares_that_leave_the_range_of_fp32_do_not_matter(name: str, scale: float) -> None:
    student, teacher = (x.float() for x in rows())
    leaf = (student * scale).requires_grad_()
    found = SIMILARITIES[name](leaf, teacher * scale)
    found.sum().backward()
    assert torch.allclose(found, SIMILARITIES[name](student, teacher), rtol=1e-4)
    assert torch.isfinite(leaf.grad).all() and leaf.grad.any()


@pytest.mark.parametrize("name", SIMILARITIES)
@pytest.mark.parametrize("n", [1, 6])
@pytest.mark.parametrize("what", [math.nan, math.inf])
def test_nan_and_inf_are_not_hidden(name: str, n: int, what: float) -> None:
    for side in (0, 1):
        pair = rows(n)
        pair[side][0, 1] = what
        assert SIMILARITIES[name](*pair)[0].isnan()


@pytest.mark.parametrize("name", SIMILARITIES)
def test_low_precision_is_computed_in_fp32(name: str) -> None:
    student, teacher = (x.bfloat16() for x in rows())
    leaf = student.clone().requires_grad_()
    found = SIMILARITIES[name](leaf, teacher)
    assert found.dtype == torch.float32
    assert torch.equal(found, SIMILARITIES[name](student.float(), teacher.float()))
    found.sum().backward()
    assert leaf.grad is not None and leaf.grad.dtype == torch.bfloat16 and torch.isfinite(leaf.grad).all()


@pytest.mark.parametrize("name", SIMILARITIES)
def test_unequal_numbers_of_examples_raise(name: str) -> None:
    student, teacher = rows()
    message = r"vectors are \[1, 4\], teacher vectors \[6, 7\]: both must be \[n d\], one vector for each of the same n"
    with pytest.raises(SettingError, match=message):
        SIMILARITIES[name](student[:1], teacher)


@pytest.mark.parametrize("shape", [(6,), (6, 4, 3), (6, 4, 3, 3)])
@pytest.mark.parametrize("name", SIMILARITIES)
def test_examples_that_are_not_vectors_raise(name: str, shape: tuple[int, ...]) -> None:
    with pytest.raises(SettingError, match=r"both must be \[n d\], one vector for each .* Pool all other axes"):
        SIMILARITIES[name](torch.randn(shape), torch.randn(shape))
