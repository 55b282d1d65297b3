"""The files that make a chain resumable: which links were begun, and what came of those that are finished.

Each is written whole or not at all. What is inside a link is recorded by its stages.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from hf_distill.chain.result import LinkResult
from hf_distill.errors import SettingError
from hf_distill.stages.record import read, write
from hf_distill.stages.result import FINISHED_BEFORE

BEGUN, FINISHED = "link.json", "link_finished.json"


def begin(folder: str, name: str, teacher: str, parameters: int) -> None:
    write(folder, BEGUN, {"name": name, "teacher": teacher, "parameters": parameters})


def finish(result: LinkResult) -> None:
    """The last thing that is written of a link."""
    write(result.folder, FINISHED, asdict(result))


def finished(folder: str) -> LinkResult | None:
    """What came of a link that is finished; its folder is where it is found, for it may have been moved."""
    found = read(folder, FINISHED)
    return None if found is None else LinkResult(**{**found, "folder": folder, "how": FINISHED_BEFORE})


def begun(folder: str) -> dict[str, Any] | None:
    found: dict[str, Any] | None = read(folder, BEGUN)
    return found


def check_what_was_begun(output_dir: str, folders: Sequence[str], *, resume: bool) -> None:
    """Refuse to begin where another chain was begun, or to go on from other links than these.

    Raises:
        SettingError: it names them.
    """
    there = sorted(os.path.join(output_dir, path.parent.name) for path in Path(output_dir).glob(f"*/{BEGUN}"))
    names = ", ".join(Path(folder).name for folder in there)
    if there and not resume:
        raise SettingError(
            f"{output_dir} holds a chain of an earlier call: {names}. Pass resume_from_checkpoint=True to go on with "
            "it, or another output_dir."
        )
    if not set(there) <= set(folders):
        raise SettingError(
            f"{output_dir} holds {names}, and the links now are {', '.join(Path(one).name for one in folders)}. Give "
            "the links that were begun, in their order, or another output_dir."
        )


def check_link(folder: str, teacher: str, parameters: int | None = None) -> None:
    """Refuse a link that was begun with another teacher, or with a student of another size.

    Raises:
        SettingError: it says what was, and what is.
    """
    before = begun(folder)
    if before is None:
        return
    if before["teacher"] != teacher:
        raise SettingError(
            f"in {folder} it was taught by {before['teacher']}, and is to be taught by {teacher}. Give it as it was, "
            "or another output_dir."
        )
    if parameters is not None and before["parameters"] != parameters:
        raise SettingError(
            f"in {folder} the student had {before['parameters']:,} parameters, and has {parameters:,}. Give it as it "
            "was, or another output_dir."
        )
