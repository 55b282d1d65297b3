"""TopK: of each row the k likeliest columns, and how likely all others are together, for each temperature to train at.

The divergence is then over k + 1 outcomes (`functional/sparse.py`): the student's own preferences among the others are
left alone. What is listed is never normalised anew: that would tell the student to give the others nothing.

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
from hf_distill.functional.rows import in_full_precision
from hf_distill.signals import SparseRows
from hf_distill.teachers.cached.stores import STORES, Field, id_type
from hf_distill.teachers.load import DTYPE_ALIASES

_ARROW = {"float16": np.float16, "float32": np.float32}


@dataclass(frozen=True)
class TopK:
    """The k largest columns of each row, and the probability of all others.

    A softened tail does not follow from the tail at another temperature, so it is kept for each of `temperatures`;
    training at any other is refused. A temperature that moves needs `Dense`.

    Args:
        k: columns kept of each row. temperatures: at which it can be trained with.
        dtype: of the log-probabilities, "float16" or "float32".

    Raises:
        SettingError: k below 1, no temperature or one that is not above 0, or another dtype.

    >>> sum(field.bytes for field in TopK(64, temperatures=(1.0,)).fields(32_000).values())
    260
    """

    k: int = 64
    temperatures: tuple[float, ...] = (1.0, 2.0)
    dtype: str = "float16"
    name = "top_k"
    lists_columns = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "temperatures", tuple(float(t) for t in self.temperatures))
        if self.k < 1 or not self.temperatures or min(self.temperatures) <= 0:
            raise SettingError(
                f"TopK(k={self.k}, temperatures={self.temperatures}): k is at least 1, and there is at least one "
                "temperature, above 0."
            )
        if self.dtype not in _ARROW:
            hint = did_you_mean(self.dtype, _ARROW, DTYPE_ALIASES)
            raise SettingError(f"TopK(dtype={self.dtype!r}): allowed are {', '.join(_ARROW)}.{hint}")

    def settings(self) -> dict[str, Any]:
        return {**asdict(self), "temperatures": list(self.temperatures)}

    def fields(self, columns: int) -> dict[str, Field]:
        kept = min(self.k, columns)
        return {
            "ids": Field(id_type(columns), kept),
            "log_probabilities": Field(_ARROW[self.dtype], kept),
            "tails": Field(np.float32, len(self.temperatures)),
        }

    def encode(self, rows: Tensor, keys: np.ndarray, counts: np.ndarray) -> dict[str, np.ndarray]:
        """ids, their log-probabilities at temperature 1, and log Σ p^(1/T) over all others for each temperature."""
        log_p = in_full_precision(rows.detach()).log_softmax(-1)
        kept, ids = log_p.topk(min(self.k, log_p.shape[-1]), dim=-1)
        others = log_p.scatter(-1, ids, -torch.inf)
        tails = torch.stack([(others / t).logsumexp(-1) for t in self.temperatures], -1)
        fields = self.fields(rows.shape[1])
        return {
            "ids": ids.cpu().numpy().astype(fields["ids"].dtype),
            "log_probabilities": kept.to(getattr(torch, self.dtype)).cpu().numpy(),
            "tails": tails.float().cpu().numpy(),
        }

    def tensor(self, name: str, stored: np.ndarray) -> Tensor:
        return torch.from_numpy(stored.astype(np.int32) if name == "ids" else stored)

    def sparse_rows(self, laid: Mapping[str, Tensor], temperature: float) -> SparseRows:
        kept, tail = self.at_temperature(laid["log_probabilities"], laid["tails"], temperature)
        return SparseRows(laid["ids"].long(), kept, tail, temperature)

    def at_temperature(self, log_probabilities: Tensor, tails: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        """Log-probabilities `[... k]` softened, and the tail's `[...]`: together they sum to 1.

        At a temperature that the tail is not kept for there must be none: see `check_temperature`.
        """
        if temperature in self.temperatures:
            tail = tails[..., self.temperatures.index(temperature), None]
        else:
            tail = torch.full_like(tails[..., :1], -torch.inf)
        both = torch.cat([log_probabilities.float() / temperature, tail], -1).log_softmax(-1)
        return both[..., :-1], both[..., -1]

    def check_temperature(self, temperature: float, columns: int) -> None:
        if self.k >= columns or temperature in self.temperatures:
            return
        known = ", ".join(f"{t:g}" for t in self.temperatures)
        raise SettingError(
            f"temperature={temperature:g}: the cache keeps the {self.k} likeliest columns of each row and the rest as "
            f"one outcome, for temperature {known}; what the rest is at another one does not follow from that. Train "
            f"at one of these, without a schedule, or build the cache with TopK(temperatures=({temperature:g},)) or "
            "Dense()."
        )


STORES[TopK.name] = TopK
