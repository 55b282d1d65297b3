"""The heads, neurons, channels and tokens of a model: where they lie, cutting them, and the permutation check."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from transformers.utils import ModelOutput

from hf_distill.errors import TeacherError
from hf_distill.students.building import all_tensors
from hf_distill.students.narrow.dataflow import Dataflow
from hf_distill.students.narrow.layout import Kind, Layout, Place

TOLERANCE = 1e-3  # of float32, through many layers; a wrong layout changes the outputs by their own size


@dataclass(frozen=True)
class Axis:
    """One axis of a tensor, made of blocks that each hold all units.

    Attributes:
        name: the tensor's name.
        dim: the axis.
        blocks: number of blocks.
        size: length of one unit.
        shared: whether its units are the key-value heads, of which there are fewer.
        convolved: whether it holds the channels of one group of a grouped convolution.
    """

    name: str
    dim: int
    blocks: int = 1
    size: int = 1
    shared: bool = False
    convolved: bool = False

    def index(self, kept: Tensor, units: int) -> Tensor:
        """Return the positions on the axis of the units `kept`, out of `units`."""
        starts = torch.arange(self.blocks)[:, None, None] * units * self.size
        return (starts + kept[None, :, None] * self.size + torch.arange(self.size)).flatten()

    def split(self, tensor: Tensor, units: int) -> Tensor:
        """Return `[... length]` as `[rows, blocks, units, size]`."""
        return tensor.reshape(-1, self.blocks, units, self.size)


@dataclass
class UnitGroup:
    """Units that are cut together: the heads of one attention, the neurons of one layer, all channels, all tokens.

    Attributes:
        kind: the kind of unit.
        name: its name in the report.
        units: number of units.
        axes: every axis along which they lie.
        readers: the axes of the weights that read them.
        shares: number of heads that use one key-value head.
        parts: number of blocks that keep equally many units (the groups of a convolution).
    """

    kind: Kind
    name: str
    units: int
    axes: list[Axis] = field(default_factory=list)
    readers: list[Axis] = field(default_factory=list)
    shares: int = 1
    parts: int = 1

    def add(self, axis: Axis, *, reads: bool) -> None:
        """Add an axis, and name the group after the modules that read it."""
        self.axes.append(axis)
        if reads:
            self.readers.append(axis)
            self.name = ", ".join(filter(None, (self.name, axis.name.rpartition(".")[0])))


Cut = tuple[UnitGroup, Tensor]  # a group, and its kept units `[kept]` in the order of the student


def find_groups(layout: Layout, flow: Dataflow, kinds: set[Kind]) -> list[UnitGroup]:
    """Return all units of these kinds, grouped as they are cut.

    Raises:
        TeacherError: if the traced forward does not show which units belong together.
    """
    names = {name for kind, axes in layout.axes.items() if kind != "vocabulary" for name, _ in axes}
    unused = sorted((names & flow.matrices) - flow.used)
    if unused:
        raise TeacherError(
            f"narrow: the first batch of data does not use {', '.join(unused[:4])}. Pass another one first."
        )
    found: list[UnitGroup] = []
    inner: set[Place] = set()
    if kinds & {"heads", "hidden"} and "heads" in layout.sizes:
        heads = _head_groups(layout, flow)
        inner = {(axis.name, axis.dim) for group in heads for axis in group.axes}
        found += heads if "heads" in kinds else []
    if "intermediate" in kinds:
        found += _neuron_groups(layout, flow)
    if "hidden" in kinds:
        found.append(_channels(layout, flow, inner))
    return found


def _head_groups(layout: Layout, flow: Dataflow) -> list[UnitGroup]:
    heads, size = layout.sizes["heads"].value, layout.head_size or 1
    key_value_heads = layout.sizes["key_value_heads"].value if layout.axes["key_value_heads"] else heads
    places = dict(layout.axes["heads"])
    if layout.head_setting is None:
        places |= {place: layout.axes["hidden"].get(place, heads * size) for place in _attention_axes(flow)}
    read = {flow.root(name) for name in flow.attention_readers}
    groups: dict[str, UnitGroup] = {}
    for (name, dim), length in {**places, **layout.axes["key_value_heads"]}.items():
        root = flow.root(flow.weight_of.get(name, name))
        if root not in read:
            if layout.head_setting is None and (name, dim) not in layout.axes["heads"]:
                continue
            raise _not_traced(name, "heads", "attention that uses it")
        shared = (name, dim) in layout.axes["key_value_heads"]
        units = key_value_heads if shared else heads
        unit = size if length % (units * size) == 0 else 1
        axis = Axis(name, dim, blocks=length // (units * unit), size=unit, shared=shared)
        group = groups.setdefault(root, UnitGroup("heads", "", heads, shares=heads // key_value_heads))
        group.add(axis, reads=name in flow.attention_readers and flow.input_axis.get(name) == dim)
    return list(groups.values())


def _attention_axes(flow: Dataflow) -> list[Place]:
    """Return the output axes of queries, keys and values, and the input axes of the matrices that read the result."""
    outputs = [(name, 1 - flow.input_axis[name]) for name in sorted(flow.attention_inputs) if name in flow.input_axis]
    biases = [(bias, 0) for bias, weight in flow.weight_of.items() if weight in flow.attention_inputs]
    return outputs + biases + [(name, flow.input_axis[name]) for name in sorted(flow.attention_readers)]


def _neuron_groups(layout: Layout, flow: Dataflow) -> list[UnitGroup]:
    places = layout.axes["intermediate"]
    names = {name for name, _ in places}
    readers = [(name, dim) for name, dim in places if flow.reads(name, dim)]
    for name, _ in readers:
        flow.join([name, *(source for source in flow.feeding[name] if source in names)])
    groups = {flow.root(name): UnitGroup("intermediate", "", places[name, dim]) for name, dim in readers}
    for (name, dim), length in places.items():
        group = groups.get(flow.root(flow.weight_of.get(name, name)))
        if group is None:
            raise _not_traced(name, "neurons", "matrix that reads them")
        group.add(Axis(name, dim, blocks=length // group.units), reads=(name, dim) in readers)
    return list(groups.values())


def _not_traced(name: str, units: str, reader: str) -> TeacherError:
    return TeacherError(
        f"narrow: {name} has an axis of {units}, but the first batch shows no {reader}. Pass a batch that uses it; if "
        "that does not help, its layers cannot be followed."
    )


def _channels(layout: Layout, flow: Dataflow, inner: set[Place]) -> UnitGroup:
    group = UnitGroup("hidden", "", layout.sizes["hidden"].value)
    for (name, dim), length in layout.axes["hidden"].items():
        if (name, dim) in inner:
            continue
        if length < group.units:
            group.parts = group.units // length
            group.axes.append(Axis(name, dim, convolved=True))
        else:
            group.add(Axis(name, dim, blocks=length // group.units), reads=flow.reads(name, dim))
    group.name = "hidden states"
    return group


def cut(tensors: Mapping[str, Tensor], cuts: Iterable[Cut]) -> dict[str, Tensor]:
    """Return the tensors that change, with only their kept units."""
    done: dict[str, Tensor] = {}
    for group, kept in cuts:
        for axis in sorted(group.axes, key=lambda axis: axis.convolved):
            if axis.name in tensors:
                done[axis.name] = _cut_axis(done.get(axis.name, tensors[axis.name]), axis, group, kept)
    for name, tensor in list(done.items()):
        norm = _norm_beside(name)
        if norm in tensors:
            done[norm] = _rescaled(done.get(norm, tensors[norm]), tensor, tensors[name])
    return done


def _cut_axis(tensor: Tensor, axis: Axis, group: UnitGroup, kept: Tensor) -> Tensor:
    if axis.convolved:  # its rows are already cut, in equal numbers from each part
        width = tensor.shape[axis.dim]
        inside = (kept % width).reshape(group.parts, -1).to(tensor.device)
        rows = tensor.reshape(group.parts, -1, *tensor.shape[1:])
        return torch.cat([part.index_select(axis.dim, index) for part, index in zip(rows, inside, strict=True)])
    units = group.units
    if axis.shared:
        key_value_heads = kept // group.shares
        kept = key_value_heads.reshape(len(key_value_heads.unique()), -1)[:, 0]
        units = group.units // group.shares
    return tensor.index_select(axis.dim, axis.index(kept, units).to(tensor.device))


def _norm_beside(name: str) -> str:
    """Return the name of the length of a weight that is stored as direction and length."""
    if name.endswith("parametrizations.weight.original1"):
        return name[:-1] + "0"
    return name.removesuffix("_v") + "_g" if name.endswith("weight_v") else ""


def _rescaled(length: Tensor, direction: Tensor, before: Tensor) -> Tensor:
    """Return the length with which a cut direction gives the weight its old values."""
    if length.dim() != direction.dim():
        return length
    dims = [dim for dim, size in enumerate(length.shape) if size == 1]
    return length * direction.norm(dim=dims, keepdim=True) / before.norm(dim=dims, keepdim=True)


def check_permutations(
    teacher: nn.Module, groups: list[UnitGroup], forward: Callable[[nn.Module], ModelOutput]
) -> None:
    """Raise TeacherError if permuting the units of a kind changes the outputs of a copy with random weights."""
    model = randomized(teacher)
    generator = torch.Generator().manual_seed(0)
    before = float_outputs(forward(model))
    named = all_tensors(model)
    for kind in sorted({group.kind for group in groups}):
        cuts = [(group, _permutation(group, generator)) for group in groups if group.kind == kind]
        values = {name: tensor.data for name, tensor in named.items()}
        permuted = cut(values, cuts)
        for name, tensor in permuted.items():
            named[name].data = tensor
        after = float_outputs(forward(model))
        for name in permuted:
            named[name].data = values[name]
        for name, expected in before.items():
            errors = [difference(after[name], expected)]
            for group, order in cuts:
                if kind == "hidden" and expected.shape[-1:] == (group.units,):
                    errors.append(difference(after[name], expected[..., order.to(expected.device)]))
            if not min(errors) < TOLERANCE:
                raise TeacherError(
                    f"narrow: {kind}= cannot be cut in {type(teacher).__name__}: permuting its units changes {name} "
                    f"(relative difference {min(errors):.1g}): an unknown layout, or the order matters."
                )


def _permutation(group: UnitGroup, generator: torch.Generator) -> Tensor:
    """Return a random order that keeps blocks whole: heads of one key-value head, channels of one convolution."""
    if group.parts > 1:
        width = group.units // group.parts
        return torch.cat([part * width + torch.randperm(width, generator=generator) for part in range(group.parts)])
    blocks = torch.randperm(group.units // group.shares, generator=generator)
    inside = [torch.randperm(group.shares, generator=generator) for _ in blocks]
    return torch.cat([block * group.shares + order for block, order in zip(blocks, inside, strict=True)])


def randomized(teacher: nn.Module) -> nn.Module:
    """Return a float32 copy with random weights that are large enough for every part to matter."""
    model = copy.deepcopy(teacher).float().eval()
    randomize(model)
    return model


def randomize(model: nn.Module) -> None:
    """Set random weights in place, without changing the random state."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator).to(parameter.device)
            if parameter.dim() < 2:
                parameter.copy_(1 + 0.5 * noise)
            else:
                parameter.copy_(noise / parameter[0].numel() ** 0.5)


def float_outputs(outputs: Mapping[str, object] | tuple[object, ...]) -> dict[str, Tensor]:
    """Return the floating-point tensors in a model's outputs."""
    values = outputs.items() if isinstance(outputs, Mapping) else enumerate(outputs)
    return {str(name): x for name, x in values if isinstance(x, Tensor) and x.is_floating_point()}


def difference(x: Tensor, y: Tensor) -> float:
    """Return the relative difference of two tensors; infinite if shapes or the places of NaN and infinity differ."""
    finite = torch.isfinite(y)
    if x.shape != y.shape or not torch.equal(finite, torch.isfinite(x)):
        return float("inf")
    x, y = x[finite], y[finite]
    return float((x - y).norm() / y.norm().clamp_min(1e-12))
