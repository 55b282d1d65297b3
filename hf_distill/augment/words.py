"""WordReplacement: replacing words by likely or similar ones, as in TinyBERT.

A dataset has token ids and not the text, so words are recognised from their pieces: WordPiece marks continuations
("##ing"), byte-level BPE and SentencePiece mark beginnings ("Ġ", "▁"). If beginnings are marked, the first word of a
text and words after punctuation have no mark, so they are never replaced.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_distill._types import Example
from hf_distill.augment.augmentation import like
from hf_distill.errors import DataError, SettingError

_BYTES = "Ġ"
_BEGIN_MARKS = ("▁", _BYTES)
_PART_OF_A_LETTER = "\ufffd"  # a piece that ends within the bytes of a letter decodes to this
_NO_WORD = frozenset("[]<>|{}")  # "[unused1]", "<0x41>", "<|endoftext|>"
_APART, _BEGINS, _GOES_ON = range(3)


class Words:
    """The words of a tokenizer.

    Args:
        tokenizer: a tokenizer from transformers.

    Raises:
        SettingError: if its vocabulary does not mark where words begin.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
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
        """Return which tokens are a whole word, `[v]` bool."""
        known = zip(self._kinds, self._lettered, strict=True)
        return torch.tensor([kind == _BEGINS and lettered for kind, lettered in known])

    def positions(self, ids: Sequence[int], attended: Sequence[int] | None = None) -> list[list[int]]:
        """Return the positions of each word, in order.

        Special tokens, padding, punctuation, and words with a piece without letters ("3d", "sst2") are left out.
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
        return self.tokenizer.convert_tokens_to_string([*tokens]).strip()

    def pieces(self, word: str) -> tuple[int, ...] | None:
        """Return a word's tokens inside a text, or None if the tokenizer does not encode it as one word."""
        ids = self.tokenizer(f" {word}", add_special_tokens=False)["input_ids"]
        return tuple(ids) if self.positions(ids) == [list(range(len(ids)))] else None

    def _letters(self, token: str | None) -> str:
        """Return a piece without its mark, decoded if pieces are bytes."""
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


def _scheme(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[str | None]) -> tuple[str, str]:
    """Return the marks of continuing and of beginning pieces; one or both (whole words only) are empty."""
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
        f"{type(tokenizer).__name__}: its vocabulary does not mark where words begin. Allowed are '##' (WordPiece), "
        "'Ġ' (byte-level BPE), '▁' (SentencePiece), or whole words (WordLevel)."
    )


Pieces: TypeAlias = tuple[int, ...]
Embeddings: TypeAlias = Mapping[str, Any] | PreTrainedModel | nn.Module | Tensor
"""Vectors by word, or a model, an `nn.Embedding` or a tensor `[v d]` with one row for each token."""


class Neighbours:
    """Finds the `count` nearest words by cosine, without the word itself, each as its pieces.

    Results are cached; the cache is not pickled.

    Args:
        words: the tokenizer's words.
        embeddings: a mapping of words to vectors (GloVe, say), or a model, an `nn.Embedding` or a tensor `[v d]` over
            the tokenizer's vocabulary. In a model's, a word of several pieces has the mean of their vectors, and its
            neighbours are words of one piece.
        count: number of words.

    Raises:
        SettingError: for other embeddings, or fewer vectors than the tokenizer has tokens.
    """

    def __init__(self, words: Words, embeddings: Embeddings, count: int) -> None:
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
        self._vectors = vectors.detach().float().cpu().clone()  # a copy, since a student's embeddings will be trained
        self._directions = F.normalize(self._vectors[self._rows], dim=-1)
        self._known: dict[Pieces, list[Pieces]] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_known": {}}

    def __call__(self, pieces: Sequence[int]) -> list[Pieces]:
        """Return the neighbours, nearest first; fewer if the tokenizer cannot encode some, none for an unknown word."""
        word = tuple(pieces)
        if word not in self._known:
            self._known[word] = self._by_name(word) if self._table is not None else self._by_pieces(word)
        return self._known[word]

    def _by_name(self, pieces: Pieces) -> list[Pieces]:
        assert self._table is not None
        text = self._words.text(pieces)
        name = text if text in self._table else text.lower()
        if name not in self._table:
            return []
        row = self._table[name]
        nearest = self._nearest(self._vectors[row], itself=row)
        titled = text.istitle() and name != text  # the table is in lower case, the word is not
        found = (self._words.pieces(self._names[row].title() if titled else self._names[row]) for row in nearest)
        return [neighbour for neighbour in found if neighbour is not None]

    def _by_pieces(self, pieces: Pieces) -> list[Pieces]:
        itself = pieces[0] if len(pieces) == 1 else None
        return [(token,) for token in self._nearest(self._vectors[list(pieces)].mean(0), itself=itself)]

    def _nearest(self, vector: Tensor, *, itself: int | None) -> list[int]:
        """Return the rows of the words with the nearest direction, in order."""
        similarity = self._directions @ F.normalize(vector, dim=-1)
        if itself is not None:
            similarity = similarity.masked_fill(self._rows == itself, -torch.inf)
        others = int((similarity > -torch.inf).sum())
        return [int(row) for row in self._rows[similarity.topk(min(self._count, others)).indices]]


