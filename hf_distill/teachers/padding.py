"""What a teacher that classifies whole texts reads at padded positions, so that it answers a row as it does alone.

The classification heads of decoders (GPT-2, Llama, Qwen, Mistral, Gemma, …) read their prediction at the last token
that is not `config.pad_token_id`. `Trainer` sets that entry for the student from its tokenizer; for a teacher nobody
does. So padded positions are written with the teacher's own padding token before it reads them: nothing attends to
them, and the head then skips them. XLNet reads the last position as such: for it, padding on the right moves to the
left. The user's model and its config stay as they are.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from hf_distill.tasks.infer import unwrapped

_MASK = "attention_mask"
_NONE = -1  # no token: nothing is padded


class OwnPadding:
    """The padding of one teacher.

    Args:
        model: the teacher, plain or PEFT.
        of_tokenizer: the id that its tokenizer pads with; None where that is not known.
    """

    def __init__(self, model: Any, of_tokenizer: int | None = None) -> None:
        inner = unwrapped(model)
        config: Any = getattr(inner, "config", None)
        text = config.get_text_config() if hasattr(config, "get_text_config") else config
        # Heads read one or the other; where a config has no such entry, no head reads it.
        both: dict[int, Any] = {id(one): one for one in (text, config)}
        self._configs = [one for one in both.values() if hasattr(one, "pad_token_id")]
        self._reads_last_position = (
            getattr(config, "model_type", None) == "xlnet"
            and getattr(getattr(inner, "sequence_summary", None), "summary_type", None) == "last"
        )
        self._embedded = _embedded(inner)
        self._keeps_end_token = bool(getattr(config, "is_encoder_decoder", False))
        self._of_tokenizer = of_tokenizer
        self._of_batch: int | None = None

    def of(self, model: Any) -> OwnPadding:
        """Returns that of another model, of which this teacher is a quantised copy."""
        found = OwnPadding(model, self._of_tokenizer)
        found._of_batch = self._of_batch
        return found

    def written(self, inputs: dict[str, Any], main: str) -> dict[str, Any]:
        """Returns the inputs as this teacher pads them itself; `main` is the name of the input ids."""
        ids, mask = inputs.get(main), inputs.get(_MASK)
        if not (isinstance(ids, Tensor) and isinstance(mask, Tensor)) or ids.is_floating_point():
            return inputs
        if mask.shape != ids.shape:  # a mask of four axes says itself who sees whom
            return inputs
        padded = mask == 0
        own = self._own_id(ids, padded)
        if own is not None:
            inputs = {**inputs, main: ids.masked_fill(padded, own)}
        return _padded_left(inputs, mask) if self._reads_last_position and ids.dim() == 2 else inputs

    @contextlib.contextmanager
    def in_config(self) -> Iterator[None]:
        """Around the teacher's forward: every part of its config names the same padding token."""
        own = self._known()
        own = _NONE if own is None else own
        kept = [(config, config.pad_token_id) for config in self._configs if config.pad_token_id != own]
        try:
            for config, _ in kept:
                config.pad_token_id = own
            yield
        finally:
            for config, before in kept:
                config.pad_token_id = before

    def _known(self) -> int | None:
        """Its config's, else the tokenizer's, else what the first padded batch held."""
        for found in (*(config.pad_token_id for config in self._configs), self._of_tokenizer, self._of_batch):
            if found is not None and 0 <= found < self._embedded:  # some configs have -1, or a token never embedded
                return int(found)
        return None

    def _own_id(self, ids: Tensor, padded: Tensor) -> int | None:
        if not self._configs:
            return None
        own = self._known()
        if own is None and bool(padded.any()):  # once: then it is known
            own = self._of_batch = int(ids[padded][0])
        if own is not None and self._keeps_end_token and own == getattr(self._configs[0], "eos_token_id", None):
            return None  # the heads of BART and T5 count the end tokens of a text
        return own


def _embedded(model: Any) -> float:
    """How many ids the model embeds; infinity where it does not say."""
    try:
        embeddings = model.get_input_embeddings()
    except (AttributeError, NotImplementedError):
        return float("inf")
    return getattr(embeddings, "num_embeddings", None) or float("inf")


def _padded_left(inputs: Mapping[str, Any], mask: Tensor) -> dict[str, Any]:
    """Every input `[b t]` with each row moved so that its last attended position is the last of all."""
    t = mask.shape[1]
    positions = torch.arange(t, device=mask.device)
    end = torch.where(mask != 0, positions + 1, 0).amax(1, keepdim=True)
    moved = (positions + end) % t  # a row without a real position stays
    return {
        name: value.gather(1, moved) if isinstance(value, Tensor) and value.shape == mask.shape else value
        for name, value in inputs.items()
    }
