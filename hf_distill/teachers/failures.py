"""Explains why a teacher's forward failed: the teacher, its inputs, the inputs that it reads, and the way out."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from accelerate.utils.memory import should_reduce_batch_size
from torch import Tensor, nn
from transformers import PreTrainedConfig

from hf_distill.errors import TeacherError
from hf_distill.tasks import Batch
from hf_distill.tasks.base import TEACHER_PREFIX
from hf_distill.tasks.infer import config_of, unwrapped
from hf_distill.teachers.base import embedded_tokens, text_config_of

# The errors that a forward may raise.
FAILURES = (RuntimeError, ValueError, TypeError, IndexError, KeyError, AttributeError, AssertionError, ArithmeticError)
_TEXT, _AUDIO, _IMAGE = "text", "audio", "image"
_COLUMNS = {
    "input_ids": _TEXT,
    "input_values": _AUDIO,
    "input_features": _AUDIO,
    "pixel_values": _IMAGE,
}
_PROCESSORS = {_TEXT: "tokenizer", _AUDIO: "feature extractor", _IMAGE: "image processor"}


def is_out_of_memory(error: Exception) -> bool:
    """Return whether a smaller batch may help; `Trainer` then tries one, if it sees the original error."""
    return isinstance(error, torch.OutOfMemoryError) or should_reduce_batch_size(error)


def explain(error: Exception, model: nn.Module, inputs: Batch, *, own: bool) -> TeacherError:
    """Return the error to raise for a forward that failed.

    Args:
        error: the error of the forward.
        model: the teacher.
        inputs: the arguments of the forward.
        own: whether these are the teacher's own (`teacher_*` columns), or the student's.
    """
    inner = unwrapped(model)
    tensors = {name: value for name, value in inputs.items() if isinstance(value, Tensor)}
    shapes = ", ".join(f"{name} {list(value.shape)}" for name, value in tensors.items())
    # After a CUDA error no tensor can be read, only its shape.
    causes = [] if "CUDA error" in str(error) else list(_causes(inner, tensors, own))
    if not causes:
        main = next((name for name in _COLUMNS if name in tensors), None)
        causes = [_advice(main, own, is_cause=False)]
    return TeacherError(
        f"the teacher's forward failed ({type(inner).__name__}, on {shapes or 'no tensor'}). {' '.join(causes)} "
        f"The error: {type(error).__name__}: {error}"
    )


def _advice(main: str | None, own: bool, *, is_cause: bool) -> str:
    """Return how to give the teacher the input that it reads.

    Args:
        main: the name of the input.
        own: whether the teacher got its own inputs.
        is_cause: whether the input is known to be the cause of the failure.
    """
    kind = _COLUMNS.get(main or "")
    if kind is None:
        return "These are its own inputs." if own else "These are the student's inputs."
    if own:
        return (
            f"These are its own inputs ({TEACHER_PREFIX}{kind} or {TEACHER_PREFIX}{main}): make them with the "
            f"{_PROCESSORS[kind]} of this checkpoint (teacher_processing_class=)."
        )
    beginning = f"It was given the student's {main}{': give' if is_cause else '. If it reads others, give'} the dataset"
    return (
        f"{beginning} a column {TEACHER_PREFIX}{kind} and pass teacher_processing_class= (its {_PROCESSORS[kind]}), or "
        f"a column {TEACHER_PREFIX}{main} with finished inputs."
    )


def _causes(model: nn.Module, tensors: Mapping[str, Tensor], own: bool) -> Iterable[str]:
    config, text = config_of(model), text_config_of(model)
    if config is None or text is None:
        return
    if "input_ids" in tensors:
        yield from _text_causes(model, text, tensors, own)
    for name, expected_input in (
        ("input_features", _expected_features),
        ("input_values", _expected_samples),
        ("pixel_values", _expected_image),
    ):
        if name in tensors:
            expected = expected_input(config, tensors[name])
            if expected is not None:
                yield f"{expected} {_advice(name, own, is_cause=True)}"
    if "decoder_input_ids" in tensors:
        yield from _decoder_causes(config, tensors["decoder_input_ids"])


def _number(config: PreTrainedConfig, name: str) -> int | None:
    """Return a positive whole number of the config, or None if there is none under this name."""
    number = getattr(config, name, None)
    return number if isinstance(number, int) and number > 0 else None


# Text.


def _text_causes(model: nn.Module, config: PreTrainedConfig, tensors: Mapping[str, Tensor], own: bool) -> Iterable[str]:
    ids, mask = tensors["input_ids"], tensors.get("attention_mask")
    column = f"{TEACHER_PREFIX}text"
    if ids.shape[-1] == 0:
        yield "Every text of the batch is empty. Leave empty examples out of the dataset."
        return
    if mask is not None and mask.dim() == ids.dim() and mask.shape != ids.shape:
        yield f"attention_mask {list(mask.shape)} has another shape than input_ids {list(ids.shape)}."
    longest = _positions(model, config)
    if longest is not None and ids.shape[-1] > longest:
        example = int(mask.flatten(0, -2).sum(-1).argmax()) if mask is not None and mask.dim() > 1 else None
        where = "" if example is None else f" (the longest is example {example} of the batch)"
        advice = (
            f"Set teacher_processing_class.model_max_length = {longest}, so that {column} is truncated"
            if own
            else f"Truncate the student's texts (max_length={longest}), or give the dataset a column {column} with "
            "teacher_processing_class="
        )
        yield f"It reads {longest} positions at most, and was given {ids.shape[-1]}{where}. {advice}."
    embedded = embedded_tokens(model)
    if embedded is not None:
        advice = (
            "teacher_processing_class= is not the tokenizer of this checkpoint"
            if own
            else f"Give the dataset a column {column} with teacher_processing_class= (its tokenizer)"
        )
        yield from _too_large(ids, embedded, "input_ids", f"it embeds {embedded} tokens", advice)
    types, type_ids = _number(config, "type_vocab_size"), tensors.get("token_type_ids")
    if types is not None and type_ids is not None:
        advice = (
            f"Leave token_type_ids out of the dataset, or give the teacher a column {column} with "
            "teacher_processing_class= (its own tokenizer)"
        )
        yield from _too_large(type_ids, types, "token_type_ids", f"it knows {types} (config.type_vocab_size)", advice)
    if getattr(config, "pad_token_id", None) is None and len(ids) > 1 and mask is None:
        yield (
            f"Its config has no pad_token_id, and the batch has {len(ids)} rows and no attention_mask, so the end of a "
            "text is not known. Set pad_token_id in the teacher's config, or pass teacher_processing_class= (its "
            "tokenizer)."
        )


def _positions(model: nn.Module, config: PreTrainedConfig) -> int | None:
    """Return how many positions a text model reads, or None if that is not known."""
    longest = _number(config, "max_position_embeddings")
    if longest is None:
        return None
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and isinstance(module, nn.Embedding) and module.padding_idx is not None:
            return longest - module.padding_idx - 1  # RoBERTa's positions begin after its padding token
    return longest


def _too_large(values: Tensor, limit: int, name: str, known: str, advice: str) -> Iterable[str]:
    largest = int(values.max()) if values.numel() else 0
    if largest >= limit:
        example = int((values >= limit).flatten(1).any(-1).nonzero()[0])
        yield f"Example {example} of the batch has {name} up to {largest}; {known}, from 0. {advice}."


# Sound and images.


def _expected_features(config: PreTrainedConfig, features: Tensor) -> str | None:
    """Return how log-mel spectrograms should look: `[b mel t]` for Whisper, `[b t mel]` for others; None if they do."""
    if features.dim() != 3:
        return f"It reads spectrograms of three axes, and was given an input of {features.dim()} axes."
    bins, frames = _number(config, "num_mel_bins"), _number(config, "max_source_positions")
    if getattr(config, "model_type", "") != "whisper" or bins is None:
        width = _number(config, "feature_projection_input_dim") or _number(config, "input_feat_per_channel")
        if width is not None and features.shape[-1] != width:
            return f"It reads features that are {width} wide, not {features.shape[-1]}."
        return None
    if features.shape[1] != bins:
        return f"It reads {bins} mel bins (config.num_mel_bins), not {features.shape[1]}."
    if frames is not None and features.shape[2] != 2 * frames:
        return f"It reads {2 * frames} frames (twice config.max_source_positions), not {features.shape[2]}."
    return None


def _expected_samples(config: PreTrainedConfig, values: Tensor) -> str | None:
    """Return how samples `[b t]` (wav2vec2) or a spectrogram `[b t mel]` (AST) should look; None if they do."""
    if hasattr(config, "conv_kernel") and hasattr(config, "conv_stride"):
        return "It reads raw samples [batch, time], and was given a spectrogram." if values.dim() != 2 else None
    bins, frames = _number(config, "num_mel_bins"), _number(config, "max_length")
    if bins is None or frames is None:
        return None
    if values.dim() != 3:
        return f"It reads spectrograms [batch, {frames}, {bins}], and was given raw samples."
    if tuple(values.shape[1:]) != (frames, bins):
        return (
            f"It reads spectrograms of {frames} frames and {bins} mel bins (config.max_length, config.num_mel_bins), "
            f"not {values.shape[1]} and {values.shape[2]}."
        )
    return None


def _expected_image(config: PreTrainedConfig, pixels: Tensor) -> str | None:
    """Return how images `[b c h w]` should look, or None if they do."""
    vision = getattr(config, "vision_config", config)
    if pixels.dim() != 4:
        return f"It reads images [batch, channels, height, width], and was given {pixels.dim()} axes."
    channels, size = _number(vision, "num_channels"), getattr(vision, "image_size", None)
    if channels is not None and pixels.shape[1] != channels:
        return f"It reads images of {channels} channels (config.num_channels), not {pixels.shape[1]}."
    if isinstance(size, int):
        size = (size, size)
    if isinstance(size, (tuple, list)) and tuple(pixels.shape[-2:]) != tuple(size):
        return (
            f"It reads images of {size[0]} × {size[1]} (config.image_size), not {pixels.shape[-2]} × "
            f"{pixels.shape[-1]}."
        )
    return None


def _decoder_causes(config: PreTrainedConfig, ids: Tensor) -> Iterable[str]:
    for name in ("max_target_positions", "max_decoder_position_embeddings", "max_position_embeddings"):
        longest = _number(config, name)
        if longest is not None:
            if ids.shape[-1] > longest:
                yield (
                    f"Its decoder reads {longest} positions at most (config.{name}), and the labels have "
                    f"{ids.shape[-1]}. Truncate the labels (max_length={longest}), or leave such examples out."
                )
            return
