"""What reads, writes and norms the hidden states, for models whose hidden states may be rotated. It rotates nothing.

That is so where every block reads them through an RMSNorm and adds what it gives to them by a matrix: RMS(x Q) is
RMS(x) Q for an orthogonal Q, once the norm's weights are in the matrices that read it (SliceGPT, section 3.1).
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any, NoReturn

import torch
from torch import nn

from hf_distill.errors import TeacherError
from hf_distill.students.narrow.dataflow import Dataflow
from hf_distill.students.narrow.units import Axis, Group

_REFUSALS = (TypeError, ValueError, RuntimeError, IndexError, AttributeError)  # of a module that is no norm


@dataclass
class Stream:
    """The hidden states of a model, of both sides of an encoder-decoder: they share their embeddings.

    Attributes:
        width: channels.
        norms: weight of a norm → what the norm adds to it before it multiplies: 1 in Gemma, else 0.
        readers: weight that reads the hidden states → its axis.
        through: the same → the norm's weight; None: no norm.
        writers: weight, or its bias, whose output is added to the hidden states → its axis.
        embeddings: tables that the hidden states start from. A tied table stands here and under `readers`.
    """

    width: int
    norms: dict[str, int] = field(default_factory=dict)
    readers: dict[str, int] = field(default_factory=dict)
    through: dict[str, str | None] = field(default_factory=dict)
    writers: dict[str, int] = field(default_factory=dict)
    embeddings: dict[str, int] = field(default_factory=dict)

    def tied(self, model: nn.Module) -> dict[str, str]:
        """Readers that are one tensor with an embedding, each with the name of that."""
        parameters = dict(model.named_parameters(remove_duplicate=False))
        tables = {id(parameters[name]): name for name in reversed(list(self.embeddings))}
        return {name: tables[id(parameters[name])] for name in self.readers if id(parameters[name]) in tables}


def find_stream(teacher: Any, channels: Group, dataflow: Dataflow) -> Stream:
    """Every tensor of the hidden states by what it does; TeacherError where they cannot be rotated."""
    parameters = dict(teacher.named_parameters(remove_duplicate=False))
    first = {id(parameter): name for name, parameter in reversed(list(teacher.named_parameters()))}
    stream = Stream(channels.units)
    for axis in channels.axes:
        if axis.name not in parameters or axis.convolved or axis.outer != 1:
            _refuse(teacher, f"{axis.name} works on the hidden states in a way that is not known")
        _place(teacher, stream, axis, first[id(parameters[axis.name])], dataflow)
    for name in stream.readers:
        before = sorted(dataflow.feeding.get(first[id(parameters[name])], set()) & stream.norms.keys())
        if len(before) > 1:
            _refuse(
                teacher,
                f"{name} reads what {', '.join(before[:3])} gave, so there are norms whose output is added to the "
                "hidden states (post-norm), and their weights stand between",
            )
        stream.through[name] = before[0] if before else None
    _check_ends(teacher, stream)
    return stream


def _place(teacher: Any, stream: Stream, axis: Axis, first: str, dataflow: Dataflow) -> None:
    """Enter one axis. `first`: under which of its names the tensor was watched."""
    name, dim = axis.name, axis.dim
    module = teacher.get_submodule(name.rpartition(".")[0])
    if isinstance(module, nn.Embedding):
        stream.embeddings[name] = dim
    elif first in dataflow.owner:  # the bias of a matrix
        stream.writers[name] = dim
    elif getattr(module, name.rpartition(".")[2]).dim() == 1:
        stream.norms[name] = _added_to_weight(teacher, name, module, stream.width)
    elif first not in dataflow.input_axis:
        _refuse(teacher, f"no matrix multiplication with {name} was seen")
    elif dataflow.input_axis[first] == dim:
        stream.readers[name] = dim
    else:
        stream.writers[name] = dim
    if name in stream.readers and name in stream.writers:
        _refuse(teacher, f"{name} reads the hidden states and gives as many channels that are none of them")


def _added_to_weight(teacher: Any, name: str, module: nn.Module, width: int) -> int:
    """0 for an RMSNorm that multiplies by its weight, 1 for one that multiplies by 1 + weight. Tried, not looked up."""
    try:
        norm: Any = copy.deepcopy(module).cpu().float()
        generator = torch.Generator().manual_seed(0)
        weight = torch.randn(width, generator=generator)
        x = 100 * torch.randn(8, width, generator=generator) + 50  # with a mean, which LayerNorm takes away
        with torch.no_grad():
            norm.weight.copy_(weight)
            given = norm(x)
    except _REFUSALS:
        given = None
    if isinstance(given, torch.Tensor) and [one for one, _ in module.named_parameters()] == ["weight"]:
        unit = x * x.square().mean(-1, keepdim=True).rsqrt()
        for added in (0, 1):
            if given.shape == x.shape and torch.allclose(given, unit * (weight + added), rtol=1e-3, atol=1e-3):
                return added
    what = "a LayerNorm, which subtracts the mean of the channels" if isinstance(module, nn.LayerNorm) else "no RMSNorm"
    _refuse(teacher, f"{name} is of a {type(module).__name__}: {what}")


def _check_ends(teacher: Any, stream: Stream) -> None:
    unread = sorted(stream.norms.keys() - set(stream.through.values()))
    if unread:
        _refuse(
            teacher,
            f"no matrix reads what {unread[0]} gives, so the model gives its hidden states out, and they would be "
            "others (a model with a head can be narrowed, and its base taken)",
        )
    if not stream.norms or not stream.embeddings or not stream.writers:
        _refuse(teacher, "no norms, embeddings or matrices that write the hidden states were seen")


def _refuse(teacher: Any, why: str) -> NoReturn:
    raise TeacherError(
        f"narrow: width='projection' rotates the hidden states, and those of {type(teacher).__name__} cannot be: "
        f"{why}. Say width='importance'."
    )
