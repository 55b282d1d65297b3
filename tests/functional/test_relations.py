"""Relations of the positions of a sequence: numbers by hand, a slow reference, padding, and invariances."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from hf_distill import SettingError
from hf_distill.functional.relations import relation_kl


def vectors(b: int = 2, t: int = 4, d_s: int = 4, d_t: int = 8) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(11)
    drawn = [torch.randn(b, t, d, generator=generator, dtype=torch.float64) for d in (d_s, d_t)]
    return drawn[0], drawn[1]


MASK = torch.tensor([[True, True, True, False], [True, False, True, True]])


def slow(student: Tensor, teacher: Tensor, mask: Tensor, heads: int) -> list[list[float]]:
    """MiniLM's formula, a number at a time, over the positions of the mask alone."""

    def relation(x: Tensor, example: int, head: int, i: int, there: list[int]) -> list[float]:
        width = x.shape[-1] // heads
        own = x[example, :, head * width : (head + 1) * width].tolist()
        scaled = [sum(a * b for a, b in zip(own[i], own[j], strict=True)) / math.sqrt(width) for j in there]
        total = sum(math.exp(one) for one in scaled)
        return [math.exp(one) / total for one in scaled]

    found = [[0.0] * mask.shape[1] for _ in mask]
    for example in range(mask.shape[0]):
        there = [j for j in range(mask.shape[1]) if mask[example, j]]
        for i in there:
            for head in range(heads):
                q, p = (relation(x, example, head, i, there) for x in (student, teacher))
                found[example][i] += sum(b * math.log(b / a) for a, b in zip(q, p, strict=True)) / heads
    return found


@pytest.mark.parametrize("heads", [1, 2, 4])
def test_matches_the_slow_reference(heads: int) -> None:
    student, teacher = vectors()
    found = relation_kl(student, teacher, MASK, heads=heads)
    assert found.shape == (2, 4) and found.dtype == torch.float64
    expected = [x for row in slow(student, teacher, MASK, heads) for x in row]
    assert found.flatten().tolist() == pytest.approx(expected, rel=1e-10, abs=1e-15)
    assert (found[MASK] > 0).all() and not found[~MASK].any()


def test_by_hand() -> None:
    """The student's vectors are 0: each position relates to both evenly. The teacher's first is (√(2 log 3), 0, 0, 0),
    its second 0: products 2 log 3 and 0, over √4 that is log 3 and 0, a softmax of (3/4, 1/4); from the second position
    again evenly. So ¾ log 3/2 + ¼ log 1/2 at the first, and 0 at the second."""
    teacher = torch.zeros(1, 2, 4, dtype=torch.float64)
    teacher[0, 0, 0] = math.sqrt(2 * math.log(3))
    student = torch.zeros(1, 2, 2, dtype=torch.float64)
    found = relation_kl(student, teacher, torch.ones(1, 2, dtype=torch.bool), heads=1)
    assert found.tolist() == [[pytest.approx(0.75 * math.log(1.5) + 0.25 * math.log(0.5), rel=1e-12), 0.0]]


def test_by_hand_in_two_heads() -> None:
    """As before, but cut into two heads of width 2: 2 log 3 / √2 in the first head, so the softmax is that of
    (√2 log 3, 0), p = 1 / (1 + 3^−√2); the second head relates evenly and adds 0 to the mean."""
    teacher = torch.zeros(1, 2, 4, dtype=torch.float64)
    teacher[0, 0, 0] = math.sqrt(2 * math.log(3))
    student = torch.zeros(1, 2, 2, dtype=torch.float64)
    found = relation_kl(student, teacher, torch.ones(1, 2, dtype=torch.bool), heads=2)
    p = 1 / (1 + 3 ** -math.sqrt(2))
    expected = (p * math.log(2 * p) + (1 - p) * math.log(2 * (1 - p))) / 2
    assert found.tolist() == [[pytest.approx(expected, rel=1e-12), 0.0]]


def test_without_mask_matches_torch() -> None:
    student, teacher = vectors()
    q, p = ((x @ x.mT / x.shape[-1] ** 0.5).softmax(-1) for x in (student, teacher))
    expected = F.kl_div(q.log(), p, reduction="none").sum(-1)
    found = relation_kl(student, teacher, torch.ones(2, 4, dtype=torch.bool), heads=1)
    assert torch.allclose(found, expected, rtol=1e-10)


@pytest.mark.parametrize("what", [math.nan, math.inf, 1e30])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_vectors_outside_the_mask_are_never_read(what: float, dtype: torch.dtype) -> None:
    student, teacher = (x.to(dtype) for x in vectors())
    found, pulls = [], []
    for outside in (0.5, what):
        leaf = student.masked_fill(~MASK[..., None], outside).requires_grad_()
        found.append(relation_kl(leaf, teacher.masked_fill(~MASK[..., None], -outside), MASK, heads=2))
        found[-1].sum().backward()
        pulls.append(leaf.grad)
    assert torch.equal(*found) and torch.equal(*pulls)
    assert pulls[1][MASK].any(-1).all() and not pulls[1][~MASK].any()
    assert torch.isfinite(pulls[1]).all()


