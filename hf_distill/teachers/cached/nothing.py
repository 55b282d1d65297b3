"""Nothing: a store for caches of the inside alone, of which no prediction is kept."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hf_distill.errors import SettingError
from hf_distill.signals import SparseRows
from hf_distill.teachers.cached.stores import STORES, Field


@dataclass(frozen=True)
class Nothing:
    """No prediction: what `TeacherCache.build(predictions=False)` keeps of them."""

    name = "nothing"
    lists_columns = False

    def settings(self) -> dict[str, Any]:
        return {}

    def fields(self, columns: int) -> dict[str, Field]:
        return {}

    def encode(self, rows: Tensor, keys: np.ndarray, counts: np.ndarray) -> dict[str, np.ndarray]:
        return {}

    def tensor(self, name: str, stored: np.ndarray) -> Tensor:
        return torch.from_numpy(stored)

    def sparse_rows(self, laid: Mapping[str, Tensor], temperature: float) -> SparseRows | None:
        return None

    def check_temperature(self, temperature: float, columns: int) -> None:
        """Raises SettingError: there are no predictions to be softened."""
        raise SettingError(
            "the cache holds no predictions: it was built with predictions=False. Train on objectives alone "
            "(alpha=None), or build it with predictions."
        )


STORES[Nothing.name] = Nothing
