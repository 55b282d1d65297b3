"""How much heads, neurons and channels matter on calibration batches: scores, and which to keep. It cuts nothing.

"activation": the size of what a unit gives to the matrices that read it, in the manner of Minitron (Muralidharan et al.
2024), which takes the size of the unit alone; what nobody reads does not matter, so here the matrix counts too.
"gradient": how the loss changes when the unit is gated (Michel et al. 2019: the mean over examples of the absolute
derivative of the loss by the gate), here for all kinds of units.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from hf_distill.errors import DataError, SettingError, did_you_mean
from hf_distill.students.narrow.units import Axis, Group

IMPORTANCE = ("activation", "gradient")
Batch = Mapping[str, Any]


class _Readers(TorchFunctionMode):
    """Shows the input of every matrix that reads units, and may change it."""

    def __init__(self, weights: dict[int, str], see: Callable[[str, Tensor], Tensor]) -> None:
        super().__init__()
        self.weights = weights
        self.see = see

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        place = {F.linear: 0, torch.addmm: 1}.get(func)
        if place is not None and len(args) > place + 1 and id(args[place + 1]) in self.weights:
            changed = self.see(self.weights[id(args[place + 1])], args[place])
            args = (*args[:place], changed, *args[place + 1 :])
        return func(*args, **(kwargs or {}))


def scores_of(
    model: nn.Module, groups: list[Group], batches: Iterable[Batch], forward: Callable[[Batch], Any], importance: str
) -> list[Tensor]:
    """For each group the score `[units]` of its units, in float64, larger is more important.

    A group that several matrices read (the channels; heads that share a table of positions) gets from each the units'
    shares of what it reads, so that a large matrix does not decide alone.
    """
    tables = dict(model.named_parameters())
    readers = {axis.name: axis for group in groups for axis in group.readers}
    units = {axis.name: group.units for group in groups for axis in group.readers}
    seen: dict[str, Tensor] = {}
    count = 0
    measure = _by_gradient if importance == "gradient" else _by_activation
    for batch in batches:
        measure(tables, readers, units, batch, forward, seen)
        count += 1
    if not count:
        raise DataError("narrow: data= gave no batch.")
    return [sum((_share(seen, axis) for axis in group.readers), torch.zeros(group.units)).double() for group in groups]


def _share(seen: dict[str, Tensor], axis: Axis) -> Tensor:
    if axis.name not in seen:
        raise DataError(f"narrow: no batch reaches {axis.name}, so nothing is known of the units that it reads.")
    return seen[axis.name] / seen[axis.name].sum().clamp_min(torch.finfo(torch.float64).tiny)


def _split(tensor: Tensor, axis: Axis, units: int) -> Tensor:
    """`[... length]` as `[rows, outer, units, size]`."""
    return tensor.reshape(-1, axis.outer, units, axis.size)


def _by_activation(
    tables: Mapping[str, Tensor], readers: dict[str, Axis], units: dict[str, int], batch: Batch,
    forward: Callable[[Batch], Any], seen: dict[str, Tensor],
) -> None:  # fmt: skip
    """Adds, for each unit, the sum over positions of the squared length of what it gives to the matrix."""

    def see(name: str, tensor: Tensor) -> Tensor:
        axis = readers[name]
        x = _split(tensor.detach(), axis, units[name]).float()
        x = x[attended(batch, name, len(x)).to(x.device)]
        w = tables[name].detach().float().movedim(axis.dim, -1)
        w = w.reshape(-1, axis.outer, units[name], axis.size)
        moments = torch.einsum("nous,nour->ousr", x, x)
        given = torch.einsum("vous,ousr,vour->u", w, moments, w).clamp_min(0)
        seen[name] = seen.get(name, torch.zeros(units[name], dtype=torch.float64)) + given.double().cpu()
        return tensor

    with torch.no_grad(), _Readers({id(tables[name]): name for name in readers}, see):
        forward(batch)


def _by_gradient(
    tables: Mapping[str, Tensor], readers: dict[str, Axis], units: dict[str, int], batch: Batch,
    forward: Callable[[Batch], Any], seen: dict[str, Tensor],
) -> None:  # fmt: skip
    """Adds, for each unit, the sum over examples of the absolute derivative of the loss by its gate."""
    gates: dict[str, Tensor] = {}
    examples = next((len(value) for value in batch.values() if isinstance(value, Tensor) and value.dim()), 1)

    def see(name: str, tensor: Tensor) -> Tensor:
        axis = readers[name]
        rows = examples if tensor.numel() % (examples * axis.outer * units[name] * axis.size) == 0 else 1
        if name not in gates:
            gates[name] = torch.ones(rows, 1, 1, units[name], 1, device=tensor.device, requires_grad=True)
        gated = tensor.reshape(rows, -1, axis.outer, units[name], axis.size) * gates[name].to(tensor.dtype)
        return gated.reshape(tensor.shape)

    with torch.enable_grad(), _Readers({id(tables[name]): name for name in readers}, see):
        loss = getattr(forward(batch), "loss", None)
    if loss is None:
        raise DataError(
            "narrow: importance='gradient' needs a loss, and the teacher gave none for a batch with the columns "
            f"{', '.join(map(str, batch))}. Give batches with labels, or say importance='activation'."
        )
    names = list(gates)
    gradients = torch.autograd.grad(loss * examples, [gates[name] for name in names], allow_unused=True)
    for name, gradient in zip(names, gradients, strict=True):
        found = torch.zeros(units[name]) if gradient is None else gradient.abs().sum(0).flatten()
        seen[name] = seen.get(name, torch.zeros(units[name], dtype=torch.float64)) + found.double().cpu()


def attended(batch: Batch, name: str, rows: int) -> Tensor:
    """Positions that are no padding, `[rows]`; all where the batch does not say so for this many."""
    side = "decoder_attention_mask" if "decoder" in name.split(".") else "attention_mask"
    mask = batch.get(side)
    if isinstance(mask, Tensor) and mask.dim() <= 3 and mask.numel() == rows:
        return mask.reshape(-1).bool()
    return torch.ones(rows, dtype=torch.bool)


def keep_best(scores: Tensor, group: Group, keep: int, blocks: int) -> Tensor:
    """The `keep` units with the highest scores, in their old order; of equal ones the first.

    Where heads share key-value heads, `blocks` of these are kept, with equally many heads each: first the best heads
    inside each, then the blocks with the highest sums. A convolution in groups keeps equally many of each.
    """
    if group.parts > 1:
        width, each = group.units // group.parts, keep // group.parts
        best = [_best(part, each) + place * width for place, part in enumerate(scores.reshape(group.parts, width))]
        return torch.cat(best)
    if group.shares > 1:
        inside = [_best(block, keep // blocks) for block in scores.reshape(-1, group.shares)]
        totals = torch.stack([scores.reshape(-1, group.shares)[i][one].sum() for i, one in enumerate(inside)])
        return torch.cat([int(block) * group.shares + inside[int(block)] for block in _best(totals, blocks)])
    return _best(scores, keep)


def _best(scores: Tensor, keep: int) -> Tensor:
    return scores.argsort(descending=True, stable=True)[:keep].sort().values


def check_importance(importance: Any) -> None:
    """Raise SettingError for a name that is none."""
    if importance not in IMPORTANCE:
        hint = did_you_mean(importance, IMPORTANCE)
        raise SettingError(f"narrow: importance={importance!r}: allowed are {' and '.join(IMPORTANCE)}.{hint}")


def on_device(batch: Any, device: torch.device) -> dict[str, Any]:
    """A batch as a dict of tensors where the model is. Raises DataError for anything else."""
    if not isinstance(batch, Mapping) and not hasattr(batch, "keys"):
        raise DataError(
            f"narrow: data= gave a {type(batch).__name__}. Give an iterable of batches: dicts of tensors, as a "
            "collator makes them."
        )
    batch = {str(name): batch[name] for name in batch.keys()}  # noqa: SIM118  # BatchEncoding is no dict
    return {name: value.to(device) if isinstance(value, Tensor) else copy.copy(value) for name, value in batch.items()}
