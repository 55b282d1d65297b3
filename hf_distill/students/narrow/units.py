"""The heads, neurons and channels of a model, and where each lies in which tensor. It chooses and cuts none."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from hf_distill.errors import TeacherError
from hf_distill.students.narrow.axes import Layout, Place
from hf_distill.students.narrow.dataflow import Dataflow


@dataclass(frozen=True)
class Axis:
    """One axis of a tensor: `outer` blocks, each of all units, each unit of `size` numbers.

    `shared`: its units are the key-value heads, of which there are fewer. `convolved`: channels of a convolution in
    groups, counted inside their group.
    """

    name: str
    dim: int
    outer: int = 1
    size: int = 1
    shared: bool = False
    convolved: bool = False

    def index(self, kept: Tensor, units: int) -> Tensor:
        """Positions on the axis of the units `kept`, out of `units`."""
        blocks = torch.arange(self.outer)[:, None, None] * units * self.size
        return (blocks + kept[None, :, None] * self.size + torch.arange(self.size)).flatten()


@dataclass
class Group:
    """Units that are cut together: the heads of one attention, the neurons of one layer, all channels, all tokens.

    `shares`: so many heads use one key-value head. `parts`: the units are kept in equal numbers from so many blocks
    (a convolution in groups). `readers`: weights that read the units.
    """

    kind: str
    name: str
    units: int
    axes: list[Axis] = field(default_factory=list)
    readers: list[Axis] = field(default_factory=list)
    shares: int = 1
    parts: int = 1


def find_groups(layout: Layout, dataflow: Dataflow, kinds: set[str]) -> list[Group]:
    """All units of the kinds asked for, grouped as they are cut."""
    found: list[Group] = []
    inner: set[Place] = set()
    _check_seen(layout, dataflow)
    if kinds & {"heads", "hidden"} and "heads" in layout.sizes:
        heads = _head_groups(layout, dataflow)
        inner = {(axis.name, axis.dim) for group in heads for axis in group.axes}
        found += heads if "heads" in kinds else []
    if "intermediate" in kinds:
        found += _neuron_groups(layout, dataflow)
    if "hidden" in kinds:
        found.append(_channels(layout, dataflow, inner))
    return found


def _check_seen(layout: Layout, dataflow: Dataflow) -> None:
    """What no forward showed cannot be told apart: its channels may be channels of the hidden states, or of heads."""
    places = {**layout.hidden, **layout.heads, **layout.groups, **layout.intermediate}
    unseen = sorted({name for name, _ in places if name in dataflow.matrices} - dataflow.seen)
    if unseen:
        raise TeacherError(
            f"narrow: the first batch of data does not reach {', '.join(unseen[:4])} of the teacher, so what lies in "
            "it cannot be told. Give batches that use all of the model."
        )


def _head_groups(layout: Layout, dataflow: Dataflow) -> list[Group]:
    heads, size = layout.sizes["heads"].value, layout.head_size or 1
    kv = layout.sizes["groups"].value if "groups" in layout.sizes and layout.groups else heads
    places = dict(layout.heads)
    if layout.head_setting is None:
        places |= {place: layout.hidden.get(place, heads * size) for place in _inner_axes(dataflow)}
    read = {dataflow.root(name) for name in dataflow.reading}
    groups: dict[str, Group] = {}
    for (name, dim), length in {**places, **layout.groups}.items():
        root = dataflow.root(dataflow.owner.get(name, name))
        if root not in read:
            if layout.head_setting is None and (name, dim) not in layout.heads:
                continue
            raise TeacherError(
                f"narrow: {name} has an axis of heads, and in a forward on the first batch no attention that uses it "
                "was seen. Either the batch does not reach it, or its attention is computed in a way that cannot be "
                "followed."
            )
        shared = (name, dim) in layout.groups
        units = kv if shared else heads
        unit = size if length % (units * size) == 0 else 1
        axis = Axis(name, dim, outer=length // (units * unit), size=unit, shared=shared)
        group = groups.setdefault(root, Group("heads", "", heads, shares=heads // kv))
        group.axes.append(axis)
        if name in dataflow.reading and dataflow.input_axis.get(name) == dim:
            group.readers.append(axis)
            group.name = ", ".join(filter(None, (group.name, name.rpartition(".")[0])))
    return list(groups.values())


def _inner_axes(dataflow: Dataflow) -> list[Place]:
    """Outputs of what asks and inputs of what reads, for weights with an input and an output."""
    asking = [(name, 1 - dataflow.input_axis[name]) for name in sorted(dataflow.asking) if name in dataflow.input_axis]
    biases = [(bias, 0) for bias, weight in dataflow.owner.items() if weight in dataflow.asking]
    return asking + biases + [(name, dataflow.input_axis[name]) for name in sorted(dataflow.reading)]


def _neuron_groups(layout: Layout, dataflow: Dataflow) -> list[Group]:
    places = layout.intermediate
    readers = [(name, dim) for name, dim in places if dataflow.input_axis.get(name) == dim and name in dataflow.feeding]
    for name, _ in readers:
        dataflow.join([name, *(source for source in dataflow.feeding[name] if _has(source, places))])
    groups: dict[str, Group] = {
        dataflow.root(name): Group("intermediate", "", places[name, dim]) for name, dim in readers
    }
    for (name, dim), length in places.items():
        group = groups.get(dataflow.root(dataflow.owner.get(name, name)))
        if group is None:
            raise TeacherError(
                f"narrow: {name} has an axis of neurons, and in a forward on the first batch no matrix that reads them "
                "was seen. Either the batch does not reach it, or its layers are computed in a way that cannot be "
                "followed."
            )
        axis = Axis(name, dim, outer=length // group.units)
        group.axes.append(axis)
        if (name, dim) in readers:
            group.readers.append(axis)
            group.name = ", ".join(filter(None, (group.name, name.rpartition(".")[0])))
    return list(groups.values())


def _has(name: str, places: Mapping[Place, int]) -> bool:
    return any(name == other for other, _ in places)


def _channels(layout: Layout, dataflow: Dataflow, inner: set[Place]) -> Group:
    units = layout.sizes["hidden"].value
    group = Group("hidden", "hidden states", units)
    for (name, dim), length in layout.hidden.items():
        if (name, dim) in inner:
            continue
        if length < units:
            group.parts = units // length
            group.axes.append(Axis(name, dim, convolved=True))
            continue
        axis = Axis(name, dim, outer=length // units)
        group.axes.append(axis)
        if dataflow.input_axis.get(name) == dim and name in dataflow.feeding:
            group.readers.append(axis)
    return group


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
