"""Which tensors read, write and normalize the residual stream, for models whose stream may be rotated.

That is possible if every block reads the stream through an RMSNorm and adds the output of a matrix to it: RMS(x Q) is
RMS(x) Q for an orthogonal Q, once the norm's weights are merged into the matrices that read it (SliceGPT, section 3.1).
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field

import torch
from torch import nn

from hf_distill.errors import TeacherError
from hf_distill.students.building import all_parameters
from hf_distill.students.narrow.dataflow import Dataflow
from hf_distill.students.narrow.units import Axis, UnitGroup


@dataclass
class ResidualStream:
    """The tensors of the residual stream, of both sides of an encoder-decoder, which share their embeddings.

    Attributes:
        width: number of channels.
        norms: for the weight of each norm, the number that the norm adds to it (1 in Gemma, otherwise 0).
        readers: for each weight that reads the stream, its axis.
        norm_of: for each reader, the norm through which it reads, or None.
        writers: for each weight or bias whose output is added to the stream, its axis.
        embeddings: for each table at the start of the stream, its axis. A tied table is also in `readers`.
    """

    width: int
    norms: dict[str, int] = field(default_factory=dict)
    readers: dict[str, int] = field(default_factory=dict)
    norm_of: dict[str, str | None] = field(default_factory=dict)
    writers: dict[str, int] = field(default_factory=dict)
    embeddings: dict[str, int] = field(default_factory=dict)

    def tied(self, model: nn.Module) -> dict[str, str]:
        """Return the readers that are tied to an embedding, each with the name of that."""
        parameters = all_parameters(model)
        tables = {id(parameters[name]): name for name in reversed(list(self.embeddings))}
        return {name: tables[id(parameters[name])] for name in self.readers if id(parameters[name]) in tables}


def find_residual_stream(teacher: nn.Module, channels: UnitGroup, flow: Dataflow) -> ResidualStream:
    """Return the role of every tensor of the residual stream. Raises TeacherError if it cannot be rotated."""
    parameters = all_parameters(teacher)
    first_name = {id(parameter): name for name, parameter in reversed(list(teacher.named_parameters()))}
    stream = ResidualStream(channels.units)
    for axis in channels.axes:
        if axis.name not in parameters or axis.convolved or axis.blocks != 1:
            raise _cannot_rotate(teacher, f"{axis.name} uses it in an unknown way")
        _add(teacher, stream, axis, first_name[id(parameters[axis.name])], flow)
    for name in stream.readers:
        norms = sorted(flow.feeding.get(first_name[id(parameters[name])], set()) & stream.norms.keys())
        if len(norms) > 1:
            raise _cannot_rotate(teacher, f"{name} reads the output of {', '.join(norms[:3])} (post-norm)")
        stream.norm_of[name] = norms[0] if norms else None
    unread = sorted(stream.norms.keys() - set(stream.norm_of.values()))
    if unread:
        raise _cannot_rotate(teacher, f"the model returns the output of {unread[0]}, since it has no head")
    if not stream.norms or not stream.embeddings or not stream.writers:
        raise _cannot_rotate(teacher, "it has no norms, no embeddings, or no matrices that write it")
    return stream


def _add(teacher: nn.Module, stream: ResidualStream, axis: Axis, traced: str, flow: Dataflow) -> None:
    """Add one axis to the stream; `traced` is the name under which the dataflow knows the tensor."""
    path, _, last = axis.name.rpartition(".")
    module = teacher.get_submodule(path)
    if isinstance(module, nn.Embedding):
        stream.embeddings[axis.name] = axis.dim
    elif traced in flow.weight_of:  # the bias of a matrix
        stream.writers[axis.name] = axis.dim
    elif module.get_parameter(last).dim() == 1:
        offset = _weight_offset(module, stream.width)
        if offset is None:
            kind = "a LayerNorm, which subtracts the mean" if isinstance(module, nn.LayerNorm) else "not an RMSNorm"
            raise _cannot_rotate(teacher, f"{axis.name} belongs to a {type(module).__name__}: {kind}")
        stream.norms[axis.name] = offset
    elif traced not in flow.input_axis:
        raise _cannot_rotate(teacher, f"no matrix multiplication with {axis.name} was traced")
    else:
        (stream.readers if flow.input_axis[traced] == axis.dim else stream.writers)[axis.name] = axis.dim
    if axis.name in stream.readers and axis.name in stream.writers:
        raise _cannot_rotate(teacher, f"{axis.name} has as many outputs as channels, but they are not the stream")


def _weight_offset(module: nn.Module, width: int) -> int | None:
    """Return 0 for an RMSNorm that multiplies by its weight, 1 if by 1 + weight, None for other modules; by trial."""
    if [name for name, _ in module.named_parameters()] != ["weight"]:
        return None
    norm = copy.deepcopy(module).cpu().float()
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(width, generator=generator)
    x = 100 * torch.randn(8, width, generator=generator) + 50  # with a mean, which LayerNorm subtracts
    try:
        with torch.no_grad():
            norm.get_parameter("weight").copy_(weight)
            found = norm(x)
    except (TypeError, ValueError, RuntimeError, IndexError, AttributeError):
        return None
    unit = x * x.square().mean(-1, keepdim=True).rsqrt()
    for offset in (0, 1):
        if found.shape == x.shape and torch.allclose(found, unit * (weight + offset), rtol=1e-3, atol=1e-3):
            return offset
    return None


def _cannot_rotate(teacher: nn.Module, why: str) -> TeacherError:
    return TeacherError(
        f"narrow: width='projection' cannot rotate the residual stream of {type(teacher).__name__}: {why}. Use "
        "width='importance'."
    )
