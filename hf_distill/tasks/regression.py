"""Rows of values rather than logits: the number(s) of a regression head, or a pooled hidden state."""

from __future__ import annotations

from typing import Literal, TypeAlias, get_args

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from hf_distill._types import Keywords
from hf_distill.errors import SettingError, TeacherError, did_you_mean
from hf_distill.functional.rows import in_full_precision
from hf_distill.tasks.base import Batch, Outputs, Task, batch_size, output_named, pick, require_axes
from hf_distill.tasks.classification import check_no_ignored
from hf_distill.vocabulary import HeadAlignment

Pooling: TypeAlias = Literal["mean", "first", "last"]
POOLING: tuple[Pooling, ...] = get_args(Pooling)
POOLING_ALIASES = {"cls": "first", "average": "mean", "avg": "mean", "eos": "last", "lasttoken": "last"}


class Regression(Task):
    """One row of values `[b v]` an example, v = num_labels. The student learns the teacher's value."""

    kind = "regression"
    axis = "example"
    reads_whole_input = reads_label_column = allows_unlabelled = True
    auto_classes = ("AutoModelForSequenceClassification",)
    matched_by = "labels"
    on_values = True
    needs_same_inputs = False

    def read(self, outputs: Outputs, batch: Batch, columns: HeadAlignment, *, teacher: bool) -> Tensor:
        return pick(self.raw_output(outputs, batch), columns, teacher=teacher)

    def label_count(self, batch: Batch) -> Tensor:
        return torch.tensor(batch["labels"].shape[0], device=batch["labels"].device)

    def check_labels(self, batch: Batch) -> None:
        check_no_ignored(batch["labels"], "regression")

    def write_to(self, config: PreTrainedConfig, batch: Batch) -> None:
        """Write label names and the problem type, without which a pipeline takes a sigmoid of a single value."""
        super().write_to(config, batch)
        if getattr(config, "problem_type", "regression") is None:
            config.problem_type = "regression"


class Embedding(Task):
    """One row `[b d]` an example: the last hidden state, pooled over the attended positions.

    A bare encoder has no loss of its own, so it trains with alpha=1, or with a `compute_loss_func`. Its saved files do
    not contain the pooling; the model card does.

    Args:
        pooling: "mean" (sentence-transformers' default), "first" (CLS) or "last" (decoders), for both models.
    """

    kind = "embedding"
    axis = "example"
    auto_classes = ("AutoModel",)
    matched_by = "width"
    on_values = True
    needs_same_inputs = False

    def __init__(self, pooling: Pooling = "mean") -> None:
        if pooling not in POOLING:
            hint = did_you_mean(pooling, POOLING, POOLING_ALIASES)
            raise SettingError(f"pooling={pooling!r}: allowed are {', '.join(POOLING)}.{hint}")
        self.pooling = pooling

    def read(self, outputs: Outputs, batch: Batch, columns: HeadAlignment, *, teacher: bool) -> Tensor:
        hidden = output_named("last_hidden_state", outputs)
        require_axes(
            hidden,
            ("example", "position", "feature"),
            what="last_hidden_state",
            teacher=teacher,
            hint="(Convolutional image models put the features first; most pool them themselves: pooler_output.) ",
        )
        mask = self._mask(hidden, batch, teacher=teacher)  # [b t]
        if self.pooling == "mean":
            summed = in_full_precision(hidden).masked_fill(~mask[..., None], 0).sum(1)  # fp16 ends at 65504
            pooled = summed / mask.sum(1, keepdim=True).clamp(min=1)
        else:
            positions = torch.arange(mask.shape[1], device=mask.device)
            if self.pooling == "first":
                chosen = torch.where(mask, positions, mask.shape[1] - 1).amin(1)
            else:
                chosen = torch.where(mask, positions, 0).amax(1)
            pooled = hidden[torch.arange(hidden.shape[0], device=hidden.device), chosen]
        return pick(pooled, columns, teacher=teacher)

    def label_count(self, batch: Batch) -> Tensor:
        return torch.tensor(batch_size(batch), device=batch["labels"].device)

    def as_outputs(self, x: Tensor, columns: HeadAlignment, width: int) -> None:
        """Return None, since the hidden states cannot be derived from the pooled `x`."""

    def _mask(self, hidden: Tensor, batch: Batch, *, teacher: bool) -> Tensor:
        mask = batch.get("attention_mask")
        if teacher and batch.get("teacher_attention_mask") is not None:
            mask = batch["teacher_attention_mask"]
        if mask is None or mask.shape != hidden.shape[:2]:  # images have none
            return torch.ones(hidden.shape[:2], dtype=torch.bool, device=hidden.device)
        return mask.bool()

    def settings(self) -> Keywords:
        return {"pooling": self.pooling}

    def check_heads(self, student: PreTrainedModel, teacher: PreTrainedModel) -> None:
        widths = [getattr(getattr(model, "config", None), "hidden_size", None) for model in (student, teacher)]
        if None not in widths and widths[0] != widths[1]:
            raise TeacherError(
                f"student and teacher embed in different widths ({widths[0]} and {widths[1]}). Give the student the "
                "teacher's hidden_size, or pass alpha=None and objectives= SimilarityMatch() (similarities between "
                'pooled examples), HiddenMatch("last") or CosineEmbedding() (positions, through a learned projection).'
            )

    def raw_output(self, outputs: Outputs, batch: Batch) -> Tensor:
        return self.read(outputs, batch, HeadAlignment(), teacher=True)

    def outputs_of_raw(self, raw: Tensor) -> dict[str, Tensor]:
        return {"last_hidden_state": raw[:, None]}  # one position: pooling it changes nothing

    def __repr__(self) -> str:
        return f"Embedding(pooling={self.pooling!r})"
