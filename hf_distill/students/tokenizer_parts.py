"""What a fast tokenizer's JSON says, cut to some of its tokens. Plain dicts in and out; it encodes no text.

Why the texts whose tokens are all kept are encoded as before:
WordPiece takes the longest piece that fits: the piece it took is still there, and no longer one has come.
BPE applies the first merge in the list that fits: the merges that make a kept token are kept in their order, and the
one that was first is still there. Unigram takes the pieces with the highest sum of scores: that sum is still there, and
the lowest score (it sets the price of an unknown character) is kept.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from itertools import pairwise
from typing import Any

from hf_distill.errors import SettingError

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
