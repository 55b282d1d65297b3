"""Limits and settings of generation, and the shared functions that generate."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, StoppingCriteriaList

from hf_distill.ddp import several_processes
from hf_distill.errors import DataError, SettingError
from hf_distill.tasks.base import IGNORED
from hf_distill.tasks.infer import forward_names, unwrapped


@dataclass(frozen=True)
class Limits:
    """The prompts that a model can continue: how long, and with which ids.

    Args:
        asked: description of one prompt.
        model: the name of its class.
        positions: its number of positions, or None if not known.
        ids: its number of embeddings, or None if not known.
        new: number of tokens to generate after the prompt.

    >>> print(Limits("prompt", "Tiny", positions=4, ids=9, new=2).obstacle([1, 2, 3]))
    a prompt of 3 tokens and max_new_tokens=2 are more than the 4 positions that Tiny knows
    """

    asked: str
    model: str
    positions: int | None
    ids: int | None
    new: int

    @classmethod
    def of(cls, model: Any, max_new_tokens: int) -> Limits:
        """Of a model: an encoder-decoder's are those of its encoder, which nothing is written behind."""
        name, ids = type(unwrapped(model)).__name__, _embedded(model)
        if unwrapped(model).config.is_encoder_decoder:
            return cls("source", name, positions(model, "encoder"), ids, 0)
        return cls("prompt", name, positions(model, "decoder"), ids, max_new_tokens)

    def obstacle(self, ids: Sequence[int]) -> str | None:
        """Why these tokens cannot be asked; None: they can."""
        if len(ids) == 0:
            return f"an empty {self.asked}, which nothing can be written to: begin it with a token"
        if self.positions is not None and len(ids) + self.new > self.positions:
            new = f" and max_new_tokens={self.new} are" if self.new else " is"
            known = f"the {self.positions} positions that {self.model} knows"
            return f"a {self.asked} of {len(ids)} tokens{new} more than {known}"
        if self.ids is not None and not 0 <= min(ids) <= max(ids) < self.ids:
            wrong = min(ids) if min(ids) < 0 else max(ids)
            return f"a {self.asked} with token id {wrong}, of which {self.model} knows 0 to {self.ids - 1}"
        return None


def positions(model: Any, side: str) -> int | None:
    """Return the number of positions of the encoder or decoder; None if it is unlimited or not in the config."""
    config = unwrapped(model).config
    if config.is_encoder_decoder:
        config = getattr(config, side, None) or config
    else:
        config = config.get_text_config(decoder=True)
    names = [f"max_{side}_position_embeddings", "max_position_embeddings"]
    names.insert(0, "max_target_positions" if side == "decoder" else "max_source_positions")
    said = [getattr(config, name, None) for name in names]
    return next((count for count in said if isinstance(count, int) and count > 0), None)  # XLNet says -1: no end


def _embedded(model: Any) -> int | None:
    """Return the number of ids that it embeds; None if not known."""
    try:
        return getattr(unwrapped(model).get_input_embeddings(), "num_embeddings", None)
    except NotImplementedError:  # transformers found none
        return None


_LONGEST, _PADDING, _NEW = 3, 4, 2  # tokens of the trial: its prompt, before it, after it
_SILENCE = 4  # a sound is tried with a quarter of its length behind it
_EXACT, _ROUNDED = 0.01, 0.3  # of a row's standard deviation; seen: 1e-6, or 0.08 and more where padding is read
_ALONE, _OF_ONE_LENGTH, _TOGETHER = range(3)  # how prompts may be asked
_found: WeakKeyDictionary[nn.Module, dict[bool, int]] = WeakKeyDictionary()  # with a cache, without
_Writing = Callable[[Any, GenerationConfig], AbstractContextManager[None]]


