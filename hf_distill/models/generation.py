"""Limits and settings of generation, and the shared functions that generate."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel, StoppingCriteriaList

from hf_distill._types import Batch, Keywords
from hf_distill.ddp import several_processes
from hf_distill.errors import DataError, SettingError, is_number, is_whole
from hf_distill.tasks.base import IGNORED
from hf_distill.tasks.infer import forward_names, unwrapped

Tokens = list[int]


@dataclass(frozen=True)
class Limits:
    """The prompts that a model can continue: how long, and with which ids.

    Args:
        prompt: "prompt" or "source", for messages.
        model: the name of its class.
        positions: its number of positions, or None if not known.
        ids: its number of embeddings, or None if not known.
        new: number of tokens to generate after the prompt.

    >>> print(Limits("prompt", "Tiny", positions=4, ids=9, new=2).obstacle([1, 2, 3]))
    a prompt of 3 tokens and max_new_tokens=2 are more than the 4 positions that Tiny knows
    """

    prompt: str
    model: str
    positions: int | None
    ids: int | None
    new: int

    @classmethod
    def of(cls, model: nn.Module, max_new_tokens: int) -> Limits:
        """Return the limits of a model: for an encoder-decoder, those of its encoder, which holds no new tokens."""
        inner: PreTrainedModel = unwrapped(model)
        try:
            ids = getattr(inner.get_input_embeddings(), "num_embeddings", None)
        except NotImplementedError:  # transformers found none
            ids = None
        if inner.config.is_encoder_decoder:
            return cls("source", type(inner).__name__, positions(inner, "encoder"), ids, 0)
        return cls("prompt", type(inner).__name__, positions(inner, "decoder"), ids, max_new_tokens)

    def obstacle(self, ids: Sequence[int]) -> str | None:
        """Return why the model cannot continue these tokens; None if it can."""
        if len(ids) == 0:
            return f"an empty {self.prompt}, which nothing can be written to: begin it with a token"
        if self.positions is not None and len(ids) + self.new > self.positions:
            new = f" and max_new_tokens={self.new} are" if self.new else " is"
            known = f"the {self.positions} positions that {self.model} knows"
            return f"a {self.prompt} of {len(ids)} tokens{new} more than {known}"
        if self.ids is not None and not 0 <= min(ids) <= max(ids) < self.ids:
            wrong = min(ids) if min(ids) < 0 else max(ids)
            return f"a {self.prompt} with token id {wrong}, of which {self.model} knows 0 to {self.ids - 1}"
        return None


def positions(model: nn.Module, side: str) -> int | None:
    """Return the number of positions of the encoder or decoder; None if it is unlimited or not in the config."""
    config = unwrapped(model).config
    own = getattr(config, side, None) if config.is_encoder_decoder else config.get_text_config(decoder=True)
    names = (
        "max_target_positions" if side == "decoder" else "max_source_positions",
        *(f"max_{side}_position_embeddings", "max_position_embeddings"),
    )
    found = (getattr(own or config, name, None) for name in names)
    return next((count for count in found if isinstance(count, int) and count > 0), None)  # XLNet has -1: no limit


_LONGEST, _PADDING, _NEW = 3, 4, 2  # tokens of the trial: its prompt, the padding before it, the new ones
_SILENCE = 4  # a recording is tried with a quarter of its length behind it
_EXACT, _ROUNDED = 0.01, 0.3  # of a row's standard deviation; seen: 1e-6, or 0.08 and more where padding is read
_ALONE, _OF_ONE_LENGTH, _TOGETHER = range(3)  # the prompts that may be in one batch
_batching: WeakKeyDictionary[nn.Module, dict[bool, int]] = WeakKeyDictionary()  # by whether a cache is used


def check_same_as_alone(model: PreTrainedModel, prompts: Sequence[Sequence[int]], settings: GenerationConfig) -> None:
    """Raise if a model generates something else for prompts in a batch than alone (except for rounding in 16 bits).

    Args:
        model: the model that generates.
        prompts: not empty.
        settings: the settings to generate with.

    Raises:
        DataError: if the generated text of a prompt depends on the others, or on the padding before it.
    """
    together = len(prompts) * max(settings.num_beams or 1, settings.num_return_sequences or 1) > 1
    if not together and not several_processes():  # all processes try: the forward of a sharded model needs every one
        return
    found, cached = _batching.setdefault(model, {}), settings.use_cache is not False
    if cached not in found:
        found[cached] = _tried(model, prompts, settings)
    name = f"{type(model).__name__} ({type(unwrapped(model)).__name__})"
    one_by_one = "one at a time (batch_size=1, in training per_device_train_batch_size=1)"
    if found[cached] == _ALONE and together:
        raise DataError(
            f"{name} generates another text for several prompts at once than for each alone. Give it {one_by_one}, one "
            "text a prompt, without beams; or switch its cache off (generation_config.use_cache=False)."
        )
    if found[cached] == _OF_ONE_LENGTH and len(set(map(len, prompts))) > 1:
        raise DataError(
            f"{name} does not leave out the padding before a prompt: its text changes with the longest prompt of the "
            f"batch. Give it prompts of one length a batch, or {one_by_one}."
        )


def sound_padding_is_read(model: PreTrainedModel, sound: Tensor, column: str, start: int) -> bool:
    """Return whether masked silence after a recording changes the model's first prediction.

    Args:
        model: an encoder-decoder in evaluation mode.
        sound: `[time ...]`, on the model's device.
        column: the name of the recording in the forward.
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
    return bool((alone - padded).abs().max() > _tolerance(model) * alone.std())


