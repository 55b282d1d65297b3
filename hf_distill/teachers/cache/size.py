"""How large a cache will be, told before the pass starts, and whether the disk has room for it."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from hf_distill.errors import DataError
from hf_distill.teachers.cache.stores import Field

PER_EXAMPLE = 16 + 4 + 24  # key, number of positions, its entry in the index
PER_COUNT = 4  # number of positions of what is kept of the inside, for each axis


_AXES = {
    "tokens": "tokens",
    "decoder": "decoder positions",
    "frames": "frames",
    "all": "positions",
    "vectors": "vectors",
}


@dataclass(frozen=True)
class Part:
    """What of the inside runs along one axis: so many positions an example, a mean, and bytes at each."""

    along: str
    positions: float
    bytes_a_position: int


@dataclass(frozen=True)
class Size:
    """What a cache takes.

    Attributes:
        examples: how many.
        positions: of an example, a mean over a sample.
        bytes_a_position: exact.
        inside: beside.
        axis: what the predictions run along; "example": each has one.
    """

    examples: int
    positions: float
    bytes_a_position: int
    inside: tuple[Part, ...] = ()
    axis: str = "input"

    @property
    def total(self) -> int:
        each = self.positions * self.bytes_a_position + PER_EXAMPLE
        each += sum(part.positions * part.bytes_a_position + PER_COUNT for part in self.inside)
        return round(self.examples * each)


def bytes_a_position(fields: dict[str, Field]) -> int:
    return sum(field.bytes for field in fields.values())


def free_bytes(folder: Path) -> int:
    """On the disk of a folder, which need not exist yet."""
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def announced(size: Size, folder: Path, *, free: int) -> str:
    """One sentence for the user, before anything is computed."""
    inside = "".join(
        f", and of its inside {part.bytes_a_position:,} bytes at each of {part.positions:.1f} {_AXES[part.along]}"
        for part in size.inside
    )
    each = f"of {size.positions:.1f} positions, {size.bytes_a_position:,} bytes a position"
    if size.axis == "example":
        each = f"with {size.bytes_a_position:,} bytes of predictions each"
    return (
        f"about {readable(size.total)} in all: {size.examples:,} examples {each}{inside}; {readable(free)} are free at "
        f"{folder}"
    )


def check_fits(size: Size, folder: Path, *, free: int, finished: int = 0) -> None:
    """Raises:
    DataError: what is still to be written does not fit onto the disk.
    """
    needed = size.total - finished
    if needed > free:
        raise DataError(
            f"the cache does not fit: {announced(size, folder, free=free)}. Choose another disk, a smaller store "
            '(store=Dense("float16"), or TopK for a large vocabulary), or fewer examples.'
        )


def readable(count: float) -> str:
    """
    >>> readable(1_530_000_000), readable(12)
    ('1.5 GB', '12 B')
    """
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"
