"""Cut the real positions of each example out of a batch, and lay them into another batch.

The same for predictions and hidden states. Axes: b examples, t positions of a batch, p real positions of all examples
one after the other, v columns, d features. With several choices an example has m / b rows.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from hf_distill.errors import DataError, SettingError, TeacherError
from hf_distill.functional.rows import in_full_precision
from hf_distill.models.positions import PositionRule
from hf_distill.tasks import TASKS, Batch, Task
from hf_distill.tasks.base import OWN_TASK, batch_size
from hf_distill.teachers.cache.hidden import StoredActivation
from hf_distill.teachers.cache.keys import MASK, decoder_lengths
from hf_distill.vocabulary import HeadAlignment

Axis = Literal["example", "input", "decoder", "frames"]
_INPUTS = ("input_ids", "inputs_embeds", "input_values", "input_features")


def axis_of(task: Task) -> Axis:
    """Return what the predictions of a task run along; raise SettingError if the task does not say so."""
    if task.axis is None:
        raise SettingError(
            f"a cache does not know what the predictions of a {task} task run along, only those of "
            f"{', '.join(name for name, known in TASKS.items() if known.axis)}. Use the live teacher."
        )
    return task.axis


def axis_of_hidden(batch: Batch, positions: PositionRule, *, task: Task, of_decoder: bool) -> str:
    """Return what hidden states run along: an `Axis`, or "all" if every example has equally many."""
    if of_decoder and (task.has_decoder or batch.get("decoder_input_ids") is not None):
        return "decoder"
    if _ids(batch) is not None:
        return "input"
    return "all" if positions.keep(batch) is None else "frames"


class RawRead(Task):
    """Reads a model's own output, before columns are aligned: `[b v]` or `[b t v]`."""

    kind = "raw"
    matched_by = "width"

    def __init__(self, task: Task) -> None:
        self._task = task

    def read(self, outputs: Any, batch: Batch, columns: HeadAlignment, *, teacher: bool) -> Tensor:
        return self._task.raw_output(outputs, batch)


def check_axes(predictions: Tensor, axis: Axis, task: Task) -> None:
    """Raise SettingError unless predictions have a row for each example or position, whichever the axis says."""
    axes = ("example", "column") if axis == "example" else ("example", "position", "column")
    if predictions.dim() != len(axes):
        raise SettingError(
            f"the teacher's predictions are {list(predictions.shape)}, and a cache for a {task} task keeps "
            f"[{', '.join(axes)}]. {OWN_TASK} A cache cannot keep the rows of such a task: use the live teacher."
        )


def real_positions(axis: str, batch: Batch, *, length: int | None = None, task: Task | None = None) -> Tensor | None:
    """Return which positions are real, `[b t]` or `[b choices t]` bool on the CPU.

    None if every example has equally many positions, or if that is not known from the batch.

    Args:
        axis: what the positions run along.
        batch: the batch as the teacher reads it.
        length: t, if the predictions are known.
        task: needed for the frames of predictions, whose number follows from its rule.
    """
    if axis == "frames":
        return None if task is None else frames_of(task, batch)
    if axis == "decoder":
        lengths, width = decoder_lengths(batch), length or _width(batch, ("labels", "decoder_input_ids"))
        if lengths is None:
            return torch.ones(batch_size(batch), width, dtype=torch.bool)
        return torch.arange(width) < torch.from_numpy(lengths)[:, None]
    if axis != "input":
        return None
    ids, mask = _ids(batch), batch.get(MASK)
    if mask is not None and mask.dim() == (2 if ids is None else ids.dim()):
        return mask.bool().cpu()
    if ids is not None and length is None:
        return torch.ones(ids.shape, dtype=torch.bool)
    return torch.ones(batch_size(batch), length or _width(batch, _INPUTS), dtype=torch.bool)


def frames_of(task: Task, batch: Batch) -> Tensor:
    """Return which frames are real, `[b t]` bool on the CPU."""
    keep = task.keep(batch)
    assert keep is not None  # a task whose axis is "frames" knows them
    return keep.view(batch_size(batch), -1).cpu()


