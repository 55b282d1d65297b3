"""The principal components of a model's hidden states on calibration data. It changes no model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from hf_distill.errors import DataError
from hf_distill.students.importance import attended


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