def _of_vocabulary(embeddings: Embeddings, tokens: int) -> Tensor:
    table: Any = embeddings
    if hasattr(table, "get_input_embeddings"):
        table = table.get_input_embeddings()
    if isinstance(table, nn.Module):
        table = getattr(table, "weight", None)
    if not isinstance(table, Tensor) or table.dim() != 2:
        raise SettingError(
            f"embeddings={type(embeddings).__name__}: it may be a mapping of words to vectors, or a model, an "
            "nn.Embedding or a tensor [v d] with a row for each token."
        )
    if len(table) < tokens:
        raise SettingError(
            f"embeddings has {len(table)} rows and the tokenizer {tokens} tokens. Pass the embeddings of a model with "
            "this tokenizer, or a mapping of words to vectors."
        )
    return table


@dataclass(frozen=True)
class Blank:
    """A text with one position to fill: ids, position, and segments or None."""

    ids: Sequence[int]
    position: int
    segments: Sequence[int] | None = None


class LikelyWords:
    """Finds the `count` most likely words at the blank of each text with a masked language model.

    Args:
        words: the words of the model's tokenizer.
        model: a model with a masked-LM head, on any device; it is set to evaluation mode.
        count: number of words.
        batch_size: texts in a forward; its logits are batch_size · length · vocabulary values.

    Raises:
        SettingError: if the tokenizer has no mask token, or more tokens than the model.
    """

    def __init__(self, words: Words, model: PreTrainedModel, count: int, batch_size: int) -> None:
        tokenizer = words.tokenizer
        if tokenizer.mask_token_id is None:
            raise SettingError("masked_lm: the tokenizer has no mask token. Pass the masked LM's own tokenizer.")
        embedding: Any = model.get_input_embeddings()
        width = embedding.weight.shape[0]
        if width < len(words):
            raise SettingError(
                f"masked_lm has {width} tokens, the tokenizer {len(words)}. Pass a masked LM with this tokenizer."
            )
        self._model = model.eval()
        self._mask, self._padding = tokenizer.mask_token_id, tokenizer.pad_token_id or 0
        self._allowed = words.whole()
        self._count = min(count, int(self._allowed.sum()))
        self._batch_size = batch_size
        self._reads_segments = "token_type_ids" in inspect.signature(model.forward).parameters

    def __call__(self, blanks: Sequence[Blank]) -> list[list[int]]:
        """Return the likely words of each text, most likely first."""
        found: list[list[int]] = []
        for start in range(0, len(blanks), self._batch_size):
            found += self._forward(blanks[start : start + self._batch_size])
        return found

    @torch.no_grad()
    def _forward(self, blanks: Sequence[Blank]) -> list[list[int]]:
        device = next(self._model.parameters()).device
        inputs = {name: value.to(device) for name, value in self._inputs(blanks).items()}
        rows = torch.arange(len(blanks), device=device)
        at = torch.tensor([blank.position for blank in blanks], device=device)
        logits = self._model(**inputs).logits[rows, at].float().cpu()[:, : len(self._allowed)]
        return logits.masked_fill(~self._allowed, -torch.inf).topk(self._count).indices.tolist()

    def _inputs(self, blanks: Sequence[Blank]) -> dict[str, Tensor]:
        longest = max(len(blank.ids) for blank in blanks)
        ids = torch.full((len(blanks), longest), self._padding)
        mask, segments = torch.zeros_like(ids), torch.zeros_like(ids)
        for row, blank in enumerate(blanks):
            length = len(blank.ids)
            ids[row, :length] = torch.tensor(blank.ids)
            ids[row, blank.position] = self._mask
            mask[row, :length] = 1
            if blank.segments is not None:
                segments[row, :length] = torch.tensor(blank.segments)
        inputs = {"input_ids": ids, "attention_mask": mask}
        return {**inputs, "token_type_ids": segments} if self._reads_segments else inputs


