"""Which tensors of a model work on the same heads or neurons, traced in one forward, without names or classes.

Every operation passes on which parameters its inputs came from. Where two activations are multiplied (queries with
keys, weights with values), their sources belong to one attention. The first matrix that reads the result reads heads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
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
# For each operation, position and keyword of input, weight and bias; and the weight's axis that meets the input.
_MATRIX_READS = {
    F.linear: (((0, "input"), (1, "weight"), (2, "bias")), 1),
    torch.addmm: (((1, "mat1"), (2, "mat2"), (0, "input")), 0),
}
_NOWHERE = ((0, ""), (0, ""), (0, ""))


@dataclass
class Dataflow:
    """How the parameters of a model work together in one forward.

    Attributes:
        attention_inputs: weights whose output is multiplied with another activation: queries, keys, values.
        attention_readers: weights that read the result of an attention.
        feeding: for each weight, the parameters between it and the matrices before it.
        input_axis: for each weight, the axis that is multiplied with its input.
        weight_of: for each bias, its weight.
        used: parameters that took part in any operation.
        matrices: all parameters with more than one axis.
    """

    attention_inputs: set[str] = field(default_factory=set)
    attention_readers: set[str] = field(default_factory=set)
    feeding: dict[str, set[str]] = field(default_factory=dict)
    input_axis: dict[str, int] = field(default_factory=dict)
    weight_of: dict[str, str] = field(default_factory=dict)
    used: set[str] = field(default_factory=set)
    matrices: set[str] = field(default_factory=set)
    _parent: dict[str, str] = field(default_factory=dict)

    def root(self, name: str) -> str:
        """Return the name that stands for all parameters that work on the same units as this one."""
        while self._parent.get(name, name) != name:
            name = self._parent[name]
        return name

    def join(self, names: Iterable[str]) -> None:
        """Note that these parameters work on the same units."""
        first, *others = sorted({self.root(name) for name in names})
        for other in others:
            self._parent[other] = first

    def reads(self, name: str, axis: int) -> bool:
        """Return whether a weight reads, along this axis, the output of other parameters."""
        return self.input_axis.get(name) == axis and name in self.feeding


def trace_dataflow(model: nn.Module, forward: Callable[[], object]) -> Dataflow:
    """Return the dataflow of a model in one forward, which runs without gradient."""
    with torch.no_grad(), _Tracer({id(parameter): name for name, parameter in model.named_parameters()}) as tracer:
        forward()
    flow = tracer.flow
    flow.matrices |= {name for name, value in model.named_parameters() if sum(size > 1 for size in value.shape) > 1}
    return flow


@dataclass(frozen=True)
class _Origin:
    """Where a tensor came from.

    Attributes:
        names: the parameters since the last matrix.
        attended: whether an attention lies between them and the tensor.
        constant: whether it was computed from parameters alone.
    """

    names: frozenset[str]
    attended: bool = False
    constant: bool = False


class _Tracer(TorchFunctionMode):
    def __init__(self, names: dict[int, str]) -> None:
        super().__init__()
        self.names = names
        self.flow = Dataflow()

    def __torch_function__(
        self,
        func: Callable[..., object],
        types: object,
        args: Sequence[object] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> object:
        given = dict(kwargs or {})
        out = func(*args, **given)
        origin: _Origin | None
        inputs = list(_tensors((args, tuple(given.values()))))
        places, axis = _MATRIX_READS.get(func, (_NOWHERE, 0))
        x, weight, bias = (_argument(args, given, i, keyword) for i, keyword in places)
        if func in _MATRIX_READS and id(weight) in self.names:
            origin = self._matrix_read(x, weight, bias, axis)
        else:
            active = [tensor for tensor in inputs if not self._is_constant(tensor)] if func in _PRODUCTS else []
            origin = self._product(active) if len(active) > 1 else self._combined(inputs)
        if origin is not None:
            for tensor in _tensors(out):
                if not isinstance(tensor, nn.Parameter):
                    vars(tensor)["_hf_distill_origin"] = origin  # lives as long as the tensor
        return out

    def _origin(self, tensor: Tensor) -> _Origin | None:
        name = self.names.get(id(tensor))
        if name is None:
            return vars(tensor).get("_hf_distill_origin")
        self.flow.used.add(name)
        return _Origin(frozenset({name}), constant=True)

    def _is_constant(self, tensor: Tensor) -> bool:
        origin = self._origin(tensor)
        return origin is not None and origin.constant

    def _combined(self, tensors: list[Tensor]) -> _Origin | None:
        origins = [origin for tensor in tensors if (origin := self._origin(tensor)) is not None]
        if not origins:
            return None
        names = frozenset().union(*(origin.names for origin in origins))
        constant = len(origins) == len(tensors) and all(origin.constant for origin in origins)
        return _Origin(names, any(origin.attended for origin in origins), constant)

    def _product(self, tensors: list[Tensor]) -> _Origin | None:
        origin = self._combined(tensors)
        if origin is None:
            return None
        self.flow.join(origin.names)
        self.flow.attention_inputs |= origin.names
        return _Origin(origin.names, attended=True)

    def _matrix_read(self, x: Tensor, weight: Tensor, bias: Tensor | None, axis: int) -> _Origin:
        name, before = self.names[id(weight)], self._origin(x)
        if before is not None:
            self.flow.feeding.setdefault(name, set()).update(before.names)
            if before.attended:
                self.flow.attention_readers.add(name)
                self.flow.join({name, *before.names})
        self.flow.input_axis[name] = axis
        self.flow.used.add(name)
        if id(bias) in self.names:
            self.flow.weight_of[self.names[id(bias)]] = name
        return _Origin(frozenset({name}))


def _argument(args: Sequence[object], given: Mapping[str, object], position: int, keyword: str) -> Any:
    return args[position] if position < len(args) else given.get(keyword)


def _tensors(value: object) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for part in value:
            yield from _tensors(part)
