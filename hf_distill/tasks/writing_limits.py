"""What a model that writes can be asked: how long, and which ids. What is done where it is too much, others decide."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from hf_distill.tasks.infer import unwrapped


@dataclass(frozen=True)
class Limits:
    """What a model can be asked to continue, or to answer.

    Args:
        asked: of one prompt, in words. model: the name of its class. positions: how many it knows, ids: how many it
            embeds; None: nothing is known. new: tokens that are to be written behind the prompt.

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
    """How many positions the encoder or the decoder knows; None where its config does not say, or there is no end."""
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
    """How many ids it can read; None where that is not known."""
    try:
        return getattr(unwrapped(model).get_input_embeddings(), "num_embeddings", None)
    except NotImplementedError:  # transformers found none
        return None