def _tried(model: PreTrainedModel, prompts: Sequence[Sequence[int]], settings: GenerationConfig) -> int:
    """Return which prompts may be in one batch, from a short prompt alone, twice in a batch, and after padding."""
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
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        alone = _steps(model, prompt, trial)
        if not _same(alone, _steps(model, prompt, trial, rows=2), _tolerance(model)):
            return _ALONE
        padded = _steps(model, prompt, trial, padding=max(1, min(_PADDING, room)))
        return _TOGETHER if _same(alone, padded, _tolerance(model)) else _OF_ONE_LENGTH


def _steps(
    model: PreTrainedModel, prompt: Tokens, trial: GenerationConfig, *, rows: int = 1, padding: int = 0
) -> list[tuple[Tensor, int]]:
    """Return the logits `[v]` of each step of the last row, and the generated token."""
    device = next(model.parameters()).device
    ids = torch.tensor([[trial.pad_token_id] * padding + prompt] * rows, device=device)
    mask = torch.tensor([[0] * padding + [1] * len(prompt)] * rows, device=device)
    found = _generate(model, trial, input_ids=ids, attention_mask=mask)
    logits = [step[-1].float() for step in found.logits]
    return list(zip(logits, found.sequences[-1, -len(logits) :].tolist(), strict=True))


def _same(ours: list[tuple[Tensor, int]], theirs: list[tuple[Tensor, int]], tolerance: float) -> bool:
    for (logits, token), (other, other_token) in zip(ours, theirs, strict=True):
        if bool((logits - other).abs().max() > tolerance * logits.std()):
            return False
        if token != other_token:  # two tokens are equally likely: from here on the texts differ
            return True
    return True


def _tolerance(model: PreTrainedModel) -> float:
    """Return how far logits may differ: more if a model computes in 16 bits, by dtype or because Accelerate does."""
    is_exact = model.dtype in (torch.float32, torch.float64) and not hasattr(model, "_original_forward")
    return _EXACT if is_exact else _ROUNDED


