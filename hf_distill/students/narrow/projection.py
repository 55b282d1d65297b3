"""A narrower model by rotating its hidden states and keeping the leading directions. It finds no directions.

SliceGPT (Ashkboos et al. 2024), section 3: a model of RMSNorms computes the same in any orthonormal basis of its hidden
states, and so some directions can be left out. There each block has its own basis, and matrices on the residual
connections lead from one to the next; here one basis serves all, so that the architecture stays what it is.

RMS over k of d numbers is √(d/k) times as large. So the hidden states are √(k/d) times the teacher's, and what reads
them makes up for it: then the eps of the norms means what it meant.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hf_distill.errors import TeacherError
from hf_distill.students.narrow.stream import Stream
from hf_distill.students.narrow.units import difference, outputs_of, shake, shaken

_TOLERANCE = 1e-3  # as in dataflow.py
Forward = Callable[[Any], Any]


@dataclass(frozen=True)
class Projected:
    """The teacher's tensors in the new basis, the share of its hidden states that this holds, and untied heads.

    `apart`: a head that was one tensor with an embedding → that.
    """

    tensors: dict[str, Tensor]
    share: float
    apart: dict[str, str]

    def notes(self, student: Any) -> list[str]:
        """What became of tied weights."""
        return [
            f"{head} is no longer tied to {table}, so the student has {student.get_parameter(head).numel():,} "
            "parameters more: the weights of the norm before it are in it now, and not in the embeddings."
            for head, table in self.apart.items()
        ]


def projected(
    tensors: Mapping[str, Tensor], stream: Stream, basis: Tensor, factors: Mapping[str, float]
) -> dict[str, Tensor]:
    """All tensors of the hidden states in the basis `[width kept]`, worked out in float64.

    `factors`: by what a tensor is multiplied besides, because the student's constants follow its width.
    """
    scale = (basis.shape[1] / stream.width) ** 0.5
    done: dict[str, Tensor] = {}
    for places, by in ((stream.embeddings, scale), (stream.writers, scale), (stream.readers, 1 / scale)):
        for name, axis in places.items():
            gain = _gain(tensors, stream, stream.through.get(name)) if places is stream.readers else None
            matrix = basis if gain is None else gain[:, None] * basis
            done[name] = _applied(tensors[name], axis, matrix * by * factors.get(name, 1.0))
    for name, added in stream.norms.items():
        done[name] = torch.full((basis.shape[1],), 1.0 - added).to(tensors[name])
    return done


def _gain(tensors: Mapping[str, Tensor], stream: Stream, norm: str | None) -> Tensor | None:
    """What the norm multiplies by, `[width]`."""
    return None if norm is None else tensors[norm].cpu().double() + stream.norms[norm]


def _applied(tensor: Tensor, axis: int, matrix: Tensor) -> Tensor:
    exact = (tensor.cpu() if tensor.device.type == "mps" else tensor).double()  # mps has no float64
    return (exact.movedim(axis, -1) @ matrix.to(exact.device)).movedim(-1, axis).contiguous().to(tensor)


def check_projection(
    teacher: Any, stream: Stream, build: Callable[[], Any], width: int, forward: Forward
) -> dict[str, float]:
    """What the student's own constants make necessary, or TeacherError where a projection is another function.

    It is tried: a copy of the teacher with random weights, whose hidden states lie in a subspace of that width, must
    not change when it is narrowed to it. `build` makes an empty student.
    """
    exact = torch.promote_types(teacher.dtype, torch.float32)
    model, student = shaken(teacher).to(exact), build().to(teacher.device, exact).eval()
    shake(student)
    generator = torch.Generator().manual_seed(2)
    basis = torch.linalg.qr(torch.randn(stream.width, width, generator=generator, dtype=torch.float64)).Q
    parameters = dict(model.named_parameters(remove_duplicate=False))
    flattened = {id(parameters[name]): (parameters[name], axis) for name, axis in _writes(stream).items()}
    for parameter, axis in flattened.values():
        parameter.data = _applied(parameter.data, axis, basis @ basis.T)
    before, after = _factors(model, stream, forward), _factors(student, stream, forward)
    factors = {name: before[name] / after[name] for name in before}
    _fill(student, model, projected(parameters, stream, basis, factors))
    _compare(outputs_of(forward(student)), outputs_of(forward(model)), type(teacher).__name__)
    return factors


def _writes(stream: Stream) -> dict[str, int]:
    return {**stream.embeddings, **stream.writers}


def _fill(student: nn.Module, model: nn.Module, new: Mapping[str, Tensor]) -> None:
    given = {**model.state_dict(), **new}
    with torch.no_grad():
        for name, tensor in student.state_dict().items():
            tensor.copy_(given[name])


def _compare(ours: dict[str, Tensor], theirs: dict[str, Tensor], model: str) -> None:
    compared = [name for name in theirs if "hidden_state" not in name]  # those are in the other basis
    wrong = {name: difference(ours[name], theirs[name]) for name in compared}
    wrong = {name: one for name, one in wrong.items() if not one < _TOLERANCE}
    if wrong or not compared:
        name, error = next(iter(wrong.items()), ("output", float("nan")))
        raise TeacherError(
            f"narrow: width='projection' cannot be used with {model}: on a model whose hidden states lie in as few "
            f"directions as are kept it changes the {name} (relative difference {error:.1g}). Something in it works on "
            "single channels of them. Say width='importance'."
        )


def _factors(model: nn.Module, stream: Stream, forward: Forward) -> dict[str, float]:
    """By what a model multiplies between an embedding and the first norm, and between a norm and what reads it.

    Gemma multiplies by √width there, T5 by 1/√width here.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    seen: dict[str, float] = dict.fromkeys([*stream.embeddings, *stream.readers], 1.0)
    given: dict[str, Tensor] = {}
    waiting: list[tuple[Any, Tensor]] = []

    def looked_up(module: Any, args: Any, out: Any) -> None:
        waiting[:] = [(module.weight, F.embedding(args[0], module.weight))]

    def normed(name: str) -> Any:
        def see(module: nn.Module, args: Any, out: Tensor) -> None:
            given[name] = out
            for weight, raw in waiting:
                same = [one for one in stream.embeddings if parameters[one] is weight]
                seen.update(dict.fromkeys(same, _ratio(args[0], raw)))
            waiting.clear()

        return see

    def read(name: str, norm: str) -> Any:
        def see(module: nn.Module, args: Any) -> None:
            if norm in given:
                seen[name] = _ratio(args[0], given[norm])

        return see

    def module_of(name: str) -> nn.Module:
        return model.get_submodule(name.rpartition(".")[0])

    hooks = [module_of(name).register_forward_hook(looked_up) for name in stream.embeddings]
    hooks += [module_of(name).register_forward_hook(normed(name)) for name in stream.norms]
    hooks += [
        module_of(name).register_forward_pre_hook(read(name, norm)) for name, norm in stream.through.items() if norm
    ]
    forward(model)
    for hook in hooks:
        hook.remove()
    return seen


def _ratio(after: Tensor, before: Tensor) -> float:
    """The number that `before` was multiplied by; 1 where it was something else (the check will show what)."""
    if after.shape != before.shape:
        return 1.0
    after, before = (one.detach().cpu().double() for one in (after, before))
    ratio = float((after * before).sum() / before.square().sum().clamp_min(1e-12))
    return ratio if difference(after, ratio * before) < _TOLERANCE else 1.0
