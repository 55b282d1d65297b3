"""Layer maps: each constructor against handwritten lists, their repr, and errors."""

from __future__ import annotations

import pytest

from hf_distill.errors import SettingError
from hf_distill.layer_map import LayerMap, Link

# i·(n-1)/(m-1), rounded to the nearest integer, halves up.
EVEN = {
    (6, 12): (0, 2, 4, 7, 9, 11),  # 0, 2.2, 4.4, 6.6, 8.8, 11
    (3, 12): (0, 6, 11),  # 0, 5.5, 11
    (2, 12): (0, 11),
    (6, 24): (0, 5, 9, 14, 18, 23),  # 0, 4.6, 9.2, 13.8, 18.4, 23
    (2, 6): (0, 5),
    (1, 6): (0,),  # one layer: the first, which has the embeddings as input, as in the teacher
    (12, 12): tuple(range(12)),
    (4, 6): (0, 2, 3, 5),  # 0, 1.67, 3.33, 5
    (3, 6): (0, 3, 5),  # 0, 2.5, 5: halves are rounded up, not to the even number
    (1, 1): (0,),
}


@pytest.mark.parametrize("sizes", EVEN, ids=str)
def test_even_maps(sizes: tuple[int, int]) -> None:
    assert LayerMap.even(*sizes).sources() == EVEN[sizes]


def test_even_maps_are_increasing() -> None:
    for teacher in range(1, 40):
        for student in range(1, teacher + 1):
            chosen = LayerMap.even(student, teacher).sources()
            assert len(set(chosen)) == student and list(chosen) == sorted(chosen)
            assert chosen[0] == 0 and (student == 1 or chosen[-1] == teacher - 1)


@pytest.mark.parametrize(
    ("made", "layers"),
    [
        (LayerMap.first(3, 12), (0, 1, 2)),
        (LayerMap.last(3, 12), (9, 10, 11)),
        (LayerMap.first_last(2, 32), (0, 31)),
        (LayerMap.first_last(5, 12), (0, 1, 2, 10, 11)),
        (LayerMap.first_last(1, 12), (0,)),
        (LayerMap.skip(6, 12), (1, 3, 5, 7, 9, 11)),
        (LayerMap.skip(4, 12, every=2), (1, 3, 5, 7)),
        (LayerMap.skip(5, 12), (1, 3, 5, 7, 9)),
        (LayerMap.of([0, -2, -1], 12), (0, 10, 11)),
        (LayerMap.of([5, 0], 6), (5, 0)),
        (LayerMap.pairs([(1, 3), (0, 3)], 2, 4), (3, 3)),
    ],
    ids=str,
)
def test_other_constructors(made: LayerMap, layers: tuple[int, ...]) -> None:
    assert made.sources() == layers


def test_layers_may_have_several_weighted_links_or_none() -> None:
    made = LayerMap.pairs([(-1, -1, 0.25), (0, 1), (-1, 2, 0.75)], 3, 4)
    assert made.links == (Link(0, 1), Link(2, 2, 0.75), Link(2, 3, 0.25))
    assert made.of_student(1) == () and made.of_student(-1) == made.links[1:]
    assert str(made) == "3 of 4 layers: 0←1 2←2(×0.75) 2←3(×0.25)"
    assert made.table().splitlines() == [
        "student  teacher",
        "      0  1",
        "      1  -",
        "      2  2 (×0.75), 3 (×0.25)",
    ]


def test_maps_are_equal_in_any_notation() -> None:
    assert LayerMap.of([0, -1], 4) == LayerMap.pairs([(1, 3), (0, 0)], 2, 4) == LayerMap.even(2, 4)
    assert len({LayerMap.even(2, 4), LayerMap.first_last(2, 4)}) == 1


REFUSED = {
    "out of range": (
        lambda: LayerMap.of([0, 12], 12),
        r"teacher layer 12: out of range. The teacher has 12 layers: 0 to 11",
    ),
    "too negative": (lambda: LayerMap.of([-13], 12), r"teacher layer -13: out of range.*-12 to -1"),
    "student out of range": (
        lambda: LayerMap.pairs([(2, 0)], 2, 4),
        r"student layer 2: out of range. The student has 2",
    ),
    "empty list": (lambda: LayerMap.of([], 12), r"the map is empty. Give at least one"),
    "empty pairs": (lambda: LayerMap.pairs([], 2, 12), r"the map is empty"),
    "twice": (lambda: LayerMap.of([0, 3, -1], 4), r"teacher layer 3 is named twice \(as 3 and -1\).*LayerMap.pairs"),
    "link twice": (
        lambda: LayerMap.pairs([(0, 3), (0, -1, 2.0)], 1, 4),
        r"student layer 0 is linked to teacher layer 3 twice",
    ),
    "too many": (lambda: LayerMap.even(13, 12), r"LayerMap.even: 13 student layers cannot be taken from 12"),
    "none": (lambda: LayerMap.even(0, 12), r"student_layers=0: give a whole number of layers, at least 1"),
    "bool": (lambda: LayerMap.last(True, 12), r"student_layers=True"),
    "half": (lambda: LayerMap.of([0, 1.5], 12), r"teacher layer 1.5: give a whole number"),
    "every": (
        lambda: LayerMap.skip(4, 12, every=4),
        r"every=4. 4 student layers and 12 teacher layers allow .* from 1 to 3",
    ),
    "weight": (lambda: LayerMap.pairs([(0, 1, 0.0)], 1, 4), r"link 0←1 has weight 0.0. Give a number above 0"),
    "weight nan": (lambda: LayerMap.pairs([(0, 1, float("nan"))], 1, 4), r"has weight nan"),
    "no link": (lambda: LayerMap.pairs([3], 1, 4), r"3 is no link. Give \(student layer, teacher layer"),
    "many to one": (
        lambda: LayerMap.pairs([(0, 1), (0, 2)], 1, 4).sources(),
        r"student layer 0 goes with layers 1, 2 of the teacher; to copy layers it needs exactly one",
    ),
    "unlinked": (
        lambda: LayerMap.pairs([(0, 1)], 2, 4).sources(),
        r"student layer 1 goes with no layer of the teacher",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_invalid_maps_raise(case: str) -> None:
    attempt, message = REFUSED[case]
    with pytest.raises(SettingError, match=message):
        attempt()
