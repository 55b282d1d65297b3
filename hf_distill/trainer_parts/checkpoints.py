"""Which checkpoints of a folder are whole. `Trainer` writes the trainer's state last."""

from __future__ import annotations

import json
from pathlib import Path

STATE = "trainer_state.json"
_PREFIX = "checkpoint-"


def checkpoints_in(folder: str) -> list[Path]:
    """The folders that `Trainer` takes for checkpoints, the last one first."""
    found = [path for path in Path(folder).glob(f"{_PREFIX}*") if path.is_dir() and step_of(path) is not None]
    return sorted(found, key=lambda path: step_of(path) or 0, reverse=True)


def step_of(checkpoint: Path) -> int | None:
    digits = checkpoint.name.removeprefix(_PREFIX)
    return int(digits) if digits.isdigit() else None


def is_whole(checkpoint: Path) -> bool:
    """Whether it was written to the end."""
    try:
        return "global_step" in json.loads((checkpoint / STATE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False


def last_whole_checkpoint(folder: str) -> str | None:
    """The last one that was written to the end."""
    return next((str(path) for path in checkpoints_in(folder) if is_whole(path)), None)
