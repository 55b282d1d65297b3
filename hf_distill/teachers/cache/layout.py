"""Where along its axes a task's predictions belong to an example: cut them out of a batch, lay them into another.

Axes: b batch, t time, v columns; p positions, of all examples one after the other.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from hf_distill.errors import DataError, SettingError, TeacherError
from hf_distill.functional.rows import in_full_precision
from hf_distill.models.positions import PositionRule
from hf_distill.tasks import TASKS, Batch, Task
from hf_distill.tasks.base import OWN_TASK, batch_size
from hf_distill.teachers.cache.hidden import DTYPES, StoredActivation
from hf_distill.teachers.cache.keys import MASK, decoder_lengths
from hf_distill.vocabulary import HeadAlignment

Axis = Literal["example", "input", "decoder", "frames"]
AXES: tuple[str, ...] = get_args(Axis)


def axis_of(task: Task) -> Axis:
    """What the predictions of a task run along.

    Raises:
        SettingError: a task of the user's own, of which that is not known.
    """
    if task.axis is None:
        raise SettingError(
            f"a cache does not know what the predictions of a {task} task run along. Supported: "
            f"{', '.join(name for name, known in TASKS.items() if known.axis)}. Use the live teacher for other tasks."
        )
    return task.axis


class RawRead(Task):
    """Reads a model's own output, before columns are matched: `[b v]` or `[b t v]`.

    A span's two rows are two columns `[b t 2]`, so that they too run along the input; an embedding is pooled.
    """

    kind = "raw"
    matched_by = "width"

    def __init__(self, task: Task) -> None:
        self._task = task

    def read(self, outputs: Any, batch: Batch, columns: HeadAlignment, *, teacher: bool) -> Tensor:
        return self._task.raw_output(outputs, batch)


def check_axes(predictions: Tensor, axis: Axis, task: Task) -> None:
    """Raise SettingError for predictions that are neither a row an example nor a row a position, whichever is meant."""
    axes = ("example", "column") if axis == "example" else ("example", "position", "column")
    if predictions.dim() != len(axes):
        raise SettingError(
            f"the teacher's predictions are {list(predictions.shape)}, and a cache for a {task} task keeps "
            f"[{', '.join(axes)}]. {OWN_TASK} A cache cannot keep the rows of such a task: use the live teacher."
        )


def real_positions(axis: Axis, batch: Batch, length: int | None = None, task: Task | None = None) -> Tensor | None:
    """`[b t]` bool, on the CPU: which positions are no padding; None: one row an example, or not known here.

    Args:
        length: t, where the predictions are at hand.
        task: needed for frames, whose number follows from its rule.
    """
    if axis == "example":
        return None
    if axis == "frames":
        return None if task is None else _required_keep(task, batch).view(batch_size(batch), -1).cpu()
    if axis == "input":
        mask = batch.get(MASK)
        if mask is not None and mask.dim() == 2:
            return mask.bool().cpu()
        return torch.ones(batch_size(batch), length or _width_of_input(batch), dtype=torch.bool)
    lengths, width = decoder_lengths(batch), length or _width_of_decoder(batch)
    if lengths is None:
        return torch.ones(batch_size(batch), width, dtype=torch.bool)
    return torch.arange(width) < torch.from_numpy(lengths)[:, None]


def cut(predictions: Tensor, real: Tensor | None) -> tuple[Tensor, np.ndarray]:
    """`[b t v]` → the real positions `[p v]` of all examples one after the other, and how many each has `[b]`.

    Raises:
        DataError: the predictions have another length than what they are of.
    """
    if real is None:
        return predictions, np.ones(predictions.shape[0], dtype=np.int64)
    if predictions.shape[:2] != real.shape:
        raise DataError(
            f"the teacher's predictions are {list(predictions.shape)}, the batch has {list(real.shape)} positions. A "
            "cache needs a position of output for each of the input (or of the decoder, or each frame)."
        )
    return predictions[real.to(predictions.device)], real.sum(1).numpy()


def lay(rows: Tensor, counts: np.ndarray, real: Tensor | None, axis: Axis) -> Tensor:
    """`[p w]` → `[b t w]`, 0 where nothing belongs; `[b w]` where a row is an example. The inverse of `cut`.

    Raises:
        DataError: an example of the batch has another number of positions than the cache holds of it.
    """
    if axis == "example":
        return rows
    if real is None:  # frames: from the left; the task knows how many there are in all
        real = torch.arange(int(counts.max(initial=0))) < torch.from_numpy(counts)[:, None]
    else:
        check_lengths(real.sum(1).numpy(), counts)
    laid = rows.new_zeros(*real.shape, rows.shape[-1])
    laid[real] = rows
    return laid


def lengthened(laid: Tensor, length: int) -> Tensor:
    """`[b t w]` with zeros up to `length` positions."""
    missing = length - laid.shape[1]
    return laid if missing <= 0 else torch.cat([laid, laid.new_zeros(laid.shape[0], missing, laid.shape[2])], 1)


def check_lengths(of_batch: np.ndarray, of_cache: np.ndarray) -> None:
    differing = np.flatnonzero(of_batch != of_cache)
    if differing.size:
        i = int(differing[0])
        raise TeacherError(
            f"example {i} of the batch has {of_batch[i]} positions, the cache holds {of_cache[i]} of it. Student and "
            "cached teacher must predict at the same positions: the same frame rate (CTC), labels of the same length "
            "(sequence to sequence), an augmentation that moves no positions."
        )


def _required_keep(task: Task, batch: Batch) -> Tensor:
    keep = task.keep(batch)
    assert keep is not None  # a task with frames says which are real
    return keep


def _width_of_input(batch: Batch) -> int:
    for name in ("input_ids", "inputs_embeds", "input_values", "input_features"):
        if batch.get(name) is not None:
            return int(batch[name].shape[1])
    raise DataError(f"the batch has no input that positions could be told of, only {sorted(batch)}.")


def _width_of_decoder(batch: Batch) -> int:
    for name in ("labels", "decoder_input_ids"):
        if batch.get(name) is not None:
            return int(batch[name].shape[1])
    raise DataError(f"the batch has neither labels nor decoder_input_ids, only {sorted(batch)}.")


def axis_of_hidden(batch: Mapping[str, Any], positions: PositionRule, *, task: Task, of_decoder: bool) -> str:
    """What hidden states run along: "tokens", "decoder", "frames", or "all" (the same number for every example)."""
    if of_decoder and (task.has_decoder or batch.get("decoder_input_ids") is not None):
        return "decoder"
    if _ids(batch) is not None:
        return "tokens"
    return "all" if positions.keep(batch) is None else "frames"


def mask_of(axis: str, batch: Mapping[str, Any]) -> Tensor | None:
    """`[b t]`, or `[b choices t]`, bool on the CPU: which positions are real; None: not known from the batch alone."""
    if axis == "decoder":
        return real_positions("decoder", batch)
    ids = _ids(batch)
    if axis != "tokens" or ids is None:
        return None
    mask = batch.get(MASK)
    if mask is None or mask.dim() == 4:
        return torch.ones(ids.shape, dtype=torch.bool)
    return mask.bool().cpu()


def cut_hidden(x: Tensor, mask: Tensor | None, pools: str | None, examples: int) -> tuple[Tensor, np.ndarray]:
    """`[m t d]` → `[p d]` and how many positions each example has `[b]`; of what is pooled, a vector for each of m.

    Raises:
        DataError: hidden states at other positions than the batch has.
    """
    flat = None if mask is None else mask.flatten(0, -2).to(x.device)
    if flat is not None and flat.shape != x.shape[:2]:
        raise DataError(
            f"the teacher's hidden states are at {list(x.shape[:2])} [examples, positions], the batch has "
            f"{list(flat.shape)}. A cache needs one for each position of the input (no virtual tokens)."
        )
    if pools is not None:
        return _pooled(x, flat, pools), np.full(examples, x.shape[0] // examples, dtype=np.int64)
    if mask is None or flat is None:
        return x.flatten(0, 1), np.full(examples, x.shape[0] * x.shape[1] // examples, dtype=np.int64)
    return x[flat], mask.flatten(1).sum(1).cpu().numpy()


def _pooled(x: Tensor, keep: Tensor | None, how: str) -> Tensor:
    """`[m d]`: the first or last position that is real, or the mean of all; 0 where none is."""
    x = in_full_precision(x)
    if keep is None:
        return x.mean(1) if how == "mean" else x[:, 0] if how == "first" else x[:, -1]
    if how == "mean":
        return x.masked_fill(~keep[..., None], 0).sum(1) / keep.sum(1, keepdim=True).clamp(min=1)
    positions = torch.arange(keep.shape[1], device=x.device)
    chosen = torch.where(keep, positions, keep.shape[1] - 1).amin(1) if how == "first" else (keep * positions).amax(1)
    return x[torch.arange(x.shape[0], device=x.device), chosen].masked_fill(~keep.any(1)[:, None], 0)


def lay_hidden(rows: Tensor, counts: np.ndarray, kept: StoredActivation, batch: Mapping[str, Any]) -> Tensor:
    """`[p d]` → `[b t d]` with 0 where nothing belongs (of choices `[b choices·t d]`); pooled: `[b r d]`.

    Raises:
        TeacherError: an example has another number of positions than the cache holds of it.
    """
    mask = None if kept.pools else mask_of(kept.axis, batch)
    if mask is not None:
        return lay(rows, counts, mask.flatten(1), "input")
    if kept.axis == "frames" and not kept.pools:
        return lay(rows, counts, None, "frames")
    if len(set(counts.tolist())) > 1:
        raise TeacherError(
            f"the cache holds {kept} of the examples of this batch at {sorted(set(counts.tolist()))} positions, and no "
            "mask says which are real. Put examples of one size into a batch."
        )
    return rows.view(len(counts), -1, rows.shape[-1])


def shown(
    laid: Tensor, kept: StoredActivation, batch: Mapping[str, Any], positions: PositionRule, counts: Tensor | None
) -> Tensor:
    """What `lay` gave as the teacher's own hidden states would be: `[m t d]` in full precision.

    Args:
        batch: as the teacher reads it.
        positions: of the student.
        counts: `[b]` of frames.

    Raises:
        TeacherError: other frames than the cache holds.
    """
    x = laid.float()
    if kept.pools:
        keep = positions.keep(batch)
        vectors = x.flatten(0, 1)[:, None]  # where every position holds it, any way of pooling gives it back
        return vectors if keep is None else vectors.expand(-1, keep.shape[1], -1)
    if kept.axis == "frames":
        keep = positions.keep(batch)
        if keep is None:
            raise TeacherError(
                f"the cache holds {kept} at frames, and the student has no rule that says which are real."
            )
        assert counts is not None  # they come with frames
        check_lengths(keep.sum(1).cpu().numpy(), counts.cpu().numpy())
        return lengthened(x, keep.shape[1])
    ids = _ids(batch) if kept.axis == "tokens" else None
    return x if ids is None else x.view(-1, ids.shape[-1], x.shape[-1])


def stored(rows: Tensor, kept: StoredActivation, dtype: str) -> np.ndarray:
    """`[p d]` as it lies on the disk.

    Raises:
        SettingError: numbers that the dtype cannot hold. TeacherError: NaN or infinity.
    """
    rows = rows.detach()
    if not bool(rows.isfinite().all()):
        raise TeacherError(
            f"the teacher's {kept} hold NaN or infinity. Look at the input; a half-precision teacher may overflow: try "
            "dtype='float32' or 'bfloat16'."
        )
    narrow = rows.to(DTYPES[dtype]).cpu()
    if bool(narrow.isinf().any()):
        raise SettingError(
            f"the teacher's {kept} reach {rows.abs().max().item():.3g}, {dtype} ends at "
            f"{torch.finfo(DTYPES[dtype]).max:.3g}. Pass inside_dtype='bfloat16' or 'float32'."
        )
    return narrow.view(torch.uint16).numpy() if dtype == "bfloat16" else narrow.numpy()


def as_tensor(values: np.ndarray, dtype: str) -> Tensor:
    """One field as it was read."""
    tensor = torch.from_numpy(values)
    return tensor.view(torch.bfloat16) if dtype == "bfloat16" else tensor


def _ids(batch: Mapping[str, Any]) -> Tensor | None:
    if batch.get("input_ids") is not None:
        return batch["input_ids"]
    embedded = batch.get("inputs_embeds")
    return None if embedded is None else embedded[..., 0]
