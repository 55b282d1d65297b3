"""The principal components of a model's hidden states on calibration data. It changes no model."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterable, Iterator, Mapping
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_distill.errors import DataError
from hf_distill.students.narrow.dataflow import Dataflow, watch
from hf_distill.students.narrow.importance import attended, on_device, scores_of
from hf_distill.students.narrow.units import Group


class Components:
    """Adds up what every norm reads, each position brought to a root mean square of 1, while used with `with`.

    `batch`: the batch that the model reads now; its padding does not count.
    """

    def __init__(self, model: nn.Module, norms: Mapping[str, int], width: int) -> None:
        self.batch: Mapping[str, Any] = {}
        self.rows = 0
        self._moments = torch.zeros(width, width, dtype=torch.float64)
        self._norms = {name: model.get_submodule(name.rpartition(".")[0]) for name in norms}
        self._hooks: list[Any] = []

    def __enter__(self) -> Components:
        for name, module in self._norms.items():
            self._hooks.append(module.register_forward_pre_hook(self._seen(name), with_kwargs=True))
        return self

    def __exit__(self, *error: object) -> None:
        for hook in self._hooks:
            hook.remove()

    def _seen(self, name: str) -> Any:
        def see(module: nn.Module, args: Any, kwargs: Any) -> None:
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
        """The first components `[width number]`, orthonormal, and which share of the sum of squares they hold.

        The mean is not subtracted: no matrix of the model could give it back. Raises DataError where the data does not
        determine them.
        """
        if self.rows < number:
            raise DataError(
                f"narrow: data= showed {self.rows} hidden states, and {number} directions are to be found in them. "
                "Give more batches."
            )
        if not torch.isfinite(self._moments).all():
            raise DataError("narrow: hidden states of the teacher on data= hold NaN or infinity.")
        values, vectors = torch.linalg.eigh(self._moments)
        values, vectors = values.flip(0).clamp_min(0), vectors.flip(1)
        return vectors[:, :number].contiguous(), float(values[:number].sum() / values.sum())


class Calibration:
    """A teacher in evaluation mode, and its batches, each read once. Used with `with`: modes are put back."""

    def __init__(self, teacher: PreTrainedModel, data: Iterable[Mapping[str, Any]]) -> None:
        self.teacher = teacher
        self._batches = iter(data)
        self._named = set(inspect.signature(teacher.forward).parameters)
        self._first: dict[str, Any] = {}
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Calibration:
        for module in self.teacher.modules():
            self._stack.callback(setattr, module, "training", module.training)
        self._stack.enter_context(torch.random.fork_rng(devices=[]))
        self.teacher.eval()
        first = next(self._batches, None)
        if first is None:
            self._stack.close()
            raise DataError("narrow: data= gave no batch.")
        try:
            self._first = self._readable(first)
        except DataError:
            self._stack.close()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def _readable(self, batch: Any) -> dict[str, Any]:
        """What `forward` names, on the teacher's device."""
        given = on_device(batch, self.teacher.device)
        read = {name: value for name, value in given.items() if name in self._named}
        if not any(isinstance(value, Tensor) for value in read.values()):
            raise DataError(
                f"narrow: a batch of data= has the columns {', '.join(given) or '(none)'}, and "
                f"{type(self.teacher).__name__} reads tensors {', '.join(sorted(self._named)[:8])}, ..."
            )
        return read

    def first(self, model: Any) -> Any:
        """What a model says of the first batch, without gradient."""
        with torch.no_grad():
            return model(**self._first)

    def dataflow(self) -> Dataflow:
        """What works with what in the teacher."""
        return watch(self.teacher, lambda: self.first(self.teacher))

    def scores(self, groups: list[Group], importance: str, components: Components | None = None) -> list[Tensor]:
        """The importance of all units, over all batches. `components` see the same batches: there may be no others."""

        def forward(batch: Mapping[str, Any]) -> Any:
            if components is not None:
                components.batch = batch
            return self.teacher(**batch)

        how = importance if groups else "activation"  # no units, no gradient
        with contextlib.nullcontext() if components is None else components:
            return scores_of(self.teacher, groups, self._all(), forward, how)

    def _all(self) -> Iterator[dict[str, Any]]:
        return chain([self._first], (self._readable(batch) for batch in self._batches))
