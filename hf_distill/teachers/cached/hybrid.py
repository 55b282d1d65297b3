"""Hybrid: of each row the k likeliest columns as they are, and a few drawn from all others.

Axes: p positions, v columns.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hf_distill.errors import SettingError, did_you_mean
from hf_distill.functional.drawing import BLOCK, drawn, merged
from hf_distill.functional.rows import BLOCKED, in_full_precision
from hf_distill.signals import SparseRows
from hf_distill.teachers.cached.sampled import CELLS, refuse_other_temperature
from hf_distill.teachers.cached.stores import STORES, Field, id_type
from hf_distill.teachers.cached.uniforms import refuse_seed, uniforms
from hf_distill.teachers.load import DTYPE_ALIASES

_DTYPES = {"float16": np.float16, "float32": np.float32}


@dataclass(frozen=True)
class Hybrid:
    """The k largest columns of each row with their probabilities, and samples of the rest by what it weighs in all.

    Exact on what is listed, and on average the teacher's distribution on the rest: Σ over the k of p δ, plus the tail's
    probability / samples for each draw. With k = v it is the live teacher. Draws, temperatures and divergences are as
    with `Sampled`.

    Args:
        k: columns kept of each row. samples: draws from the others. temperature: at which it can be trained with.
        dtype: of the log-probabilities of the k, "float16" (off by 2^-12 of log p) or "float32". seed: of the draws.

    Raises:
        SettingError: a setting outside these bounds.

    >>> sum(field.bytes for field in Hybrid(16, 16).fields(32_000).values())
    104
    """

    k: int = 16
    samples: int = 16
    temperature: float = 1.0
    dtype: str = "float16"
    seed: int = 0
    name = "hybrid"
    lists_columns = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "temperature", float(self.temperature))
        if self.k < 1 or self.samples < 1 or self.temperature <= 0:
            raise SettingError(
                f"Hybrid(k={self.k}, samples={self.samples}, temperature={self.temperature:g}): k and samples are at "
                "least 1, and the temperature is above 0. For samples alone take Sampled, for none TopK."
            )
        if self.dtype not in _DTYPES:
            hint = did_you_mean(self.dtype, _DTYPES, DTYPE_ALIASES)
            raise SettingError(f"Hybrid(dtype={self.dtype!r}): allowed are {', '.join(_DTYPES)}.{hint}")
        refuse_seed(self.seed, "Hybrid")

    def settings(self) -> dict[str, Any]:
        return asdict(self)

    def fields(self, columns: int) -> dict[str, Field]:
        kept = min(self.k, columns)
        return {
            "ids": Field(id_type(columns), kept),
            "log_probabilities": Field(_DTYPES[self.dtype], kept),
            "tail": Field(np.float32, 1),
            "drawn": Field(id_type(columns), self.samples),
            "mean_log_probability": Field(np.float32, 1),
        }

    def encode(self, rows: Tensor, keys: np.ndarray, counts: np.ndarray) -> dict[str, np.ndarray]:
        """The k and their log p, log of what all others weigh, draws of these, and the mean of log p over the draws."""
        at = uniforms(keys, counts, self.samples, seed=self.seed)
        many = max(1, CELLS // max(rows.shape[1], BLOCK * self.samples))
        parts = [self._kept_and_drawn(some, u) for some, u in zip(rows.split(many), at.split(many), strict=True)]
        types = self.fields(rows.shape[1])
        return {name: np.concatenate([part[name] for part in parts]).astype(types[name].dtype) for name in types}

    def _kept_and_drawn(self, rows: Tensor, at: Tensor) -> dict[str, np.ndarray]:
        log_p = (in_full_precision(rows.detach()) / self.temperature).log_softmax(-1)
        kept, ids = log_p.topk(min(self.k, log_p.shape[-1]), dim=-1)
        others = log_p.scatter(-1, ids, -torch.inf)
        tail = others.logsumexp(-1, keepdim=True)
        chosen = drawn((others - tail.clamp(min=BLOCKED)).exp(), at.to(rows.device))
        mean = log_p.gather(-1, chosen).mean(-1, keepdim=True)
        mean = torch.where(tail > -torch.inf, mean, 0.0)  # none was drawn
        found = {"ids": ids, "log_probabilities": kept, "tail": tail, "drawn": chosen, "mean_log_probability": mean}
        return {name: value.cpu().numpy() for name, value in found.items()}

    def tensor(self, name: str, stored: np.ndarray) -> Tensor:
        return torch.from_numpy(stored.astype(np.int32) if name in ("ids", "drawn") else stored)

    def sparse_rows(self, laid: Mapping[str, Tensor], temperature: float) -> SparseRows:
        tail = laid["tail"]
        both = torch.cat([laid["log_probabilities"].float(), tail], -1).log_softmax(-1)  # rounding left it beside 1
        kept, share = both[..., :-1], both[..., -1:].exp() / self.samples
        impossible = kept == -torch.inf  # listed where fewer are possible than are listed
        chosen, shares = merged(laid["drawn"].long(), share.expand(laid["drawn"].shape))
        chosen = chosen.masked_fill(tail == -torch.inf, -1)  # nothing is left to draw from
        mean = laid["mean_log_probability"].expand(chosen.shape)
        return SparseRows(
            ids=torch.cat([laid["ids"].long().masked_fill(impossible, -1), chosen], -1),
            log_probabilities=torch.cat([kept.masked_fill(impossible, 0.0), mean], -1),
            log_tail=torch.full_like(tail[..., 0], -torch.inf),
            temperature=temperature,
            weights=torch.cat([kept.exp(), shares], -1),
        )

    def check_temperature(self, temperature: float, columns: int) -> None:
        refuse_other_temperature(self, temperature)


STORES[Hybrid.name] = Hybrid
