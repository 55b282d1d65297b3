"""How a student writes from its own distribution: which ids it may use, and which of its settings are followed.

When it writes, and what becomes of the texts, is said elsewhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from transformers import GenerationConfig

from hf_distill.tasks.generating import end_tokens, generation_settings
from hf_distill.tasks.infer import unwrapped

# What is followed of the student's generation_config. Anything else could make its samples another distribution than
# its own; not all of what `generate` knows is listed there, so what is not here is left out.
_FOLLOWED = (
    *("pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id"),
    *("use_cache", "cache_implementation", "cache_config", "max_cache_len", "compile_config", "disable_compile"),
)
_LANGUAGE = "forced_bos_token_id"  # of an encoder-decoder's text (mBART, M2M100): given, as a prompt is


def sampling_settings(
    student: Any, *, max_new_tokens: int, sampling_temperature: float, never: Sequence[int] = ()
) -> GenerationConfig:
    """The settings to sample with: from all ids but those that are `never` to be written.

    Raises:
        SettingError: see `generation_settings`.
    """
    return generation_settings(
        student,
        max_new_tokens=max_new_tokens,
        do_sample=True,
        sampling_temperature=sampling_temperature,
        others={"suppress_tokens": list(never) or None},
        followed=(*_FOLLOWED, _LANGUAGE) if unwrapped(student).config.is_encoder_decoder else _FOLLOWED,
    )


def tokens_needed(settings: GenerationConfig, tokenizer: Any = None) -> dict[str, set[int]]:
    """Tokens of which a text cannot do without all, by what it does with them."""
    first, last = getattr(settings, _LANGUAGE), getattr(tokenizer, "eos_token_id", None)
    return {
        "begin": set() if first is None else {first},
        "end": end_tokens(settings) | (set() if last is None else {last}),
    }


def ids_not_shared(student: Any, teacher: Any = None, tokenizer: Any = None) -> list[int]:
    """Columns of the student's head that its texts must not hold, as far as is known.

    Those that no token belongs to (padding), that are not compared with the teacher's, and that one of the models has
    no embedding for.

    Args:
        teacher: fitted. tokenizer: the student's. Each may be None.

    >>> from types import SimpleNamespace
    >>> student = nn.Module()
    >>> student.get_output_embeddings = lambda: nn.Linear(2, 6)
    >>> ids_not_shared(student, tokenizer=SimpleNamespace(get_vocab=lambda: {"a": 0, "b": 1, "c": 3}))
    [2, 4, 5]
    """
    columns = range(_head_width(unwrapped(student)))
    written = set(tokenizer.get_vocab().values() if hasattr(tokenizer, "get_vocab") else columns)
    compared = None if teacher is None else teacher.columns.student
    if compared is not None:
        written &= set(range(compared)) if isinstance(compared, int) else set(compared)
    for model in (student, *_models_of(teacher)):
        embedded = _embeddings(unwrapped(model))
        if embedded is not None:
            written &= set(range(embedded))
    return sorted(set(columns) - written)


def _models_of(teacher: Any) -> list[Any]:
    """Those that read what the student writes."""
    members = getattr(teacher, "teachers", None)
    if members is not None:
        return [model for member in members for model in _models_of(member)]
    model = getattr(teacher, "model", None)
    return [model] if isinstance(model, nn.Module) else []


def _head_width(model: Any) -> int:
    """`out_features`, since the weights of a quantised head have another shape."""
    find = getattr(model, "get_output_embeddings", None)
    width = getattr(None if find is None else find(), "out_features", None)
    return int(model.config.get_text_config(decoder=True).vocab_size if width is None else width)


def _embeddings(model: Any) -> int | None:
    """How many ids it can read; None where that is not known."""
    find = getattr(model, "get_input_embeddings", None)
    found: Any = None if find is None else find()
    count = getattr(found, "num_embeddings", None)
    if count is None and isinstance(getattr(found, "weight", None), Tensor):  # under an adapter
        count = found.weight.shape[0]
    return None if count is None else int(count)
