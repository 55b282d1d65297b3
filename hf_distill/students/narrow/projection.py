"""A narrower model by rotating the residual stream and keeping its leading directions.

SliceGPT (Ashkboos et al. 2024), section 3: a model of RMSNorms computes the same in any orthonormal basis of its
residual stream, so directions can be left out. In SliceGPT each block has its own basis, and matrices on the residual
connections convert between them; here one basis serves all blocks, so that the architecture does not change.

The RMS over k of d numbers is √(d/k) times as large. So the stream is scaled by √(k/d), and its readers are scaled
back: then the eps of the norms keeps its meaning.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cached_property

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedConfig
from transformers.utils import ModelOutput

from hf_distill.errors import TeacherError
from hf_distill.students.building import all_parameters, empty_student, untied_config
from hf_distill.students.narrow.calibration import Calibration, Components
from hf_distill.students.narrow.layout import Layout, changed, followers
from hf_distill.students.narrow.residual_stream import ResidualStream
from hf_distill.students.narrow.units import TOLERANCE, difference, float_outputs, randomize, randomized

Forward = Callable[[nn.Module], ModelOutput]


class Projection:
    """A projection of one teacher: verified before the data is read, then determined by its `components`.

    Attributes:
        components: reads the data, see `Calibration.scores`.
        config: the teacher's config, untied if the head gets its own weights.
        untied: for each head that was tied to an embedding, the name of that.
    """

    def __init__(self, calibration: Calibration, layout: Layout, stream: ResidualStream, width: int) -> None:
        self.teacher, self.stream, self.width = calibration.teacher, stream, width
        if layout.head_setting is None:
            raise TeacherError(
                "narrow: width='projection': the config derives a head's size from hidden=. Use width='importance'."
            )
        self.untied = stream.tied(self.teacher)
        self.config = untied_config(layout.config) if self.untied else layout.config
        settings = layout.sizes["hidden"].values
        new = {one: width for main in settings for one in (main, *followers("hidden", main, self.config))}
        self.factors = self._verified_factors(changed(self.config, new), calibration.first)
        self.components = Components(self.teacher, stream.norms, stream.width)

    def _verified_factors(self, config: PreTrainedConfig, forward: Forward) -> dict[str, float]:
        """Return the factors that the student's constants need, after a check that a projection preserves the outputs.

        A copy of the teacher with random weights, whose hidden states lie in a subspace of the student's width, must
        not change when it is projected to that subspace.

        Raises:
            TeacherError: if it changes.
        """
        dtype = torch.promote_types(self.teacher.dtype, torch.float32)
        model = randomized(self.teacher).to(dtype)
        student: nn.Module = empty_student(self.teacher, config, "narrow", self.untied)
        student = student.to(device=self.teacher.device, dtype=dtype).eval()
        randomize(student)
        generator = torch.Generator().manual_seed(2)
        stream = self.stream
        basis = torch.linalg.qr(torch.randn(stream.width, self.width, generator=generator, dtype=torch.float64)).Q
        parameters = all_parameters(model)
        flattened = {
            id(parameters[n]): (parameters[n], axis) for n, axis in {**stream.embeddings, **stream.writers}.items()
        }
        for parameter, axis in flattened.values():
            parameter.data = _applied(parameter.data, axis, basis @ basis.T)
        before, after = _constants(model, stream, forward), _constants(student, stream, forward)
        factors = {name: before[name] / after[name] for name in before}
        tensors = {**model.state_dict(), **project(parameters, stream, basis, factors)}
        with torch.no_grad():
            for name, tensor in student.state_dict().items():
                tensor.copy_(tensors[name])
        ours, theirs = float_outputs(forward(student)), float_outputs(forward(model))
        compared = [name for name in theirs if "hidden_state" not in name]  # they are in the other basis
        errors = {name: difference(ours[name], theirs[name]) for name in compared} or {"outputs": float("nan")}
        for name, error in errors.items():
            if not error < TOLERANCE:
                raise TeacherError(
                    f"narrow: width='projection' changes the {name} (relative difference {error:.1g}): the teacher "
                    "uses single channels somewhere. Use width='importance'."
                )
        return factors

    def tensors(self) -> dict[str, Tensor]:
        """Return the teacher's tensors of the residual stream in the basis of the components."""
        tensors = {name: parameter.detach() for name, parameter in all_parameters(self.teacher).items()}
        return project(tensors, self.stream, self._leading[0], self.factors)

    def share(self) -> float:
        """Return the share of the hidden states that the basis holds."""
        return self._leading[1]

    @cached_property
    def _leading(self) -> tuple[Tensor, float]:
        return self.components.leading(self.width)

    def notes(self, student: nn.Module) -> list[str]:
        """Return a note for each head that is no longer tied."""
        return [
            f"{head} is no longer tied to {table}, since it now contains the weights of the norm before it: the "
            f"student has {student.get_parameter(head).numel():,} parameters more."
            for head, table in self.untied.items()
        ]


