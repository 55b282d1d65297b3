"""SimilarityMatch in float64, on numbers small enough to check on paper: pooling, and each similarity."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from hf_distill import SimilarityMatch
from tests.objectives.by_hand import Shown, attended, fitted, found, hidden

NAN = float("nan")


def of(compare: str, ours: Any, theirs: Any, mask: Any = None, **settings: Any) -> tuple[float, int]:
    """Return value and count for examples `[b t d]`."""
    objective = fitted(SimilarityMatch(distance=compare, **settings), Shown(1, 2), Shown(1, 2))
    batch = attended(*(mask or [[1] * len(example) for example in ours]))
    return found(objective, hidden(0, *ours), hidden(0, *theirs), batch)


def alone(*vectors: Any) -> list[Any]:
    """Return examples of one position each."""
    return [[vector] for vector in vectors]


def test_similarity_preserving() -> None:
    """Student (1, 0), (0, 1): products I. Teacher (1, 0), (1, 0): all ones, its rows of length 1 are (1, 1)/√2.

    Each row: (1 - 1/√2)² + 1/2 = 2 - √2. The paper's 1/n² · Σ is 2 (2 - √2) / 4; before the division by the count
    n = 2, the sum is 2 - √2.
    """
    total, count = of("similarity_preserving", alone([1, 0], [0, 1]), alone([1, 0], [1, 0]))
    assert (total, count) == (pytest.approx(2 - math.sqrt(2), rel=1e-12), 2)


def test_distance_relations() -> None:
    """On a line: the student at 0, 1, 3 (distances 1, 2, 3, of mean 2), the teacher at 0, 1, 2 (1, 1, 2, of mean 4/3).

    In units of their means: student 1/2, 1, 3/2 for the pairs (01), (12), (02); teacher 3/4, 3/4, 3/2. Huber below 1 is
    x²/2: (1/16)/2, (1/16)/2, 0. Each pair counts in both of its examples, over n - 1 = 2 partners:
    Σ = 2 · (1/16) / 2.
    """
    total, count = of("distance_relations", alone([0, 0], [1, 0], [3, 0]), alone([0, 0], [1, 0], [2, 0]))
    assert (total, count) == (pytest.approx(1 / 16, rel=1e-12), 3)


def test_angle_relations() -> None:
    """The student's examples form a right angle with equal legs; the teacher's lie on a line at 0, 1, 2.

    Cosines of the student's angles: 0 at the corner, 1/√2 at the other two. The teacher's: 1 at the end points, -1 in
    between. The corner is the first point on the line: at it 0 and 1, Huber of 1: 1/2. At the second:
    1/√2 and -1: |x| - 1/2 = 1/√2 + 1/2. At the third: 1/√2 and 1: (1 - 1/√2)²/2. Each angle counts twice, over 2
    pairs.
    """
    half = 1 / math.sqrt(2)
    expected = 0.5 + (half + 0.5) + (1 - half) ** 2 / 2
    total, count = of("angle_relations", alone([0, 0], [1, 0], [0, 1]), alone([0, 0], [1, 0], [2, 0]))
    assert (total, count) == (pytest.approx(expected, rel=1e-12), 3)


def test_centered_kernel_alignment() -> None:
    """Student on the line at -1, 0, 1; teacher at -1, 2, -1 (both of mean 0): 1 - (x·y)² / (|x|² |y|²) = 1 - 0.

    For one column, linear CKA is the squared correlation: 0 here, and 1 with itself.
    """
    ours, theirs = alone([-1, 0], [0, 0], [1, 0]), alone([-1, 0], [2, 0], [-1, 0])
    assert of("centered_kernel_alignment", ours, theirs) == (pytest.approx(3.0, rel=1e-12), 3)
    assert of("centered_kernel_alignment", ours, ours)[0] == pytest.approx(0.0, abs=1e-12)
    # (-1, 0, 1) and (0, 0, 3), minus its mean (-1, -1, 2): product 3, lengths² 2 and 6: 1 - 9/12, for each of 3.
    skewed = alone([0, 0], [0, 0], [3, 0])
    assert of("centered_kernel_alignment", ours, skewed)[0] == pytest.approx(3 * 0.25, rel=1e-12)


@pytest.mark.parametrize(
    ("pooling", "first", "second"),
    [("mean", [2.0, 1.0], [1.0, 5.0]), ("first", [1.0, 0.0], [1.0, 5.0]), ("last", [3.0, 2.0], [1.0, 5.0])],
)
def test_pooling_over_valid_positions(pooling: str, first: list[float], second: list[float]) -> None:
    """The examples are ((1, 0), (3, 2)) and ((1, 5), padding); `first` and `second` are the pooled vectors."""
    ours = [[[1.0, 0.0], [3.0, 2.0]], [[1.0, 5.0], [NAN, NAN]]]
    theirs = [[[1.0, 1.0], [1.0, 1.0]], [[0.0, 1.0], [NAN, NAN]]]
    found_here = of("similarity_preserving", ours, theirs, [[1, 1], [1, 0]], pooling=pooling)
    assert found_here == of("similarity_preserving", alone(first, second), alone([1.0, 1.0], [0.0, 1.0]))
    assert found_here[0] > 0.01


@pytest.mark.parametrize("compare", ["similarity_preserving", "distance_relations", "centered_kernel_alignment"])
def test_a_single_example_gives_zero(compare: str) -> None:
    assert of(compare, alone([1, 2]), alone([5, 0])) == (0.0, 1)
    two = [[[1.0, 2.0]], [[NAN, NAN]]], [[[5.0, 0.0]], [[NAN, NAN]]]
    assert of(compare, *two, [[1], [0]]) == (0.0, 1)  # an example without valid positions is not counted


def test_images_are_pooled_over_all_patches() -> None:
    """The means of the patches are (1, 0), (0, 1) and (1, 0), (1, 0), as in the first test: 2 - √2."""
    objective = fitted(SimilarityMatch(), Shown(1, 2), Shown(1, 2), kind="embedding")
    ours = hidden(0, [[2.0, 0.0], [0.0, 0.0]], [[0.0, 1.0], [0.0, 1.0]])
    theirs = hidden(0, [[1.0, 0.0], [1.0, 0.0]], [[2.0, 0.0], [0.0, 0.0]])
    batch = {"pixel_values": torch.zeros(2, 3, 4, 4)}
    total, count = found(objective, ours, theirs, batch, kind="embedding")
    assert (total, count) == (pytest.approx(2 - math.sqrt(2), rel=1e-12), 2)
