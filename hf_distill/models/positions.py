"""PositionRule: which positions of hidden states are real (attended tokens, frames with sound, all patches).

They follow from the batch alone, like a task's rows. Without a mask (images, Whisper's 30 seconds) each example has the
same number of positions, and all are real.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hf_distill.errors import DataError
from hf_distill.tasks import Batch, Task
from hf_distill.tasks.base import IGNORED, TEACHER_PREFIX, attended, batch_size
from hf_distill.tasks.infer import unwrapped

_MASK = "attention_mask"


class PositionRule:
    """The positions of one side of a student.

    Args:
        model: the student, whose rule converts samples to frames.
        task: the task of the student.
        of_decoder: whether the positions are those of the decoder of an encoder-decoder.
    """

    def __init__(self, model: Any, task: Task, *, of_decoder: bool = False) -> None:
        model = unwrapped(model)
        self._of_decoder = of_decoder
        self._labels_decoder = task.has_decoder
        rule = getattr(model, "_get_feat_extract_output_lengths", None)
        self._frame_lengths = rule or getattr(model, "_get_subsampling_output_length", None)

    def keep(self, batch: Batch) -> Tensor | None:
        """Return the real positions `[b t]` bool; None means every position of every example."""
        if self._of_decoder:
            return self._of_decoder_inputs(batch)
        if batch.get("input_ids") is not None or batch.get("inputs_embeds") is not None:
            return _of_tokens(batch)
        if batch.get("input_values") is not None or batch.get("input_features") is not None:
            return self._of_frames(batch)
        return None

    def segments(self, batch: Batch) -> Tensor | None:
        """Return the sequence of each position `[b t]` if several are packed into a row, else None."""
        ids = batch.get("position_ids")
        if self._of_decoder or ids is None or ids.dim() != 2 or batch.get(_MASK) is not None:
            return None
        return (ids == 0).cumsum(-1)

    def check_not_packed(self, batch: Batch, what: str) -> None:
        """Raise DataError if a row may hold several examples, for objectives that need one a row."""
        if self.segments(batch) is not None:
            raise DataError(
                f"{what} needs an example a row, but position_ids without attention_mask allow several. Leave packing "
                "out, or use HiddenMatch or RelationMatch on all positions."
            )

    def count(self, batch: Batch) -> Tensor:
        """Return the number of real positions, a scalar; without a mask, the number of examples."""
        keep = self.keep(batch)
        return torch.tensor(batch_size(batch)) if keep is None else keep.sum()

    def count_examples(self, batch: Batch) -> Tensor:
        """Return the number of examples with a real position, a scalar."""
        keep = self.keep(batch)
        return torch.tensor(batch_size(batch)) if keep is None else keep.any(-1).sum()

    def _of_decoder_inputs(self, batch: Batch) -> Tensor:
        if self._labels_decoder and batch.get("labels") is not None:
            return batch["labels"] != IGNORED
        if batch.get("decoder_input_ids") is not None:
            return attended(batch, "decoder_attention_mask", ("decoder_input_ids",))
        return _of_tokens(batch)  # a decoder with the inputs of the encoder (BART's classifier)

    def _of_frames(self, batch: Batch) -> Tensor | None:
        if self._frame_lengths is None or (batch.get("input_features") is not None and batch.get(_MASK) is None):
            return None
        mask = attended(batch, _MASK, ("input_values",))
        frames = int(self._frame_lengths(torch.tensor(mask.shape[1])))
        lengths = self._frame_lengths(mask.sum(-1)).to(mask.device)
        return torch.arange(frames, device=mask.device) < lengths[:, None]


def _of_tokens(batch: Batch) -> Tensor:
    given = batch["input_ids"] if batch.get("input_ids") is not None else batch["inputs_embeds"][..., 0]
    mask = batch.get(_MASK)
    if mask is None or mask.dim() == 4:  # `[b 1 t t]` masks pairs of positions (packed sequences)
        keep = torch.ones(given.shape, dtype=torch.bool, device=given.device)
    else:
        keep = mask.bool()
    theirs = batch.get(f"{TEACHER_PREFIX}{_MASK}")
    if theirs is not None and theirs.shape == keep.shape:
        keep = keep & theirs.bool()  # attended in both models
    return keep.flatten(0, -2)  # multiple choice: `[b choices t]`


def check_positions(keep: Tensor | None, shape: tuple[int, ...], *, examples: int, whose: str, what: str) -> None:
    """Raise DataError if the positions of a model's activations differ from the batch's.

    Args:
        keep: `[b t]`, the valid positions; None means all of each example.
        shape: shape of the activation, up to its positions.
        examples: number of examples in the batch.
        whose: "student" or "teacher", for the message.
        what: name of the activation, for the message.
    """
    where = f"{what} of the {whose} are at {list(shape)}"
    if keep is None and (shape[0] != examples or len(shape) != 2):
        raise DataError(
            f"the batch has {examples} examples, but {where}, not [examples, positions]: the model computes on a grid, "
            "or on parts of an example (windows, frames of a video). Match another stack of blocks (student_stack=, "
            "teacher_stack=), or use HiddenMatch."
        )
    if keep is None or tuple(keep.shape) == tuple(shape):
        return
    raise DataError(
        f"the batch has {list(keep.shape)} [examples, positions], but {where}. Student and teacher need the same "
        "positions: the same tokenizer and padding, the same frame rate, and no prompt tuning. If a model pads to a "
        "multiple of its attention window, pad in the collator: pad_to_multiple_of."
    )
