"""Keeping some units of a model's tensors: pure slicing of named tensors. It chooses no units and builds no model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from hf_distill.students.units import Axis, Group

Cut = tuple[Group, Tensor]  # a group, and its kept units `[kept]` in the order they shall have


def cut(tensors: Mapping[str, Tensor], cuts: Iterable[Cut]) -> dict[str, Tensor]:
    """The tensors that change, cut. Names that no group speaks of are left out; so are aliases that are not named."""
    done: dict[str, Tensor] = {}
    for group, kept in cuts:
        for axis in sorted(group.axes, key=lambda one: one.convolved):
            if axis.name in tensors:
                done[axis.name] = _cut_axis(done.get(axis.name, tensors[axis.name]), axis, group, kept)
    for name, tensor in list(done.items()):
        norm = _norm_beside(name)
        if norm in tensors:
            done[norm] = _rescaled(done.get(norm, tensors[norm]), tensor, tensors[name])
    return done


def _cut_axis(tensor: Tensor, axis: Axis, group: Group, kept: Tensor) -> Tensor:
    if axis.convolved:  # its rows are cut already, in equal numbers from each part
        width = tensor.shape[axis.dim]
        inside = (kept % width).reshape(group.parts, -1).to(tensor.device)
        rows = tensor.reshape(group.parts, -1, *tensor.shape[1:])
        parts = [part.index_select(axis.dim, index) for part, index in zip(rows, inside, strict=True)]
        return torch.cat(parts)
    units = group.units
    if axis.shared:
        kept = kept.reshape(-1, len(kept) // _shared_kept(group, kept))[:, 0] // group.shares
        units = group.units // group.shares
    return tensor.index_select(axis.dim, axis.index(kept, units).to(tensor.device))


def _shared_kept(group: Group, kept: Tensor) -> int:
    return len((kept // group.shares).unique())


def _norm_beside(name: str) -> str:
    """A weight that is stored as direction and length: the name of the length."""
    if name.endswith("parametrizations.weight.original1"):
        return name[:-1] + "0"
    return name.removesuffix("_v") + "_g" if name.endswith("weight_v") else ""


def _rescaled(length: Tensor, direction: Tensor, before: Tensor) -> Tensor:
    """The length that gives the weight its old values, now that part of the direction is gone."""
    if length.dim() != direction.dim():
        return length
    dims = [dim for dim, size in enumerate(length.shape) if size == 1]
    return length * direction.norm(dim=dims, keepdim=True) / before.norm(dim=dims, keepdim=True)
