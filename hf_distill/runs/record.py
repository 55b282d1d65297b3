"""The record of a run, as JSON: the settings that each stage or link began with, and its result."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from transformers import TrainingArguments

from hf_distill._types import State
from hf_distill._utils import write_text_whole
from hf_distill.errors import SettingError
from hf_distill.objectives import Objective
from hf_distill.presets import Stage
from hf_distill.schedules import PROGRESS
from hf_distill.trainer.settings import deciding_arguments, plain, without_address

BEGUN, FINISHED = "begun.json", "finished.json"

Part = Literal["stage", "link"]


def write(folder: str, name: str, content: State) -> None:
    """Write `BEGUN` or `FINISHED`, whole or not at all."""
    write_text_whole(Path(folder, name), json.dumps(content, indent=2))


def read(folder: str, name: str) -> Any:
    """Return what was written, or None if there is no such file."""
    path = Path(folder, name)
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def folder_of(output_dir: str, number: int, name: str) -> str:
    """Return `<output_dir>/1-<name>`, the folder of a stage or link; they are counted from 1."""
    return os.path.join(output_dir, f"{number}-{name}")


def stage_settings(stage: Stage, args: TrainingArguments) -> State:
    """Return the settings that determine the result of a stage: its objectives, their weights, and its arguments."""
    objectives = [
        f"{_weight(objective)} × {objective.name}: {without_address(repr(objective))}"
        for objective in stage.make_objectives()
    ]
    own = {name: plain(getattr(args, name)) for name in stage.arguments}
    return {"name": stage.name, "objectives": objectives, "arguments": {**deciding_arguments(args), **own}}


def _weight(objective: Objective) -> str:
    values = [objective.weight(progress) for progress in PROGRESS]
    return f"{values[0]:g}" if len(set(values)) == 1 else " ".join(f"{value:g}" for value in values)


def check_names(part: Part, names: Sequence[str]) -> None:
    """Check that each name can be the name of a folder, and that no name occurs twice.

    Raises:
        SettingError: otherwise.
    """
    for name in names:
        if not re.fullmatch(r"[\w.-]+", name):
            raise SettingError(f"{part} {name!r}: it names a folder. Use letters, digits, '_', '-' and '.' only.")
    repeated = [name for name in names if names.count(name) > 1]
    if repeated:
        raise SettingError(f"two {part}s are called {repeated[0]!r}; the {part}s are {', '.join(names)}. Rename one.")


def check_folders(output_dir: str, folders: Sequence[str], part: Part, *, resume: bool) -> None:
    """Check that `output_dir` holds no other run, and that this run is resumed if it holds some of it.

    Args:
        output_dir: the folder of the run.
        folders: the folders of its stages or links, in order.
        part: which of the two, for the message.
        resume: whether the run may continue.

    Raises:
        SettingError: names the folders that are there.
    """
    there = sorted(os.path.join(output_dir, path.parent.name) for path in Path(output_dir).glob(f"*/{BEGUN}"))
    if there and not resume:
        raise SettingError(
            f"{output_dir} holds {part}s of an earlier call: {_names(there)}. Pass resume_from_checkpoint=True to "
            "continue it, or another output_dir."
        )
    others = [folder for folder in there if folder not in folders]
    if others:
        raise SettingError(
            f"{output_dir} holds {_names(others)}, and the {part}s now are {_names(folders)}. Pass the same {part}s in "
            "the same order, or another output_dir."
        )


def _names(folders: Sequence[str]) -> str:
    return ", ".join(Path(folder).name for folder in folders)


def check_unchanged(folder: str, part: str, now: State) -> None:
    """Check that the settings of a stage or link are those that it began with, if it has begun.

    Args:
        folder: the folder of the stage or link.
        part: its name in the message: "stage 'logits'".
        now: its settings; a dictionary among them is compared key by key.

    Raises:
        SettingError: gives the old and the new value of each changed setting.
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
            f"{part} has other settings than when it began in {folder}: {'; '.join(changed)}. Restore them, or pass "
            "another output_dir."
        )


def _flat(settings: State) -> State:
    flat: State = {}
    for name, value in settings.items():
        flat.update(value if isinstance(value, dict) else {name: value})
    return flat
