"""The heads, neurons and channels of a model, and where each lies in which tensor. It chooses and cuts none."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from hf_distill.errors import TeacherError
from hf_distill.students.layout import Layout
from hf_distill.students.sizes import Place
from hf_distill.students.wiring import Wiring


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


def find_groups(layout: Layout, wiring: Wiring, kinds: set[str]) -> list[Group]:
    """All units of the kinds asked for, grouped as they are cut."""
    found: list[Group] = []
    inner: set[Place] = set()
    _check_seen(layout, wiring)
    if kinds & {"heads", "hidden"} and "heads" in layout.sizes:
        heads = _head_groups(layout, wiring)
        inner = {(axis.name, axis.dim) for group in heads for axis in group.axes}
        found += heads if "heads" in kinds else []
    if "intermediate" in kinds:
        found += _neuron_groups(layout, wiring)
    if "hidden" in kinds:
        found.append(_channels(layout, wiring, inner))
    return found


def _check_seen(layout: Layout, wiring: Wiring) -> None:
    """What no forward showed cannot be told apart: its channels may be channels of the hidden states, or of heads."""
    places = {**layout.hidden, **layout.heads, **layout.groups, **layout.intermediate}
    unseen = sorted({name for name, _ in places if name in wiring.matrices} - wiring.seen)
    if unseen:
        raise TeacherError(
            f"narrow: the first batch of data does not reach {', '.join(unseen[:4])} of the teacher, so what lies in "
            "it cannot be told. Give batches that use all of the model."
        )


def _head_groups(layout: Layout, wiring: Wiring) -> list[Group]:
    heads, size = layout.sizes["heads"].value, layout.head_size or 1
    kv = layout.sizes["groups"].value if "groups" in layout.sizes and layout.groups else heads
    places = dict(layout.heads)
    if layout.head_setting is None:
        places |= {place: layout.hidden.get(place, heads * size) for place in _inner_axes(wiring)}
    read = {wiring.root(name) for name in wiring.reading}
    groups: dict[str, Group] = {}
    for (name, dim), length in {**places, **layout.groups}.items():
        root = wiring.root(wiring.owner.get(name, name))
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
        if name in wiring.reading and wiring.input_axis.get(name) == dim:
            group.readers.append(axis)
            group.name = ", ".join(filter(None, (group.name, name.rpartition(".")[0])))
    return list(groups.values())


def _inner_axes(wiring: Wiring) -> list[Place]:
    """Outputs of what asks and inputs of what reads, for weights with an input and an output."""
    asking = [(name, 1 - wiring.input_axis[name]) for name in sorted(wiring.asking) if name in wiring.input_axis]
    biases = [(bias, 0) for bias, weight in wiring.owner.items() if weight in wiring.asking]
    return asking + biases + [(name, wiring.input_axis[name]) for name in sorted(wiring.reading)]


def _neuron_groups(layout: Layout, wiring: Wiring) -> list[Group]:
    places = layout.intermediate
    readers = [(name, dim) for name, dim in places if wiring.input_axis.get(name) == dim and name in wiring.feeding]
    for name, _ in readers:
        wiring.join([name, *(source for source in wiring.feeding[name] if _has(source, places))])
    groups: dict[str, Group] = {
        wiring.root(name): Group("intermediate", "", places[name, dim]) for name, dim in readers
    }
    for (name, dim), length in places.items():
        group = groups.get(wiring.root(wiring.owner.get(name, name)))
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


def _channels(layout: Layout, wiring: Wiring, inner: set[Place]) -> Group:
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
        if wiring.input_axis.get(name) == dim and name in wiring.feeding:
            group.readers.append(axis)
    return group
