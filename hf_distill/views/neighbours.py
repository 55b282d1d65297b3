"""The words nearest to a word, in a table of word vectors or among a model's own input embeddings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hf_distill.errors import SettingError
from hf_distill.views.words import Words

Pieces = tuple[int, ...]


class Neighbours:
    """The `count` nearest words by cosine, the word itself left out; each as its pieces.

    Remembers what was asked; the memory is left behind when it is pickled.

    Args:
        words: the tokenizer's words.
        embeddings: a mapping of words to vectors (GloVe, say), or a model, an `nn.Embedding` or a tensor `[v d]` over
            the tokenizer's vocabulary. Of the latter, a word of several pieces has the mean of their vectors, and its
            neighbours are words of one piece.
        count: how many.

    Raises:
        SettingError: none of these, or fewer vectors than the tokenizer has tokens.
    """

    def __init__(self, words: Words, embeddings: Any, count: int) -> None:
        self._words = words
        self._count = count
        self._table: dict[str, int] | None = None
        if isinstance(embeddings, Mapping):
            self._names = list(embeddings)
            self._table = {name: row for row, name in enumerate(self._names)}
            vectors = torch.as_tensor(np.stack([np.asarray(v, dtype=np.float32) for v in embeddings.values()]))
            self._rows = torch.arange(len(vectors))
        else:
            vectors = _of_vocabulary(embeddings, len(words))
            self._rows = words.whole().nonzero().squeeze(-1)
        self._vectors = vectors.detach().float().cpu().clone()  # as they are now: a student's own will be trained
        self._directions = F.normalize(self._vectors[self._rows], dim=-1)
        self._known: dict[Pieces, list[Pieces]] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_known": {}}

    def __call__(self, pieces: Sequence[int]) -> list[Pieces]:
        """The neighbours, nearest first; fewer where the tokenizer cannot write one, none for an unknown word."""
        asked = tuple(pieces)
        if asked not in self._known:
            self._known[asked] = self._by_name(asked) if self._table is not None else self._by_pieces(asked)
        return self._known[asked]

    def _by_name(self, pieces: Pieces) -> list[Pieces]:
        assert self._table is not None
        text = self._words.text(pieces)
        name = text if text in self._table else text.lower()
        if name not in self._table:
            return []
        row = self._table[name]
        nearest = self._nearest(self._vectors[row], itself=row)
        titled = text.istitle() and name != text  # a table in lower case, and a word that is not
        found = (self._words.pieces(self._names[row].title() if titled else self._names[row]) for row in nearest)
        return [one for one in found if one is not None]

    def _by_pieces(self, pieces: Pieces) -> list[Pieces]:
        itself = pieces[0] if len(pieces) == 1 else None
        return [(token,) for token in self._nearest(self._vectors[list(pieces)].mean(0), itself=itself)]

    def _nearest(self, vector: Tensor, *, itself: int | None) -> list[int]:
        """The rows of the words whose direction is nearest, in order."""
        likeness = self._directions @ F.normalize(vector, dim=-1)
        if itself is not None:
            likeness = likeness.masked_fill(self._rows == itself, -torch.inf)
        others = int((likeness > -torch.inf).sum())
        return [int(row) for row in self._rows[likeness.topk(min(self._count, others)).indices]]


def _of_vocabulary(embeddings: Any, tokens: int) -> Tensor:
    table = embeddings
    if hasattr(table, "get_input_embeddings"):
        table = table.get_input_embeddings()
    if isinstance(table, nn.Module):
        table = getattr(table, "weight", None)
    if not isinstance(table, Tensor) or table.dim() != 2:
        raise SettingError(
            f"embeddings={type(embeddings).__name__}: it may be a mapping of words to vectors, or a model, an "
            "nn.Embedding or a tensor [v d] with a row a token."
        )
    if len(table) < tokens:
        raise SettingError(
            f"embeddings has {len(table)} rows and the tokenizer {tokens} tokens. Pass the embeddings of a model with "
            "this tokenizer, or a mapping of words to vectors."
        )
    return table