def check_same_as_alone(
    model: Any, prompts: Sequence[Sequence[int]], settings: GenerationConfig, writing: _Writing
) -> None:
    """Raise if a model generates something else for prompts in a batch than alone (except for rounding in 16 bits).

    Args:
        prompts: not empty.
        settings: the settings to generate with.
        writing: returns a context in which only given settings apply.

    Raises:
        DataError: if the generated text of a prompt depends on the others, or on the padding before it.
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
    """Return whether masked silence after a recording changes the model's first prediction.

    Args:
        model: an encoder-decoder in evaluation mode.
        sound: `[time ...]`, on the model's device.
        column: its name in the forward.
        start: the start token of the decoder.
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
    """Return the logits `[v]` of each step of the last row, and the generated token."""
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
    """Return whether it computes in less than 32 bits, by its dtype or because Accelerate wrapped its forward."""
    return model.dtype not in (torch.float32, torch.float64) or hasattr(model, "_original_forward")


Tokens = list[int]
_CUTS = ("min_p", "typical_p", "epsilon_cutoff", "eta_cutoff", "top_h")  # beside top_k and top_p: what cuts off tokens
_OF_SAMPLING = ("temperature", "top_k", "top_p", *_CUTS)
_SHOWN = ("return_dict_in_generate", "output_scores", "output_logits", "output_attentions", "output_hidden_states")
_WHISPERS_OWN = ("language", "task", "return_timestamps", "prompt_ids")  # GenerationConfig does not declare them
# For recordings longer than a window: they skip windows, write them again, or condition them on the ones before.
_OF_SEVERAL_WINDOWS = (
    *("condition_on_prev_tokens", "compression_ratio_threshold", "logprob_threshold", "no_speech_threshold"),
    "prompt_condition_type",
)
_REFUSED = {
    "stop_strings": "a text ends with a token here. Name it: eos_token_id",
    "max_length": "say how many tokens are to be written: max_new_tokens",
    **dict.fromkeys(_SHOWN, "it changes what `generate` returns, not what is written"),
}


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Inside this context the model is in evaluation mode; each module gets its mode back."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextlib.contextmanager
def drawn_from(device: torch.device, *key: int | str) -> Iterator[None]:
    """Inside this context, random numbers of the CPU and the device follow from the key; then states are restored."""
    seed = int.from_bytes(hashlib.blake2b(repr(key).encode(), digest_size=7).digest(), "little")
    on_cuda = device.type == "cuda"
    with torch.random.fork_rng(devices=[device] if on_cuda else []):
        torch.default_generator.manual_seed(seed)
        if on_cuda:
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        yield


def set_generation(settings: GenerationConfig, values: Mapping[str, Any], *, own: Sequence[str] = ()) -> None:
    """Set these values, and raise if transformers leaves one of them aside.

    `GenerationConfig.update` does not raise for names that it does not know: it returns them. For a published Whisper,
    `language` and `task` are such names, because its `generation_config.json` does not have them.

    Args:
        settings: the configuration to change.
        values: the values by transformers' names.
        own: names that the model's own `generate` reads from the configuration; they are set even if it lacks them.

    Raises:
        SettingError: a name is unknown, or transformers refuses a value.
    """
    for name in own:
        if name in values:
            setattr(settings, name, values[name])
    try:
        unknown = sorted(settings.update(**{name: value for name, value in values.items() if name not in own}))
    except (ValueError, TypeError) as error:
        raise SettingError(f"transformers refuses these settings of generate: {error}") from error
    if unknown:
        raise SettingError(f"transformers' generate has no setting {', '.join(unknown)}.")


def source_of(model: Any) -> str:
    """The name of the input that a model reads: input_ids, or input_features or input_values for audio."""
    inner = unwrapped(model)
    name = getattr(inner, "main_input_name", "input_ids")
    return getattr(inner.encoder, "main_input_name", name) if name == "inputs" else name


def window_of(model: Any) -> int | None:
    """The number of frames that Whisper reads at once; None for a model whose `generate` has no windows."""
    inner = unwrapped(model)
    if "force_unique_generate_call" not in inspect.signature(type(inner).generate).parameters:
        return None
    encoder = inner.get_encoder()
    return int(encoder.conv1.stride[0] * encoder.conv2.stride[0] * inner.config.max_source_positions)


