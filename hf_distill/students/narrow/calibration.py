"""The calibration data: each batch is read once, for the importance of units and the components of hidden states."""

from __future__ import annotations

import contextlib
import copy
import inspect
from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from hf_distill._types import Batch, Keywords
from hf_distill.errors import DataError
from hf_distill.students.narrow.dataflow import Dataflow, trace_dataflow
from hf_distill.students.narrow.importance import Importance, UnitScores, attended
from hf_distill.students.narrow.units import UnitGroup


class Components:
    """Adds up the second moments of the input of every norm, with each position scaled to a root mean square of 1.

    The norms are hooked inside its context.

    Attributes:
        batch: the batch that the model reads now; its padding does not count.
        rows: number of positions so far.
    """

    def __init__(self, model: nn.Module, norms: Iterable[str], width: int) -> None:
        self.batch: Batch = {}
        self.rows = 0
        self._moments = torch.zeros(width, width, dtype=torch.float64)
        self._norms = {name: model.get_submodule(name.rpartition(".")[0]) for name in norms}
        self._hooks: list[RemovableHandle] = []

    def __enter__(self) -> Components:
        for name, module in self._norms.items():
            self._hooks.append(module.register_forward_pre_hook(self._hook(name), with_kwargs=True))
        return self

    def __exit__(self, *error: object) -> None:
        for hook in self._hooks:
            hook.remove()

    def _hook(self, name: str) -> Callable[[nn.Module, tuple[Any, ...], Keywords], None]:
        def see(module: nn.Module, args: tuple[Any, ...], kwargs: Keywords) -> None:
            x = (*args, *kwargs.values())[0].detach()
            x = x.reshape(-1, x.shape[-1])
            x = x[attended(self.batch, name, len(x)).to(x.device)]
            x = x if x.dtype == torch.float64 else x.float()
            length = x.square().mean(-1, keepdim=True).sqrt()
            unit = x / length.clamp_min(torch.finfo(x.dtype).tiny)
            self._moments += (unit.T @ unit).double().cpu()
            self.rows += len(x)

        return see

    def leading(self, number: int) -> tuple[Tensor, float]:
        """Return the first components, orthonormal `[width number]`, and their share of the sum of squares.

        The mean is not subtracted: no matrix of the model could add it again. Raises DataError if the data does not
        determine the components.
        """
        if self.rows < number:
            raise DataError(f"narrow: data= has {self.rows} positions for {number} directions. Pass more batches.")
        if not torch.isfinite(self._moments).all():
            raise DataError("narrow: the teacher's hidden states on data= contain NaN or infinity.")
        values, vectors = torch.linalg.eigh(self._moments)
        values, vectors = values.flip(0).clamp_min(0), vectors.flip(1)
        return vectors[:, :number].contiguous(), float(values[:number].sum() / values.sum())


class Calibration:
    """A teacher in evaluation mode and its batches, as a context manager that restores modes and random state."""

    def __init__(self, teacher: PreTrainedModel, data: Iterable[Batch]) -> None:
        self.teacher = teacher
        self._batches = iter(data)
        self._columns = set(inspect.signature(teacher.forward).parameters)
        self._first: Keywords = {}
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Calibration:
        with self._stack as stack:
            for module in self.teacher.modules():
                stack.callback(setattr, module, "training", module.training)
            stack.enter_context(torch.random.fork_rng(devices=[]))
            self.teacher.eval()
            for batch in self._batches:
                self._first = self._readable(batch)
                break
            else:
                raise DataError("narrow: data= has no batch.")
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def _readable(self, batch: Batch) -> Keywords:
        """Return the columns that the teacher reads, on its device."""
        if not hasattr(batch, "keys"):  # a BatchEncoding is not a Mapping
            raise DataError(f"narrow: data= contains a {type(batch).__name__}. Pass batches: dicts of tensors.")
        columns = [str(name) for name in batch.keys()]  # noqa: SIM118  # a BatchEncoding iterates over encodings
        read = {name: batch[name] for name in columns if name in self._columns}
        if not any(isinstance(value, Tensor) for value in read.values()):
            names = ", ".join(sorted(self._columns))
            raise DataError(f"narrow: data= has the columns {', '.join(columns)}; the teacher reads {names}.")
        device = self.teacher.device
        return {key: value.to(device) if isinstance(value, Tensor) else copy.copy(value) for key, value in read.items()}

    def first(self, model: nn.Module) -> ModelOutput:
        """Return a model's outputs for the first batch, without gradient."""
        with torch.no_grad():
            outputs: ModelOutput = model(**self._first)
        return outputs

    def dataflow(self) -> Dataflow:
        """Return the dataflow of the teacher on the first batch."""
        return trace_dataflow(self.teacher, lambda: self.first(self.teacher))

    def scores(
        self, groups: list[UnitGroup], importance: Importance, components: Components | None = None
    ) -> list[Tensor]:
        """Return the importance of all units over all batches, `[units]` for each group.

        Args:
            groups: the units.
            importance: the kind of score.
            components: reads the same batches, since `data` may be an iterator.
        """
        scores = UnitScores(self.teacher, groups)

        def forward(batch: Batch) -> ModelOutput:
            if components is not None:
                components.batch = batch
            outputs: ModelOutput = self.teacher(**batch)
            return outputs

        with contextlib.nullcontext() if components is None else components:
            for batch in self._all():
                scores.add(batch, forward, importance if groups else "activation")  # no units need no gradient
        return scores.result()

    def _all(self) -> Iterator[Batch]:
        return chain([self._first], (self._readable(batch) for batch in self._batches))
