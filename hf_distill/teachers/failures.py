"""A teacher's forward that failed: the error says whose it was, on which inputs, what it reads, and the way out."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from accelerate.utils.memory import should_reduce_batch_size
from torch import Tensor, nn

from hf_distill.errors import TeacherError
from hf_distill.tasks.base import TEACHER_PREFIX
from hf_distill.tasks.infer import unwrapped

# What a forward may raise. (Not memory: `Trainer` tries smaller batches on it.)
FAILURES = (RuntimeError, ValueError, TypeError, IndexError, KeyError, AttributeError, AssertionError, ArithmeticError)
_TEXT, _AUDIO, _IMAGE = "text", "audio", "image"
_COLUMNS = {
    "input_ids": _TEXT,
    "input_values": _AUDIO,
    "input_features": _AUDIO,
    "pixel_values": _IMAGE,
}
_PROCESSORS = {_TEXT: "tokenizer", _AUDIO: "feature extractor", _IMAGE: "image processor"}


def is_of_memory(error: Exception) -> bool:
    """Whether a smaller batch may help; such an error is passed on as it is."""
    return isinstance(error, torch.OutOfMemoryError) or should_reduce_batch_size(error)


def explained(error: Exception, model: Any, inputs: Mapping[str, Any], *, own: bool) -> TeacherError:
    """Returns the error to raise for a forward that failed.

    Args:
        inputs: what the model was called with.
        own: whether these are the teacher's own (`teacher_*` columns); else they are the student's.
    """
    inner = unwrapped(model)
    name = type(inner).__name__
    shown = ", ".join(
        f"{key} {list(value.shape)}" for key, value in inputs.items() if isinstance(value, Tensor)
    )  # a device that has failed can still say shapes
    causes = [] if "CUDA error" in str(error) else list(_causes(inner, inputs, own))
    if not causes:
        causes = [_other_inputs(_main_of(inputs), own, sure=False)]
    return TeacherError(
        f"the teacher's forward failed ({name}, on {shown or 'no tensor'}). {' '.join(causes)} "
        f"It said: {type(error).__name__}: {error}"
    )


def _main_of(inputs: Mapping[str, Any]) -> str | None:
    return next((name for name in _COLUMNS if isinstance(inputs.get(name), Tensor)), None)


def _other_inputs(main: str | None, own: bool, *, sure: bool) -> str:
    """The way out where the input is not what the teacher reads; `sure`: that is known to be the cause."""
    kind = _COLUMNS.get(main or "")
    if kind is None:
        return "These are its own inputs." if own else "These are the student's inputs."
    if own:
        return (
            f"These are its own inputs ({TEACHER_PREFIX}{kind} or {TEACHER_PREFIX}{main}): let the "
            f"{_PROCESSORS[kind]} that belongs to this checkpoint make them (teacher_processing_class=)."
        )
    found = f"It was given the student's {main}{': give' if sure else '. If it reads others, give'} the dataset"
    return (
        f"{found} a column {TEACHER_PREFIX}{kind} and pass teacher_processing_class= (its {_PROCESSORS[kind]}), or "
        f"give it ready inputs as {TEACHER_PREFIX}{main}."
    )


def _causes(model: nn.Module, inputs: Mapping[str, Any], own: bool) -> Iterable[str]:
    config = getattr(model, "config", None)
    if config is None:
        return
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    if isinstance(inputs.get("input_ids"), Tensor):
        yield from _of_text(model, text, inputs, own)
    for name, look in (
        ("input_features", _of_features),
        ("input_values", _of_samples),
        ("pixel_values", _of_image),
    ):
        if isinstance(inputs.get(name), Tensor):
            expected = look(config, inputs[name])
            if expected is not None:
                yield f"{expected} {_other_inputs(name, own, sure=True)}"
    yield from _of_decoder(config, inputs)


# Text.


def _of_text(model: nn.Module, config: Any, inputs: Mapping[str, Any], own: bool) -> Iterable[str]:
    ids, mask = inputs["input_ids"], inputs.get("attention_mask")
    column = f"{TEACHER_PREFIX}text"
    if ids.shape[-1] == 0:
        yield "Every text of the batch is empty. Leave empty examples out of the dataset."
        return
    if isinstance(mask, Tensor) and mask.dim() == ids.dim() and mask.shape != ids.shape:
        yield f"attention_mask {list(mask.shape)} has another shape than input_ids {list(ids.shape)}."
    longest = _positions(model, config)
    if longest is not None and ids.shape[-1] > longest:
        example = int(mask.flatten(0, -2).sum(-1).argmax()) if isinstance(mask, Tensor) and mask.dim() > 1 else None
        where = "" if example is None else f" (the longest is example {example} of the batch)"
        way_out = (
            f"Set teacher_processing_class.model_max_length = {longest}, by which {column} is cut"
            if own
            else f"Truncate the student's texts (max_length={longest}), or give the dataset a column {column} with "
            "teacher_processing_class="
        )
        yield f"It reads {longest} positions at most, and was given {ids.shape[-1]}{where}. {way_out}."
    embedded = _embedded(model)
    if embedded is not None:
        yield from _beyond(ids, embedded, "input_ids", f"it embeds {embedded} tokens", own)
    types = getattr(config, "type_vocab_size", None)
    if isinstance(inputs.get("token_type_ids"), Tensor) and isinstance(types, int) and types > 0:
        yield from _beyond(
            inputs["token_type_ids"], types, "token_type_ids", f"it knows {types} (config.type_vocab_size)", own
        )
    if getattr(config, "pad_token_id", None) is None and len(ids) > 1 and not isinstance(mask, Tensor):
        yield (
            f"Its config has no pad_token_id, and the batch has {len(ids)} rows and no attention_mask, so it is not "
            "known where a text ends. Set pad_token_id in the teacher's config, or pass teacher_processing_class= (its "
            "tokenizer)."
        )


def _positions(model: nn.Module, config: Any) -> int | None:
    """How many positions a text model reads; None where nothing says so."""
    longest = getattr(config, "max_position_embeddings", None)
    if not isinstance(longest, int) or longest <= 0:
        return None
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and isinstance(module, nn.Embedding) and module.padding_idx is not None:
            return longest - module.padding_idx - 1  # RoBERTa counts from behind its padding token
    return longest


def _embedded(model: Any) -> int | None:
    try:
        weight = getattr(model.get_input_embeddings(), "weight", None)
    except (AttributeError, NotImplementedError):
        return None
    return int(weight.shape[0]) if isinstance(weight, Tensor) else None


def _beyond(values: Tensor, limit: int, name: str, known: str, own: bool) -> Iterable[str]:
    largest = int(values.max()) if values.numel() else 0
    if largest < limit:
        return
    example = int((values >= limit).flatten(1).any(-1).nonzero()[0])
    way_out = {
        "token_type_ids": f"Leave token_type_ids out of the dataset, or give the teacher a column {TEACHER_PREFIX}text "
        "with teacher_processing_class= (its own tokenizer)",
        "input_ids": f"Give the dataset a column {TEACHER_PREFIX}text with teacher_processing_class= (its tokenizer)"
        if not own
        else "teacher_processing_class= is not the tokenizer of this checkpoint",
    }[name]
    yield f"Example {example} of the batch has {name} up to {largest}; {known}, from 0. {way_out}."


# Sound and images.


def _of_features(config: Any, features: Tensor) -> str | None:
    """Log-mel spectrograms: `[b mel t]` for Whisper, `[b t mel]` for the others."""
    bins = getattr(config, "num_mel_bins", None)
    frames = getattr(config, "max_source_positions", None)
    if getattr(config, "model_type", "") != "whisper" or not isinstance(bins, int):
        width = getattr(config, "feature_projection_input_dim", None) or getattr(config, "input_feat_per_channel", None)
        if isinstance(width, int) and features.dim() == 3 and features.shape[-1] != width:
            return f"It reads features that are {width} wide, not {features.shape[-1]}."
        return None if features.dim() == 3 else _no_spectrogram(features)
    if features.dim() != 3:
        return _no_spectrogram(features)
    if features.shape[1] != bins:
        return f"It reads {bins} mel bins (config.num_mel_bins), not {features.shape[1]}."
    if isinstance(frames, int) and features.shape[2] != 2 * frames:
        return f"It reads {2 * frames} frames (twice config.max_source_positions), not {features.shape[2]}."
    return None


def _no_spectrogram(features: Tensor) -> str:
    return f"It reads spectrograms of three axes, and was given an input of {features.dim()} axes."


def _of_samples(config: Any, values: Tensor) -> str | None:
    """Raw samples `[b t]` for the wav2vec2 family, a spectrogram `[b t mel]` for AST."""
    if hasattr(config, "conv_kernel") and hasattr(config, "conv_stride"):
        return "It reads raw samples [batch, time], and was given a spectrogram." if values.dim() != 2 else None
    bins, frames = getattr(config, "num_mel_bins", None), getattr(config, "max_length", None)
    if not isinstance(bins, int) or not isinstance(frames, int):
        return None
    if values.dim() != 3:
        return f"It reads spectrograms [batch, {frames}, {bins}], and was given raw samples."
    if tuple(values.shape[1:]) != (frames, bins):
        return (
            f"It reads spectrograms of {frames} frames and {bins} mel bins (config.max_length, config.num_mel_bins), "
            f"not {values.shape[1]} and {values.shape[2]}."
        )
    return None


def _of_image(config: Any, pixels: Tensor) -> str | None:
    vision = getattr(config, "vision_config", config)
    channels, size = getattr(vision, "num_channels", None), getattr(vision, "image_size", None)
    if pixels.dim() != 4:
        return f"It reads images [batch, channels, height, width], and was given {pixels.dim()} axes."
    if isinstance(channels, int) and pixels.shape[1] != channels:
        return f"It reads images of {channels} channels (config.num_channels), not {pixels.shape[1]}."
    if isinstance(size, int):
        size = (size, size)
    if isinstance(size, (tuple, list)) and tuple(pixels.shape[-2:]) != tuple(size):
        return (
            f"It reads images of {size[0]} × {size[1]} (config.image_size), not {pixels.shape[-2]} × "
            f"{pixels.shape[-1]}."
        )
    return None


def _of_decoder(config: Any, inputs: Mapping[str, Any]) -> Iterable[str]:
    ids = inputs.get("decoder_input_ids")
    if not isinstance(ids, Tensor):
        return
    for name in ("max_target_positions", "max_decoder_position_embeddings", "max_position_embeddings"):
        longest = getattr(config, name, None)
        if isinstance(longest, int) and longest > 0:
            if ids.shape[-1] > longest:
                yield (
                    f"Its decoder reads {longest} positions at most (config.{name}), and the labels have "
                    f"{ids.shape[-1]}. Cut the labels (max_length={longest}), or leave such examples out."
                )
            return