def generation_settings(
    model: Any,
    *,
    max_new_tokens: int,
    do_sample: bool,
    sampling_temperature: float,
    others: Mapping[str, Any] | None = None,
    followed: Sequence[str] | None = None,
) -> GenerationConfig:
    """The model's own `generation_config` with these said anew; sampling is from all tokens unless `others` cut it.

    `forced_eos_token_id` is not taken over: it would put an end token behind a text that is cut off.

    Args:
        followed: names of what is taken over from the model's own; None: all.
        others: further settings of `generate`, by transformers' names (num_beams, top_p, ...); they are the last word.
            Whisper also takes language, task, return_timestamps and prompt_ids.

    Raises:
        SettingError: a model that cannot generate, a number out of range, an unknown setting, one that cannot be used
            here, or no token to pad with.
    """
    inner = unwrapped(model)
    if not getattr(inner, "can_generate", lambda: False)():
        raise SettingError(f"{type(inner).__name__} cannot generate: it has no head that writes text.")
    settings = copy.deepcopy(vars(model).get("generation_config", inner.generation_config))  # PEFT's may be its own
    if followed is not None:
        kept = {name: getattr(settings, name, None) for name in followed}
        settings = GenerationConfig(**{name: value for name, value in kept.items() if value is not None})
    others = dict(others or {})
    do_sample = bool(others.get("do_sample", do_sample))
    own = _WHISPERS_OWN if window_of(model) is not None else ()
    if own and others.get("prompt_ids") is not None:
        others["prompt_ids"] = [int(token) for token in others["prompt_ids"]]  # it may be a tensor
    sampling: dict[str, Any] = {"temperature": sampling_temperature, "top_k": 0, "top_p": 1.0}
    given = {"max_new_tokens": max_new_tokens, "max_length": None, "do_sample": do_sample, "forced_eos_token_id": None}
    given |= dict.fromkeys(name for name in (*_SHOWN, *_CUTS, *_OF_SEVERAL_WINDOWS) if hasattr(settings, name))
    given |= sampling if do_sample else dict.fromkeys(sampling)
    given |= {"num_beams": 1} if own and do_sample else {}  # as transformers does
    merged = {**settings.to_dict(), **given, **others}
    _check_settings(model, merged, others, sampling_temperature)
    if own:
        _check_whisper_settings(model, merged, others)
    set_generation(settings, {**given, **others}, own=own)
    if settings.pad_token_id is None:
        ends = end_tokens(settings)
        if not ends:
            raise SettingError("the model's generation_config names neither pad_token_id nor eos_token_id. Set one.")
        settings.pad_token_id = min(ends)
    return settings


def _check_settings(
    model: Any, merged: Mapping[str, Any], others: Mapping[str, Any], sampling_temperature: float
) -> None:
    new, temperature = merged["max_new_tokens"], merged["temperature"] if merged["do_sample"] else sampling_temperature
    if not _is_count(new) or not isinstance(temperature, (int, float)) or not 0 < temperature < float("inf"):
        raise SettingError(
            f"max_new_tokens={new} (1 or more), sampling_temperature={temperature} (above 0; to write the likeliest "
            "tokens, do_sample=False)."
        )
    count, beams = (1 if merged.get(name) is None else merged[name] for name in ("num_return_sequences", "num_beams"))
    windowed = window_of(model) is not None
    for name, value in (("num_return_sequences", count), ("num_beams", beams)):
        if not _is_count(value):
            raise SettingError(f"{name}={value!r}: a whole number, at least 1.")
    if count > (1 if windowed else beams) and not merged["do_sample"]:
        beams_do = "" if windowed else f", or generation={{'num_beams': {count}}}"  # Whisper's give the best one alone
        raise SettingError(
            f"num_return_sequences={count} of the likeliest text are the same text. Pass do_sample=True{beams_do}."
        )
    idle = [name for name in _OF_SAMPLING if others.get(name) is not None and not merged["do_sample"]]
    if idle:
        raise SettingError(
            f"{', '.join(f'{name}={others[name]}' for name in idle)} without sampling changes nothing. Pass "
            "do_sample=True, or leave it out."
        )
    for name, reason in _REFUSED.items():
        if merged.get(name):
            raise SettingError(
                f"{name}={merged[name]!r} cannot be used: {reason}. Leave {name} out, or set it to None where the "
                "model's own generation_config says it."
            )
    known = positions(model, "decoder") if unwrapped(model).config.is_encoder_decoder else None
    if known is not None and new > known:
        raise SettingError(
            f"max_new_tokens={new} are more than the {known} positions that the decoder of "
            f"{type(unwrapped(model)).__name__} knows. Lower max_new_tokens."
        )


