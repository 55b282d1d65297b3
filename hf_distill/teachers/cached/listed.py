"""Listed: rows as a teacher tells them that knows its likeliest columns alone (a served one). Nothing is chosen here.

Axes: p positions, k listed columns.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hf_distill.errors import SettingError
from hf_distill.signals import SparseRows
from hf_distill.teachers.cached.stores import STORES, Field

_ARROW = {"float16": np.float16, "float32": np.float32}


@dataclass(frozen=True)
class Listed:
    """The columns that the teacher told, and its tail, for the temperature that they are of.

    Where a row was not asked for (no label counted there), its tail is NaN.

    Args:
        k: columns a row, at most; what a row lists beyond is put into the tail, the likeliest first.
        temperature: of the probabilities. dtype: of the log-probabilities, "float16" or "float32".

    >>> sum(field.bytes for field in Listed(20).fields(32_000).values())
    124
    """

    k: int
    temperature: float = 1.0
    dtype: str = "float16"
    name = "listed"
    lists_columns = True

    def settings(self) -> dict[str, Any]:
        return asdict(self)

    def fields(self, columns: int) -> dict[str, Field]:
        return {
            "ids": Field(np.int32, self.k),
            "log_probabilities": Field(_ARROW[self.dtype], self.k),
            "tails": Field(np.float32, 1),
        }

    def encode(self, rows: Tensor, keys: np.ndarray, counts: np.ndarray) -> dict[str, np.ndarray]:
        """Raises SettingError: it keeps what is listed, not logits."""
        raise SettingError("Listed keeps what a teacher lists by itself. For logits use TopK.")

    def encode_listed(self, rows: SparseRows) -> dict[str, np.ndarray]:
        """`[p k']` and `[p]` → for each field `[p width]`."""
        log_p, order = rows.log_probabilities.float().sort(dim=-1, descending=True, stable=True)
        ids, tail = rows.ids.gather(-1, order), rows.log_tail.float()
        rest, ids, log_p = log_p[:, self.k :], ids[:, : self.k], log_p[:, : self.k]
        if rest.shape[1]:
            tail = torch.cat((rest, tail[:, None]), -1).logsumexp(-1)
        missing = self.k - ids.shape[1]
        ids = torch.nn.functional.pad(ids, (0, missing), value=-1)
        log_p = torch.nn.functional.pad(log_p, (0, missing), value=-torch.inf)
        return {
            "ids": ids.cpu().numpy().astype(np.int32),
            "log_probabilities": log_p.to(getattr(torch, self.dtype)).cpu().numpy(),
            "tails": tail[:, None].cpu().numpy(),
        }

    def tensor(self, name: str, stored: np.ndarray) -> Tensor:
        return torch.from_numpy(stored)

    def sparse_rows(self, laid: Mapping[str, Tensor], temperature: float) -> SparseRows:
        both = torch.cat((laid["log_probabilities"].float(), laid["tails"]), -1).log_softmax(-1)
        return SparseRows(laid["ids"].long(), both[..., :-1], both[..., -1], temperature)

    def check_temperature(self, temperature: float, columns: int) -> None:
        """Raises SettingError: the teacher was asked at another one."""
        if temperature != self.temperature:
            raise SettingError(
                f"temperature={temperature:g}: the cache keeps what its teacher listed at temperature "
                f"{self.temperature:g}, and softening that would need all columns. Train at {self.temperature:g}, "
                "without a schedule."
            )


STORES[Listed.name] = Listed
