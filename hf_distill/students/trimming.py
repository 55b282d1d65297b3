"""Renumbering the token ids that configs hold, after tokens were left out. It reads names of settings, no tokenizer."""

from __future__ import annotations

import copy
import json
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice, pairwise
from typing import Any

import torch
from transformers import PreTrainedConfig

from hf_distill.errors import DataError, SettingError, TeacherError
from hf_distill.students.narrow.axes import Layout
from hf_distill.students.narrow.units import Axis, Cut, Group

# Lists of ids from which a token that is gone can simply be left out.
_LISTS = ("suppress_tokens", "begin_suppress_tokens", "bad_words_ids")
# Tables of names and ids (Whisper's languages and tasks).
_TABLES = ("lang_to_id", "task_to_id")


def renumber(config: Any, places: Mapping[int, int], where: str) -> list[str]:
    """Change every token id in a config (and in configs inside it), in place; returns notes.

    Raises TeacherError where a setting that names one token names one that is not kept.
    """
    notes: list[str] = []
    for path, holder in _configs(config, where):
        for name, value in list(vars(holder).items()):
            if name.endswith(("_token_id", "_token_ids")) and value is not None:
                setattr(holder, name, _placed(value, places, f"{path}.{name}"))
            elif name == "forced_decoder_ids" and value:
                pairs = [[at, _placed(token, places, f"{path}.{name}")] for at, token in value]
                setattr(holder, name, pairs)
            elif name in _LISTS and value:
                kept = [token for token in map(lambda one: _listed(one, places), value) if token is not None]
                setattr(holder, name, kept or None)
                if len(kept) < len(value):
                    notes.append(f"{path}.{name}: {len(kept)} of {len(value)}; the other tokens are gone.")
            elif name in _TABLES and isinstance(value, dict):
                setattr(holder, name, {key: places[token] for key, token in value.items() if token in places})
    return notes


def _configs(config: Any, where: str) -> Iterator[tuple[str, Any]]:
    yield where, config
    for name, value in vars(config).items():
        if isinstance(value, PreTrainedConfig):
            yield from _configs(value, f"{where}.{name}")


def _listed(token: Any, places: Mapping[int, int]) -> Any:
    if isinstance(token, (list, tuple)):
        placed = [places.get(one) for one in token]
        return None if None in placed else placed
    return places.get(token)


def _placed(value: Any, places: Mapping[int, int], where: str) -> Any:
    if isinstance(value, (list, tuple)):
        return [_placed(one, places, where) for one in value]
    if value is None or value < 0:  # -1 is nobody's id, and some configs say "none" so
        return value
    if value not in places:
        raise TeacherError(
            f"narrow: {where} is {value}, and that token is not kept. Keep it: trim_vocabulary(..., keep=[{value}])."
        )
    return places[value]


KINDS = ("WordPiece", "BPE", "Unigram", "WordLevel")
Json = dict[str, Any]


def vocabulary_of(model: Json) -> dict[str, int]:
    """Piece → id. Raises SettingError for a model of another kind."""
    if model.get("type") not in KINDS:
        raise SettingError(f"trim_vocabulary: a {model.get('type')} tokenizer. Known are {', '.join(KINDS)}.")
    vocabulary = model["vocab"]
    if isinstance(vocabulary, list):
        return {piece: index for index, (piece, _) in enumerate(vocabulary)}
    return dict(vocabulary)


def needed(tokenizer: Json, kept: Iterable[int]) -> set[int]:
    """Ids that must stay so that `kept` are found again, and so that words of the same characters can be written."""
    model = tokenizer["model"]
    ids = vocabulary_of(model)
    pieces = {index: piece for piece, index in ids.items()}
    chosen = {pieces[index] for index in kept if index in pieces}
    prefix = model.get("continuing_subword_prefix") or ""
    extra = {piece for piece in ids if model.get("byte_fallback") and _is_byte(piece)}
    if model["type"] == "BPE":
        extra |= _made_on_the_way(model, chosen)
        if _is_byte_level(tokenizer):
            extra |= {piece for piece in ids if len(piece) == 1}
    else:
        letters = {letter for piece in chosen for letter in piece.removeprefix(prefix)}
        extra |= {piece for letter in letters for piece in (letter, prefix + letter)}
    if model["type"] == "Unigram":
        extra.add(min(model["vocab"], key=lambda one: one[1])[0])
        extra.add(model["vocab"][model["unk_id"]][0] if model.get("unk_id") is not None else "")
    extra.add(model.get("unk_token") or "")
    return {*kept, *(ids[piece] for piece in extra if piece in ids)}


