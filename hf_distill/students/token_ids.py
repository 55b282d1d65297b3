"""Renumbering the token ids that configs hold, after tokens were left out. It reads names of settings, no tokenizer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from transformers import PreTrainedConfig

from hf_distill.errors import TeacherError

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
