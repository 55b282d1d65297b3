"""Padding for a teacher that classifies whole texts, so that each row's prediction is the same as without padding.

The classification heads of decoders (GPT-2, Llama, Qwen, Mistral, Gemma, …) read their prediction at the last token
that is not `config.pad_token_id`. `Trainer` sets that entry for the student, from its tokenizer, but not for a teacher.
So padded positions get the teacher's own padding token: nothing attends to them, and the head skips them. XLNet reads
the last position whatever it is, so its padding moves to the left. The user's model and its config do not change.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from hf_distill._types import Keywords
from hf_distill.tasks.infer import config_of, unwrapped
from hf_distill.teachers.base import embedded_tokens, text_config_of

_MASK = "attention_mask"
_NONE = -1  # a padding token that is no token: nothing is padded


class OwnPadding:
    """The padding of one teacher.

    Args:
        model: the teacher, plain or PEFT.
        tokenizer_pad_id: the id that its tokenizer pads with, or None if unknown.
    """

    def __init__(self, model: nn.Module, tokenizer_pad_id: int | None = None) -> None:
        config, text = config_of(model), text_config_of(model)
        # Some heads read the text config and others the whole config; a config without this entry is read by neither.
        distinct = [text] if text is config else [text, config]
        self._configs: list[PreTrainedConfig] = [c for c in distinct if c is not None and hasattr(c, "pad_token_id")]
        summary = getattr(unwrapped(model), "sequence_summary", None)  # of XLNet, XLM and Flaubert
        is_xlnet = getattr(config, "model_type", None) == "xlnet"
        self._reads_last_position = is_xlnet and getattr(summary, "summary_type", None) == "last"
        self._embedded = embedded_tokens(model) or float("inf")
        self._keeps_end_token = bool(getattr(config, "is_encoder_decoder", False))
        self._tokenizer_pad_id = tokenizer_pad_id
        self._batch_pad_id: int | None = None

    def for_copy(self, model: nn.Module) -> OwnPadding:
        """Return the padding of another copy of this teacher, such as its full precision."""
        padding = OwnPadding(model, self._tokenizer_pad_id)
        padding._batch_pad_id = self._batch_pad_id
        return padding

    def apply(self, inputs: Keywords, main: str) -> Keywords:
        """Return the inputs with this teacher's own padding.

        Args:
            inputs: the arguments of its forward.
            main: the name of the input ids.
        """
        ids, mask = inputs.get(main), inputs.get(_MASK)
        if not (isinstance(ids, Tensor) and isinstance(mask, Tensor)) or ids.is_floating_point():
            return inputs
        if mask.shape != ids.shape:  # a mask with four axes says which position attends to which
            return inputs
        padded = mask == 0
        pad_id = self._pad_id(ids, padded)
        if pad_id is not None:
            inputs = {**inputs, main: ids.masked_fill(padded, pad_id)}
        return _pad_left(inputs, mask) if self._reads_last_position and ids.dim() == 2 else inputs

    @contextlib.contextmanager
    def in_config(self) -> Iterator[None]:
        """During the teacher's forward, let every part of its config name the same padding token."""
        pad_id = self._known_pad_id()
        pad_id = _NONE if pad_id is None else pad_id
        saved = [(config, config.pad_token_id) for config in self._configs if config.pad_token_id != pad_id]
        try:
            for config, _ in saved:
                config.pad_token_id = pad_id
            yield
        finally:
            for config, before in saved:
                config.pad_token_id = before

    def _known_pad_id(self) -> int | None:
        """Return the padding token of the config, else the tokenizer's, else that of the first padded batch."""
        for pad_id in (*(config.pad_token_id for config in self._configs), self._tokenizer_pad_id, self._batch_pad_id):
            if pad_id is not None and 0 <= pad_id < self._embedded:  # some configs have -1, or a token not embedded
                return int(pad_id)
        return None

    def _pad_id(self, ids: Tensor, padded: Tensor) -> int | None:
        if not self._configs:
            return None
        pad_id = self._known_pad_id()
        if pad_id is None and bool(padded.any()):  # remembered for later batches
            pad_id = self._batch_pad_id = int(ids[padded][0])
        if pad_id is not None and self._keeps_end_token and pad_id == getattr(self._configs[0], "eos_token_id", None):
            return None  # the heads of BART and T5 count the end tokens of a text
        return pad_id


def _pad_left(inputs: Keywords, mask: Tensor) -> Keywords:
    """Return the inputs with each row of every `[b t]` rotated so that its last attended position comes last."""
    t = mask.shape[1]
    positions = torch.arange(t, device=mask.device)
    end = torch.where(mask != 0, positions + 1, 0).amax(1, keepdim=True)
    source = (positions + end) % t  # a row without an attended position stays
    return {
        name: value.gather(1, source) if isinstance(value, Tensor) and value.shape == mask.shape else value
        for name, value in inputs.items()
    }
