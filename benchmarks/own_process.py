"""A figure from a process of its own, or why there is none. What is measured there is the script's business."""

from __future__ import annotations

import re
import signal
import subprocess
from collections.abc import Mapping, Sequence


class NotMeasured(Exception):
    """The process gave no figure; the text says why."""


def figure(command: Sequence[str], *, environment: Mapping[str, str] | None = None) -> float:
    """What the command prints last.

    Raises:
        NotMeasured: it fails, or that is no number.
    """
    env = None if environment is None else dict(environment)
    said = subprocess.run(list(command), capture_output=True, text=True, env=env)
    if said.returncode < 0:
        raise NotMeasured(f"its process was ended by {signal.Signals(-said.returncode).name}")
    if said.returncode:
        raise NotMeasured(_error_in(said.stderr) or f"its process ended with {said.returncode} and said nothing")
    last = said.stdout.split()[-1:]
    try:
        return float(last[0])
    except (IndexError, ValueError) as error:
        raise NotMeasured(f"its process ended with {last[0] if last else 'nothing'!r} in place of a number") from error


def _error_in(text: str) -> str:
    """The last line that names an error; else the last one. Libraries may say more as they are unloaded."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    errors = [line for line in lines if re.match(r"[\w.]+(Error|Exception|Interrupt|Absent)\b", line)]
    return (errors or lines or [""])[-1]


def why_not(failed: Mapping[str, str]) -> list[str]:
    """Lines for below a table: of each way, why it has no figure of memory."""
    return [f"No peak memory of {way}: {why}." for way, why in failed.items()]
