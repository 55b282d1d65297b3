"""`trim_vocabulary`: a tokenizer with fewer tokens, and the same ids in configs. `narrow` cuts the model to match."""

from __future__ import annotations

import copy
import json
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice, pairwise
from typing import Any

from tokenizers import Tokenizer
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedTokenizerBase

from hf_distill.errors import DataError, SettingError, TeacherError

Json = dict[str, Any]
NewIds = Mapping[int, int]  # old id → new id
_KINDS = ("WordPiece", "BPE", "Unigram", "WordLevel")
_BATCH = 1000
_TOKEN_LISTS = ("suppress_tokens", "begin_suppress_tokens", "bad_words_ids")  # a lost token can be left out of these
_TOKEN_TABLES = ("lang_to_id", "task_to_id")  # name → id: Whisper's languages and tasks


@dataclass(frozen=True)
class TrimmedVocabulary:
    """The tokens to keep, and a tokenizer for them.

    Attributes:
        tokenizer: like the given tokenizer, with the kept tokens renumbered. Save it beside the student.
        kept: the old id of each new id, ascending.
        before: number of tokens of the given tokenizer.
    """

    tokenizer: PreTrainedTokenizerBase = field(repr=False)
    kept: tuple[int, ...] = field(repr=False)
    before: int

    @cached_property
    def new_ids(self) -> dict[int, int]:
        """The new id of each kept old id."""
        return {old: new for new, old in enumerate(self.kept)}

    def __str__(self) -> str:
        return f"{len(self.kept)} of {self.before} tokens"


def trim_vocabulary(
    processing_class: PreTrainedTokenizerBase, texts: Iterable[str], *, keep: Sequence[int] = ()
) -> TrimmedVocabulary:
    """Return the tokens that these texts use, and a tokenizer with only these tokens.

    The new tokenizer encodes the texts to the same tokens, renumbered. It always keeps special and added tokens, the
    steps of the BPE merges behind kept tokens, the single characters of kept tokens, and all bytes if it falls back on
    bytes. Other texts are encoded with the remaining tokens: in more pieces, or with the unknown token.

    Args:
        processing_class: a fast tokenizer of kind WordPiece, BPE, Unigram or WordLevel.
        texts: the corpus, read once. Take the texts of the task, and some more.
        keep: further ids to keep.

    Raises:
        SettingError: if the tokenizer is slow or of another kind, or does not have an id in `keep`.
        DataError: if there are no texts.
        TeacherError: if the new tokenizer encodes one of the first 1000 texts differently, or changes when it is saved.

    >>> from tokenizers import Tokenizer, models, pre_tokenizers
    >>> from transformers import PreTrainedTokenizerFast
    >>> backend = Tokenizer(models.WordLevel({"[UNK]": 0, "a": 1, "b": 2, "c": 3}, unk_token="[UNK]"))
    >>> backend.pre_tokenizer = pre_tokenizers.Whitespace()
    >>> tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]")
    >>> vocabulary = trim_vocabulary(tokenizer, ["a c", "c"])
    >>> print(vocabulary, vocabulary.kept, vocabulary.tokenizer("c a")["input_ids"])
    3 of 4 tokens (0, 1, 3) [2, 1]
    """
    backend = getattr(processing_class, "backend_tokenizer", None)
    if backend is None:
        raise SettingError(f"trim_vocabulary: {type(processing_class).__name__} is not a fast tokenizer.")
    if isinstance(texts, str):
        raise SettingError("trim_vocabulary: texts= is one string. Pass an iterable of texts.")
    ids = processing_class.get_vocab()
    unknown = sorted(set(keep) - set(ids.values()))
    if unknown:
        raise SettingError(f"trim_vocabulary: keep= has ids that are not in the tokenizer: {unknown[:5]}.")
    parts = json.loads(backend.to_str())
    kind = parts["model"].get("type")
    if kind not in _KINDS:
        raise SettingError(f"trim_vocabulary: the tokenizer is a {kind}. Supported are {', '.join(_KINDS)}.")
    used, sample = _used_ids(processing_class, texts)
    always = {*keep, *processing_class.all_special_ids, *(added["id"] for added in parts.get("added_tokens") or [])}
    kept = tuple(sorted(_with_needed(parts, used | always)))
    new_ids = {old: new for new, old in enumerate(kept)}
    trimmed = TrimmedVocabulary(_rebuilt(processing_class, _trimmed(parts, new_ids)), kept, len(ids))
    _check_encoding(processing_class, trimmed, sample)
    return trimmed


