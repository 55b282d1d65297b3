"""The number of rows in a chunk: within the budget, as few chunks as it allows, none of them short."""

from __future__ import annotations

import math
import random

import pytest

from hf_distill.functional.fused.chunks import ENOUGH_ROWS, FEW_ROWS, MOST_ROWS, ROUND_ROWS, rows_a_chunk

MIB = 2**20


def calls() -> list[tuple[int, int, int, int, bool]]:
    """n, bytes of a row on either side, budget, over_teacher: heads of 2 to 600,000 bytes, from one row to all."""
    drawn, found = random.Random(5), []
    for _ in range(3000):
        student = 2 * round(math.exp(drawn.uniform(0, 12.6)))
        teacher = drawn.choice([0, student, student, 2 * student])
        n = round(math.exp(drawn.uniform(0, 9)))
        rows = math.exp(drawn.uniform(-1, 7))  # about as many fit
        budget = max(1, round(rows * (student + teacher)))
        found.append((n, student, teacher, budget, teacher == student and drawn.random() < 0.7))
    gpt2 = 2 * 50257
    for n in (0, 1, 501, 990, 1000, 1990, 2048):  # 500 rows fit
        found += [(n, gpt2, gpt2, 96 * MIB, over) for over in (False, True)]
    return found


CALLS = calls()


def fit(memory: int, bytes_a_row: int, most: int) -> int:
    return max(1, min(memory // bytes_a_row, most))


def chunks_of(n: int, rows: int) -> list[int]:
    return [min(rows, n - first) for first in range(0, n, rows)]


def test_chunks_fit_the_budget_unless_they_have_one_row() -> None:
    for n, student, teacher, budget, over in CALLS:
        found = rows_a_chunk(n, student, teacher, budget, over_teacher=over)
        assert 1 <= found.part <= found.whole <= max(1, n)
        assert found.whole <= MOST_ROWS
        assert found.part * student + found.whole * teacher <= budget or found.whole == 1
        assert sum(chunks_of(n, found.whole)) == n


def test_rows_that_fit_are_one_chunk() -> None:
    some = 0
    for n, student, teacher, budget, over in CALLS:
        if 0 < n <= MOST_ROWS and n * (student + teacher) <= budget:
            found = rows_a_chunk(n, student, teacher, budget, over_teacher=over)
            assert (found.whole, found.part) == (n, n)
            some += 1
    assert some > 100
    assert rows_a_chunk(0, 10, 10, 10**6, over_teacher=False).whole == 1


def test_student_parts_are_used_only_if_they_make_chunks_longer() -> None:
    split = 0
    for n, student, teacher, budget, over in CALLS:
        found = rows_a_chunk(n, student, teacher, budget, over_teacher=over)
        together = rows_a_chunk(n, student, teacher, budget, over_teacher=False)
        assert together.whole == together.part
        if found.part == found.whole:
            assert found == together
            continue
        split += 1
        assert over and together.whole < min(n, ENOUGH_ROWS)
        assert together.whole < found.whole <= ENOUGH_ROWS and found.part <= FEW_ROWS
    assert split > 100


def test_chunks_are_as_few_as_round_numbers_allow_and_even() -> None:
    """Above 32 rows only multiples of 32 are used; a chunk has less than 32 rows more than equal chunks would."""
    several = 0
    for n, student, teacher, budget, over in CALLS:
        found = rows_a_chunk(n, student, teacher, budget, over_teacher=over)
        if found.whole >= n:
            continue
        several += 1
        if found.part == found.whole:
            rows = fit(budget, student + teacher, MOST_ROWS)
        else:
            rows = fit(budget - found.part * student, teacher, ENOUGH_ROWS)
        assert found.whole <= rows
        if rows > ROUND_ROWS:
            assert found.whole % ROUND_ROWS == 0
            rows -= rows % ROUND_ROWS
        chunks = chunks_of(n, found.whole)
        assert len(chunks) == math.ceil(n / rows)
        assert found.whole - math.ceil(n / len(chunks)) < ROUND_ROWS
    assert several > 500


@pytest.mark.parametrize(
    ("n", "chunks"), [(500, [500]), (501, [256, 245]), (990, [352, 352, 286]), (1000, [352, 352, 296])]
)
def test_by_hand(n: int, chunks: list[int]) -> None:
    """GPT-2's 50,257 columns of 2 bytes, both sides: 96 MiB hold 500 rows, or 480 by 32."""
    row = 2 * 50257
    assert chunks_of(n, rows_a_chunk(n, row, row, 96 * MIB, over_teacher=False).whole) == chunks