_CUTS = ("min_p", "typical_p", "epsilon_cutoff", "eta_cutoff", "top_h")  # cut off tokens, as top_k and top_p do
_OF_SAMPLING = ("temperature", "top_k", "top_p", *_CUTS)
_OUTPUTS = ("return_dict_in_generate", "output_scores", "output_logits", "output_attentions", "output_hidden_states")
_WHISPERS_OWN = ("language", "task", "return_timestamps", "prompt_ids")  # GenerationConfig does not declare them
# For recordings longer than a window: they skip windows, repeat them, or condition them on the windows before.
_OF_SEVERAL_WINDOWS = (
    *("condition_on_prev_tokens", "compression_ratio_threshold", "logprob_threshold", "no_speech_threshold"),
    "prompt_condition_type",
)
_REFUSED = {
    "stop_strings": "a text ends with a token here. Name it: eos_token_id",
    "max_length": "say how many tokens are to be written: max_new_tokens",
    **dict.fromkeys(_OUTPUTS, "it changes what `generate` returns, not the text"),
}


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put a model in evaluation mode; each module gets its mode back at the end."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextlib.contextmanager
def drawn_from(device: torch.device, *key: int | str) -> Iterator[None]:
    """Derive the random numbers of the CPU and the device from a key; restore the states at the end."""
    seed = int.from_bytes(hashlib.blake2b(repr(key).encode(), digest_size=7).digest(), "little")
    on_cuda = device.type == "cuda"
    with torch.random.fork_rng(devices=[device] if on_cuda else []):
        torch.default_generator.manual_seed(seed)
        if on_cuda:
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        yield


def set_generation(settings: GenerationConfig, values: Keywords, *, own: Sequence[str] = ()) -> None:
    """Set these values, and raise if transformers ignores one of them.

    `GenerationConfig.update` does not raise for names that it does not know: it returns them. For a published Whisper,
    `language` and `task` are such names, because its `generation_config.json` does not have them.

    Args:
        settings: the configuration to change.
        values: the values by transformers' names.
        own: names that the model's own `generate` reads from the configuration; they are set even if it lacks them.

    Raises:
        SettingError: if a name is unknown, or transformers refuses a value.
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


def source_of(model: PreTrainedModel) -> str:
    """Return the name of the model's main input: input_ids, or input_features or input_values for audio."""
    inner: PreTrainedModel = unwrapped(model)
    name = inner.main_input_name
    return getattr(inner.encoder, "main_input_name", name) if name == "inputs" else name


def window_of(model: PreTrainedModel) -> int | None:
    """Return the number of frames that Whisper reads at once; None for a model whose `generate` has no windows."""
    inner: PreTrainedModel = unwrapped(model)
    if "force_unique_generate_call" not in inspect.signature(cast(Any, type(inner)).generate).parameters:
        return None
    encoder = inner.get_encoder()
    return int(encoder.conv1.stride[0] * encoder.conv2.stride[0] * inner.config.max_source_positions)


