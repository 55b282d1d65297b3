"""Word replacement as in TinyBERT: a word gives way to one that a masked LM or an embedding space finds fitting."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from hf_distill.errors import DataError, SettingError
from hf_distill.views.masked_lm import Blank, LikelyWords
from hf_distill.views.neighbours import Neighbours
from hf_distill.views.seam import Example, like
from hf_distill.views.words import Words

_OF_TOKENS = ("attention_mask", "token_type_ids", "special_tokens_mask")


@dataclass
class _Text:
    """One example: its ids, its segments, its words that are to be replaced, and a number in [0, 1) for each."""

    ids: list[int]
    segments: list[int] | None
    chosen: list[list[int]]
    draws: list[float]
    fixed_length: bool
    candidates: dict[int, list[tuple[int, ...]]]  # by a word's first position


class WordReplacement:
    """Each word is replaced with a probability, by one of its K candidates, all alike.

    A word of one piece: the K words that the masked LM finds likeliest in its place (the word itself may be among
    them). A word of several: the K nearest in the embedding space. Without a masked LM every word takes neighbours;
    without embeddings words of several pieces stay. Numbers, punctuation, special tokens and padding stay.

    Labels stay as they are: the sentence's, and also a token's (the first piece of a replaced word keeps its label).
    An example with a label a token, a span or padding takes only words of as many pieces.

    Jiao et al. 2020, TinyBERT, section 3.2 and algorithm 1; its p_t is `probability`, its K `candidates`, its N_a the
    `copies` of `augment_dataset`. There the embeddings are GloVe's. Here all blanks of a sentence are filled in view of
    the sentence as it was, not of the words replaced before, so that they can share one forward.

    Args:
        tokenizer: of the student, of the masked LM, and of embeddings that are a model's.
        masked_lm: a model with a masked-LM head; it is put in evaluation mode. On an accelerator it cannot run in
            worker processes: use `augment_dataset`, or no workers.
        embeddings: a mapping of words to vectors, or a model, an `nn.Embedding` or a tensor `[v d]` of the tokenizer's
            vocabulary (see `Neighbours`).
        probability: of a word to be replaced. candidates: K.
        same_length: take only words of as many pieces, always.
        batch_size: sentences a forward of the masked LM, one a blank.

    Raises:
        SettingError: neither masked LM nor embeddings, a number out of range, or a tokenizer that does not fit.
        DataError: (when called) examples without `input_ids`, or with several sequences each.

    >>> from tokenizers import Tokenizer, models
    >>> from transformers import PreTrainedTokenizerFast
    >>> words = Tokenizer(models.WordLevel({"?": 0, "good": 1, "fine": 2}, unk_token="?"))
    >>> replace = WordReplacement(
    ...     PreTrainedTokenizerFast(tokenizer_object=words, unk_token="?"), embeddings=torch.eye(3), probability=1.0
    ... )
    >>> replace([{"input_ids": [1, 0, 2], "labels": 1}])
    [{'input_ids': [2, 0, 1], 'labels': 1}]
    """

    acts_on = "examples"
    changes_tokens = True

    def __init__(
        self,
        tokenizer: Any,
        *,
        masked_lm: Any = None,
        embeddings: Any = None,
        probability: float = 0.4,
        candidates: int = 15,
        same_length: bool = False,
        batch_size: int = 16,
    ) -> None:
        if masked_lm is None and embeddings is None:
            raise SettingError(
                "WordReplacement needs masked_lm= or embeddings= (or both, as in TinyBERT): got neither."
            )
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

    @property
    def moves_positions(self) -> bool:
        """Whether a word may be replaced by one of more or fewer pieces."""
        return self._neighbours is not None and not self.same_length

    def __call__(self, examples: Sequence[Example]) -> list[Example]:
        texts = [self._choose(example) for example in examples]
        self._ask_model(texts)
        if self._neighbours is not None:
            for text in texts:
                for word in text.chosen:
                    if len(word) > 1 or self._likely is None:
                        text.candidates[word[0]] = self._neighbours([text.ids[i] for i in word])
        return [self._replaced(example, text) for example, text in zip(examples, texts, strict=True)]

    def _choose(self, example: Example) -> _Text:
        """Two draws a word, whether it is replaced and by which: so what one word draws does not move the next's."""
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
        of_tokens = {name for name, value in example.items() if np.ndim(value) and len(value) == len(ids)}
        padded = attended is not None and not all(_numbers(attended))
        return _Text(
            ids=ids,
            segments=_numbers(example["token_type_ids"]) if "token_type_ids" in example else None,
            chosen=[words[i] for i in kept],
            draws=[which[i] for i in kept],
            fixed_length=self.same_length
            or padded
            or "start_positions" in example
            or bool(of_tokens - {"input_ids", *_OF_TOKENS}),
            candidates={},
        )

    def _ask_model(self, texts: list[_Text]) -> None:
        if self._likely is None:
            return
        single = [(text, word[0]) for text in texts for word in text.chosen if len(word) == 1]
        found = self._likely([Blank(text.ids, position, text.segments) for text, position in single])
        for (text, position), tokens in zip(single, found, strict=True):
            text.candidates[position] = [(token,) for token in tokens]

    def _replaced(self, example: Example, text: _Text) -> Example:
        """The example with other words; from the last to the first, so that positions before stay what they are."""
        ids, room = list(text.ids), max(self._limit - len(text.ids), 0)
        columns = {name: _numbers(example[name]) for name in _OF_TOKENS if name in example}
        for word, draw in zip(reversed(text.chosen), reversed(text.draws), strict=True):
            fitting = [
                one
                for one in text.candidates.get(word[0], [])
                if len(one) == len(word) or (not text.fixed_length and len(one) - len(word) <= room)
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


def _numbers(value: Any) -> list[int]:
    return np.asarray(value).tolist()
