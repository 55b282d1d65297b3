"""Tiny tokenizers, built in memory: words w0, w1, … with their number as id."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast


def tokenizer(
    words: int | Mapping[str, int] = 40, *, added: Sequence[str] = (), padding: str = "w0"
) -> PreTrainedTokenizerFast:
    """Return a tokenizer of a number of words, or of the given words, followed by `added` tokens."""
    ids = {f"w{i}": i for i in range(words)} if isinstance(words, int) else dict(words)
    backend = Tokenizer(models.WordLevel(ids, unk_token=next(iter(ids))))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    made = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token=padding if padding in ids else None)
    if added:
        made.add_tokens(list(added))
    return made


def bpe_tokenizer(merges: Sequence[tuple[str, str]]) -> PreTrainedTokenizerFast:
    """Return a tokenizer with a fixed vocabulary and these merge rules."""
    ids = {token: i for i, token in enumerate(("a", "b", "c", "ab", "bc", "abc"))}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE(vocab=ids, merges=list(merges))))
