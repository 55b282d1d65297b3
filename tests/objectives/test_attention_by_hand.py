"""AttentionMatch and RelationMatch in float64, on numbers small enough to check on paper."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from hf_distill import AttentionMatch, RelationMatch
from hf_distill.models.capture import AttentionRecord
from hf_distill.signals import ActivationKey
from tests.objectives.by_hand import Shown, attended, doubles, fitted, found


def attention(*heads: Any, layer: int = 0, **changed: Any) -> dict[ActivationKey, AttentionRecord]:
    """Return one example with these scores `[h t s]`: the keys are unit vectors, so each query is its row of scores."""
    scores = doubles(*heads)[None]
    keys = torch.eye(scores.shape[-1], dtype=torch.float64).expand(1, scores.shape[1], -1, -1)
    plain: dict[str, Any] = {"bias": None, "softcap": None, "mask": None, "causal": False, **changed}
    return {ActivationKey("attention", layer): AttentionRecord(scores, keys, 1.0, **plain)}


def of(objective: Any, student: Any, teacher: Any, mask: list[int], heads: tuple[int, int] = (1, 1)) -> Any:
    fit = fitted(objective, Shown(1, 2, heads[0]), Shown(1, 2, heads[1]))
    return found(fit, student, teacher, attended(mask))


def test_scores_are_compared_over_pairs_of_valid_positions() -> None:
    """Two of three positions are valid. Rows differ by (1, 0) and (2, 2): 1/2 + 8/2 = 4.5, over 2 positions."""
    ours = attention([[1.0, 2.0, 99.0], [3.0, 4.0, 99.0], [99.0, 99.0, 99.0]])
    theirs = attention([[0.0, 2.0, 7.0], [1.0, 2.0, 7.0], [7.0, 7.0, 7.0]])
    assert of(AttentionMatch(), ours, theirs, [1, 1, 0]) == (4.5, 2)


def test_keys_masked_in_either_model_are_excluded() -> None:
    """The student is causal, so row 1 has only its first pair: 1² / 1; row 2 has both: (4 + 4) / 2. Sum 5."""
    ours = attention([[1.0, 2.0], [3.0, 4.0]], causal=True)
    theirs = attention([[0.0, 9.0], [1.0, 2.0]])
    assert of(AttentionMatch(), ours, theirs, [1, 1]) == (5.0, 2)
    assert of(AttentionMatch(), theirs, ours, [1, 1]) == (5.0, 2)


def test_probabilities_are_compared_by_forward_kl() -> None:
    """Student (1/2, 1/2), teacher (3/4, 1/4): ¾ log(3/2) + ¼ log(1/2) at one position; they agree at the other."""
    ours = attention([[0.0, 0.0, 50.0], [0.0, 0.0, 50.0], [0.0, 0.0, 0.0]])
    theirs = attention([[math.log(3.0), 0.0, 0.0], [1.0, 1.0, 0.0], [9.0, 0.0, 0.0]])
    total, count = of(AttentionMatch(distance="probabilities"), ours, theirs, [1, 1, 0])
    assert (total, count) == (pytest.approx(0.75 * math.log(1.5) + 0.25 * math.log(0.5), rel=1e-12), 2)


def test_the_distance_is_averaged_over_heads() -> None:
    """Heads differ by 1 and by 3 at one position with one key: (1 + 9) / 2 = 5."""
    assert of(AttentionMatch(), attention([[1.0]], [[3.0]]), attention([[0.0]], [[0.0]]), [1], (2, 2)) == (5.0, 1)


@pytest.mark.parametrize(
    ("heads", "expected"),
    [
        ("grouped", (1.0 + 4.0) / 2),  # the means of neighbours, 2 and 5, against 1 and 3
        ([[0, 1], [2, 3]], (1.0 + 4.0) / 2),
        ([3, 0], (25.0 + 4.0) / 2),  # 6 against 1, and 1 against 3
        ([[0, 1, 2], [3]], ((8 / 3 - 1) ** 2 + 9.0) / 2),  # the mean of 1, 3 and 4 is 8/3
    ],
)
def test_models_with_different_head_counts_are_matched(heads: Any, expected: float) -> None:
    """One position. The student's heads score 1 and 3; the teacher's 1, 3, 4 and 6."""
    theirs = attention([[1.0]], [[3.0]], [[4.0]], [[6.0]])
    total, count = of(AttentionMatch(heads=heads), attention([[1.0]], [[3.0]]), theirs, [1], (2, 4))
    assert (total, count) == (pytest.approx(expected, rel=1e-12), 1)


def test_attention_without_a_mask_counts_each_image_once() -> None:
    """Two patches whose rows differ by (1, 1) and (3, 3): (1 + 9) / 2 = 5, for one image."""
    fit = fitted(AttentionMatch(), Shown(1, 2), Shown(1, 2), kind="embedding")
    batch = {"pixel_values": torch.zeros(1, 3, 4, 4)}
    ours, theirs = attention([[1.0, 1.0], [3.0, 3.0]]), attention([[0.0, 0.0], [0.0, 0.0]])
    assert found(fit, ours, theirs, batch, kind="embedding") == (5.0, 1)


# Relations.

NAN = float("nan")


def vectors(what: str, *rows: Any) -> dict[ActivationKey, torch.Tensor]:
    """Return `[1 t d]` of the last block."""
    return {ActivationKey(what, 0): doubles(rows)}


def softmax(*scores: float) -> list[float]:
    whole = sum(map(math.exp, scores))
    return [math.exp(one) / whole for one in scores]


def kl(p: list[float], q: list[float]) -> float:
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))


def test_relations_with_one_head() -> None:
    """Width 1 on both sides, positions 1 and 2 of the student, 0 and 1 of the teacher; the third is padding.

    The student's relations: softmax of (1·1, 1·2) and of (2·1, 2·2). The teacher's: of (0, 0) and of (0, 1).
    """
    expected = kl(softmax(0, 0), softmax(1, 2)) + kl(softmax(0, 1), softmax(2, 4))
    objective = fitted(RelationMatch(relations=("values",)), Shown(1, 1), Shown(1, 1))
    ours, theirs = vectors("values", [1.0], [2.0], [NAN]), vectors("values", [0.0], [1.0], [NAN])
    assert found(objective, ours, theirs, attended([1, 1, 0])) == (pytest.approx(expected, rel=1e-12), 2)


def test_products_are_divided_by_the_root_of_the_head_width() -> None:
    """Width 4 in one piece: the student's (1, 1, 1, 1) with itself is 4 / √4 = 2, with (0, 0, 0, 0) it is 0.

    In two pieces: 2 / √2 = √2 in each head, averaged over heads. The teacher is all 0, so its relations are uniform.
    """
    ours = vectors("keys", [1.0] * 4, [0.0] * 4)
    theirs = vectors("keys", [0.0] * 2, [0.0] * 2)  # a different width
    for pieces, score in ((1, 2.0), (2, math.sqrt(2))):
        objective = RelationMatch(relations=("keys",), relation_heads=pieces)
        fit = fitted(objective, Shown(1, 4, 4), Shown(1, 2, 2))
        expected = kl([0.5, 0.5], softmax(score, 0))
        assert found(fit, ours, theirs, attended([1, 1])) == (pytest.approx(expected, rel=1e-12), 2)


def test_relations_are_summed_with_their_weights() -> None:
    """Values agree; queries and keys both differ by k: 2 k + 0.5 k."""
    ours = {**vectors("queries", [1.0], [2.0]), **vectors("keys", [1.0], [2.0]), **vectors("values", [1.0], [1.0])}
    theirs = {**vectors("queries", [0.0], [1.0]), **vectors("keys", [0.0], [1.0]), **vectors("values", [1.0], [1.0])}
    k = kl(softmax(0, 0), softmax(1, 2)) + kl(softmax(0, 1), softmax(2, 4))
    for relations, factor in (
        ({"queries": 2.0, "keys": 0.5, "values": 7.0}, 2.5),
        (("queries", "keys", "values"), 2.0),
        ({"queries": 3.0}, 3.0),
    ):
        objective = fitted(RelationMatch(relations=relations), Shown(1, 1), Shown(1, 1))
        total, _ = found(objective, ours, theirs, attended([1, 1]))
        assert total == pytest.approx(factor * k, rel=1e-12)
        assert {read.what for read in objective.needs.activations} == set(relations)


@pytest.mark.parametrize(
    ("student", "teacher", "expected"),
    [((4, 2), (8, 4), 4), ((6, 3), (8, 4), None), ((4, 2), (6, 3), 2), ((12, 3), (16, 4), 4)],
)
def test_the_default_number_of_relation_heads_divides_both_widths(
    student: Any, teacher: Any, expected: int | None
) -> None:
    """The teacher's number if it divides both widths, else the student's; arguments are (width, heads)."""
    objective = RelationMatch()
    if expected is None:  # 4 does not divide 6, and 3 does not divide 8
        with pytest.raises(ValueError, match=r"neither 4 \(the teacher's attention heads\) nor 3 \(the student's\)"):
            fitted(objective, Shown(1, *student), Shown(1, *teacher))
    else:
        assert fitted(objective, Shown(1, *student), Shown(1, *teacher))._heads == expected
