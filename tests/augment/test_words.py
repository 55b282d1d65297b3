"""Which positions are words: against what the tokenizer itself says, and by hand."""

from __future__ import annotations

import pytest

from hf_distill.augment.words import Words
from hf_distill.errors import SettingError
from tests.augment.making import byte_level, sentence_piece, whole_words, word_pieces
from tests.tiny_tokenizers import bpe_tokenizer


def said(tokenizer, text: str) -> tuple[list[int], list[list[int]]]:
    """The ids, and the positions of each of the tokenizer's own words."""
    encoded = tokenizer(text, add_special_tokens=False)
    numbers = encoded.word_ids()
    return encoded["input_ids"], [[i for i, n in enumerate(numbers) if n == word] for word in sorted(set(numbers))]


def test_word_pieces_are_grouped_as_the_tokenizer_does() -> None:
    ids, words = said(word_pieces(), "the good player seeing a film")
    assert [len(word) for word in words] == [1, 1, 2, 2, 1, 1]  # play ##er, see ##ing
    assert Words(word_pieces()).positions(ids) == words


def test_what_is_no_word() -> None:
    tokenizer = word_pieces()
    ids = tokenizer.convert_tokens_to_ids(
        ["[CLS]", "good", ",", "7", "##th", "[MASK]", "play", "##ing", "[SEP]", "[UNK]", "film", "[PAD]"]
    )
    # "7th" has a number in it; "film" is behind the end of the mask, and the pieces of "playing" are one word.
    attended = [1] * 10 + [0, 0]
    assert Words(tokenizer).positions(ids, attended) == [[1], [6, 7]]
    assert Words(tokenizer).positions(ids) == [[1], [6, 7], [10]]
    assert Words(tokenizer).positions(tokenizer.convert_tokens_to_ids(["film", "see", "##7"])) == [[0]]


def test_where_a_beginning_is_marked() -> None:
    """good, films good: the first word carries no mark and is left alone; so is a comma."""
    tokenizer = byte_level()
    tokens = ["good", ",", "Ġfilm", "s", "Ġgood"]
    words = Words(tokenizer)
    ids = tokenizer.convert_tokens_to_ids(tokens)
    assert words.positions(ids) == [[2, 3], [4]]
    assert words.text([ids[2], ids[3]]) == "films"
    assert words.pieces("good") == (ids[4],)
    # A dash of three bytes ends a word; a part of an é makes it one that is not known; a bracket begins none.
    ids = tokenizer.convert_tokens_to_ids(["Ġfilm", "âĢĶ", "Ġfilm", "Ã", "Ġ(", "s", "Ġ", "s", "Ġgood"])
    assert words.positions(ids) == [[0], [8]]
    tokenizer = sentence_piece()
    ids = tokenizer.convert_tokens_to_ids(["▁good", ",", "▁film", "s", "▁", "s"])
    assert Words(tokenizer).positions(ids) == [[0], [2, 3]]
    assert Words(tokenizer).text(ids[2:4]) == "films"


def test_pieces_of_a_word() -> None:
    tokenizer = word_pieces()
    words = Words(tokenizer)
    assert words.pieces("player") == tuple(tokenizer.convert_tokens_to_ids(["play", "##er"]))
    assert words.pieces("play,er") is None  # several words
    assert words.pieces("xyz") is None  # unknown


def test_the_words_of_one_piece() -> None:
    tokenizer = word_pieces()
    whole = {tokenizer.convert_ids_to_tokens(int(i)) for i in Words(tokenizer).whole().nonzero()}
    assert whole == {"good", "bad", "film", "play", "see", "fun", "sad", "act", "a", "the"}
    whole = Words(whole_words(6)).whole().tolist()
    assert whole == [False, True, True, True, True, False]  # padding and mask


def test_a_vocabulary_that_does_not_tell() -> None:
    with pytest.raises(SettingError, match=r"its vocabulary does not mark where words begin.*WordPiece"):
        Words(bpe_tokenizer([("a", "b")]))
