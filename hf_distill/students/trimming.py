"""A tokenizer cut to the tokens that a corpus uses, and which tokens those are. It touches no model: `narrow` does."""

from __future__ import annotations

import copy
import json
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice
from typing import Any

import torch

from hf_distill.errors import DataError, SettingError, TeacherError
from hf_distill.students import tokenizer_parts
from hf_distill.students.cutting import Cut
from hf_distill.students.layout import Layout
from hf_distill.students.units import Axis, Group

_AT_ONCE = 1000


@dataclass(frozen=True)
class TrimmedVocabulary:
    """The tokens to keep, and the tokenizer for them.

    Attributes:
        tokenizer: like the given one, with the kept tokens renumbered. Save it beside the student.
        kept: the old id of each new one; in the old order.
        before: how many tokens the given tokenizer had.
    """

    tokenizer: Any = field(repr=False)
    kept: tuple[int, ...] = field(repr=False)
    before: int

    @cached_property
    def places(self) -> dict[int, int]:
        """Old id → new id."""
        return {old: new for new, old in enumerate(self.kept)}

    def cut(self, layout: Layout) -> Cut:
        """The axes of tokens in a model, and what to keep of them. Raises TeacherError where they do not fit."""
        units = layout.sizes["vocabulary"].value
        if self.kept[-1] >= units:
            raise TeacherError(
                f"narrow: the tokenizer of vocabulary= has ids up to {self.kept[-1]}, and the teacher has {units} "
                f"tokens ({layout.sizes['vocabulary'].settings[0]}). Is it the teacher's tokenizer?"
            )
        axes = [Axis(name, dim, outer=length // units) for (name, dim), length in layout.vocabulary.items()]
        return Group("vocabulary", "tokens", units, axes), torch.tensor(self.kept)

    def __str__(self) -> str:
        return f"{len(self.kept)} of {self.before} tokens"


def trim_vocabulary(tokenizer: Any, texts: Iterable[str], *, keep: Sequence[int] = ()) -> TrimmedVocabulary:
    """The tokens that these texts use, and a tokenizer that has no others and encodes the texts as before, renumbered.

    Always kept are special and added tokens, what the tokenizer needs to make the kept ones (the steps of a BPE merge),
    single characters of the kept ones, and all bytes where it falls back on bytes. Other texts are written with the
    tokens that are left: in more pieces, or with the unknown token where a character never came up.

    Args:
        tokenizer: a fast one: WordPiece, BPE, Unigram or WordLevel.
        texts: the corpus. Read once, whole; take the texts of the task and some more.
        keep: further ids to keep.

    Raises:
        SettingError: for a tokenizer that is not fast, or of another kind, or an id that it has not.
        DataError: for a corpus without texts.
        TeacherError: if the trimmed tokenizer encodes one of the first 1000 texts otherwise, or cannot be read back.

    >>> from tokenizers import Tokenizer, models, pre_tokenizers
    >>> from transformers import PreTrainedTokenizerFast
    >>> backend = Tokenizer(models.WordLevel({"[UNK]": 0, "a": 1, "b": 2, "c": 3}, unk_token="[UNK]"))
    >>> backend.pre_tokenizer = pre_tokenizers.Whitespace()
    >>> tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]")
    >>> vocabulary = trim_vocabulary(tokenizer, ["a c", "c"])
    >>> print(vocabulary, vocabulary.kept, vocabulary.tokenizer("c a")["input_ids"])
    3 of 4 tokens (0, 1, 3) [2, 1]
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise SettingError(
            f"trim_vocabulary: {type(tokenizer).__name__} is no fast tokenizer. Load it with use_fast=True; where "
            "there is none, its vocabulary cannot be trimmed here."
        )
    if isinstance(texts, str):
        raise SettingError("trim_vocabulary: texts= is one string. Give an iterable of texts.")
    ids = tokenizer.get_vocab()
    unknown = sorted(set(keep) - set(ids.values()))
    if unknown:
        raise SettingError(f"trim_vocabulary: keep= names ids that the tokenizer has not: {unknown[:5]}.")
    parts = json.loads(backend.to_str())
    tokenizer_parts.vocabulary_of(parts["model"])
    used, sample = _used(tokenizer, texts)
    always = {*keep, *tokenizer.all_special_ids, *(one["id"] for one in parts.get("added_tokens") or [])}
    kept = tuple(sorted(tokenizer_parts.needed(parts, used | always)))
    places = {old: new for new, old in enumerate(kept)}
    trimmed = TrimmedVocabulary(_rebuilt(tokenizer, tokenizer_parts.cut(parts, places)), kept, len(ids))
    _check(tokenizer, trimmed, sample)
    return trimmed


def _used(tokenizer: Any, texts: Iterable[str]) -> tuple[set[int], list[str]]:
    """The ids in all texts, and the first texts."""
    used: set[int] = set()
    sample: list[str] = []
    stream = iter(texts)
    while some := list(islice(stream, _AT_ONCE)):
        strange = next((one for one in some if not isinstance(one, str)), None)
        if strange is not None:
            raise DataError(f"trim_vocabulary: texts= gave a {type(strange).__name__}. Give strings.")
        sample = sample or some
        for row in _encoded(tokenizer, some):
            used.update(row)
    if not sample:
        raise DataError("trim_vocabulary: texts= gave no text.")
    return used, sample


def _encoded(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    rows: list[list[int]] = tokenizer(texts, padding=False, truncation=False, verbose=False)["input_ids"]
    return rows


def _rebuilt(tokenizer: Any, parts: tokenizer_parts.Json) -> Any:
    """A tokenizer of the same class, read from what it wrote."""
    from tokenizers import Tokenizer

    new = copy.deepcopy(tokenizer)
    new._tokenizer = Tokenizer.from_str(json.dumps(parts))
    with tempfile.TemporaryDirectory() as folder:
        new.save_pretrained(folder)
        return type(tokenizer).from_pretrained(folder)


def _check(tokenizer: Any, trimmed: TrimmedVocabulary, sample: list[str]) -> None:
    for text, old, new in zip(sample, _encoded(tokenizer, sample), _encoded(trimmed.tokenizer, sample), strict=True):
        if [trimmed.places[index] for index in old] != new:
            raise TeacherError(
                f"trim_vocabulary: the trimmed {type(tokenizer).__name__} encodes {text[:60]!r} otherwise than the "
                "given one. It does not keep its words where its class says; trim it by hand."
            )
    words = trimmed.tokenizer.get_vocab()
    before = {index: token for token, index in tokenizer.get_vocab().items()}
    if any(words.get(before[old]) != new for old, new in trimmed.places.items() if old in before):
        raise TeacherError(f"trim_vocabulary: the trimmed {type(tokenizer).__name__} reads back with other ids.")
