"""HiddenMatch and CosineEmbedding in float64, on numbers small enough to check on paper."""

from __future__ import annotations

import math

import pytest
import torch

from hf_distill import CosineEmbedding, HiddenMatch
from hf_distill.signals import ActivationKey
from tests.objectives.by_hand import Shown, attended, doubles, fitted, found, hidden

NAN = float("nan")
ONE, TWO, THREE = (Shown(layers, 2) for layers in (1, 2, 3))
MASK = attended([1, 1], [1, 0])  # three valid positions
# Differences (1, 0), (1, 1) and (0, 3); the fourth position is padding.
OURS = [[1.0, 2.0], [3.0, 4.0]], [[5.0, 6.0], [NAN, NAN]]
THEIRS = [[0.0, 2.0], [2.0, 3.0]], [[5.0, 3.0], [9.0, 9.0]]


def test_mean_squared_over_valid_positions() -> None:
    """(1² + 0²)/2 + (1² + 1²)/2 + (0² + 3²)/2 = 0.5 + 1 + 4.5 = 6, over 3 positions."""
    objective = fitted(HiddenMatch(), ONE, ONE)
    assert found(objective, hidden(0, *OURS), hidden(0, *THEIRS), MASK) == (6.0, 3)


def test_first_and_last_pooling_count_examples() -> None:
    """First: 0.5 and 4.5, over 2 examples. Last of the first example is its second position: 1 + 4.5."""
    for positions, expected in (("first", 5.0), ("last", 5.5)):
        objective = fitted(HiddenMatch(pooling=positions), ONE, ONE)
        assert found(objective, hidden(0, *OURS), hidden(0, *THEIRS), MASK) == (expected, 2)


def test_first_and_last_pooling_with_left_padding() -> None:
    """The first valid position, not position 0: in the second example it is position 1, which is also the last.

    Differences: (1, 0) and (1, 1) in the first example; (2, 0) at position 1 of the second.
    First: 0.5 + 2 = 2.5; last: 1 + 2 = 3.
    """
    ours = hidden(0, [[1.0, 2.0], [3.0, 4.0]], [[NAN, NAN], [2.0, 0.0]])
    theirs = hidden(0, [[0.0, 2.0], [2.0, 3.0]], [[NAN, NAN], [0.0, 0.0]])
    for positions, expected in (("first", 2.5), ("last", 3.0)):
        objective = fitted(HiddenMatch(pooling=positions), ONE, ONE)
        assert found(objective, ours, theirs, attended([1, 1], [0, 1])) == (expected, 2)


def test_an_example_without_valid_positions_is_not_counted() -> None:
    objective = fitted(HiddenMatch(pooling="first"), ONE, ONE)
    assert found(objective, hidden(0, *OURS), hidden(0, *THEIRS), attended([0, 0], [1, 0])) == (4.5, 1)


@pytest.mark.parametrize(
    ("distance", "settings", "expected"),
    [
        # The first position compares (3, 4) with (4, 3): cosine 24/25; the second (1, 0) with (0, 2): cosine 0.
        ("cosine", {}, (1 - 24 / 25) + 1),
        ("normalized_squared", {}, 2 * (1 - 24 / 25) + 2),  # |a - b|² of unit vectors is 2 - 2 cos
        # Two numbers minus their mean are (-x, x), standardized to (-1, 1) or (1, -1): (3, 4) rises, the others
        # fall, fall and rise: 4 where the directions are opposite, so 4 at both positions.
        ("standardized_squared", {}, 4.0 + 4.0),
        # |differences| 1, 1 and 1, 2. beta 1: 1 - 1/2 and 2 - 1/2, means 0.5 and 1. beta 2: x²/4: 1/4 and (1/4 + 1)/2
        ("smooth_l1", {}, 0.5 + 1.0),
        ("smooth_l1", {"beta": 2.0}, 0.25 + 0.625),
        # Means of |differences| 1 and 1.5, and -log sigmoid of the cosines: log(1 + e^(-24/25)) and log 2.
        ("l1_cosine", {}, 2.5 + math.log1p(math.exp(-24 / 25)) + math.log(2)),
        ("l1_cosine", {"cosine_weight": 0.0}, 2.5),
    ],
)
def test_each_distance_by_hand(distance: str, settings: dict, expected: float) -> None:
    objective = fitted(HiddenMatch(distance=distance, distance_kwargs=settings), ONE, ONE)
    total, count = found(
        objective, hidden(0, [[3.0, 4.0], [1.0, 0.0]]), hidden(0, [[4.0, 3.0], [0.0, 2.0]]), attended([1, 1])
    )
    assert total == pytest.approx(expected, rel=1e-12) and count == 2


