"""Asking a model to write: prompts in, tokens out. Which prompts, and what becomes of the tokens, is said elsewhere."""

from __future__ import annotations

import contextlib
import copy
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from transformers import GenerationConfig

from hf_distill.errors import DataError, SettingError
from hf_distill.tasks.base import IGNORED
from hf_distill.tasks.infer import unwrapped

Tokens = list[int]


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """In evaluation mode; afterwards each module is in the mode that it was in."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextlib.contextmanager
def drawn_from(device: torch.device, *key: int | str) -> Iterator[None]:
    """Inside, what is drawn on the CPU and on this device follows from the key; afterwards all is as it was."""
    seed = int.from_bytes(hashlib.blake2b(repr(key).encode(), digest_size=7).digest(), "little")
    on_cuda = device.type == "cuda"
    with torch.random.fork_rng(devices=[device] if on_cuda else []):
        torch.default_generator.manual_seed(seed)
        if on_cuda:
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        yield


def generation_settings(
    model: Any,
    *,
    max_new_tokens: int,
    do_sample: bool,
    sampling_temperature: float,
    others: Mapping[str, Any] | None = None,
) -> GenerationConfig:
    """The model's own `generation_config` with these said anew; sampling is from all tokens unless `others` cut it.

    Args:
        others: further settings of `generate`, by transformers' names (num_beams, top_p, ...).

    Raises:
        SettingError: a model that cannot generate, a number out of range, an unknown setting, or no token to pad with.
    """
    if not getattr(unwrapped(model), "can_generate", lambda: False)():
        raise SettingError(f"{type(unwrapped(model)).__name__} cannot generate: it has no head that writes text.")
    if max_new_tokens < 1 or not 0 < sampling_temperature < float("inf"):
        raise SettingError(
            f"max_new_tokens={max_new_tokens} (1 or more), sampling_temperature={sampling_temperature} (above 0; to "
            "write the likeliest tokens, do_sample=False)."
        )
    settings = copy.deepcopy(unwrapped(model).generation_config)
    sampling: dict[str, Any] = {"temperature": sampling_temperature, "top_k": 0, "top_p": 1.0}
    if not do_sample:
        sampling = {name: None for name in (*sampling, "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff")}
    given = {"max_new_tokens": max_new_tokens, "max_length": None, "do_sample": do_sample, **sampling, **(others or {})}
    unknown = sorted(settings.update(**given))
    if unknown:
        raise SettingError(f"transformers' generate has no setting {', '.join(unknown)}.")
    if settings.pad_token_id is None:
        ends = end_tokens(settings)
        if not ends:
            raise SettingError("the model's generation_config names neither pad_token_id nor eos_token_id. Set one.")
        settings.pad_token_id = min(ends)
    return settings


def end_tokens(settings: GenerationConfig) -> set[int]:
    """The tokens that end a text."""
    ends = settings.eos_token_id
    return set() if ends is None else {ends} if isinstance(ends, int) else set(ends)


def continued(model: Any, prompts: Sequence[Sequence[int]], settings: GenerationConfig) -> list[Tokens]:
    """What a causal model writes after each prompt, its end token included where it came to one.

    Args:
        prompts: token ids, ragged, none empty. settings: from `generation_settings`.

    Returns:
        `num_return_sequences` for each prompt, one after the other.

    Raises:
        DataError: an empty prompt, or one too long for the model.
    """
    _refuse_lengths(model, prompts, settings.max_new_tokens)
    width = max(map(len, prompts))
    device = next(model.parameters()).device
    ids = torch.tensor([[settings.pad_token_id] * (width - len(one)) + list(one) for one in prompts], device=device)
    mask = torch.tensor([[0] * (width - len(one)) + [1] * len(one) for one in prompts], device=device)
    with torch.no_grad(), evaluating(model):
        written = model.generate(input_ids=ids, attention_mask=mask, generation_config=settings)
    return [until_end(row, end_tokens(settings)) for row in written[:, width:].tolist()]


def answered(model: Any, inputs: Mapping[str, Any], settings: GenerationConfig) -> list[Tokens]:
    """What an encoder-decoder writes to a batch of inputs, as labels: without the token that its decoder starts from.

    (Whisper's `generate` gives the text alone, without language, task and end tokens.)
    """
    with torch.no_grad(), evaluating(model):
        written = model.generate(**inputs, generation_config=settings)
    ends = end_tokens(settings)
    if unwrapped(model).main_input_name == "input_features":
        return [until_end(row, ends, padding=settings.pad_token_id) for row in written.tolist()]
    return [until_end(row, ends) for row in written[:, 1:].tolist()]


def prompt_of(ids: Sequence[int], read: Sequence[int] | None = None, labels: Sequence[int] | None = None) -> Tokens:
    """The tokens of a text before the first one that is to be predicted; all of them, if none is.

    The first token is predicted from nothing, so it is always of the prompt.

    Args:
        read: 0 for padding. labels: -100 for what is not to be predicted; None: nothing is.

    >>> prompt_of([0, 5, 6, 7], [0, 1, 1, 1], [-100, -100, -100, 7])
    [5, 6]
    """
    attended = [1] * len(ids) if read is None else read
    wanted = [IGNORED] * len(ids) if labels is None else labels
    real = [(int(token), label) for token, there, label in zip(ids, attended, wanted, strict=True) if there]
    first = next((place for place, (_, label) in enumerate(real) if label != IGNORED and place > 0), len(real))
    return [token for token, _ in real[:first]]


def until_end(tokens: Sequence[int], ends: set[int], *, padding: int | None = None) -> Tokens:
    """Up to the first token that ends a text, with it; without one, up to the padding behind the last token.

    >>> until_end([5, 2, 0, 0], {2}), until_end([5, 6], {2}), until_end([5, 0, 0], {2}, padding=0)
    ([5, 2], [5, 6], [5])
    """
    for place, token in enumerate(tokens):
        if token in ends:
            return list(tokens[: place + 1])
    last = len(tokens)
    while last and tokens[last - 1] == padding:
        last -= 1
    return list(tokens[:last])


def _refuse_lengths(model: Any, prompts: Sequence[Sequence[int]], new: int) -> None:
    lengths = [len(one) for one in prompts]
    if not lengths or min(lengths) == 0:
        raise DataError("there is an empty prompt, which nothing can be written after. Begin prompts with a token.")
    known = getattr(unwrapped(model).config.get_text_config(decoder=True), "max_position_embeddings", None)
    if known is not None and max(lengths) + new > known:
        raise DataError(
            f"a prompt of {max(lengths)} tokens and max_new_tokens={new} are more than the {known} positions that "
            f"{type(unwrapped(model)).__name__} knows. Cut the prompts, or lower max_new_tokens."
        )