def generation_settings(
    model: PreTrainedModel,
    *,
    max_new_tokens: int,
    do_sample: bool,
    sampling_temperature: float,
    others: Keywords | None = None,
    followed: Sequence[str] | None = None,
) -> GenerationConfig:
    """Return the model's own `generation_config` with these settings; sampling is from all tokens unless others limit.

    `forced_eos_token_id` is dropped: it would end a text that is cut off with an end token.

    Args:
        model: plain or PEFT.
        max_new_tokens: maximal number of tokens to generate.
        do_sample: whether to sample; otherwise the likeliest tokens are taken.
        sampling_temperature: temperature of the sampling.
        others: further settings of `generate`, by transformers' names (num_beams, top_p, ...), which override all the
            rest. Whisper also has language, task, return_timestamps and prompt_ids.
        followed: names of the settings that are taken from the model's own; None means all.

    Raises:
        SettingError: if the model cannot generate, a number is out of range, a setting is unknown or cannot be used
            here, or there is no token to pad with.
    """
    inner: PreTrainedModel = unwrapped(model)
    if not getattr(inner, "can_generate", lambda: False)():
        raise SettingError(f"{type(inner).__name__} cannot generate: it has no head that writes text.")
    settings = copy.deepcopy(vars(model).get("generation_config", inner.generation_config))  # PEFT may have its own
    if followed is not None:
        kept = {name: vars(settings).get(name) for name in followed}
        settings = GenerationConfig(**{name: value for name, value in kept.items() if value is not None})
    others = dict(others or {})
    do_sample = bool(others.get("do_sample", do_sample))
    own = _WHISPERS_OWN if window_of(model) is not None else ()
    if own and others.get("prompt_ids") is not None:
        others["prompt_ids"] = [int(token) for token in others["prompt_ids"]]  # it may be a tensor
    sampling: Keywords = {"temperature": sampling_temperature, "top_k": 0, "top_p": 1.0}
    given = {"max_new_tokens": max_new_tokens, "max_length": None, "do_sample": do_sample, "forced_eos_token_id": None}
    given |= dict.fromkeys(name for name in (*_OUTPUTS, *_CUTS, *_OF_SEVERAL_WINDOWS) if name in vars(settings))
    given |= sampling if do_sample else dict.fromkeys(sampling)
    given |= {"num_beams": 1} if own and do_sample else {}  # as transformers does
    merged = {**settings.to_dict(), **given, **others}
    problem = _problem(model, merged, others, sampling_temperature)
    if own and not problem:
        problem = _whisper_problem(model, merged, others)
    if problem:
        raise SettingError(problem)
    set_generation(settings, {**given, **others}, own=own)
    if settings.pad_token_id is None:
        ends = end_tokens(settings)
        if not ends:
            raise SettingError("the model's generation_config has neither pad_token_id nor eos_token_id. Set one.")
        settings.pad_token_id = min(ends)
    return settings


def _problem(model: PreTrainedModel, merged: Keywords, others: Keywords, sampling_temperature: float) -> str | None:
    """Return why settings cannot be used; None if they can.

    Args:
        model: the model that generates.
        merged: all settings.
        others: those that the user passed by transformers' names.
        sampling_temperature: the temperature, if there is no sampling.
    """
    inner: PreTrainedModel = unwrapped(model)
    new, temperature = merged["max_new_tokens"], merged["temperature"] if merged["do_sample"] else sampling_temperature
    if not is_whole(new) or new < 1 or not is_number(temperature) or not 0 < temperature < float("inf"):
        return (
            f"max_new_tokens={new} (1 or more), sampling_temperature={temperature} (above 0; for the likeliest tokens "
            "do_sample=False)."
        )
    count, beams = (1 if merged.get(name) is None else merged[name] for name in ("num_return_sequences", "num_beams"))
    for name, value in (("num_return_sequences", count), ("num_beams", beams)):
        if not is_whole(value) or value < 1:
            return f"{name}={value!r}: a whole number, at least 1."
    windowed = window_of(model) is not None  # Whisper's beams return only the best text
    if count > (1 if windowed else beams) and not merged["do_sample"]:
        or_beams = "" if windowed else f", or generation={{'num_beams': {count}}}"
        return f"num_return_sequences={count} of the likeliest text are the same text. Pass do_sample=True{or_beams}."
    idle = [f"{name}={others[name]}" for name in _OF_SAMPLING if others.get(name) is not None]
    if idle and not merged["do_sample"]:
        return f"{', '.join(idle)} without sampling changes nothing. Pass do_sample=True, or leave it out."
    for name, reason in _REFUSED.items():
        if merged.get(name):
            return (
                f"{name}={merged[name]!r} cannot be used: {reason}. Leave {name} out, or set it to None if it comes "
                "from the model's own generation_config."
            )
    known = positions(model, "decoder") if inner.config.is_encoder_decoder else None
    if known is not None and new > known:
        decoder = f"the decoder of {type(inner).__name__}"
        return f"max_new_tokens={new} are more than the {known} positions that {decoder} knows. Lower max_new_tokens."
    return None