def test_nan_inside_the_mask_gives_nan() -> None:
    for side in (0, 1):
        pair = list(vectors())
        pair[side][0, 1, 0] = math.nan
        found = relation_kl(*pair, MASK, heads=2)
        assert found[0, :3].isnan().all() and torch.isfinite(found[1]).all() and found[0, 3] == 0


def test_more_padding_changes_nothing() -> None:
    student, teacher = vectors()
    wide = [F.pad(x, (0, 0, 0, 3), value=math.nan) for x in (student, teacher)]
    padded = relation_kl(*wide, F.pad(MASK, (0, 3)), heads=2)
    assert torch.allclose(padded[:, :4], relation_kl(student, teacher, MASK, heads=2), rtol=1e-13)
    assert not padded[:, 4:].any()


def test_value_and_gradient_at_equality() -> None:
    student, _ = vectors()
    leaf = student.clone().requires_grad_()
    found = relation_kl(leaf, student, MASK, heads=2)
    found.sum().backward()
    assert not found.any()
    assert leaf.grad is not None and leaf.grad.abs().max() < 1e-15


def test_invariant_to_rotations_within_heads_only() -> None:
    student, teacher = vectors(d_s=8)
    turn = torch.linalg.qr(torch.randn(8, 8, dtype=torch.float64)).Q
    small = torch.linalg.qr(torch.randn(4, 4, dtype=torch.float64)).Q
    found = relation_kl(student, teacher, MASK, heads=2)
    assert torch.allclose(
        relation_kl(student @ torch.block_diag(small, small.T), teacher, MASK, heads=2), found, rtol=1e-9
    )
    assert not torch.allclose(relation_kl(student @ turn, teacher, MASK, heads=2), found, rtol=1e-2)
    alone = relation_kl(student, teacher, MASK, heads=1)
    assert torch.allclose(relation_kl(student @ turn, teacher, MASK, heads=1), alone, rtol=1e-9)


def test_the_number_of_heads_changes_the_value() -> None:
    student, teacher = vectors()
    found = [relation_kl(student, teacher, MASK, heads=heads).sum().item() for heads in (1, 2, 4)]
    assert min(abs(found[0] - found[1]), abs(found[1] - found[2]), abs(found[0] - found[2])) > 1e-2


@pytest.mark.parametrize("heads", [1, 2])
def test_gradient_by_finite_differences(heads: int) -> None:
    student, teacher = (x.requires_grad_() for x in vectors(t=4))
    assert torch.autograd.gradcheck(lambda s, t: relation_kl(s, t, MASK, heads=heads), (student, teacher))


def test_zero_and_equal_vectors_do_not_give_nan() -> None:
    student = torch.zeros(2, 4, 4, requires_grad=True)
    found = relation_kl(student, torch.ones(2, 4, 8), MASK, heads=2)  # both relate evenly
    found.sum().backward()
    assert not found.any() and student.grad is not None and torch.isfinite(student.grad).all()


def test_low_precision_is_computed_in_fp32() -> None:
    student, teacher = (x.bfloat16() for x in vectors())
    leaf = student.clone().requires_grad_()
    found = relation_kl(leaf, teacher, MASK, heads=2)
    assert found.dtype == torch.float32
    assert torch.equal(found, relation_kl(student.float(), teacher.float(), MASK, heads=2))
    found.sum().backward()
    assert leaf.grad is not None and leaf.grad.dtype == torch.bfloat16


def test_non_contiguous_views() -> None:
    student, teacher = vectors()
    turned = student.transpose(0, 1).contiguous().transpose(0, 1)
    assert not turned.is_contiguous()
    found, expected = (relation_kl(one, teacher, MASK, heads=2) for one in (turned, student))
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(("b", "t", "kept"), [(0, 3, True), (2, 0, True), (2, 3, False)])
def test_empty_inputs(b: int, t: int, kept: bool) -> None:
    student = torch.randn(b, t, 4).requires_grad_()
    found = relation_kl(student, torch.randn(b, t, 8), torch.full((b, t), kept), heads=2)
    assert found.shape == (b, t) and not found.any()
    found.sum().backward()
    assert student.grad is not None and not student.grad.any()


@pytest.mark.parametrize("heads", [3, 8, 0, -2])
def test_heads_that_do_not_divide_raise_and_name_those_that_do(heads: int) -> None:
    student, teacher = vectors(d_s=12, d_t=8)
    message = rf"heads={heads}: .* student's width 12 and the teacher's width 8\. Allowed: 1, 2, 4\."
    with pytest.raises(SettingError, match=message):
        relation_kl(student, teacher, MASK, heads=heads)


def test_wrong_shapes_raise() -> None:
    student, teacher = vectors()
    with pytest.raises(
        SettingError, match=r"student vectors are \[2, 4, 4\], teacher vectors \[2, 3, 8\], mask \[2, 4\]"
    ):
        relation_kl(student, teacher[:, :3], MASK, heads=2)
    with pytest.raises(SettingError, match=r"mask \[1, 4\]: they must be"):
        relation_kl(student, teacher, MASK[:1], heads=2)
