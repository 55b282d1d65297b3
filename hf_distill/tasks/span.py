"""Extractive question answering: two rows an example, the start and the end, over the positions of the input."""

from __future__ import annotations

import torch
from torch import Tensor

from hf_distill.tasks.base import IGNORED, Batch, Outputs, Task, attended, batch_size, output_named, require_axes
from hf_distill.vocabulary import HeadAlignment


class Span(Task):
    """Rows `[b 2 t]`; padded positions are masked, so more padding changes nothing.

    The head's own loss in transformers takes its softmax over padded positions too, so the labels' term depends on
    padding, as in `Trainer`.
    """

    kind = "span"
    axis = "input"
    auto_classes = ("AutoModelForQuestionAnswering",)
    matched_by = "positions"
    label_names = ("start_positions", "end_positions")

    def read(self, outputs: Outputs, batch: Batch, columns: HeadAlignment, *, teacher: bool) -> Tensor:
        both = output_named("start_logits", outputs), output_named("end_logits", outputs)
        require_axes(both[0], ("example", "position"), what="start_logits", teacher=teacher)
        logits = torch.stack(both, 1)  # [b 2 t]
        readable = self._readable(batch)
        if logits.shape[-1] != readable.shape[1]:
            return logits  # of another input; the comparison of the rows raises
        return logits.masked_fill(~readable[:, None], -torch.inf)

    def as_outputs(self, x: Tensor, columns: HeadAlignment, width: int) -> tuple[Tensor, ...]:
        return x.unbind(1)  # start_logits and end_logits; padded positions are -inf

    def select(self, x: Tensor, batch: Batch) -> Tensor:
        return x.flatten(0, 1)

    def rows_are_distributions(self, batch: Batch) -> bool:
        return False  # their columns are positions

    def rows(self, batch: Batch) -> int:
        return 2 * batch_size(batch)

    def keep(self, batch: Batch) -> Tensor | None:
        """Return None for all rows, or with labels the rows whose answer is at an attended position."""
        if not self.has_labels(batch):
            return None
        return self._inside(batch).flatten()

    def label_count(self, batch: Batch) -> Tensor:
        """Return the number of starts and ends before the padded length, since transformers ignores others."""
        positions = self._positions(batch)
        return ((positions >= 0) & (positions < self._readable(batch).shape[1])).sum()

    def targets(self, batch: Batch) -> Tensor | None:
        if not self.has_labels(batch):
            return None
        return torch.where(self._inside(batch), self._positions(batch), IGNORED).flatten()

    def _positions(self, batch: Batch) -> Tensor:
        columns = [batch[name] for name in self.label_names]
        columns = [x.squeeze(-1) if x.dim() > 1 else x for x in columns]
        return torch.stack(columns, 1)  # [b 2]

    def _readable(self, batch: Batch) -> Tensor:
        return attended(batch, "attention_mask", ("input_ids", "inputs_embeds"))  # [b t]

    def _inside(self, batch: Batch) -> Tensor:
        """Return `[b 2]` bool: whether the answer is at an attended position."""
        positions, readable = self._positions(batch), self._readable(batch)
        within = (positions >= 0) & (positions < readable.shape[1])
        return within & readable.gather(1, positions.clamp(0, readable.shape[1] - 1))

    def raw_output(self, outputs: Outputs, batch: Batch) -> Tensor:
        """Return the two rows as columns `[b t 2]`, so that they run along the input."""
        return torch.stack((output_named("start_logits", outputs), output_named("end_logits", outputs)), -1)

    def outputs_of_raw(self, raw: Tensor) -> dict[str, Tensor]:
        return {"start_logits": raw[..., 0], "end_logits": raw[..., 1]}

    def raw_of_predictions(self, predictions: Tensor) -> Tensor:
        return predictions.transpose(1, 2)  # [b 2 t] -> [b t 2]
