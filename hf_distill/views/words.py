"""Which tokens of a vocabulary begin words, and which positions of a text make one word. No models here.

A dataset keeps token ids and not the text, so words are told from the pieces: WordPiece marks what goes on ("##ing"),
byte-level BPE and SentencePiece what begins ("Ġ", "▁"). Where a beginning is marked, the first word of a text and one
glued to a punctuation mark carry no mark; they are no words here, and are left alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hf_distill.errors import SettingError

_BYTES = "Ġ"
_BEGIN_MARKS = ("▁", _BYTES)
_PART_OF_A_LETTER = "\ufffd"  # what a piece reads as that ends amid the bytes of a letter
_NO_WORD = frozenset("[]<>|{}")  # "[unused1]", "<0x41>", "<|endoftext|>"
_APART, _BEGINS, _GOES_ON = range(3)


class Words:
    """The words of a tokenizer.

    Args:
        tokenizer: a tokenizer of transformers.

    Raises:
        SettingError: nothing in its vocabulary tells where words begin.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        tokens = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
        self._goes_on, self._mark = _scheme(tokenizer, tokens)
        texts = [self._letters(token) for token in tokens]
        special = set(tokenizer.all_special_ids)
        self._kinds = [
            _APART if token is None or i in special else self._kind(token, text)
            for i, (token, text) in enumerate(zip(tokens, texts, strict=True))
        ]
        self._lettered = [any(letter.isalpha() for letter in text) and not _NO_WORD & set(text) for text in texts]

    def __len__(self) -> int:
        return len(self._kinds)

    def whole(self) -> Tensor:
        """`[v]` bool: the tokens that can stand as a word of their own."""
        known = zip(self._kinds, self._lettered, strict=True)
        return torch.tensor([kind == _BEGINS and lettered for kind, lettered in known])

    def positions(self, ids: Sequence[int], attended: Sequence[int] | None = None) -> list[list[int]]:
        """The positions of each word, in order.

        Special tokens, padding, punctuation, and what has a piece without letters ("3d", "sst2") are none.
        """
        found: list[list[int]] = []
        inside = False
        for position, token in enumerate(ids):
            kind = self._kinds[token] if attended is None or attended[position] else _APART
            if kind == _BEGINS:
                found.append([position])
            elif kind == _GOES_ON and inside:
                found[-1].append(position)
            inside = kind == _BEGINS or (kind == _GOES_ON and inside)
        return [word for word in found if all(self._lettered[ids[position]] for position in word)]

    def text(self, pieces: Sequence[int]) -> str:
        tokens = self.tokenizer.convert_ids_to_tokens(list(pieces))
        return self.tokenizer.convert_tokens_to_string(tokens).strip()

    def pieces(self, word: str) -> tuple[int, ...] | None:
        """A word's tokens inside a text; None: the tokenizer does not write it as one word."""
        ids = self.tokenizer(f" {word}", add_special_tokens=False)["input_ids"]
        return tuple(ids) if self.positions(ids) == [list(range(len(ids)))] else None

    def _letters(self, token: str | None) -> str:
        """A piece without its mark, and as text where pieces are bytes."""
        if token is None:
            return ""
        if self._mark == _BYTES:
            return self.tokenizer.convert_tokens_to_string([token]).strip()
        return token.removeprefix(self._goes_on).removeprefix(self._mark)

    def _kind(self, token: str, text: str) -> int:
        begins = not token.startswith(self._goes_on) if self._goes_on else token.startswith(self._mark)
        punctuation = not any(letter.isalnum() or letter == _PART_OF_A_LETTER for letter in text)
        if punctuation and (begins or self._mark):
            return _APART
        return _BEGINS if begins else _GOES_ON


def _scheme(tokenizer: Any, tokens: Sequence[str | None]) -> tuple[str, str]:
    """What marks a piece that goes on, and what one that begins: one of them is empty, or both (whole words only)."""
    model = getattr(getattr(tokenizer, "backend_tokenizer", None), "model", None)
    kind = type(model).__name__
    if kind == "WordPiece" or any((token or "").startswith("##") and len(token or "") > 2 for token in tokens):
        return getattr(model, "continuing_subword_prefix", "##"), ""
    for mark in _BEGIN_MARKS:
        if any((token or "").startswith(mark) for token in tokens):
            return "", mark
    if kind == "WordLevel":
        return "", ""
    raise SettingError(
        f"{type(tokenizer).__name__}: nothing in its vocabulary tells where words begin. Words are known by '##' "
        "(WordPiece), by 'Ġ' (byte-level BPE), by '▁' (SentencePiece), or because every token is one (WordLevel)."
    )
