"""Whether a model writes to inputs of a batch what it writes to each alone: found by experiment, once.

Prompts are padded on the left. Most models mask it and number positions from the first token on; recurrent ones (RWKV)
read it as text, decoders of encoder-decoders (BART's) count it, and prompt tuning puts its vectors before it.
Sounds are padded at their end: models that normalise over all of a recording (Moonshine) read that too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import GenerationConfig

from hf_distill.errors import DataError
from hf_distill.tasks.infer import forward_names, unwrapped
from hf_distill.unused_outputs import several_processes

_LONGEST, _PADDING, _NEW = 3, 4, 2  # tokens of the trial: its prompt, before it, after it
_SILENCE = 4  # a sound is tried with a quarter of its length behind it
_EXACT, _ROUNDED = 0.01, 0.3  # of a row's standard deviation; seen: 1e-6, or 0.08 and more where padding is read
_ALONE, _OF_ONE_LENGTH, _TOGETHER = range(3)  # how prompts may be asked
_found: WeakKeyDictionary[nn.Module, dict[bool, int]] = WeakKeyDictionary()  # with a cache, without
_Writing = Callable[[Any, GenerationConfig], AbstractContextManager[None]]


def refuse_unlike_alone(
    model: Any, prompts: Sequence[Sequence[int]], settings: GenerationConfig, writing: _Writing
) -> None:
    """Refuse prompts in a batch where a model does not write as it does alone. (In 16 bits a small change is rounding.)

    Args:
        prompts: not empty. settings: those they are to be continued by. writing: the context in which a model writes
            by some settings alone.

    Raises:
        DataError: what the model writes to a prompt changes with the others, or with the padding before it.
    """
    together = len(prompts) * max(settings.num_beams or 1, settings.num_return_sequences or 1) > 1
    if not together and not several_processes():  # of several all try: a sharded model's forward waits for every one
        return
    found, cached = _found.setdefault(model, {}), settings.use_cache is not False
    if cached not in found:
        found[cached] = _tried(model, prompts, settings, writing)
    name = f"{type(model).__name__} ({type(unwrapped(model)).__name__})"
    one_by_one = "one at a time (batch_size=1, in training per_device_train_batch_size=1)"
    if found[cached] == _ALONE and together:
        raise DataError(
            f"{name} does not write to several prompts at once what it writes to each alone. Give it {one_by_one}, "
            "one text a prompt, without beams; or switch its cache off (generation_config.use_cache=False)."
        )
    if found[cached] == _OF_ONE_LENGTH and len(set(map(len, prompts))) > 1:
        raise DataError(
            f"{name} does not leave out the padding before a prompt: what it writes changes with the longest prompt of "
            f"the batch. Give it prompts of one length a batch, or {one_by_one}."
        )


def sound_padding_is_read(model: Any, sound: Tensor, column: str, start: int) -> bool:
    """Whether masked silence behind a recording changes the model's first prediction.

    Args:
        model: an encoder-decoder in evaluation mode.
        sound: `[time ...]`, on the model's device.
        column: the forward's name for it.
        start: the token that the decoder starts from.
    """
    if "attention_mask" not in forward_names(model):
        return True
    silence = sound.new_zeros(max(1, len(sound) // _SILENCE), *sound.shape[1:])
    decoder = torch.tensor([[start]], device=sound.device)
    logits = []
    for padding in (silence[:0], silence):
        mask = torch.tensor([[1] * len(sound) + [0] * len(padding)], device=sound.device)
        inputs = {column: torch.cat([sound, padding])[None], "attention_mask": mask}
        with torch.no_grad():
            logits.append(model(**inputs, decoder_input_ids=decoder).logits[0, -1].float())
    alone, padded = logits
    return bool((alone - padded).abs().max() > (_ROUNDED if _rounds(model) else _EXACT) * alone.std())


def _tried(model: Any, prompts: Sequence[Sequence[int]], settings: GenerationConfig, writing: _Writing) -> int:
    prompt, new = list(min(prompts, key=len)[:_LONGEST]), min(_NEW, settings.max_new_tokens)
    room = max(map(len, prompts)) + settings.max_new_tokens - len(prompt) - new  # positions that it surely has
    trial = GenerationConfig(
        max_new_tokens=new,
        min_new_tokens=new,
        do_sample=False,
        use_cache=settings.use_cache,
        pad_token_id=settings.pad_token_id,
        eos_token_id=settings.eos_token_id,
        return_dict_in_generate=True,
        output_logits=True,
    )
    device = next(model.parameters()).device
    with writing(model, trial), torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        alone = _asked(model, prompt, trial)
        if not _same(alone, _asked(model, prompt, trial, rows=2), model):
            return _ALONE
        padded = _asked(model, prompt, trial, padding=max(1, min(_PADDING, room)))
        return _TOGETHER if _same(alone, padded, model) else _OF_ONE_LENGTH


def _asked(
    model: Any, prompt: list[int], trial: GenerationConfig, *, rows: int = 1, padding: int = 0
) -> list[tuple[Tensor, int]]:
    """The logits of each step of the last row `[v]`, and the token written there."""
    device = next(model.parameters()).device
    ids = torch.tensor([[trial.pad_token_id] * padding + prompt] * rows, device=device)
    mask = torch.tensor([[0] * padding + [1] * len(prompt)] * rows, device=device)
    found = model.generate(input_ids=ids, attention_mask=mask, generation_config=trial)
    logits = [step[-1].float() for step in found.logits]
    return list(zip(logits, found.sequences[-1, -len(logits) :].tolist(), strict=True))


def _same(some: list[tuple[Tensor, int]], others: list[tuple[Tensor, int]], model: Any) -> bool:
    allowed = _ROUNDED if _rounds(model) else _EXACT
    for (one, token), (other, other_token) in zip(some, others, strict=True):
        if bool((one - other).abs().max() > allowed * one.std()):
            return False
        if token != other_token:  # of two that are equally likely: from here on they read different texts
            return True
    return True


def _rounds(model: Any) -> bool:
    """Whether it computes in less than 32 bits, in its own type or because Accelerate has wrapped its forward."""
    return model.dtype not in (torch.float32, torch.float64) or hasattr(model, "_original_forward")
