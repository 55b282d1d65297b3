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

_BEGIN_MARKS = ("▁", "Ġ")
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
        special = set(tokenizer.all_special_ids)
        self._kinds = [_APART if i in special else self._kind(token) for i, token in enumerate(tokens)]

    def __len__(self) -> int:
        return len(self._kinds)

    def whole(self) -> Tensor:
        """`[v]` bool: the tokens that can stand as a word of their own."""
        return torch.tensor([kind == _BEGINS for kind in self._kinds])

    def positions(self, ids: Sequence[int], attended: Sequence[int] | None = None) -> list[list[int]]:
        """The positions of each word, in order; special tokens, padding, numbers and punctuation are none."""
        found: list[list[int]] = []
        inside = False
        for position, token in enumerate(ids):
            kind = self._kinds[token] if attended is None or attended[position] else _APART
            if kind == _BEGINS:
                found.append([position])
            elif kind == _GOES_ON and inside:
                found[-1].append(position)
            inside = kind == _BEGINS or (kind == _GOES_ON and inside)
        return found

    def text(self, pieces: Sequence[int]) -> str:
        tokens = self.tokenizer.convert_ids_to_tokens(list(pieces))
        return self.tokenizer.convert_tokens_to_string(tokens).strip()

    def pieces(self, word: str) -> tuple[int, ...] | None:
        """A word's tokens inside a text; None: the tokenizer does not write it as one word."""
        ids = self.tokenizer(f" {word}", add_special_tokens=False)["input_ids"]
        return tuple(ids) if self.positions(ids) == [list(range(len(ids)))] else None

    def _kind(self, token: str | None) -> int:
        if token is None:
            return _APART
        begins = not token.startswith(self._goes_on) if self._goes_on else token.startswith(self._mark)
        text = token.removeprefix(self._mark if begins else self._goes_on)
        if not any(letter.isalpha() for letter in text) or _NO_WORD & set(text):
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