def _used_ids(processing_class: PreTrainedTokenizerBase, texts: Iterable[str]) -> tuple[set[int], list[str]]:
    """Return the ids in all texts, and the first texts."""
    used: set[int] = set()
    sample: list[str] = []
    remaining = iter(texts)
    while batch := list(islice(remaining, _BATCH)):
        for text in batch:
            if not isinstance(text, str):
                raise DataError(f"trim_vocabulary: texts= contains a {type(text).__name__}. Pass strings.")
        sample = sample or batch
        used.update(*_encoded(processing_class, batch))
    if not sample:
        raise DataError("trim_vocabulary: texts= is empty.")
    return used, sample


def _encoded(processing_class: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    rows: list[list[int]] = processing_class(texts, padding=False, truncation=False, verbose=False)["input_ids"]
    return rows


def _rebuilt(processing_class: PreTrainedTokenizerBase, parts: Json) -> PreTrainedTokenizerBase:
    """Return a tokenizer of the same class with these parts, saved and loaded once."""
    new = copy.deepcopy(processing_class)
    vars(new)["_tokenizer"] = Tokenizer.from_str(json.dumps(parts))
    with tempfile.TemporaryDirectory() as folder:
        new.save_pretrained(folder)
        loaded: PreTrainedTokenizerBase = type(processing_class).from_pretrained(folder)
    return loaded


def _check_encoding(processing_class: PreTrainedTokenizerBase, trimmed: TrimmedVocabulary, sample: list[str]) -> None:
    name, new_ids = type(processing_class).__name__, trimmed.new_ids
    before, after = _encoded(processing_class, sample), _encoded(trimmed.tokenizer, sample)
    for text, old, new in zip(sample, before, after, strict=True):
        if [new_ids[index] for index in old] != new:
            raise TeacherError(
                f"trim_vocabulary: this {name} cannot be trimmed: it would encode {text[:60]!r} differently."
            )
    words = trimmed.tokenizer.get_vocab()
    if any(words.get(token) != new_ids[old] for token, old in processing_class.get_vocab().items() if old in new_ids):
        raise TeacherError(f"trim_vocabulary: the trimmed {name} has other ids after it is saved and loaded.")


# The parts of a fast tokenizer, as its JSON holds them.


def _vocabulary(model: Json) -> dict[str, int]:
    """Return piece → id."""
    vocabulary = model["vocab"]
    if isinstance(vocabulary, list):
        return {piece: index for index, (piece, _) in enumerate(vocabulary)}
    return dict(vocabulary)


def _with_needed(tokenizer: Json, kept: Iterable[int]) -> set[int]:
    """Return `kept` and the ids without which the kept tokens, or words of the same characters, are not reached."""
    model = tokenizer["model"]
    ids = _vocabulary(model)
    pieces = {index: piece for piece, index in ids.items()}
    chosen = {pieces[index] for index in kept if index in pieces}
    prefix = model.get("continuing_subword_prefix") or ""
    extra = {piece for piece in ids if model.get("byte_fallback") and _is_byte(piece)}
    if model["type"] == "BPE":
        ranks = {_pair(merge): rank for rank, merge in enumerate(model["merges"])}
        extra |= {piece for token in chosen for piece in _merge_steps(token, ranks, model)}
        if any("ByteLevel" in str(tokenizer.get(part)) for part in ("pre_tokenizer", "decoder")):
            extra |= {piece for piece in ids if len(piece) == 1}
    else:
        letters = {letter for piece in chosen for letter in piece.removeprefix(prefix)}
        extra |= {piece for letter in letters for piece in (letter, prefix + letter)}
    if model["type"] == "Unigram":
        extra.add(min(model["vocab"], key=lambda entry: entry[1])[0])
        extra.add(model["vocab"][model["unk_id"]][0] if model.get("unk_id") is not None else "")
    extra.add(model.get("unk_token") or "")
    return {*kept, *(ids[piece] for piece in extra if piece in ids)}


def _merge_steps(token: str, ranks: Mapping[tuple[str, str], int], model: Json) -> set[str]:
    """Return the characters of a token, and every piece on the way from them to the token.

    Merges within a token happen as they would in the token alone: none has crossed its ends, or it would be longer.
    """
    prefix, suffix = (model.get(key) or "" for key in ("continuing_subword_prefix", "end_of_word_suffix"))
    body = token.removesuffix(suffix)
    inner = bool(prefix) and body.startswith(prefix)
    parts = list(body.removeprefix(prefix) if inner else body)
    if not parts:
        return set()
    parts = [prefix + part if at or inner else part for at, part in enumerate(parts)]
    if suffix and token.endswith(suffix):
        parts[-1] += suffix
    steps = set(parts)
    while found := [(ranks[pair], at) for at, pair in enumerate(pairwise(parts)) if pair in ranks]:
        _, at = min(found)
        parts[at : at + 2] = [_merged((parts[at], parts[at + 1]), model)]
        steps.add(parts[at])
    return steps


def _trimmed(tokenizer: Json, new_ids: NewIds) -> Json:
    """Return the same tokenizer with only the tokens of `new_ids`."""
    new = copy.deepcopy(tokenizer)
    model = new["model"]
    ids = {piece: new_ids[index] for piece, index in _vocabulary(model).items() if index in new_ids}
    if model["type"] == "Unigram":
        model["vocab"] = [entry for index, entry in enumerate(model["vocab"]) if index in new_ids]
        model["unk_id"] = None if model.get("unk_id") is None else new_ids[model["unk_id"]]
    else:
        model["vocab"] = ids
    if model["type"] == "BPE":
        pairs = [(merge, _pair(merge)) for merge in model["merges"]]
        model["merges"] = [merge for merge, pair in pairs if {*pair, _merged(pair, model)} <= ids.keys()]
    for added in new.get("added_tokens") or []:
        added["id"] = new_ids[added["id"]]
    if new.get("padding"):
        new["padding"]["pad_id"] = new_ids[new["padding"]["pad_id"]]
    new["post_processor"] = _post_processor(new.get("post_processor"), new_ids)
    return new


def _post_processor(part: Json | None, new_ids: NewIds) -> Json | None:
    """Renumber the ids that a post-processor puts around a text."""
    if part is None:
        return None
    if part.get("type") == "Sequence":
        return part | {"processors": [_post_processor(inner, new_ids) for inner in part["processors"]]}
    if part.get("type") == "TemplateProcessing":
        tokens = part["special_tokens"].items()
        return part | {
            "special_tokens": {name: token | {"ids": [new_ids[i] for i in token["ids"]]} for name, token in tokens}
        }
    return part | {side: [part[side][0], new_ids[part[side][1]]] for side in ("sep", "cls") if side in part}


def _is_byte(piece: str) -> bool:
    return len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">")


