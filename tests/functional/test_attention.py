"""Distances of attention scores: numbers by hand, slow references, and forbidden pairs, which are never read."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from hf_distill import SettingError
from hf_distill.functional.attention import attention_kl, map_heads, score_distance

Distance = Callable[[Tensor, Tensor, Tensor], Tensor]
BOTH = [score_distance, attention_kl]


def scores(b: int = 2, h: int = 3, t: int = 4, s: int = 5) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(7)
    drawn = 2 * torch.randn(2, b, h, t, s, generator=generator, dtype=torch.float64)
    return drawn[0], drawn[1]


def some_keys(*, heads: int = 1) -> Tensor:
    """Two sequences, of 3 and of 5 keys, the queries of the second causal; query 3 of the first has nothing."""
    keys = torch.zeros(2, heads, 4, 5, dtype=torch.bool)
    keys[0, :, :3, :3] = True
    keys[1] = torch.ones(4, 5, dtype=torch.bool).tril(1)
    if heads > 1:
        keys[1, 0, 2] = False  # one head without a key, where the others have some
        keys[1, 1, 2, 0] = False
    return keys


# Both once more, a number at a time.


def slow_squares(student: list[float], teacher: list[float]) -> float:
    return sum((a - b) ** 2 for a, b in zip(student, teacher, strict=True)) / len(student)


def slow_kl(student: list[float], teacher: list[float]) -> float:
    def log_softmax(x: list[float]) -> list[float]:
        return [a - math.log(sum(math.exp(b) for b in x)) for a in x]

    q, p = log_softmax(student), log_softmax(teacher)
    return sum(math.exp(b) * (b - a) for a, b in zip(q, p, strict=True))


SLOW = {score_distance: slow_squares, attention_kl: slow_kl}


def slow(distance: Distance, student: Tensor, teacher: Tensor, keys: Tensor) -> list[list[float]]:
    b, h, t, s = student.shape
    found = [[0.0] * t for _ in range(b)]
    for i in range(b):
        for query in range(t):
            for head in range(h):
                there = [k for k in range(s) if keys[i, min(head, keys.shape[1] - 1), query, k]]
                if there:
                    pair = [[x[i, head, query, k].item() for k in there] for x in (student, teacher)]
                    found[i][query] += SLOW[distance](*pair) / h
    return found


@pytest.mark.parametrize("distance", BOTH)
@pytest.mark.parametrize("heads", [1, 3])
def test_matches_the_slow_reference(distance: Distance, heads: int) -> None:
    student, teacher = scores()
    found = distance(student, teacher, some_keys(heads=heads))
    assert found.shape == (2, 4) and found.dtype == torch.float64
    expected = slow(distance, student, teacher, some_keys(heads=heads))
    assert found.flatten().tolist() == pytest.approx([x for row in expected for x in row], rel=1e-12, abs=1e-15)
    assert found[0, 3] == 0 and (found[1] > 0).all()


def test_scores_by_hand() -> None:
    """Two keys of three. Head 0: differences (−2, 0), 4 / 2 = 2. Head 1: (−1, −2), 5 / 2. Their mean is 9 / 4."""
    student = torch.tensor([[[[1.0, 2.0, 9.0]], [[0.0, 1.0, 0.0]]]], dtype=torch.float64)
    teacher = torch.tensor([[[[3.0, 2.0, 0.0]], [[1.0, 3.0, 0.0]]]], dtype=torch.float64)
    keys = torch.tensor([[[[True, True, False]]]])
    assert score_distance(student, teacher, keys).tolist() == [[2.25]]


def test_kl_by_hand() -> None:
    """Two keys of three. Head 0: teacher (3/4, 1/4), student (1/2, 1/2): ¾ log 3/2 + ¼ log 1/2. Head 1: the other
    way about: ½ log 2/3 + ½ log 2. Their mean."""
    uneven, even = [math.log(3), 0.0], [5.0, 5.0]
    student = torch.tensor([[[[*even, 9.0]], [[*uneven, 9.0]]]], dtype=torch.float64)
    teacher = torch.tensor([[[[*uneven, 7.0]], [[*even, 0.0]]]], dtype=torch.float64)
    keys = torch.tensor([[[[True, True, False]]]])
    first = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    second = 0.5 * math.log(2 / 3) + 0.5 * math.log(2)
    assert attention_kl(student, teacher, keys).tolist() == [[pytest.approx((first + second) / 2, rel=1e-12)]]


def test_kl_without_mask_matches_torch() -> None:
    student, teacher = scores()
    keys = torch.ones(2, 1, 4, 5, dtype=torch.bool)
    expected = F.kl_div(student.softmax(-1).log(), teacher.softmax(-1), reduction="none").sum(-1).mean(1)
    assert torch.allclose(attention_kl(student, teacher, keys), expected, rtol=1e-12)


@pytest.mark.parametrize("distance", BOTH)
@pytest.mark.parametrize("what", [math.nan, math.inf, -math.inf, 1e30])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scores_of_forbidden_pairs_are_never_read(distance: Distance, what: float, dtype: torch.dtype) -> None:
    student, teacher = (x.to(dtype) for x in scores())
    for keys in (some_keys(), some_keys(heads=3)):
        found, pulls = [], []
        for under in (0.0, what):
            leaf = student.masked_fill(~keys, under).requires_grad_()
            found.append(distance(leaf, teacher.masked_fill(~keys, -under), keys))
            found[-1].sum().backward()
            pulls.append(leaf.grad)
        assert torch.equal(*found) and torch.equal(*pulls)
        assert torch.isfinite(found[1]).all() and torch.isfinite(pulls[1]).all()
        assert pulls[1].any() and not pulls[1][(~keys).expand_as(student)].any()


@pytest.mark.parametrize("distance", BOTH)
def test_nan_under_an_allowed_pair_gives_nan(distance: Distance) -> None:
    for side in (0, 1):
        pair = list(scores())
        pair[side][1, 2, 0, 0] = math.nan
        found = distance(*pair, some_keys())
        assert found[1, 0].isnan() and torch.isfinite(found[0]).all() and torch.isfinite(found[1, 1:]).all()


@pytest.mark.parametrize("distance", BOTH)
def test_more_padding_changes_nothing(distance: Distance) -> None:
    student, teacher = scores()
    padded = distance(
        *(F.pad(x, (0, 3, 0, 2), value=math.nan) for x in (student, teacher)), F.pad(some_keys(), (0, 3, 0, 2))
    )
    assert torch.allclose(padded[:, :4], distance(student, teacher, some_keys()), rtol=1e-14)
    assert not padded[:, 4:].any()


@pytest.mark.parametrize("distance", BOTH)
def test_value_and_gradient_at_equality(distance: Distance) -> None:
    student, _ = scores()
    leaf = student.clone().requires_grad_()
    found = distance(leaf, student, some_keys())
    found.sum().backward()
    assert not found.any()
    assert leaf.grad is not None and leaf.grad.abs().max() < 1e-15


def test_constant_shift_of_a_query_changes_only_score_distance() -> None:
    student, teacher = scores()
    shift = torch.arange(4.0, dtype=torch.float64)[:, None] + 1
    kl = attention_kl(student, teacher, some_keys())
    assert torch.allclose(attention_kl(student + shift, teacher - shift, some_keys()), kl, rtol=1e-10)
    assert score_distance(student + shift, student, some_keys())[1].tolist() == pytest.approx([1.0, 4.0, 9.0, 16.0])


@pytest.mark.parametrize("distance", BOTH)
def test_gradient_by_finite_differences(distance: Distance) -> None:
    student, teacher = (x.requires_grad_() for x in scores(h=2))
    assert torch.autograd.gradcheck(lambda s, t: distance(s, t, some_keys()), (student, teacher))


@pytest.mark.parametrize("distance", BOTH)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_computed_in_fp32(distance: Distance, dtype: torch.dtype) -> None:
    student, teacher = (x.to(dtype) for x in scores())
    leaf = student.clone().requires_grad_()
    found = distance(leaf, teacher, some_keys())
    assert found.dtype == torch.float32
    assert torch.equal(found, distance(student.float(), teacher.float(), some_keys()))
    found.sum().backward()
    assert leaf.grad is not None and leaf.grad.dtype == dtype


@pytest.mark.parametrize("distance", BOTH)
@pytest.mark.parametrize("shape", [(0, 2, 3, 3), (2, 2, 0, 3), (2, 2, 0, 0), (2, 2, 3, 0)])
def test_empty_inputs(distance: Distance, shape: tuple[int, int, int, int]) -> None:
    b, _, t, s = shape
    student = torch.zeros(shape, requires_grad=True)
    found = distance(student, torch.zeros(shape), torch.ones(b, 1, t, s, dtype=torch.bool))
    assert found.shape == (b, t) and not found.any()
    found.sum().backward()
    assert student.grad is not None and student.grad.shape == shape


@pytest.mark.parametrize("distance", BOTH)
def test_wrong_shapes_raise(distance: Distance) -> None:
    student, teacher = scores()
    message = r"the student has 2 attention heads, the teacher 3\. Say which teacher head .* \(map_heads\)"
    with pytest.raises(SettingError, match=message):
        distance(student[:, :2], teacher, some_keys())
    message = r"student scores are \[2, 3, 4, 5\].*keys \[2, 4, 5\].*keys \[b 1 t s\] or \[b h t s\]"
    with pytest.raises(SettingError, match=message):
        distance(student, teacher, some_keys()[:, 0])
    with pytest.raises(SettingError, match=r"teacher scores \[2, 3, 4, 1\]"):  # would be broadcast without a word
        distance(student, teacher[..., :1], some_keys())
    with pytest.raises(SettingError, match=r"student scores are \[3, 4, 5\]"):
        distance(student[0], teacher[0], some_keys(heads=3)[0])
    with pytest.raises(SettingError, match=r"keys \[2, 2, 4, 5\]"):
        distance(student, teacher, some_keys(heads=2))


# Pairing heads.


def test_heads_are_selected_in_the_given_order() -> None:
    _, teacher = scores()
    assert torch.equal(map_heads(teacher, [2, 0]), torch.stack((teacher[:, 2], teacher[:, 0]), 1))
    assert torch.equal(map_heads(teacher, [[1], [1]]), teacher[:, [1, 1]])
    assert map_heads(teacher.bfloat16(), [0]).dtype == torch.bfloat16


def test_heads_are_averaged_in_full_precision() -> None:
    """By hand: the mean of 1, 2 and 6 is 3, of 2 alone 2; that of 256 and 258 is 257, which bf16 does not have."""
    teacher = torch.tensor([1.0, 2.0, 6.0]).view(1, 3, 1, 1)
    assert map_heads(teacher, [[0, 1, 2], [1]]).flatten().tolist() == [3.0, 2.0]
    found = map_heads(torch.tensor([256.0, 258.0]).bfloat16().view(1, 2, 1, 1), [[0, 1]])
    assert found.dtype == torch.float32 and found.item() == 257.0


def test_pairing_of_heads_changes_the_distance() -> None:
    student, teacher = scores()
    found = [
        score_distance(student, map_heads(teacher, heads), some_keys()).sum()
        for heads in ([0, 1, 2], [2, 1, 0], [0, 0, 0])
    ]
    assert len({x.item() for x in found}) == 3


def test_gradient_flows_to_the_selected_heads() -> None:
    teacher = scores()[1].requires_grad_()
    map_heads(teacher, [[0, 2], [2]]).sum().backward()
    assert teacher.grad is not None
    assert teacher.grad[0, :, 0, 0].tolist() == [0.5, 0.0, 1.5]


@pytest.mark.parametrize(
    ("heads", "message"),
    [
        ([0, 3], r"heads=\[0, 3\]: the teacher's 3 heads are 0 to 2, not \[3\]"),
        ([[0, 7], [-1]], r"heads=\[\[0, 7\], \[-1\]\]: the teacher's 3 heads are 0 to 2, not \[-1, 7\]"),
        ([], r"heads=\[\]: name at least one teacher head for each student head"),
        ([[0], []], r"heads=\[\[0\], \[\]\]: name at least one"),
    ],
)
def test_missing_heads_raise(heads: list[int] | list[list[int]], message: str) -> None:
    with pytest.raises(SettingError, match=message):
        map_heads(scores()[1], heads)