def cut(x: Tensor, real: Tensor | None, examples: int, pooling: str | None = None) -> tuple[Tensor, np.ndarray]:
    """Return the real positions `[p ...]` of all examples one after the other, and how many each example has `[b]`.

    Args:
        x: `[m t ...]`.
        real: as `real_positions` returns it.
        examples: b.
        pooling: "first", "last" or "mean" for one vector of each of the m rows, None for every position.

    Raises:
        DataError: if x has other positions than the batch.
    """
    flat = None if real is None else real.flatten(0, -2).to(x.device)
    if flat is not None and flat.shape != x.shape[:2]:
        raise DataError(
            f"the teacher's outputs are {list(x.shape[:2])} [examples, positions], the batch is {list(flat.shape)}. A "
            "cache needs an output for each position of input (no virtual tokens) or decoder, or for each frame."
        )
    if pooling is not None:
        return _pool(x, flat, pooling), np.full(examples, x.shape[0] // examples, dtype=np.int64)
    if real is None or flat is None:
        return x.flatten(0, 1), np.full(examples, x.shape[0] * x.shape[1] // examples, dtype=np.int64)
    return x[flat], real.flatten(1).sum(1).cpu().numpy()


def _pool(x: Tensor, keep: Tensor | None, how: str) -> Tensor:
    """Return the first or last real position, or the mean of all, `[m d]`; 0 if no position is real."""
    x = in_full_precision(x)
    if keep is None:
        return x.mean(1) if how == "mean" else x[:, 0] if how == "first" else x[:, -1]
    if how == "mean":
        return x.masked_fill(~keep[..., None], 0).sum(1) / keep.sum(1, keepdim=True).clamp(min=1)
    positions = torch.arange(keep.shape[1], device=x.device)
    chosen = torch.where(keep, positions, keep.shape[1] - 1).amin(1) if how == "first" else (keep * positions).amax(1)
    return x[torch.arange(x.shape[0], device=x.device), chosen].masked_fill(~keep.any(1)[:, None], 0)


def lay(rows: Tensor, counts: np.ndarray, real: Tensor | None, *, from_left: bool = False) -> Tensor:
    """Lay `[p w]` into a batch, `[b t w]` with 0 at padding. The inverse of `cut`.

    Args:
        rows: the positions of all examples, one example after the other.
        counts: `[b]`, how many each example has.
        real: as `real_positions` returns it for this batch.
        from_left: whether examples of unequal length begin at the left, if `real` is None.

    Raises:
        TeacherError: if an example of the batch has another number of positions than the cache holds.
    """
    if real is not None:
        real = real.flatten(1)
        check_lengths(real.sum(1).numpy(), counts)
    elif from_left:
        real = torch.arange(int(counts.max(initial=0))) < torch.from_numpy(counts)[:, None]
    elif len(set(counts.tolist())) > 1:
        raise TeacherError("the examples of this batch have other sizes, and no mask. Put equal sizes into a batch.")
    else:
        return rows.view(len(counts), -1, rows.shape[-1])
    laid = rows.new_zeros(*real.shape, rows.shape[-1])
    laid[real] = rows
    return laid


def lay_hidden(rows: Tensor, counts: np.ndarray, kept: StoredActivation, batch: Batch) -> Tensor:
    """Lay the positions of a stored activation into a batch, `[b t d]`; `[b m/b d]` if it is pooled."""
    frames = kept.along == "frames"  # the student's rule says how many there are
    return lay(rows, counts, None if frames else real_positions(kept.along, batch), from_left=frames)


def as_hidden_states(
    laid: Tensor, kept: StoredActivation, batch: Batch, positions: PositionRule, counts: Tensor | None
) -> Tensor:
    """Return what `lay_hidden` returned as the teacher's hidden states would be, `[m t d]` in full precision.

    Args:
        laid: on the device of the batch.
        kept: which activation it is.
        batch: as the teacher reads it.
        positions: of the student.
        counts: `[b]`, the frames of each example, if its axis is "frames".
    """
    x = laid.float()
    if kept.pooling:
        keep = positions.keep(batch)
        vectors = x.flatten(0, 1)[:, None]  # at every position, so that pooling gives it back
        return vectors if keep is None else vectors.expand(-1, keep.shape[1], -1)
    if kept.axis == "frames":
        keep = positions.keep(batch)
        if keep is None or counts is None:
            raise TeacherError(f"the cache holds {kept} at frames, and the student's rule does not say which are real.")
        check_lengths(keep.sum(1).cpu().numpy(), counts.cpu().numpy())
        return lengthen(x, keep.shape[1])
    ids = _ids(batch) if kept.axis == "input" else None
    return x if ids is None else x.view(-1, ids.shape[-1], x.shape[-1])


def lengthen(laid: Tensor, length: int) -> Tensor:
    """Append zeros to `[b t w]` until it has `length` positions."""
    missing = length - laid.shape[1]
    return laid if missing <= 0 else torch.cat([laid, laid.new_zeros(laid.shape[0], missing, laid.shape[2])], 1)


def check_lengths(of_batch: np.ndarray, of_cache: np.ndarray) -> None:
    """Raise TeacherError if an example of the batch has another number of positions than the cache holds."""
    differing = np.flatnonzero(of_batch != of_cache)
    if differing.size:
        i = int(differing[0])
        raise TeacherError(
            f"example {i} of the batch has {of_batch[i]} positions, the cache holds {of_cache[i]} of it. Both need the "
            "same frame rate (CTC), labels of equal length (sequence to sequence), and no augmentation that moves them."
        )


def _width(batch: Batch, names: tuple[str, ...]) -> int:
    for name in names:
        if batch.get(name) is not None:
            return int(batch[name].shape[1])
    raise DataError(
        f"the batch has none of {', '.join(names)}, so its positions are not known; it has {sorted(batch)}."
    )


def _ids(batch: Batch) -> Tensor | None:
    if batch.get("input_ids") is not None:
        return batch["input_ids"]
    embedded = batch.get("inputs_embeds")
    return None if embedded is None else embedded[..., 0]
