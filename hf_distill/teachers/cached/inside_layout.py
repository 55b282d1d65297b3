"""Where hidden states belong to an example: cut out of a batch as it is padded, laid into another. As `layout.py` does.

Axes: b batch (m = b, or b · choices), t time, d width; p positions of all examples one after the other.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hf_distill.errors import DataError, SettingError, TeacherError
from hf_distill.functional.rows import in_full_precision
from hf_distill.inside.positions import Positions
from hf_distill.teachers.cached import layout
from hf_distill.teachers.cached.inside import DTYPES, KeptRead
from hf_distill.teachers.cached.keys import MASK


def axis_of_hidden(batch: Mapping[str, Any], positions: Positions, *, kind: str, of_decoder: bool) -> str:
    """What hidden states run along: "tokens", "decoder", "frames", or "all" (the same number for every example)."""
    if of_decoder and (kind == "seq2seq" or batch.get("decoder_input_ids") is not None):
        return "decoder"
    if _ids(batch) is not None:
        return "tokens"
    return "all" if positions.keep(batch) is None else "frames"


def mask_of(axis: str, batch: Mapping[str, Any]) -> Tensor | None:
    """`[b t]`, or `[b choices t]`, bool on the CPU: which positions are real; None: not known from the batch alone."""
    if axis == "decoder":
        return layout.real_positions("decoder", batch)
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


def lay_hidden(rows: Tensor, counts: np.ndarray, kept: KeptRead, batch: Mapping[str, Any]) -> Tensor:
    """`[p d]` → `[b t d]` with 0 where nothing belongs (of choices `[b choices·t d]`); pooled: `[b r d]`.

    Raises:
        TeacherError: an example has another number of positions than the cache holds of it.
    """
    mask = None if kept.pools else mask_of(kept.axis, batch)
    if mask is not None:
        return layout.lay(rows, counts, mask.flatten(1), "input")
    if kept.axis == "frames" and not kept.pools:
        return layout.lay(rows, counts, None, "frames")
    if len(set(counts.tolist())) > 1:
        raise TeacherError(
            f"the cache holds {kept} of the examples of this batch at {sorted(set(counts.tolist()))} positions, and no "
            "mask says which are real. Put examples of one size into a batch."
        )
    return rows.view(len(counts), -1, rows.shape[-1])


def shown(
    laid: Tensor, kept: KeptRead, batch: Mapping[str, Any], positions: Positions, counts: Tensor | None
) -> Tensor:
    """What `lay` gave as the teacher's own hidden states would be: `[m t d]` in full precision.

    Args:
        batch: as the teacher reads it. positions: of the student. counts: `[b]` of frames.

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
        layout.refuse_other_lengths(keep.sum(1).cpu().numpy(), counts.cpu().numpy())
        return layout.lengthened(x, keep.shape[1])
    ids = _ids(batch) if kept.axis == "tokens" else None
    return x if ids is None else x.view(-1, ids.shape[-1], x.shape[-1])


def stored(rows: Tensor, kept: KeptRead, dtype: str) -> np.ndarray:
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
