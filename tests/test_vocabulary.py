"""Which columns of two heads have the same meaning: label names, padded vocabularies, different tokenizers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from transformers import BertConfig

from hf_distill import SettingError, TeacherError
from hf_distill.vocabulary import HeadAlignment, label_ids, match_labels, match_vocabularies, tokenizer_difference
from tests.tiny_tokenizers import bpe_tokenizer, tokenizer


def labels(names: Sequence[str]) -> BertConfig:
    return BertConfig(label2id={name: i for i, name in enumerate(names)}, id2label=dict(enumerate(names)))


# Labels.


def test_default_names_are_matched_by_index() -> None:
    assert match_labels(BertConfig(num_labels=3), BertConfig(num_labels=3)) == HeadAlignment()


def test_equal_names_in_equal_order_need_no_index() -> None:
    assert match_labels(labels(["a", "b"]), labels(["a", "b"])) == HeadAlignment()


def test_teacher_columns_are_reordered_to_the_students() -> None:
    columns = match_labels(labels(["neg", "neutral", "pos"]), labels(["pos", "neg", "neutral"]))
    assert columns == HeadAlignment(teacher=(1, 2, 0))
    logits = torch.tensor([[9.0, 1.0, 5.0]])  # the teacher's: pos, neg, neutral
    assert columns.of_teacher(logits).tolist() == [[1.0, 5.0, 9.0]]
    assert columns.of_student(logits) is logits


def test_matching_by_index_ignores_names() -> None:
    assert match_labels(labels(["neg", "pos"]), labels(["0", "1"]), matching="by_index") == HeadAlignment()


@pytest.mark.parametrize(
    ("student", "teacher", "message"),
    [
        (["neg", "pos"], ["bad", "good"], r"label names differ: student \{neg, pos\}, teacher \{bad, good\}.*by_index"),
        (
            ["LABEL_0", "LABEL_1"],
            ["neg", "pos"],
            r"student \{LABEL_0, LABEL_1\}, teacher \{neg, pos\}",
        ),
        (["neg", "pos"], ["Neg", "Pos"], r"label names differ"),
        (["a", "b"], ["a", "b", "c"], r"different numbers of labels: student 2 \{a, b\}, teacher 3 \{a, b, c\}"),
    ],
)
def test_different_label_sets_raise(student: list[str], teacher: list[str], message: str) -> None:
    with pytest.raises(TeacherError, match=message):
        match_labels(labels(student), labels(teacher))


def test_different_numbers_of_labels_raise_by_index() -> None:
    with pytest.raises(TeacherError, match="different numbers of labels"):
        match_labels(BertConfig(num_labels=2), BertConfig(num_labels=3), matching="by_index")


def test_an_unknown_matching_raises() -> None:
    with pytest.raises(SettingError, match=r"label_matching='name': allowed are by_name and by_index"):
        match_labels(labels(["a"]), labels(["a"]), matching="name")


def test_long_lists_of_names_are_shortened() -> None:
    with pytest.raises(TeacherError, match=r"student \{a0, a1, a2, a3, a4, a5, a6, a7, … \(20 in all\)\}"):
        match_labels(labels([f"a{i}" for i in range(20)]), labels([f"b{i}" for i in range(20)]))


def test_a_config_with_only_id2label() -> None:
    config = BertConfig(num_labels=2)
    config.id2label = {0: "neg", 1: "pos"}  # as scripts do; label2id still has the defaults
    assert label_ids(config) == {"neg": 0, "pos": 1}
    assert match_labels(config, labels(["pos", "neg"])) == HeadAlignment(teacher=(1, 0))


def test_a_config_with_only_label2id() -> None:
    config = BertConfig(num_labels=2)
    config.label2id = {"neg": 0, "pos": 1}
    assert label_ids(config) == {"neg": 0, "pos": 1}


def test_string_ids_from_json() -> None:
    config = BertConfig(num_labels=2)
    config.label2id = {"neg": "1", "pos": "0"}
    assert label_ids(config) == {"neg": 1, "pos": 0}


# Vocabularies.


def matched(
    student: Any, teacher: Any, widths: tuple[int, int] = (40, 40), embeddings: int | None = None
) -> HeadAlignment:
    return match_vocabularies(
        student_width=widths[0],
        teacher_width=widths[1],
        student_tokenizer=student,
        teacher_tokenizer=teacher,
        teacher_embeddings=embeddings,
    )


def test_equal_tokenizers_and_widths_need_no_index() -> None:
    assert matched(tokenizer(), tokenizer()) == HeadAlignment()


@pytest.mark.parametrize("widths", [(40, 48), (48, 40), (41, 64), (48, 48)])
def test_padded_columns_are_excluded(widths: tuple[int, int]) -> None:
    assert matched(tokenizer(), tokenizer(), widths) == HeadAlignment(40, 40)


def test_tokens_of_only_one_tokenizer_are_excluded() -> None:
    plain, more = tokenizer(), tokenizer(added=["<user>", "<bot>"])
    assert matched(plain, more, (40, 42)) == HeadAlignment(40, 40)
    assert matched(more, plain, (42, 40), embeddings=48) == HeadAlignment(40, 40)
    # the student's extra tokens are padding in the teacher's head, so they are not compared
    assert matched(more, plain, (42, 48), embeddings=48) == HeadAlignment(40, 40)


def test_a_gap_is_excluded_by_listing_the_other_columns() -> None:
    """A token in the middle that only one tokenizer has; no other token has that id."""
    holed = tokenizer({f"w{i}": i for i in range(40) if i != 7})
    columns = matched(holed, tokenizer())
    assert columns == HeadAlignment(*[tuple(i for i in range(40) if i != 7)] * 2)
    logits = torch.arange(40.0)[None]
    assert columns.of_teacher(logits).tolist() == [[float(i) for i in range(40) if i != 7]]


def test_moved_ids_raise() -> None:
    swapped = {f"w{i}": i for i in range(40)} | {"w3": 4, "w4": 3}
    with pytest.raises(TeacherError, match=r"2 tokens have other ids, 'w3' is 3 .* and 4 for the"):
        matched(tokenizer(), tokenizer(swapped))


def test_different_tokens_at_the_same_id_raise() -> None:
    renamed = {f"w{i}": i for i in range(39)} | {"other": 39}
    with pytest.raises(TeacherError, match=r"id 39 is 'w39' for the student and 'other' for the teacher"):
        matched(tokenizer(), tokenizer(renamed))


def test_a_different_vocabulary_raises() -> None:
    foreign = {f"x{i}": i for i in range(40)}
    with pytest.raises(TeacherError, match=r"only 0 of 40 and 40 tokens are the same.*at sequence level"):
        matched(tokenizer(), tokenizer(foreign))


def test_different_merges_raise() -> None:
    first = bpe_tokenizer([("a", "b"), ("ab", "c")])
    second = bpe_tokenizer([("b", "c"), ("a", "bc")])
    assert first.get_vocab() == second.get_vocab()
    assert first("abc")["input_ids"] == second("abc")["input_ids"]  # but other texts would differ
    assert tokenizer_difference(first, second) == "the vocabularies agree but the merges do not"
    assert tokenizer_difference(first, bpe_tokenizer([("a", "b"), ("ab", "c")])) is None
    with pytest.raises(TeacherError, match="the merges do not"):
        matched(first, second, (6, 6))


def test_ids_that_the_teacher_cannot_embed_raise() -> None:
    more = tokenizer(added=["<user>", "<bot>"])
    with pytest.raises(TeacherError, match=r"makes ids up to 41, the teacher embeds only 40. Remove the tokens"):
        matched(more, tokenizer(), (42, 40), embeddings=40)


@pytest.mark.parametrize("known", ["student", "teacher", "neither"])
def test_without_tokenizers_only_equal_widths_match(known: str) -> None:
    ours = tokenizer() if known == "student" else None
    theirs = tokenizer() if known == "teacher" else None
    assert matched(ours, theirs) == HeadAlignment()
    with pytest.raises(TeacherError, match=r"different width \(40 and 48\).*teacher_processing_class="):
        matched(ours, theirs, (40, 48))


def test_contiguous_columns_are_views() -> None:
    x = torch.arange(6.0).view(2, 3)
    assert HeadAlignment(2, None).of_student(x).tolist() == [[0, 1], [3, 4]]
    assert HeadAlignment(None, (2, 0)).of_teacher(x).tolist() == [[2, 0], [5, 3]]
    assert HeadAlignment().of_teacher(x) is x


# Labels among the compared columns.


@pytest.mark.parametrize(
    ("columns", "width"),
    [
        (HeadAlignment(), 6),
        (HeadAlignment(4, 4), 6),
        (HeadAlignment((0, 2, 5), (0, 2, 5)), 6),
        (HeadAlignment((3, 1), (1, 3)), 4),
        (HeadAlignment(None, (2, 0, 1)), 3),
        (HeadAlignment((0,), (0,)), 6),
    ],
)
def test_target_columns_select_the_labels_logit(columns: HeadAlignment, width: int) -> None:
    ids = torch.tensor([*range(width), -100, 0, -100, width - 1])
    logits = torch.arange(float(width)) * 10  # column i of the student has the value 10 i
    picked = columns.of_student(logits).tolist()
    found = columns.of_labels(ids).tolist()
    assert found == [picked.index(10.0 * i) if 10.0 * i in picked else -100 for i in ids.tolist()]


@pytest.mark.parametrize("columns", [HeadAlignment(2, 2), HeadAlignment((0, 2), (0, 2)), HeadAlignment((2, 0), (0, 2))])
def test_target_columns_of_labels_that_are_not_compared(columns: HeadAlignment) -> None:
    assert columns.of_labels(torch.tensor([7, 3, 1_000_000])).tolist() == [-100] * 3
    empty = columns.of_labels(torch.empty(0, dtype=torch.long))
    assert empty.shape == (0,) and empty.dtype == torch.long


def test_target_columns_do_not_change_the_labels() -> None:
    ids = torch.tensor([0, 1, 2, -100])
    for columns in (HeadAlignment(), HeadAlignment(1, 1), HeadAlignment((2, 0), (0, 2))):
        columns.of_labels(ids)
        assert ids.tolist() == [0, 1, 2, -100]


def test_alignments_are_equal_after_use() -> None:
    """The cached index is not part of equality."""
    used, fresh = HeadAlignment((0, 2), (2, 0)), HeadAlignment((0, 2), (2, 0))
    used.of_student(torch.zeros(3))
    used.of_labels(torch.tensor([2]))
    assert used == fresh and repr(used) == repr(fresh)
    assert HeadAlignment((0, 2), (2, 0)).of_teacher(torch.tensor([1.0, 2.0, 3.0])).tolist() == [3.0, 1.0]
