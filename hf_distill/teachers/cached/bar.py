"""A progress bar of the pass: batches, examples or tokens a second, time left."""

from __future__ import annotations

from typing import Any

import numpy as np
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

_UNITS = {"example": "examples", "input": "tokens", "decoder": "tokens", "frames": "frames"}


class Bar:
    """Counts batches and the positions in them; shows nothing where it is not to be shown.

    Args:
        total: batches in all. finished: those of an earlier pass.
        axis: what the predictions run along, which says what a position is.
    """

    def __init__(self, *, total: int, axis: str, finished: int = 0, shown: bool = True) -> None:
        self._progress = Progress(
            TextColumn("asking the teacher"),
            BarColumn(bar_width=30),
            MofNCompleteColumn(),
            TextColumn("{task.fields[speed]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            disable=not shown,
        )
        self._task = self._progress.add_task("", total=total, completed=finished, speed="")
        self._positions = 0
        self._unit = _UNITS[axis]

    def __enter__(self) -> Bar:
        self._progress.start()
        return self

    def __exit__(self, *error: Any) -> None:
        self._progress.stop()

    def advance(self, counts: np.ndarray) -> None:
        """A batch is done, of examples with so many positions."""
        self._positions += int(counts.sum())
        elapsed = self._progress.tasks[0].elapsed or 0.0
        speed = f"{self._positions / elapsed:,.0f} {self._unit}/s" if elapsed > 0 else ""
        self._progress.update(self._task, advance=1, speed=speed)