def _check_whisper_settings(model: Any, merged: Mapping[str, Any], others: Mapping[str, Any]) -> None:
    name = type(unwrapped(model)).__name__
    parameters = inspect.signature(type(unwrapped(model)).generate).parameters
    general = {"generation_config", "synced_gpus", *vars(GenerationConfig()), *_WHISPERS_OWN}
    wrong = sorted(set(others) & (set(parameters) | set(_OF_SEVERAL_WINDOWS)) - general)
    if wrong:
        raise SettingError(
            f"{', '.join(wrong)} cannot be given: each window of sound is written once and by itself here. Of {name}'s "
            f"own settings, {', '.join(_WHISPERS_OWN)} can be given."
        )
    if merged["do_sample"] and others.get("num_beams") not in (None, 1):
        raise SettingError(f"num_beams={others['num_beams']}: {name} samples without beams. Leave one of the two out.")
    if isinstance(merged.get("language"), (list, tuple)):
        raise SettingError("language: give one for all recordings, and make a call for each language.")
    english_only = merged.get("is_multilingual") is False
    for setting, table in (("language", "lang_to_id"), ("task", "task_to_id")):
        if merged.get(setting) is not None and (english_only or not merged.get(table)):
            reason = "says is_multilingual=False" if english_only else f"has no {table}"
            raise SettingError(
                f"{setting}={merged[setting]!r}: the generation_config of this {name} {reason}, so it has no token for "
                f"it. Leave {setting} out."
            )


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def end_tokens(settings: GenerationConfig) -> set[int]:
    """The tokens that end a text."""
    ends = settings.eos_token_id
    return set() if ends is None else {ends} if isinstance(ends, int) else set(ends)


def generate_causal(model: Any, prompts: Sequence[Sequence[int]], settings: GenerationConfig) -> list[Tokens]:
    """What a causal model writes after each prompt, its end token included where it came to one.

    Args:
        prompts: token ids, ragged, none empty.
        settings: from `generation_settings`.

    Returns:
        `num_return_sequences` for each prompt, one after the other.

    Raises:
        DataError: an empty prompt, one too long for the model, or an id that it does not know; several at once, of a
            model that then writes otherwise than to each alone.
    """
    limits = Limits.of(model, settings.max_new_tokens)
    for reason in filter(None, map(limits.obstacle, prompts)):
        raise DataError(f"there is {reason}. Leave such prompts out, or cut them.")
    check_same_as_alone(model, prompts, settings, _writing)
    width = max(map(len, prompts))
    device = next(model.parameters()).device
    ids = torch.tensor([[settings.pad_token_id] * (width - len(one)) + list(one) for one in prompts], device=device)
    mask = torch.tensor([[0] * (width - len(one)) + [1] * len(one) for one in prompts], device=device)
    with _writing(model, settings):
        written = model.generate(input_ids=ids, attention_mask=mask, generation_config=settings)
    return [until_end(row, end_tokens(settings)) for row in written[:, width:].tolist()]


def generate_seq2seq(model: Any, inputs: Mapping[str, Any], settings: GenerationConfig) -> list[Tokens]:
    """What an encoder-decoder writes to a batch of inputs, as labels: without the token that its decoder starts from.

    Whisper's labels begin with its tokens for language (set or detected), task and timestamps. They do not contain the
    prompt.

    Raises:
        DataError: an empty source, or one too long for the model.
        SettingError: transformers' `generate` refuses the settings.
    """
    _check_sources(model, inputs)
    if window_of(model) is not None:
        return _windows_written(model, inputs, settings)
    with _writing(model, settings):
        written = model.generate(**inputs, generation_config=settings)
    return [until_end(row, end_tokens(settings)) for row in written[:, 1:].tolist()]


