"""What is kept of a row of the teacher's predictions, and in how many bytes. Files are elsewhere.

Axes: p positions, v columns.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from hf_distill.errors import SettingError, did_you_mean
from hf_distill.functional.rows import in_full_precision
from hf_distill.signals import SparseRows
from hf_distill.teachers.load import DTYPE_ALIASES

_ARROW_TYPE = {"float16": np.float16, "bfloat16": np.uint16, "float32": np.float32}  # Arrow knows no bfloat16


@dataclass(frozen=True)
class Field:
    """So many numbers a position, as they lie on the disk."""

    dtype: Any
    width: int

    @property
    def bytes(self) -> int:
        return int(np.dtype(self.dtype).itemsize * self.width)


class Store(Protocol):
    """What a kind of cache keeps of each row. `name` and the settings stand in the manifest."""

    @property
    def name(self) -> str: ...

    @property
    def lists_columns(self) -> bool:
        """Whether it names columns of a vocabulary by their number, and does not keep all of them."""
        ...

    def settings(self) -> dict[str, Any]: ...

    def fields(self, columns: int) -> dict[str, Field]:
        """What is written, for a head of so many columns."""
        ...

    def encode(self, rows: Tensor, keys: np.ndarray, counts: np.ndarray) -> dict[str, np.ndarray]:
        """`[p v]` → for each field `[p width]`.

        Args:
            keys: `[b 2]` of the examples. counts: `[b]` how many of the positions each has. For what is drawn.
        """
        ...

    def tensor(self, name: str, stored: np.ndarray) -> Tensor:
        """One field as it was read, as a tensor."""
        ...

    def sparse_rows(self, laid: Mapping[str, Tensor], temperature: float) -> SparseRows | None:
        """What is told of the rows, from fields `[... width]`; None: `logits` are all there is to it."""
        ...

    def check_temperature(self, temperature: float, columns: int) -> None:
        """Raises SettingError: a head of so many columns cannot be trained at this temperature with what is kept."""
        ...


@dataclass(frozen=True)
class Dense:
    """All columns, as they are.

    Args:
        dtype: "float16" (3 digits; up to 65,504), "bfloat16" (2 digits, any size) or "float32".
        keeps_largest: round how far each row's columns are below its largest, which is kept in float32 beside them: a
            row of logits around 2,000 then loses no more than one around 0. None: `TeacherCache.build` decides.

    Raises:
        SettingError: another dtype.

    >>> Dense().fields(3)["logits"].bytes
    6
    """

    dtype: str = "float16"
    keeps_largest: bool | None = None
    name = "dense"
    lists_columns = False

    def __post_init__(self) -> None:
        if self.dtype not in _ARROW_TYPE:
            hint = did_you_mean(self.dtype, _ARROW_TYPE, DTYPE_ALIASES)
            raise SettingError(f"Dense(dtype={self.dtype!r}): allowed are {', '.join(_ARROW_TYPE)}.{hint}")

    def settings(self) -> dict[str, Any]:
        return asdict(self)

    def fields(self, columns: int) -> dict[str, Field]:
        largest = {"largest": Field(np.float32, 1)} if self.keeps_largest else {}
        return {"logits": Field(_ARROW_TYPE[self.dtype], columns), **largest}

    def encode(self, rows: Tensor, keys: np.ndarray, counts: np.ndarray) -> dict[str, np.ndarray]:
        rows, beside = rows.detach(), {}
        if self.keeps_largest:
            rows = in_full_precision(rows)
            largest = rows.amax(-1, keepdim=True).float()
            largest = largest.where(largest.isfinite(), 0.0)  # no column is possible
            rows, beside = rows - largest.to(rows.dtype), {"largest": largest.cpu().numpy()}
        kept = rows.to(getattr(torch, self.dtype)).cpu()
        self._refuse_overflow(rows, kept)
        return {"logits": kept.view(torch.uint16).numpy() if self.dtype == "bfloat16" else kept.numpy(), **beside}

    def logits(self, laid: Mapping[str, Tensor]) -> Tensor:
        """`[... columns]` in float32, from fields `[... width]`."""
        logits = laid["logits"].float()
        return logits + laid["largest"] if self.keeps_largest else logits

    def tensor(self, name: str, stored: np.ndarray) -> Tensor:
        tensor = torch.from_numpy(stored)
        return tensor.view(torch.bfloat16) if self.dtype == "bfloat16" and name == "logits" else tensor

    def sparse_rows(self, laid: Mapping[str, Tensor], temperature: float) -> None:
        return None

    def check_temperature(self, temperature: float, columns: int) -> None:
        """Any will do."""

    def _refuse_overflow(self, rows: Tensor, kept: Tensor) -> None:
        if self.dtype == "float16" and bool((kept.isinf() & ~rows.cpu().isinf()).any()):
            largest = rows[rows.isfinite()].abs().max().item()
            raise SettingError(
                f"the teacher's logits {'differ by' if self.keeps_largest else 'reach'} {largest:.3g}, float16 ends at "
                '65504. Pass store=Dense("bfloat16") or Dense("float32").'
            )


def rounding_error(rows: Tensor, dtype: str) -> float:
    """How much rounding `[p v]` to a dtype changes, relative to how much the rows differ from each other.

    Both are root mean squares; what all rows have in common teaches nothing, so it is taken off first.

    >>> offset = torch.tensor([[2000.3], [2000.9]])
    >>> rounding_error(offset, "float32") < 1e-3 < rounding_error(offset, "float16")
    True
    """
    rows = rows.detach().double()
    error = (rows.to(getattr(torch, dtype)).double() - rows).square().mean()
    spread = (rows - rows.mean(0)).square().mean()
    return float((error / spread).sqrt()) if spread > 0 else 0.0


def id_type(columns: int) -> Any:
    """Of a column's number: 2 bytes up to 65,536 columns, else 4."""
    return np.uint16 if columns <= 1 << 16 else np.int32


STORES: dict[str, Any] = {"dense": Dense}


def store_from(description: Mapping[str, Any]) -> Store:
    """The store that a manifest names.

    Raises:
        SettingError: written by a version that knows more of them.
    """
    settings = {name: value for name, value in description.items() if name != "name"}
    if description.get("name") not in STORES:
        raise SettingError(
            f"the cache keeps {description.get('name')!r}, which this version does not know; it knows "
            f"{', '.join(STORES)}. Update hf-distill."
        )
    return STORES[description["name"]](**settings)


def described(store: Store) -> dict[str, Any]:
    return {"name": store.name, **store.settings()}
