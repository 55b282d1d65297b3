"""Draws in proportion to weights: how often, never what weighs nothing, and repeated draws put together."""

from collections import Counter

import pytest
import torch

from hf_distill.functional.sparse import draw_columns, merge_repeats


def uniforms(n, k, seed=0):
    return torch.rand(n, k, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("stratified", [True, False])
def test_how_often(stratified):
    """Counts over 4000 rows of 5 draws against 5 · share: within 4.5 standard errors, of a binomial's 20000 draws.

    (Stratified draws vary less, so the same bound holds.) By normal tails 4.5 is passed once in 20000 columns.
    """
    weights = torch.tensor([3.0, 0.0, 1.0, 5.0, 0.5, 0.5, 0.0])
    share = (weights / weights.sum()).double()
    ids = draw_columns(weights.expand(4000, -1), uniforms(4000, 5), stratified=stratified)
    assert (ids[:, 1:] >= ids[:, :-1]).all()
    found = torch.bincount(ids.flatten(), minlength=7)
    assert found[1] == found[6] == 0
    assert ((found - 20000 * share).abs() <= 4.5 * (20000 * share * (1 - share)).sqrt()).all()
    each = (ids == 3).sum(1)  # half of the row, that is at least 1 and at most 3 of the 5 parts and what they share
    spread = each.double().var().item()
    assert spread == pytest.approx(5 * 0.5 * 0.5, rel=0.15) if not stratified else spread < 0.5


def test_a_column_that_fills_whole_parts_is_drawn_in_each():
    weights = torch.tensor([[0.1, 0.6, 0.3]])  # of ten parts 1 to 6 are the second's
    for row in uniforms(50, 10):
        ids = draw_columns(weights, row[None])[0]
        assert ids.tolist() == [0] + [1] * 6 + [2] * 3


@pytest.mark.parametrize("stratified", [True, False])
def test_long_rows_as_by_one_sum_over_all_columns(stratified):
    """The inverse of the cumulative sum in float64, column by column; blocks of columns without weight between."""
    weights = torch.rand(40, 1000, generator=torch.Generator().manual_seed(1)) ** 8
    weights[:, 100:500] = 0.0
    u = uniforms(40, 16)
    at = (torch.arange(16) + u) / 16 if stratified else u.sort(-1).values
    up_to = weights.double().cumsum(-1)
    expected = torch.searchsorted(up_to, at * up_to[:, -1:], right=True)
    found = draw_columns(weights, u, stratified=stratified)
    assert (found == expected).float().mean() > 0.99  # float32 sums of blocks: a draw at a border may fall to the next
    assert (weights.gather(-1, found) > 0).all() and (found[:, 1:] >= found[:, :-1]).all()


def test_the_ends_of_a_row():
    """The smallest and the largest number there are; columns without weight at both ends; a row without any."""
    weights = torch.tensor([[0.0, 1e-30, 1.0, 1e-9, 0.0], [0.0] * 5, [1e30, 0.0, 0.0, 0.0, 0.0]])
    ends = torch.tensor([[0.0, 1 - 2.0**-53]], dtype=torch.float64).expand(3, -1)
    for stratified in (True, False):
        ids = draw_columns(weights, ends, stratified=stratified)
        assert ids[0].tolist() == [1, 3] and ids[1].tolist() == [4, 4] and ids[2].tolist() == [0, 0]


def test_merged_as_counted_by_hand():
    ids = draw_columns(torch.rand(30, 6, generator=torch.Generator().manual_seed(1)), uniforms(30, 9)).view(5, 6, 9)
    weights = torch.rand(5, 6, 9, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    found, sums = merge_repeats(ids, weights)
    for row, of_row, listed, total in zip(
        ids.view(-1, 9).tolist(), weights.view(-1, 9).tolist(), found.view(-1, 9).tolist(), sums.view(-1, 9).tolist(),
        strict=True,
    ):  # fmt: skip
        expected: Counter = Counter()
        for column, weight in zip(row, of_row, strict=True):
            expected[column] += weight
        assert listed == sorted(expected) + [-1] * (9 - len(expected))
        assert total == pytest.approx([expected[c] for c in sorted(expected)] + [0.0] * (9 - len(expected)))