_TOKEN_COLUMNS = ("attention_mask", "token_type_ids", "special_tokens_mask")


@dataclass
class _Text:
    """An example with the words to replace, and a random number in [0, 1) for each."""

    ids: list[int]
    segments: list[int] | None
    chosen: list[list[int]]
    draws: list[float]
    fixed_length: bool
    candidates: dict[int, list[Pieces]]  # by a word's first position


class WordReplacement:
    """Replaces each word with some probability by one of its K candidates, drawn uniformly.

    The candidates of a word of one piece are the K most likely words in its place by the masked LM (possibly including
    the word itself); those of a word of several pieces are the K nearest in the embedding space. Without a masked LM
    every word uses the embeddings; without embeddings, words of several pieces are not replaced. Numbers, punctuation,
    special tokens and padding are never replaced.

    Labels of sentences and of tokens are kept (the first piece of a replaced word keeps its label). An example with a
    label for each token, a span or padding accepts only words with the same number of pieces.

    Jiao et al. 2020, TinyBERT, section 3.2 and algorithm 1; its p_t is `probability`, its K `candidates`, its N_a the
    `copies` of `augment_dataset`. The paper's embeddings are GloVe's. Here all blanks of a sentence are filled given
    the original sentence, not the words replaced before, so that they share one forward.

    Args:
        tokenizer: the tokenizer of the student, of the masked LM, and of a model's embeddings.
        masked_lm: a model with a masked-LM head; it is set to evaluation mode. On an accelerator it cannot run in
            worker processes: use `augment_dataset`, or no workers.
        embeddings: a mapping of words to vectors, or a model, an `nn.Embedding` or a tensor `[v d]` for the tokenizer's
            vocabulary (see `Neighbours`).
        probability: probability that a word is replaced.
        candidates: K, the number of candidates.
        same_length: whether to accept only words with the same number of pieces.
        batch_size: sentences in a forward of the masked LM, each with one blank.

    Raises:
        SettingError: without masked LM and embeddings, for a number out of range, or a tokenizer that does not fit.
        DataError: when called, for examples without `input_ids`, or with several sequences each.

    >>> from tokenizers import Tokenizer, models
    >>> from transformers import PreTrainedTokenizerFast
    >>> words = Tokenizer(models.WordLevel({"?": 0, "good": 1, "fine": 2}, unk_token="?"))
    >>> replace = WordReplacement(
    ...     PreTrainedTokenizerFast(tokenizer_object=words, unk_token="?"), embeddings=torch.eye(3), probability=1.0
    ... )
    >>> replace([{"input_ids": [1, 0, 2], "labels": 1}])
    [{'input_ids': [2, 0, 1], 'labels': 1}]
    """

    paper: ClassVar[str | None] = "jiao2020tinybert"
    acts_on = "examples"
    changes_tokens = True

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        masked_lm: PreTrainedModel | None = None,
        embeddings: Embeddings | None = None,
        probability: float = 0.4,
        candidates: int = 15,
        same_length: bool = False,
        batch_size: int = 16,
    ) -> None:
        if masked_lm is None and embeddings is None:
            raise SettingError("WordReplacement needs masked_lm= or embeddings=, or both as in TinyBERT: got neither.")
        if not 0 <= probability <= 1 or candidates < 1 or batch_size < 1:
            raise SettingError(
                f"WordReplacement: probability={probability} (0 to 1), candidates={candidates} and "
                f"batch_size={batch_size} (1 or more)."
            )
        self.probability = probability
        self.candidates = candidates
        self.same_length = same_length
        self._words = Words(tokenizer)
        self._limit = tokenizer.model_max_length
        self._likely = None if masked_lm is None else LikelyWords(self._words, masked_lm, candidates, batch_size)
        self._neighbours = None if embeddings is None else Neighbours(self._words, embeddings, candidates)

    def __repr__(self) -> str:
        return (
            f"WordReplacement(probability={self.probability:g}, candidates={self.candidates}, "
            f"same_length={self.same_length})"
        )

    @property
    def moves_positions(self) -> bool:
        """Whether a word may be replaced by one with more or fewer pieces."""
        return self._neighbours is not None and not self.same_length

    def __call__(self, examples: Sequence[Example]) -> list[Example]:
        texts = [self._choose(example) for example in examples]
        self._add_likely_words(texts)
        if self._neighbours is not None:
            for text in texts:
                for word in text.chosen:
                    if len(word) > 1 or self._likely is None:
                        text.candidates[word[0]] = self._neighbours([text.ids[i] for i in word])
        return [self._replaced(example, text) for example, text in zip(examples, texts, strict=True)]

    def _choose(self, example: Example) -> _Text:
        """Draw two numbers for each word, replaced or not, so that one word's choice does not affect the next."""
        if np.ndim(example.get("input_ids", 0)) != 1:
            raise DataError(
                f"WordReplacement takes examples with one sequence of input_ids, not {sorted(example)}"
                + (" with several sequences an example (multiple choice)." if "input_ids" in example else ".")
                + " Tokenize before augmenting."
            )
        ids, attended = _numbers(example["input_ids"]), example.get("attention_mask")
        words = self._words.positions(ids, None if attended is None else _numbers(attended))
        hit, which = torch.rand(2, len(words), dtype=torch.float64).tolist()
        kept = [i for i in range(len(words)) if hit[i] < self.probability]
        with_length = {name for name, value in example.items() if np.ndim(value) and len(value) == len(ids)}
        padded = attended is not None and not all(_numbers(attended))
        return _Text(
            ids=ids,
            segments=_numbers(example["token_type_ids"]) if "token_type_ids" in example else None,
            chosen=[words[i] for i in kept],
            draws=[which[i] for i in kept],
            fixed_length=self.same_length
            or padded
            or "start_positions" in example
            or bool(with_length - {"input_ids", *_TOKEN_COLUMNS}),
            candidates={},
        )

    def _add_likely_words(self, texts: list[_Text]) -> None:
        if self._likely is None:
            return
        single = [(text, word[0]) for text in texts for word in text.chosen if len(word) == 1]
        found = self._likely([Blank(text.ids, position, text.segments) for text, position in single])
        for (text, position), tokens in zip(single, found, strict=True):
            text.candidates[position] = [(token,) for token in tokens]

    def _replaced(self, example: Example, text: _Text) -> Example:
        """Return the example with the words replaced, from last to first, so that earlier positions stay valid."""
        ids, room = list(text.ids), max(self._limit - len(text.ids), 0)
        columns = {name: _numbers(example[name]) for name in _TOKEN_COLUMNS if name in example}
        for word, draw in zip(reversed(text.chosen), reversed(text.draws), strict=True):
            fitting = [
                pieces
                for pieces in text.candidates.get(word[0], [])
                if len(pieces) == len(word) or (not text.fixed_length and len(pieces) - len(word) <= room)
            ]
            if not fitting:
                continue
            pieces = fitting[int(draw * len(fitting))]
            place = slice(word[0], word[-1] + 1)
            room -= len(pieces) - len(word)
            ids[place] = pieces
            for values in columns.values():
                values[place] = [values[word[0]]] * len(pieces)
        columns["input_ids"] = ids
        return {name: like(value, columns[name]) if name in columns else value for name, value in example.items()}


def _numbers(value: Sequence[int] | np.ndarray | Tensor) -> list[int]:
    return np.asarray(value).tolist()
