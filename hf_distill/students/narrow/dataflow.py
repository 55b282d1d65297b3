"""Which tensors of a model work on the same heads or neurons, seen in one forward. It looks at no names or classes.

Every operation passes on what its inputs came from. Where two activations are multiplied (queries with keys, weights
with values) their sources belong together: an attention. The first matrix that reads the outcome reads its heads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

_PRODUCTS = {
    torch.matmul, torch.bmm, torch.baddbmm, torch.einsum, F.scaled_dot_product_attention, Tensor.matmul,
    Tensor.__matmul__, Tensor.__rmatmul__, Tensor.bmm, Tensor.baddbmm,
}  # fmt: skip
_READS = {F.linear: (0, 1, 2), torch.addmm: (1, 2, 0)}  # where input, weight and bias stand
_INPUT_AXIS = {F.linear: 1, torch.addmm: 0}


@dataclass(frozen=True)
class Source:
    """What a tensor came from: parameters, whether an attention lies between, and whether it is of parameters alone."""

    names: frozenset[str]
    attended: bool = False
    constant: bool = False


@dataclass
class Dataflow:
    """What one forward showed.

    Attributes:
        together: parameters that meet in one attention or feed one matrix → a name for all of them.
        asking: weights whose output is multiplied with another activation: queries, keys, values.
        reading: weights that read what attention gives.
        feeding: weight → the parameters between it and the matrices before it.
        input_axis: weight → the axis that its input is multiplied with.
        owner: bias → its weight.
        seen: parameters that took part in any operation.
        matrices: all parameters with more than one axis.
    """

    asking: set[str] = field(default_factory=set)
    reading: set[str] = field(default_factory=set)
    feeding: dict[str, set[str]] = field(default_factory=dict)
    input_axis: dict[str, int] = field(default_factory=dict)
    owner: dict[str, str] = field(default_factory=dict)
    seen: set[str] = field(default_factory=set)
    matrices: set[str] = field(default_factory=set)
    _parent: dict[str, str] = field(default_factory=dict)

    def root(self, name: str) -> str:
        """The name of the group."""
        while self._parent.get(name, name) != name:
            name = self._parent[name]
        return name

    def join(self, names: Iterable[str]) -> None:
        """All of them work on the same units."""
        roots = sorted({self.root(name) for name in names})
        for other in roots[1:]:
            self._parent[other] = roots[0]


class _Watch(TorchFunctionMode):
    def __init__(self, names: dict[int, str]) -> None:
        super().__init__()
        self.names = names
        self.dataflow = Dataflow()

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        given = dict(kwargs or {})
        out = func(*args, **given)
        inputs = list(_tensors((args, tuple(given.values()))))
        source: Source | None
        if func in _READS and self._is_weight(_at(args, given, func, 1)):
            source = self._read(func, args, given)
        elif func in _PRODUCTS and len(active := [x for x in inputs if not self._is_constant(x)]) > 1:
            source = self._product(active)
        else:
            source = self._sum(inputs)
        if source is not None:
            for tensor in _tensors(out):
                if not isinstance(tensor, nn.Parameter):
                    tensor._came_from = source  # type: ignore[attr-defined]  # a mark that lives as long as the tensor
        return out

    def _is_weight(self, tensor: Any) -> bool:
        return isinstance(tensor, Tensor) and id(tensor) in self.names

    def _is_constant(self, tensor: Tensor) -> bool:
        source = self._source(tensor)
        return source is not None and source.constant

    def _source(self, tensor: Tensor) -> Source | None:
        if id(tensor) in self.names:
            self.dataflow.seen.add(self.names[id(tensor)])
            return Source(frozenset({self.names[id(tensor)]}), constant=True)
        return getattr(tensor, "_came_from", None)

    def _sum(self, tensors: list[Tensor]) -> Source | None:
        sources = [source for tensor in tensors if (source := self._source(tensor)) is not None]
        if not sources:
            return None
        names = frozenset().union(*(source.names for source in sources))
        constant = len(sources) == len(tensors) and all(source.constant for source in sources)
        return Source(names, any(source.attended for source in sources), constant)

    def _product(self, tensors: list[Tensor]) -> Source | None:
        source = self._sum(tensors)
        if source is None:
            return None
        self.dataflow.join(source.names)
        self.dataflow.asking |= source.names
        return Source(source.names, attended=True)

    def _read(self, func: Callable[..., Any], args: Any, given: dict[str, Any]) -> Source:
        tensor, weight, bias = (_at(args, given, func, place) for place in range(3))
        name = self.names[id(weight)]
        before = self._source(tensor)
        if before is not None:
            self.dataflow.feeding.setdefault(name, set()).update(before.names)
            if before.attended:
                self.dataflow.reading.add(name)
                self.dataflow.join({name, *before.names})
        self.dataflow.input_axis[name] = _INPUT_AXIS[func]
        self.dataflow.seen.add(name)
        if self._is_weight(bias):
            self.dataflow.owner[self.names[id(bias)]] = name
        return Source(frozenset({name}))


def _at(args: Any, given: dict[str, Any], func: Callable[..., Any], part: int) -> Any:
    place = _READS[func][part]
    if place < len(args):
        return args[place]
    return given.get(("input", "weight", "bias")[part] if func is F.linear else ("mat1", "mat2", "input")[part])


def _tensors(value: Any) -> Iterable[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for one in value:
            yield from _tensors(one)


def watch(model: nn.Module, forward: Callable[[], Any]) -> Dataflow:
    """The wiring of a model, from one forward without gradient."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    with torch.no_grad(), _Watch(names) as seen:
        forward()
    seen.dataflow.matrices |= {name for name, one in model.named_parameters() if sum(n > 1 for n in one.shape) > 1}
    return seen.dataflow