def test_layer_pairs_are_summed_with_their_weights() -> None:
    """Student 0 is matched with teacher 0 at 0.25 and with teacher 2 at 0.75, student 1 with teacher 1.

    One position, width 2. Distances: student 0 (1, 1) from (0, 0) is 1, from (3, 1) is 4/2 = 2; student 1
    (2, 2) from (2, 0) is 2. 0.25 · 1 + 0.75 · 2 + 2 = 3.75.
    """
    objective = fitted(HiddenMatch([(0, 0, 0.25), (0, -1, 0.75), (1, 1)]), TWO, THREE)
    ours = {**hidden(0, [[1.0, 1.0]]), **hidden(1, [[2.0, 2.0]])}
    theirs = {**hidden(0, [[0.0, 0.0]]), **hidden(1, [[2.0, 0.0]]), **hidden(2, [[3.0, 1.0]])}
    assert found(objective, ours, theirs, attended([1])) == (3.75, 1)
    assert {read.layer for read in objective.needs.activations} == {0, 1}
    assert {read.layer for read in objective.teacher_needs.activations} == {0, 1, 2}


def test_embeddings_are_matched_with_the_blocks_or_alone() -> None:
    """Both numbers of the embeddings differ by 2: 4; the blocks are 1 apart: 4 + 1, or 4 alone."""
    ours = {**hidden(-1, [[2.0, 2.0]]), **hidden(0, [[1.0, 1.0]])}
    theirs = {**hidden(-1, [[0.0, 0.0]]), **hidden(0, [[0.0, 0.0]])}
    both = fitted(HiddenMatch(embeddings=True), ONE, ONE)
    assert found(both, ours, theirs, attended([1])) == (5.0, 1)
    alone = fitted(HiddenMatch(None, embeddings=True), ONE, THREE)
    assert {read.layer for read in alone.needs.activations | alone.teacher_needs.activations} == {-1}
    assert found(alone, ours, theirs, attended([1])) == (4.0, 1)


def test_the_projection_is_applied_to_the_student() -> None:
    """W = [[1, 0], [0, 2], [1, 1]] maps (1, 2) to (1, 4, 3), which is (1 + 0 + 9) / 3 from (0, 4, 0)."""
    objective = fitted(HiddenMatch(), ONE, Shown(1, 3))
    assert {name: tuple(p.shape) for name, p in objective.learned.named_parameters()} == {"matrices.0_0.weight": (3, 2)}
    with torch.no_grad():
        next(objective.learned.parameters()).copy_(doubles([1, 0], [0, 2], [1, 1]))
    total, count = found(objective, hidden(0, [[1.0, 2.0]]), hidden(0, [[0.0, 4.0, 0.0]]), attended([1]))
    assert (total, count) == (pytest.approx(10 / 3, rel=1e-12), 1)


@pytest.mark.parametrize(
    ("projection", "teacher", "names"),
    [
        ("auto", 2, None),
        ("none", 2, None),
        ("shared", 2, None),
        ("auto", 3, ["embeddings", "0_0", "1_2"]),
        ("shared", 3, ["all"]),
        ("linear", 2, ["embeddings", "0_0", "1_2"]),
    ],
)
def test_projections_are_learned_where_widths_differ(projection: str, teacher: int, names: list[str] | None) -> None:
    objective = fitted(HiddenMatch(projection=projection, embeddings=True), TWO, Shown(3, teacher))
    learned = None if objective.learned is None else list(objective.learned.matrices)
    assert learned == names
    assert all(p.dtype == torch.float64 for p in (objective.learned.parameters() if names else ()))