def try_settings(model: Any, inputs: Mapping[str, Any], settings: GenerationConfig) -> None:
    """Let Whisper write one token, so that settings which its `generate` refuses are found before the work begins.

    Raises:
        SettingError: transformers' `generate` refuses the settings.
    """
    once = StoppingCriteriaList([lambda ids, scores, **rest: torch.ones(len(ids), dtype=torch.bool, device=ids.device)])
    with drawn_from(next(model.parameters()).device, 0):
        _windows_written(model, inputs, settings, stopping_criteria=once)


def _windows_written(
    model: Any, inputs: Mapping[str, Any], settings: GenerationConfig, **arguments: Any
) -> list[Tokens]:
    """Whisper's labels for a batch of windows.

    `force_unique_generate_call` makes Whisper run the general `generate` once and return all of its ids. Otherwise it
    removes those that begin and end the text.
    """
    prompt = getattr(settings, "prompt_ids", None) or []
    if prompt:
        arguments["prompt_ids"] = torch.tensor(prompt, device=next(model.parameters()).device)
    if settings.do_sample:
        arguments["temperature"] = settings.temperature  # else Whisper's own `generate` does not sample
    try:
        with _writing(model, settings):
            written = model.generate(**inputs, generation_config=settings, force_unique_generate_call=True, **arguments)
    except (ValueError, TypeError) as error:
        raise SettingError(f"transformers' generate refuses these settings: {error}") from error
    return [until_end(row, end_tokens(settings)) for row in written[:, len(prompt) + 1 :].tolist()]


def prompt_of(ids: Sequence[int], read: Sequence[int] | None = None, labels: Sequence[int] | None = None) -> Tokens:
    """The tokens of a text before the first one that is to be predicted; all of them, if none is.

    The first token is predicted from nothing, so it is always of the prompt.

    Args:
        read: 0 for padding.
        labels: -100 for what is not to be predicted; None: nothing is.

    >>> prompt_of([0, 5, 6, 7], [0, 1, 1, 1], [-100, -100, -100, 7])
    [5, 6]
    """
    attended = [1] * len(ids) if read is None else read
    wanted = [IGNORED] * len(ids) if labels is None else labels
    real = [(int(token), label) for token, there, label in zip(ids, attended, wanted, strict=True) if there]
    first = next((place for place, (_, label) in enumerate(real) if label != IGNORED and place > 0), len(real))
    return [token for token, _ in real[:first]]


def until_end(tokens: Sequence[int], ends: set[int]) -> Tokens:
    """Up to the first token that ends a text, with it.

    >>> until_end([5, 2, 0, 0], {2}), until_end([5, 6], {2})
    ([5, 2], [5, 6])
    """
    for place, token in enumerate(tokens):
        if token in ends:
            return list(tokens[: place + 1])
    return list(tokens)


def _check_sources(model: Any, inputs: Mapping[str, Any]) -> None:
    ids, mask = inputs.get("input_ids"), inputs.get("attention_mask")
    if ids is None:
        return
    known = positions(model, "encoder")
    if known is not None and ids.shape[1] > known:
        raise DataError(
            f"there is a source of {ids.shape[1]} tokens, padding included, more than the {known} positions that "
            f"{type(unwrapped(model)).__name__} knows. Cut the sources."
        )
    if ids.shape[1] == 0 or (mask is not None and mask.dim() == 2 and int(mask.sum(1).min()) == 0):
        raise DataError("there is an empty source, which nothing can be written to. Begin sources with a token.")


@contextlib.contextmanager
def _writing(model: Any, settings: GenerationConfig) -> Iterator[None]:
    """Without gradients, in evaluation mode, and by these settings alone.

    `generate` fills in from the model's own `generation_config` what is None in the one that it is given: inside, the
    own one is this. (A PEFT model may have one beside that of the model inside.)
    """
    holders = [one for one in {id(one): one for one in (unwrapped(model), model)}.values() if _holds_settings(one)]
    before = [one.generation_config for one in holders]
    try:
        for one in holders:
            one.generation_config = settings
        with torch.no_grad(), evaluating(model):
            yield
    finally:
        for one, own in zip(holders, before, strict=True):
            one.generation_config = own


def _holds_settings(model: Any) -> bool:
    return "generation_config" in vars(model)
