"""Which positions are words: compared with the tokenizer's own word ids, and by hand."""

from __future__ import annotations

import pytest

from hf_distill.augment.words import Words
from hf_distill.errors import SettingError
from tests.augment.making import byte_level, sentence_piece, whole_words, word_pieces
from tests.tiny_tokenizers import bpe_tokenizer


def word_ids_of(tokenizer, text: str) -> tuple[list[int], list[list[int]]]:
    """Return the ids, and the positions of each of the tokenizer's words."""
    encoded = tokenizer(text, add_special_tokens=False)
    numbers = encoded.word_ids()
    return encoded["input_ids"], [[i for i, n in enumerate(numbers) if n == word] for word in sorted(set(numbers))]


def test_word_pieces_are_grouped_as_the_tokenizer_does() -> None:
    ids, words = word_ids_of(word_pieces(), "the good player seeing a film")
    assert [len(word) for word in words] == [1, 1, 2, 2, 1, 1]  # play ##er, see ##ing
    assert Words(word_pieces()).positions(ids) == words


def test_special_tokens_numbers_and_masked_positions_are_not_words() -> None:
    tokenizer = word_pieces()
    ids = tokenizer.convert_tokens_to_ids(
        ["[CLS]", "good", ",", "7", "##th", "[MASK]", "play", "##ing", "[SEP]", "[UNK]", "film", "[PAD]"]
    )
    # "7th" contains a number; "film" lies behind the end of the mask; the pieces of "playing" are one word.
    attended = [1] * 10 + [0, 0]
    assert Words(tokenizer).positions(ids, attended) == [[1], [6, 7]]
    assert Words(tokenizer).positions(ids) == [[1], [6, 7], [10]]
    assert Words(tokenizer).positions(tokenizer.convert_tokens_to_ids(["film", "see", "##7"])) == [[0]]


def test_words_of_tokenizers_that_mark_word_beginnings() -> None:
    """good, films good: the first word has no mark and is skipped; the comma too."""
    tokenizer = byte_level()
    tokens = ["good", ",", "Ġfilm", "s", "Ġgood"]
    words = Words(tokenizer)
    ids = tokenizer.convert_tokens_to_ids(tokens)
    assert words.positions(ids) == [[2, 3], [4]]
    assert words.text([ids[2], ids[3]]) == "films"
    assert words.pieces("good") == (ids[4],)
    # A three-byte dash ends a word; part of an é makes a word unknown; a bracket does not begin a word.
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
    assert words.pieces("play,er") is None  # two words
    assert words.pieces("xyz") is None  # unknown


def test_words_of_one_piece() -> None:
    tokenizer = word_pieces()
    whole = {tokenizer.convert_ids_to_tokens(int(i)) for i in Words(tokenizer).whole().nonzero()}
    assert whole == {"good", "bad", "film", "play", "see", "fun", "sad", "act", "a", "the"}
    whole = Words(whole_words(6)).whole().tolist()
    assert whole == [False, True, True, True, True, False]  # padding and mask are not words


def test_a_vocabulary_without_word_marks_raises() -> None:
    with pytest.raises(SettingError, match=r"its vocabulary does not mark where words begin.*WordPiece"):
        Words(bpe_tokenizer([("a", "b")]))
