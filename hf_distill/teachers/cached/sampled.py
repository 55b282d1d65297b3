"""Sampled: of each row a few columns, drawn by their probability: targets that are the teacher's on average.

Axes: p positions, v columns, k draws.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hf_distill.errors import SettingError
from hf_distill.functional.drawing import BLOCK, drawn, merged
from hf_distill.functional.rows import in_full_precision
from hf_distill.signals import SparseRows
from hf_distill.teachers.cached.stores import STORES, Field, id_type
from hf_distill.teachers.cached.uniforms import refuse_seed, uniforms

CELLS = 1 << 24  # numbers that are held at once to draw from rows: 128 MB of float64


@dataclass(frozen=True)
class Sampled:
    """Columns drawn with replacement, each with the weight that makes their mean the teacher's distribution.

    Anshumann et al. 2025, Sparse Logit Sampling (random sampling knowledge distillation): proposals r ∝
    p^proposal_power, weights p / (k r). The gradient of the forward KL is then the teacher's on average, which that of
    no top-k is. Where we differ: draws are stratified (`functional/drawing.py`), by which no estimate varies more, and
    one number a row (the mean of log p over the draws) makes the reported value a divergence. Weights are not divided
    by their sum: it is 1 on average, and to divide would bring a bias. Repeated draws are put together when read.

    The draws follow from the seed and the content of the example: the bytes depend neither on processes nor on how
    often a build was interrupted. Training at another temperature is refused, and so are divergences but forward_kl.

    Args:
        samples: draws a row. temperature: at which it can be trained with. proposal_power: above 0, at most 1; at 1 all
            weights are equal and are not kept. stratified: False for independent draws. seed: of the draws.

    Raises:
        SettingError: a setting outside these bounds.

    >>> sum(field.bytes for field in Sampled(32).fields(32_000).values())
    68
    """

    samples: int = 32
    temperature: float = 1.0
    proposal_power: float = 1.0
    stratified: bool = True
    seed: int = 0
    name = "sampled"
    lists_columns = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "temperature", float(self.temperature))
        object.__setattr__(self, "proposal_power", float(self.proposal_power))
        if self.samples < 1 or self.temperature <= 0 or not 0 < self.proposal_power <= 1:
            raise SettingError(
                f"Sampled(samples={self.samples}, temperature={self.temperature:g}, proposal_power="
                f"{self.proposal_power:g}): at least one sample, a temperature above 0, and a power above 0 and at "
                "most 1 (above 1 an unlikely column has a weight without bound)."
            )
        refuse_seed(self.seed, "Sampled")

    def settings(self) -> dict[str, Any]:
        return asdict(self)

    def fields(self, columns: int) -> dict[str, Field]:
        weights = {} if self.proposal_power == 1 else {"weights": Field(np.float32, self.samples)}
        return {
            "ids": Field(id_type(columns), self.samples),
            **weights,
            "mean_log_probability": Field(np.float32, 1),
        }

    def encode(self, rows: Tensor, keys: np.ndarray, counts: np.ndarray) -> dict[str, np.ndarray]:
        """ids, ascending; their weights where they are not 1 / k; and the mean of log p, each by its weight."""
        at = uniforms(keys, counts, self.samples, seed=self.seed)
        many = max(1, CELLS // max(rows.shape[1], BLOCK * self.samples))
        parts = [self._drawn(some, u) for some, u in zip(rows.split(many), at.split(many), strict=True)]
        types = self.fields(rows.shape[1])
        return {name: np.concatenate([part[name] for part in parts]).astype(types[name].dtype) for name in types}

    def _drawn(self, rows: Tensor, at: Tensor) -> dict[str, np.ndarray]:
        log_p = (in_full_precision(rows.detach()) / self.temperature).log_softmax(-1)
        proposals = (log_p if self.proposal_power == 1 else self.proposal_power * log_p).exp()
        ids = drawn(proposals, at.to(rows.device), stratified=self.stratified)
        known = log_p.gather(-1, ids)
        weights = torch.full_like(known, 1 / self.samples)
        if self.proposal_power != 1:
            total = proposals.sum(-1, keepdim=True, dtype=torch.float64).float()
            weights = weights * total * ((1 - self.proposal_power) * known).exp()
        mean = (weights * known).sum(-1, keepdim=True) / weights.sum(-1, keepdim=True)
        found = {"ids": ids, "weights": weights, "mean_log_probability": mean}
        return {name: value.cpu().numpy() for name, value in found.items()}

    def tensor(self, name: str, stored: np.ndarray) -> Tensor:
        return torch.from_numpy(stored.astype(np.int32) if name == "ids" else stored)

    def sparse_rows(self, laid: Mapping[str, Tensor], temperature: float) -> SparseRows:
        ids, mean = laid["ids"].long(), laid["mean_log_probability"]
        weights = laid["weights"] if "weights" in laid else torch.full_like(mean, 1 / self.samples).expand(ids.shape)
        ids, weights = merged(ids, weights)
        none = torch.full_like(mean[..., 0], -torch.inf)
        return SparseRows(ids, mean.expand(ids.shape), none, temperature, weights)

    def check_temperature(self, temperature: float, columns: int) -> None:
        refuse_other_temperature(self, temperature)


def refuse_other_temperature(store: Any, temperature: float) -> None:
    """Raises:
    SettingError: another than it was drawn at.
    """
    if temperature != store.temperature:
        kind = type(store).__name__
        raise SettingError(
            f"temperature={temperature:g}: the cache keeps columns that were drawn from the teacher's probabilities at "
            f"temperature {store.temperature:g}; at another one they would be drawn otherwise. Train at "
            f"{store.temperature:g}, without a schedule, or build the cache with {kind}(temperature={temperature:g}) "
            "or Dense()."
        )


STORES[Sampled.name] = Sampled
