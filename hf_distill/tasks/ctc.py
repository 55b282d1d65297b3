"""CTC speech recognition: a row a frame after the convolution stack; no padded frame counts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from hf_distill.errors import SettingError
from hf_distill.tasks.base import Batch, PositionTask, attended


class CTC(PositionTask):
    """Frames `[b f v]`. How many are real follows from the samples (or input frames) by the student's own rule.

    With `config.ctc_loss_reduction="sum"` the head's loss is a sum over utterances, so the divergence is a sum over
    frames: both terms on one scale, and alpha=0 still is `Trainer`.

    Args:
        frame_lengths: input length `[b]` → frames `[b]`.
        sums_over_examples: the head's loss is a sum.
    """

    kind = "ctc"
    matched_by = "vocabulary"

    def __init__(self, frame_lengths: Callable[[Tensor], Tensor], *, sums_over_examples: bool = False) -> None:
        self._frame_lengths = frame_lengths
        self.sums_over_examples = sums_over_examples

    @classmethod
    def from_model(cls, model: Any) -> CTC:
        rule = getattr(model, "_get_feat_extract_output_lengths", None)
        rule = rule or getattr(model, "_get_subsampling_output_length", None)
        if rule is None:
            raise SettingError(
                f"{type(model).__name__} does not say how long its output is. Pass task=CTC(frame_lengths) with a "
                "function from input lengths to frames."
            )
        return cls(rule, sums_over_examples=model.config.ctc_loss_reduction == "sum")

    def keep(self, batch: Batch) -> Tensor:
        mask = attended(batch, "attention_mask", ("input_values", "input_features"))
        frames = int(self._frame_lengths(torch.tensor(mask.shape[1])))
        lengths = self._frame_lengths(mask.sum(-1)).to(mask.device)
        positions = torch.arange(frames, device=mask.device)
        return (positions < lengths[:, None]).flatten()

    def label_count(self, batch: Batch) -> Tensor:
        labels = batch["labels"]
        return torch.tensor(labels.shape[0], device=labels.device)
