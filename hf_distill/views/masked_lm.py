"""The words that a masked language model finds likely at a position: many positions in one forward."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hf_distill.errors import SettingError
from hf_distill.views.words import Words


@dataclass(frozen=True)
class Blank:
    """A text with one position to fill: its ids, that position, and its segments where it has such."""

    ids: Sequence[int]
    position: int
    segments: Sequence[int] | None = None


class LikelyWords:
    """The `count` most likely words at the blank of each text, by a masked language model.

    Args:
        words: the words of the model's tokenizer.
        model: with a masked-LM head, on any device; it is put in evaluation mode.
        count: how many.
        batch_size: texts a forward; its logits take batch_size · length · vocabulary numbers.

    Raises:
        SettingError: the tokenizer has no mask token, or more tokens than the model.
    """

    def __init__(self, words: Words, model: Any, count: int, batch_size: int) -> None:
        tokenizer = words.tokenizer
        if tokenizer.mask_token_id is None:
            raise SettingError("masked_lm: the tokenizer has no mask token. Pass the masked LM's own tokenizer.")
        width = model.get_input_embeddings().weight.shape[0]
        if width < len(words):
            raise SettingError(
                f"masked_lm knows {width} tokens, the tokenizer has {len(words)}. Pass a masked LM with this tokenizer."
            )
        self._model = model.eval()
        self._mask, self._padding = tokenizer.mask_token_id, tokenizer.pad_token_id or 0
        self._allowed = words.whole()
        self._count = min(count, int(self._allowed.sum()))
        self._batch_size = batch_size
        self._reads_segments = "token_type_ids" in inspect.signature(model.forward).parameters

    def __call__(self, blanks: Sequence[Blank]) -> list[list[int]]:
        """For each text its likely words, the likeliest first."""
        found: list[list[int]] = []
        for start in range(0, len(blanks), self._batch_size):
            found += self._forward(blanks[start : start + self._batch_size])
        return found

    @torch.no_grad()
    def _forward(self, blanks: Sequence[Blank]) -> list[list[int]]:
        device = next(self._model.parameters()).device
        inputs = {name: value.to(device) for name, value in self._inputs(blanks).items()}
        rows = torch.arange(len(blanks), device=device)
        at = torch.tensor([blank.position for blank in blanks], device=device)
        logits = self._model(**inputs).logits[rows, at].float().cpu()[:, : len(self._allowed)]
        return logits.masked_fill(~self._allowed, -torch.inf).topk(self._count).indices.tolist()

    def _inputs(self, blanks: Sequence[Blank]) -> dict[str, Tensor]:
        longest = max(len(blank.ids) for blank in blanks)
        ids = torch.full((len(blanks), longest), self._padding)
        mask, segments = torch.zeros_like(ids), torch.zeros_like(ids)
        for row, blank in enumerate(blanks):
            length = len(blank.ids)
            ids[row, :length] = torch.tensor(blank.ids)
            ids[row, blank.position] = self._mask
            mask[row, :length] = 1
            if blank.segments is not None:
                segments[row, :length] = torch.tensor(blank.segments)
        made = {"input_ids": ids, "attention_mask": mask}
        return {**made, "token_type_ids": segments} if self._reads_segments else made