def cut(tokenizer: Json, places: Mapping[int, int]) -> Json:
    """The same tokenizer with the tokens of `places` (old id → new id) alone."""
    new = copy.deepcopy(tokenizer)
    model = new["model"]
    ids = {piece: places[index] for piece, index in vocabulary_of(model).items() if index in places}
    if model["type"] == "Unigram":
        model["vocab"] = [entry for index, entry in enumerate(model["vocab"]) if index in places]
        model["unk_id"] = None if model.get("unk_id") is None else places[model["unk_id"]]
    else:
        model["vocab"] = ids
    if model["type"] == "BPE":
        model["merges"] = [pair for pair in model["merges"] if _can_merge(_pair(pair), ids, model)]
    for added in new.get("added_tokens") or []:
        added["id"] = places[added["id"]]
    if new.get("padding"):
        new["padding"]["pad_id"] = places[new["padding"]["pad_id"]]
    new["post_processor"] = _renumbered(new.get("post_processor"), places)
    return new


def _renumbered(part: Any, places: Mapping[int, int]) -> Any:
    """Ids that a post-processor puts around a text."""
    if not isinstance(part, dict):
        return part
    if part.get("type") == "Sequence":
        return part | {"processors": [_renumbered(one, places) for one in part["processors"]]}
    if part.get("type") == "TemplateProcessing":
        tokens = {
            name: one | {"ids": [places[index] for index in one["ids"]]} for name, one in part["special_tokens"].items()
        }
        return part | {"special_tokens": tokens}
    return part | {side: [part[side][0], places[part[side][1]]] for side in ("sep", "cls") if side in part}


def _is_byte(piece: str) -> bool:
    return len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">")


def _is_byte_level(tokenizer: Json) -> bool:
    return any('"ByteLevel"' in str(tokenizer.get(part)).replace("'", '"') for part in ("pre_tokenizer", "decoder"))


def _pair(merge: Any) -> tuple[str, str]:
    left, right = merge.split(" ") if isinstance(merge, str) else merge
    return left, right


def _can_merge(pair: tuple[str, str], ids: Mapping[str, int], model: Json) -> bool:
    return pair[0] in ids and pair[1] in ids and _merged(pair, model) in ids


def _merged(pair: tuple[str, str], model: Json) -> str:
    return pair[0] + pair[1].removeprefix(model.get("continuing_subword_prefix") or "")


def _made_on_the_way(model: Json, chosen: set[str]) -> set[str]:
    """Every piece that comes up while the merges make one of the chosen, its characters included.

    Inside a token the merges go as they would in the token alone: no merge has crossed its ends, or it would be larger.
    """
    ranks = {_pair(merge): rank for rank, merge in enumerate(model["merges"])}
    return {piece for token in chosen for piece in _steps(token, ranks, model)}


def _steps(token: str, ranks: Mapping[tuple[str, str], int], model: Json) -> set[str]:
    prefix, suffix = (model.get(key) or "" for key in ("continuing_subword_prefix", "end_of_word_suffix"))
    body = token.removesuffix(suffix)
    inner = bool(prefix) and body.startswith(prefix)
    parts = list(body.removeprefix(prefix) if inner else body)
    if not parts:
        return set()
    parts = [prefix + part if at or inner else part for at, part in enumerate(parts)]
    if suffix and token.endswith(suffix):
        parts[-1] += suffix
    made = set(parts)
    while len(parts) > 1:
        pairs = [(ranks.get(pair), at) for at, pair in enumerate(pairwise(parts))]
        found = [(rank, at) for rank, at in pairs if rank is not None]
        if not found:
            return made
        _, at = min(found)
        parts[at : at + 2] = [_merged((parts[at], parts[at + 1]), model)]
        made.add(parts[at])
    return made


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
    vocabulary_of(parts["model"])
    used, sample = _used(tokenizer, texts)
    always = {*keep, *tokenizer.all_special_ids, *(one["id"] for one in parts.get("added_tokens") or [])}
    kept = tuple(sorted(needed(parts, used | always)))
    places = {old: new for new, old in enumerate(kept)}
    trimmed = TrimmedVocabulary(_rebuilt(tokenizer, cut(parts, places)), kept, len(ids))
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


def _rebuilt(tokenizer: Any, parts: Json) -> Any:
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