def _whisper_problem(model: PreTrainedModel, merged: Keywords, others: Keywords) -> str | None:
    kind = type(unwrapped(model))
    parameters = inspect.signature(kind.generate).parameters
    general = {"generation_config", "synced_gpus", *vars(GenerationConfig()), *_WHISPERS_OWN}
    wrong = sorted(set(others) & (set(parameters) | set(_OF_SEVERAL_WINDOWS)) - general)
    if wrong:
        return (
            f"{', '.join(wrong)} cannot be given: each window of sound is written once and by itself here. Of "
            f"{kind.__name__}'s own settings, {', '.join(_WHISPERS_OWN)} can be given."
        )
    if merged["do_sample"] and others.get("num_beams") not in (None, 1):
        return f"num_beams={others['num_beams']}: {kind.__name__} samples without beams. Leave one of the two out."
    if isinstance(merged.get("language"), (list, tuple)):
        return "language: give one for all recordings, and make a call for each language."
    english_only = merged.get("is_multilingual") is False
    for setting, table in (("language", "lang_to_id"), ("task", "task_to_id")):
        if merged.get(setting) is not None and (english_only or not merged.get(table)):
            reason = "says is_multilingual=False" if english_only else f"has no {table}"
            return (
                f"{setting}={merged[setting]!r}: the generation_config of this {kind.__name__} {reason}, so there is "
                f"no token for it. Leave {setting} out."
            )
    return None


def end_tokens(settings: GenerationConfig) -> set[int]:
    """Return the tokens that end a text."""
    ends = settings.eos_token_id
    return set() if ends is None else {ends} if isinstance(ends, int) else set(ends)


def generate_causal(
    model: PreTrainedModel, prompts: Sequence[Sequence[int]], settings: GenerationConfig
) -> list[Tokens]:
    """Return the tokens that a causal model generates after each prompt, including the end token if it reached one.

    Args:
        model: plain or PEFT.
        prompts: token ids, ragged, none empty.
        settings: from `generation_settings`.

    Returns:
        `num_return_sequences` texts for each prompt, in the order of the prompts.

    Raises:
        DataError: if a prompt is empty, too long for the model, or has an id that it does not know; or if the model
            generates something else for several prompts at once than for each alone.
    """
    limits = Limits.of(model, settings.max_new_tokens)
    for reason in filter(None, map(limits.obstacle, prompts)):
        raise DataError(f"there is {reason}. Leave such prompts out, or cut them.")
    check_same_as_alone(model, prompts, settings)
    width = max(map(len, prompts))
    device = next(model.parameters()).device
    padded = [([settings.pad_token_id] * (width - len(prompt)), list(prompt)) for prompt in prompts]
    ids = torch.tensor([padding + prompt for padding, prompt in padded], device=device)
    mask = torch.tensor([[0] * len(padding) + [1] * len(prompt) for padding, prompt in padded], device=device)
    written = _generate(model, settings, input_ids=ids, attention_mask=mask)
    return [until_end(row, end_tokens(settings)) for row in written[:, width:].tolist()]


def generate_seq2seq(model: PreTrainedModel, inputs: Batch, settings: GenerationConfig) -> list[Tokens]:
    """Return the labels that an encoder-decoder generates for a batch, without the start token of its decoder.

    Whisper's labels begin with its tokens for language (set or detected), task and timestamps. They do not contain the
    prompt.

    Args:
        model: plain or PEFT.
        inputs: the inputs of the encoder.
        settings: from `generation_settings`.

    Raises:
        DataError: if a source is empty, or too long for the model.
        SettingError: if transformers' `generate` refuses the settings.
    """
    _check_sources(model, inputs)
    if window_of(model) is not None:
        return _generate_windows(model, inputs, settings)
    written = _generate(model, settings, **inputs)
    return [until_end(row, end_tokens(settings)) for row in written[:, 1:].tolist()]


