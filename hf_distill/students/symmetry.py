"""Whether units are what they were taken for: exchanging them must change nothing. Tried with random weights.

A wrong guess about a layout (how queries, keys and values lie in one matrix, say) would give a student that runs and
computes nonsense. So every layout is tried before it is cut.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from hf_distill.errors import TeacherError
from hf_distill.students.cutting import Cut, cut
from hf_distill.students.units import Group

_TOLERANCE = 1e-3  # of float32, through many layers; a wrong layout changes the outputs by their own size


def check_exchangeable(teacher: nn.Module, groups: list[Group], forward: Callable[[Any], Any]) -> None:
    """Raise TeacherError where exchanging the units of a kind changes what the model computes."""
    model = shaken(teacher)
    generator = torch.Generator().manual_seed(0)
    before = outputs_of(forward(model))
    named = dict([*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)])
    for kind in sorted({group.kind for group in groups}):
        cuts = [(group, _shuffled(group, generator)) for group in groups if group.kind == kind]
        values = {name: tensor.data for name, tensor in named.items()}
        changed = cut(values, cuts)
        for name, tensor in changed.items():
            named[name].data = tensor
        after = outputs_of(forward(model))
        for name in changed:
            named[name].data = values[name]
        _compare(before, after, cuts if kind == "hidden" else [], kind, type(teacher).__name__)


def shaken(teacher: nn.Module) -> Any:
    """A float32 copy with random weights: large enough that every part matters."""
    model = copy.deepcopy(teacher).float().eval()
    shake(model)
    return model


def shake(model: nn.Module) -> None:
    """Random weights in place, from a generator of its own."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator).to(parameter.device)
            if parameter.dim() < 2:
                parameter.copy_(1 + 0.5 * noise)
            else:
                parameter.copy_(noise / parameter[0].numel() ** 0.5)


def _shuffled(group: Group, generator: torch.Generator) -> Tensor:
    """Blocks stay whole where the units lie in blocks: heads of one key-value head, channels of one convolution."""
    if group.parts > 1:
        width = group.units // group.parts
        return torch.cat([part * width + torch.randperm(width, generator=generator) for part in range(group.parts)])
    blocks = torch.randperm(group.units // group.shares, generator=generator)
    inside = [torch.randperm(group.shares, generator=generator) for _ in blocks]
    return torch.cat([block * group.shares + one for block, one in zip(blocks, inside, strict=True)])


def outputs_of(given: Any) -> dict[str, Tensor]:
    """The floating-point tensors among what a model gives."""
    values = given.items() if hasattr(given, "items") else enumerate(given)
    return {str(name): one for name, one in values if isinstance(one, Tensor) and one.is_floating_point()}


def _compare(before: dict[str, Tensor], after: dict[str, Tensor], channels: list[Cut], kind: str, model: str) -> None:
    for name, one in before.items():
        errors = [difference(after[name], one)]
        for group, order in channels:
            if one.shape[-1:] == (group.units,):
                errors.append(difference(after[name], one[..., order.to(one.device)]))
        if not min(errors) < _TOLERANCE:
            raise TeacherError(
                f"narrow: the {kind} units of {model} cannot be cut: exchanging some of them changes its {name} "
                f"(relative difference {min(errors):.1g}). They lie fused in a layout that is not known here, or each "
                "has a place that matters (convolutions in groups, gates by head)."
            )


def difference(one: Tensor, two: Tensor) -> float:
    """Relative difference of two tensors; infinite where their shapes, or the places that are not finite, differ."""
    finite = torch.isfinite(two)
    if one.shape != two.shape or not torch.equal(finite, torch.isfinite(one)):
        return float("inf")
    one, two = one[finite], two[finite]
    return float((one - two).norm() / two.norm().clamp_min(1e-12))