def test_without_a_mask_each_example_counts_once() -> None:
    """Two images of two patches; differences (1, 0), (1, 1) and (0, 3), (2, 2): (0.5 + 1)/2 + (4.5 + 4)/2 = 5, of 2."""
    objective = fitted(HiddenMatch(), ONE, ONE, kind="embedding")
    ours = hidden(0, [[1.0, 2.0], [3.0, 4.0]], [[5.0, 6.0], [2.0, 2.0]])
    theirs = hidden(0, [[0.0, 2.0], [2.0, 3.0]], [[5.0, 3.0], [0.0, 0.0]])
    batch = {"pixel_values": torch.zeros(2, 3, 4, 4)}
    assert found(objective, ours, theirs, batch, kind="embedding") == (5.0, 2)
    first = fitted(HiddenMatch(pooling="first"), ONE, ONE, kind="embedding")
    assert found(first, ours, theirs, batch, kind="embedding") == (5.0, 2)  # 0.5 + 4.5
    last = fitted(HiddenMatch(pooling="last"), ONE, ONE, kind="embedding")
    assert found(last, ours, theirs, batch, kind="embedding") == (5.0, 2)  # 1 + 4


def test_the_side_selects_the_mask() -> None:
    """The encoder uses the attention mask, the decoder uses the labels.

    Encoder: differences 1 and 2 in both entries at the two attended positions: 1 + 4 = 5, of 2.
    Decoder: the labels exclude its second position: 9, of 1.
    """
    batch = {**attended([1, 1, 0]), "labels": torch.tensor([[5, -100]])}
    ours = {
        **hidden(0, [[1.0, 1.0], [2.0, 2.0], [7.0, 7.0]], side="encoder"),
        **hidden(0, [[3.0, 3.0], [8.0, 8.0]]),
    }
    theirs = {**hidden(0, [[0.0, 0.0]] * 3, side="encoder"), **hidden(0, [[0.0, 0.0]] * 2)}
    for side, expected in (("encoder", (5.0, 2)), (None, (9.0, 1))):
        objective = fitted(HiddenMatch(side=side), *(Shown(1, 2, two_sided=True) for _ in range(2)), kind="seq2seq")
        assert found(objective, ours, theirs, batch, kind="seq2seq") == expected


def test_the_named_stack_is_used_in_both_models() -> None:
    student, teacher = Shown(2, 2), Shown(2, 2)
    objective = fitted(HiddenMatch(side="encoder", student_stack="a.b", teacher_stack="c"), student, teacher)
    assert (student.asked, teacher.asked) == ([("encoder", "a.b")], [("encoder", "c")])
    assert {read.stack for read in objective.needs.activations} == {"a.b"}
    assert {read.stack for read in objective.teacher_needs.activations} == {"c"}


def test_cosine_embedding_is_one_minus_the_cosine_of_the_last_hidden_states() -> None:
    """(3, 4) and (4, 3): 1 - 24/25; (1, 0) and (-2, 0): 2; a zero vector: 1; padding is skipped. Sum 3.04 of 3."""
    read = ActivationKey("last_hidden", 0)
    ours = {read: doubles([[3, 4], [1, 0], [0, 0], [NAN, NAN]])}
    theirs = {read: doubles([[4, 3], [-2, 0], [1, 1], [1, 1]])}
    objective = fitted(CosineEmbedding(), TWO, THREE)
    total, count = found(objective, ours, theirs, attended([1, 1, 1, 0]))
    assert (total, count) == (pytest.approx(3.04, rel=1e-12), 3)
    assert objective.needs.activations == objective.teacher_needs.activations == {read}