def project(
    tensors: Mapping[str, Tensor], stream: ResidualStream, basis: Tensor, factors: Mapping[str, float]
) -> dict[str, Tensor]:
    """Return all tensors of the residual stream in another basis, computed in float64.

    Args:
        tensors: the teacher's tensors.
        stream: their roles.
        basis: orthonormal, `[width kept]`.
        factors: for some tensors, a further factor that makes up for a constant that follows the student's width.
    """
    scale = (basis.shape[1] / stream.width) ** 0.5
    done: dict[str, Tensor] = {}
    for name, axis in {**stream.embeddings, **stream.writers}.items():
        done[name] = _applied(tensors[name], axis, basis * scale * factors.get(name, 1.0))
    for name, axis in stream.readers.items():
        norm = stream.norm_of.get(name)
        matrix = basis if norm is None else (tensors[norm].cpu().double() + stream.norms[norm])[:, None] * basis
        done[name] = _applied(tensors[name], axis, matrix * (1 / scale) * factors.get(name, 1.0))
    for name, offset in stream.norms.items():
        done[name] = torch.full((basis.shape[1],), 1.0 - offset).to(tensors[name])
    return done


def _applied(tensor: Tensor, axis: int, matrix: Tensor) -> Tensor:
    exact = (tensor.cpu() if tensor.device.type == "mps" else tensor).double()  # mps has no float64
    return (exact.movedim(axis, -1) @ matrix.to(exact.device)).movedim(-1, axis).contiguous().to(tensor)


def _constants(model: nn.Module, stream: ResidualStream, forward: Forward) -> dict[str, float]:
    """Return the factors between an embedding and the first norm, and between a norm and its readers.

    Gemma multiplies embeddings by √width; T5 multiplies the input of its head by 1/√width.
    """
    parameters = all_parameters(model)
    constants: dict[str, float] = dict.fromkeys([*stream.embeddings, *stream.readers], 1.0)
    normed: dict[str, Tensor] = {}
    looked_up: list[tuple[Tensor, Tensor]] = []

    def after_embedding(module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> None:
        weight = module.get_parameter("weight")
        looked_up[:] = [(weight, F.embedding(args[0], weight))]

    def after_norm(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def see(module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> None:
            normed[name] = out
            for weight, rows in looked_up:
                same = [table for table in stream.embeddings if parameters[table] is weight]
                constants.update(dict.fromkeys(same, _ratio(args[0], rows)))
            looked_up.clear()

        return see

    def before_reader(name: str, norm: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def see(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            if norm in normed:
                constants[name] = _ratio(args[0], normed[norm])

        return see

    def module_of(name: str) -> nn.Module:
        return model.get_submodule(name.rpartition(".")[0])

    hooks = [module_of(name).register_forward_hook(after_embedding) for name in stream.embeddings]
    hooks += [module_of(name).register_forward_hook(after_norm(name)) for name in stream.norms]
    readers = [(name, norm) for name, norm in stream.norm_of.items() if norm]
    hooks += [module_of(name).register_forward_pre_hook(before_reader(name, norm)) for name, norm in readers]
    forward(model)
    for hook in hooks:
        hook.remove()
    return constants


def _ratio(after: Tensor, before: Tensor) -> float:
    """Return the number by which `before` was multiplied; 1 if it is something else, which the check will show."""
    if after.shape != before.shape:
        return 1.0
    after, before = (x.detach().cpu().double() for x in (after, before))
    ratio = float((after * before).sum() / before.square().sum().clamp_min(1e-12))
    return ratio if difference(after, ratio * before) < TOLERANCE else 1.0