def _pair(merge: str | list[str]) -> tuple[str, str]:
    left, right = merge.split(" ") if isinstance(merge, str) else merge
    return left, right


def _merged(pair: tuple[str, str], model: Json) -> str:
    return pair[0] + pair[1].removeprefix(model.get("continuing_subword_prefix") or "")


# The token ids in the configs of a model.


def renumber(config: PreTrainedConfig | GenerationConfig, new_ids: NewIds, path: str) -> list[str]:
    """Renumber every token id in a config and in the configs within it, in place; return notes.

    Args:
        config: a model's config or generation config.
        new_ids: old id → new id.
        path: the name of the config, for messages.

    Raises:
        TeacherError: if a setting needs a token that is not kept.
    """
    notes: list[str] = []
    for where, holder in _configs(config, path):
        for name, value in list(vars(holder).items()):
            if not value and not isinstance(value, int):
                continue
            if name.endswith(("_token_id", "_token_ids")):
                setattr(holder, name, _renumbered(value, new_ids, f"{where}.{name}"))
            elif name == "forced_decoder_ids":
                setattr(holder, name, [[at, _renumbered(token, new_ids, f"{where}.{name}")] for at, token in value])
            elif name in _TOKEN_LISTS:
                kept = [new for token in value if (new := _if_kept(token, new_ids)) is not None]
                setattr(holder, name, kept or None)
                if len(kept) < len(value):
                    notes.append(f"{where}.{name}: {len(kept)} of {len(value)}; the other tokens were not kept.")
            elif name in _TOKEN_TABLES and isinstance(value, dict):
                setattr(holder, name, {key: new_ids[token] for key, token in value.items() if token in new_ids})
    return notes


def _configs(
    config: PreTrainedConfig | GenerationConfig, path: str
) -> Iterator[tuple[str, PreTrainedConfig | GenerationConfig]]:
    yield path, config
    for name, value in vars(config).items():
        if isinstance(value, PreTrainedConfig):
            yield from _configs(value, f"{path}.{name}")


def _if_kept(token: int | list[int], new_ids: NewIds) -> int | list[int] | None:
    """Return the new id, or ids; None if one of them is not kept."""
    if isinstance(token, int):
        return new_ids.get(token)
    return [new_ids[part] for part in token] if new_ids.keys() >= set(token) else None


def _renumbered(value: Any, new_ids: NewIds, where: str) -> Any:
    if isinstance(value, (list, tuple)):
        return [_renumbered(part, new_ids, where) for part in value]
    if value is None or value < 0:  # -1 stands for "none" in some configs
        return value
    if value not in new_ids:
        raise TeacherError(f"narrow: {where}={value} is not kept. Pass it to trim_vocabulary(..., keep=[{value}]).")
    return new_ids[value]
