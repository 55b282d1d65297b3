"""What is measured before a pass: the size of the cache, the effect of padding, and the error of rounding."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from hf_distill._types import Batch
from hf_distill.teachers.cache.files import DTYPES
from hf_distill.teachers.cache.hidden import stored_activations
from hf_distill.teachers.cache.keys import MASK
from hf_distill.teachers.cache.source import Source, TeacherOutputs
from hf_distill.teachers.cache.stores import Dense, store_from
from hf_distill.teachers.passes import readable_bytes
from hf_distill.teachers.shards import Json

_BYTES_PER_EXAMPLE = 16 + 4 + 24  # key, number of positions, entry in the index
_BYTES_PER_COUNT = 4  # the number of positions along each axis of activations
_SAMPLE = 64  # examples whose length is measured
_SHARD_BYTES = 64_000_000
_SHARD_EXAMPLES = 256  # or a thousandth of all: at most this many are lost when a pass is interrupted
_LARGE_ROUNDING = 0.01  # of the differences between rows
_LARGE_PADDING = 1e-3  # of the largest prediction; half precision alone gives more than rounding
_LARGE_PADDING_HALF = 0.05
_AXES = {"input": "tokens", "decoder": "decoder positions", "all": "positions"}  # other axes are words themselves


@dataclass(frozen=True)
class Size:
    """The size of a cache on the disk.

    Attributes:
        examples: how many there are.
        positions: rows of predictions of an example, a mean over a sample.
        bytes_per_position: of predictions, exact.
        activations: for each axis, positions of an example (a mean) and bytes of a position (exact).
        axis: what the predictions run along; "example" means one row for each example.
    """

    examples: int
    positions: float
    bytes_per_position: int
    activations: dict[str, tuple[float, int]]
    axis: str

    @property
    def total(self) -> int:
        """Bytes of all shards and the index."""
        each = self.positions * self.bytes_per_position + _BYTES_PER_EXAMPLE
        each += sum(positions * width + _BYTES_PER_COUNT for positions, width in self.activations.values())
        return round(self.examples * each)

    def describe(self, folder: Path, *, free: int) -> str:
        """Return the size in words, with the bytes that are free where the cache will be."""
        each = f"of {self.positions:.1f} positions, {self.bytes_per_position:,} bytes a position"
        if self.axis == "example":
            each = f"with {self.bytes_per_position:,} bytes of predictions each"
        for axis, (positions, width) in self.activations.items():
            each += f", and activations of {width:,} bytes at each of {positions:.1f} {_AXES.get(axis, axis)}"
        return (
            f"about {readable_bytes(self.total)} in all: {self.examples:,} examples {each}; "
            f"{readable_bytes(free)} are free at {folder}"
        )


def measure_size(source: Source, plan: Json, *, batch_size: int) -> Size:
    """Return the size of a cache, from a sample of examples over the whole dataset, without querying the teacher."""
    count = len(source)
    indices = np.linspace(0, count - 1, min(_SAMPLE, count)).astype(int).tolist()
    starts = range(0, len(indices), batch_size)
    sampled = [source.count_positions(source.batch(indices[start : start + batch_size])) for start in starts]
    means = {axis: sum(batch[axis] for batch in sampled) / len(indices) for axis in sampled[0]}
    activations: dict[str, tuple[float, int]] = {}
    for kept in stored_activations(plan["activations"]):
        width = kept.width * np.dtype(DTYPES[plan["activations"]["dtype"]]).itemsize
        positions = means.get(kept.along) or plan["activations"]["positions"][kept.along]
        activations[kept.along] = (positions, width + activations.get(kept.along, (0, 0))[1])
    fields = store_from(plan["store"]).fields(plan["predictions"]["columns"])
    return Size(count, means["predictions"], sum(field.bytes for field in fields.values()), activations, source.axis)


def shard_size(requested: int | None, bytes_per_example: float, count: int, batch_size: int) -> int:
    """Return the examples of a shard: whole batches, so that no batch crosses its end."""
    default = min(max(_SHARD_EXAMPLES, count // 1000), int(_SHARD_BYTES / max(1.0, bytes_per_example)))
    return max(1, min(default if requested is None else requested, count) // batch_size) * batch_size


def change_by_padding(source: Source, batch: Batch, outputs: TeacherOutputs, device: torch.device) -> float | None:
    """Return how much padding changes the predictions (or an activation) of the most padded example of a batch.

    Relative to the largest. None if nothing is padded there, there is no mask, or the teacher is sparse.
    """
    mask = batch.get(MASK)
    if mask is None or mask.dim() != 2 or bool(mask.all()) or source.main not in batch:
        return None
    row = int(mask.sum(1).argmin())
    real = mask[row].bool()
    alone = {
        name: value[row : row + 1, real] if value.shape[1:2] == mask.shape[1:2] else value[row : row + 1]
        for name, value in batch.items()
        if isinstance(value, Tensor)
    }
    padded, unpadded = _rows_of(outputs, row), _rows_of(source.query(alone, device), 0)
    if padded is None or unpadded is None or padded.shape != unpadded.shape or padded.numel() == 0:
        return None
    difference = (padded - unpadded).abs().nan_to_num().max() / unpadded.abs().max().clamp(min=1e-12)
    return float(f"{difference.item():.2g}")


def _rows_of(outputs: TeacherOutputs, example: int) -> Tensor | None:
    """Return the predictions of an example `[n v]`, or its first activation if there are none."""
    first = next(iter(outputs.activations.values()), None)
    rows, counts = (outputs.rows, outputs.counts) if outputs.rows is not None else first or (None, outputs.counts)
    if rows is None:
        return None
    end = int(counts[: example + 1].sum())
    return rows[end - int(counts[example]) : end].float()


def padding_warning(change: float | None, plan: Json) -> str | None:
    """Return what to log about `change_by_padding`, or None if rounding explains it."""
    exact = plan["teacher"]["dtype"] in ("float32", "float64")
    if change is None or change <= (_LARGE_PADDING if exact else _LARGE_PADDING_HALF):
        return None
    return (
        f"the predictions of this teacher depend on how far its batch is padded: they change by {change:.2g} of the "
        f"largest prediction. The cache holds those in batches of {plan['padding']['batch_size']} consecutive "
        "examples, and a live teacher's differ in other batches. To avoid this, pad to one fixed length in both."
    )


def rounding_errors(outputs: TeacherOutputs, plan: Json) -> dict[str, float]:
    """Return the `rounding_error` of everything that is kept in half precision, measured on the first batch."""
    found: dict[str, float] = {}
    store, activations = store_from(plan["store"]), plan["activations"]
    rounds = isinstance(store, Dense) and not store.keeps_largest and store.dtype != "float32"
    if rounds and outputs.rows is not None and bool(outputs.rows.isfinite().all()):
        found["predictions"] = rounding_error(outputs.rows, plan["store"]["dtype"])
    if activations is not None and activations["dtype"] != "float32":
        for kept, (rows, _) in outputs.activations.items():
            found[kept.field] = rounding_error(rows, activations["dtype"])
    return {name: float(f"{error:.2g}") for name, error in found.items()}


def rounding_error(rows: Tensor, dtype: str) -> float:
    """Return how much rounding `[p v]` to a dtype changes, relative to how much the rows differ from each other.

    Both are root mean squares. What all rows have in common teaches nothing, so it is subtracted first.

    >>> offset = torch.tensor([[2000.3], [2000.9]])
    >>> rounding_error(offset, "float32") < 1e-3 < rounding_error(offset, "float16")
    True
    """
    rows = rows.detach().double()
    error = (rows.to(getattr(torch, dtype)).double() - rows).square().mean()
    spread = (rows - rows.mean(0)).square().mean()
    return float((error / spread).sqrt()) if spread > 0 else 0.0


def rounding_warning(errors: Mapping[str, float], plan: Json) -> str | None:
    """Return what to log about `rounding_errors`, or None if they are small."""
    if not errors or max(errors.values()) <= _LARGE_ROUNDING:
        return None
    name, error = max(errors.items(), key=lambda item: item[1])
    dtype = plan["store"]["dtype"] if name == "predictions" else plan["activations"]["dtype"]
    instead = 'store=Dense("float32")' if name == "predictions" else 'BuildOptions(activation_dtype="float32")'
    return (
        f"rounding to {dtype} changes {name} by {error:.2g} of their differences between positions (root mean squares, "
        f"in the first batch): they are large beside their differences. Pass {instead}."
    )