def try_settings(model: PreTrainedModel, inputs: Batch, settings: GenerationConfig) -> None:
    """Generate one token with Whisper, so that its `generate` refuses wrong settings before the work begins.

    Raises:
        SettingError: if transformers' `generate` refuses the settings.
    """
    once = StoppingCriteriaList([lambda ids, scores, **rest: torch.ones(len(ids), dtype=torch.bool, device=ids.device)])
    with drawn_from(next(model.parameters()).device, 0):
        _generate_windows(model, inputs, settings, stopping_criteria=once)


def _generate_windows(
    model: PreTrainedModel, inputs: Batch, settings: GenerationConfig, **arguments: Any
) -> list[Tokens]:
    """Return Whisper's labels for a batch of windows.

    `force_unique_generate_call` makes Whisper run the general `generate` once and return all of its ids. Otherwise it
    removes those that begin and end the text.
    """
    prompt = vars(settings).get("prompt_ids") or []
    if prompt:
        arguments["prompt_ids"] = torch.tensor(prompt, device=next(model.parameters()).device)
    if settings.do_sample:
        arguments["temperature"] = settings.temperature  # else Whisper's own `generate` does not sample
    try:
        written = _generate(model, settings, **inputs, force_unique_generate_call=True, **arguments)
    except (ValueError, TypeError) as error:
        raise SettingError(f"transformers' generate refuses these settings: {error}") from error
    return [until_end(row, end_tokens(settings)) for row in written[:, len(prompt) + 1 :].tolist()]


def prompt_of(ids: Sequence[int], read: Sequence[int] | None = None, labels: Sequence[int] | None = None) -> Tokens:
    """Return the tokens of a text before the first labelled one; all of them if none is labelled.

    The first token always belongs to the prompt, since nothing predicts it.

    Args:
        ids: the tokens, with padding.
        read: the attention mask, 0 for padding; None means no padding.
        labels: -100 where nothing is predicted; None means everywhere.

    >>> prompt_of([0, 5, 6, 7], [0, 1, 1, 1], [-100, -100, -100, 7])
    [5, 6]
    """
    attended = [1] * len(ids) if read is None else read
    wanted = [IGNORED] * len(ids) if labels is None else labels
    real = [(int(token), label) for token, there, label in zip(ids, attended, wanted, strict=True) if there]
    first = next((place for place, (_, label) in enumerate(real) if label != IGNORED and place > 0), len(real))
    return [token for token, _ in real[:first]]


def until_end(tokens: Sequence[int], ends: set[int]) -> Tokens:
    """Return the tokens up to and including the first that ends a text.

    >>> until_end([5, 2, 0, 0], {2}), until_end([5, 6], {2})
    ([5, 2], [5, 6])
    """
    for place, token in enumerate(tokens):
        if token in ends:
            return list(tokens[: place + 1])
    return list(tokens)


def _check_sources(model: PreTrainedModel, inputs: Batch) -> None:
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


def _generate(model: PreTrainedModel, settings: GenerationConfig, **arguments: Any) -> Any:
    """Call the model's `generate` without gradients, in evaluation mode, and with these settings only.

    `generate` replaces a None in its settings by the value in the model's own `generation_config`, so that is replaced
    too. (A PEFT model may have one beside that of the base model.)
    """
    models = [unwrapped(model)] if unwrapped(model) is model else [unwrapped(model), model]
    holders = [holder for holder in models if "generation_config" in vars(holder)]
    before = [holder.generation_config for holder in holders]
    try:
        for holder in holders:
            holder.generation_config = settings
        with torch.no_grad(), evaluating(model):
            return cast(Any, model).generate(**arguments, generation_config=settings)
    finally:
        for holder, own in zip(holders, before, strict=True):
            holder.generation_config = own
