"""How much heads, neurons and channels matter on calibration batches, and which of them to keep.

"activation": the size of a unit's contribution to the matrices that read it, after Minitron (Muralidharan et al. 2024).
Minitron uses the size of the unit alone; a unit that nothing reads does not matter, so here the matrix counts too.
"gradient": the mean over examples of the absolute derivative of the loss by a gate on the unit, as Michel et al. 2019
use for heads.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from transformers.utils import ModelOutput

from hf_distill._types import Batch
from hf_distill.errors import DataError
from hf_distill.students.narrow.units import Axis, UnitGroup

Importance = Literal["activation", "gradient"]
Forward = Callable[[Batch], ModelOutput]


class UnitScores:
    """Adds up the score of every unit of some groups, batch by batch."""

    def __init__(self, model: nn.Module, groups: list[UnitGroup]) -> None:
        self.groups = groups
        self._weights = dict(model.named_parameters())
        self._readers: dict[str, tuple[Axis, int]] = {
            axis.name: (axis, group.units) for group in groups for axis in group.readers
        }
        self._sums: dict[str, Tensor] = {}

    def result(self) -> list[Tensor]:
        """Return the scores of each group, `[units]` in float64; larger is more important.

        Where several matrices read a group (channels; heads that share a table of positions), each matrix gives shares
        of its input, so that a large matrix does not decide alone.
        """
        totals = []
        for group in self.groups:
            total = torch.zeros(group.units)
            for axis in group.readers:
                if axis.name not in self._sums:
                    raise DataError(f"narrow: no batch of data= reaches {axis.name}, so its units have no score.")
                scores = self._sums[axis.name]
                total = total + scores / scores.sum().clamp_min(torch.finfo(torch.float64).tiny)
            totals.append(total.double())
        return totals

    def add(self, batch: Batch, forward: Forward, importance: Importance) -> None:
        """Run the model on a batch and add its scores."""
        if importance == "gradient":
            self._add_gradients(batch, forward)
        else:
            self._add_activations(batch, forward)

    def _add_activations(self, batch: Batch, forward: Forward) -> None:
        """Add the sum over positions of the squared length of each unit's contribution to the matrix."""

        def see(name: str, tensor: Tensor) -> Tensor:
            axis, units = self._readers[name]
            x = axis.split(tensor.detach(), units).float()
            x = x[attended(batch, name, len(x)).to(x.device)]
            w = axis.split(self._weights[name].detach().float().movedim(axis.dim, -1), units)
            moments = torch.einsum("nous,nour->ousr", x, x)
            self._add(name, torch.einsum("vous,ousr,vour->u", w, moments, w).clamp_min(0))
            return tensor

        with torch.no_grad(), self._hooked(see):
            forward(batch)

    def _add_gradients(self, batch: Batch, forward: Forward) -> None:
        """Add the sum over examples of the absolute derivative of the loss by each unit's gate."""
        gates: dict[str, Tensor] = {}
        examples = next((len(value) for value in batch.values() if isinstance(value, Tensor) and value.dim()), 1)

        def see(name: str, tensor: Tensor) -> Tensor:
            axis, units = self._readers[name]
            rows = examples if tensor.numel() % (examples * axis.blocks * units * axis.size) == 0 else 1
            if name not in gates:
                gates[name] = torch.ones(rows, 1, 1, units, 1, device=tensor.device, requires_grad=True)
            gated = tensor.reshape(rows, -1, axis.blocks, units, axis.size) * gates[name].to(tensor.dtype)
            return gated.reshape(tensor.shape)

        with torch.enable_grad(), self._hooked(see):
            loss = getattr(forward(batch), "loss", None)
        if loss is None:
            raise DataError("narrow: importance='gradient' needs a loss. Pass data= with labels, or use 'activation'.")
        gradients = torch.autograd.grad(loss * examples, list(gates.values()), allow_unused=True)
        for name, gradient in zip(gates, gradients, strict=True):
            units = self._readers[name][1]
            self._add(name, torch.zeros(units) if gradient is None else gradient.abs().sum(0).flatten())

    def _hooked(self, see: Callable[[str, Tensor], Tensor]) -> _MatrixInputs:
        return _MatrixInputs({id(self._weights[name]): name for name in self._readers}, see)

    def _add(self, name: str, scores: Tensor) -> None:
        before = self._sums.get(name, torch.zeros(self._readers[name][1], dtype=torch.float64))
        self._sums[name] = before + scores.double().cpu()


class _MatrixInputs(TorchFunctionMode):
    """Replaces the input of every matrix in `weights` (by id) by the result of `see`."""

    def __init__(self, weights: dict[int, str], see: Callable[[str, Tensor], Tensor]) -> None:
        super().__init__()
        self.weights = weights
        self.see = see

    def __torch_function__(
        self,
        func: Callable[..., object],
        types: object,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> object:
        place = {F.linear: 0, torch.addmm: 1}.get(func)
        if place is not None and len(args) > place + 1 and id(args[place + 1]) in self.weights:
            changed = self.see(self.weights[id(args[place + 1])], args[place])
            args = (*args[:place], changed, *args[place + 1 :])
        return func(*args, **(kwargs or {}))


def attended(batch: Batch, name: str, rows: int) -> Tensor:
    """Return which positions are not padding, `[rows]`; all, if the batch has no mask of this many positions.

    Args:
        batch: the inputs of the model.
        name: the parameter that reads the positions; a decoder's uses the decoder's mask.
        rows: number of positions.
    """
    mask = batch.get("decoder_attention_mask" if "decoder" in name.split(".") else "attention_mask")
    if isinstance(mask, Tensor) and mask.dim() <= 3 and mask.numel() == rows:
        return mask.reshape(-1).bool()
    return torch.ones(rows, dtype=torch.bool)


def keep_best(scores: Tensor, group: UnitGroup, keep: int, key_value_heads: int) -> Tensor:
    """Return the units with the highest scores, in their old order; of equal units the first.

    Where heads share key-value heads, the best heads of each are taken, and then the key-value heads with the highest
    sums. A grouped convolution keeps equally many channels of each group.

    Args:
        scores: `[units]`.
        group: the units.
        keep: number of units to keep.
        key_value_heads: number of key-value heads to keep, with equally many heads each.
    """
    if group.parts > 1:
        width, each = group.units // group.parts, keep // group.parts
        parts = enumerate(scores.reshape(group.parts, width))
        return torch.cat([_best(part, each) + place * width for place, part in parts])
    if group.shares > 1:
        blocks = scores.reshape(-1, group.shares)
        inside = [_best(block, keep // key_value_heads) for block in blocks]
        totals = torch.stack([block[best].sum() for block, best in zip(blocks, inside, strict=True)])
        return torch.cat([block * group.shares + inside[block] for block in _best(totals, key_value_heads).tolist()])
    return _best(scores, keep)


def _best(scores: Tensor, keep: int) -> Tensor:
    return scores.argsort(descending=True, stable=True)[:keep].sort().values
