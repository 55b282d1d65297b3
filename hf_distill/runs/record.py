"""The record of a run, as JSON: the settings that each stage or link was begun with, and its result."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hf_distill._utils import write_text_whole
from hf_distill.errors import SettingError
from hf_distill.presets import Stage
from hf_distill.schedules import PROGRESS
from hf_distill.trainer.settings import DECIDING, plain, without_address

BEGUN, FINISHED = "begun.json", "finished.json"


def write(folder: str, name: str, content: Mapping[str, Any]) -> None:
    """Write `BEGUN` or `FINISHED`, whole or not at all."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    write_text_whole(Path(folder, name), json.dumps(content, indent=2))


def read(folder: str, name: str) -> Any:
    """Return what was written; None if there is no such file."""
    path = Path(folder, name)
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def stage_settings(stage: Stage, args: Any) -> dict[str, Any]:
    """Return what decides the result of a stage: its objectives with their weights, and its arguments."""
    objectives = [f"{_weight(one)} × {one.name}: {without_address(repr(one))}" for one in stage.make_objectives()]
    names = dict.fromkeys([*DECIDING, *stage.arguments])
    arguments = {name: plain(getattr(args, name)) for name in names if hasattr(args, name)}
    return {"name": stage.name, "objectives": objectives, "arguments": arguments}


def _weight(objective: Any) -> str:
    values = [objective.weight(progress) for progress in PROGRESS]
    return f"{values[0]:g}" if len(set(values)) == 1 else " ".join(f"{value:g}" for value in values)


def check_folders(output_dir: str, folders: Sequence[str], parts: str, *, resume: bool) -> None:
    """Raise if `output_dir` holds parts of another run, or parts of this one that it was not asked to resume.

    Args:
        output_dir: the folder of the run.
        folders: those of its parts, in order.
        parts: "stages" or "links", for the message.
        resume: whether parts that were begun may go on.

    Raises:
        SettingError: names the folders that are there.
    """
    there = sorted(os.path.join(output_dir, path.parent.name) for path in Path(output_dir).glob(f"*/{BEGUN}"))
    if there and not resume:
        raise SettingError(
            f"{output_dir} holds {parts} of an earlier call: {_names(there)}. Pass resume_from_checkpoint=True to go "
            "on with them, or another output_dir."
        )
    strangers = [folder for folder in there if folder not in folders]
    if strangers:
        raise SettingError(
            f"{output_dir} holds {_names(strangers)}, and the {parts} now are {_names(folders)}. Give the {parts} that "
            "were begun, in their order, or another output_dir."
        )


def _names(folders: Sequence[str]) -> str:
    return ", ".join(Path(folder).name for folder in folders)


def check_unchanged(folder: str, part: str, now: Mapping[str, Any]) -> None:
    """Raise if what was begun in `folder` had other settings.

    Args:
        folder: of the stage or link.
        part: how the message calls it: "stage 'logits'".
        now: the settings to compare; a dictionary among them is compared name by name.

    Raises:
        SettingError: says what each setting was, and what it is.
    """
    before = read(folder, BEGUN)
    if before is None:
        return
    old, new = _flat({name: before[name] for name in now}), _flat(now)
    changed = [
        f"{name} was {old.get(name, 'not given')!r}, is {new.get(name, 'not given')!r}"
        for name in dict.fromkeys([*old, *new])
        if old.get(name, "not given") != new.get(name, "not given")
    ]
    if changed:
        raise SettingError(
            f"{part} is not the one that was begun in {folder}: {'; '.join(changed)}. Give it as it was, or another "
            "output_dir."
        )


def _flat(settings: Mapping[str, Any]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        flat.update(value if isinstance(value, dict) else {name: value})
    return flat
