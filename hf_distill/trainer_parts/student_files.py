"""Which files of a folder are the student's, and bringing them, each whole or not at all, to the output folder."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

from hf_distill.run_facts import looks_like_hub_id

# What training needs and nobody who loads the student does.
_STATE_FILES = (
    "optimizer*",
    "scheduler*",
    "scaler*",
    "rng_state*",
    "distill_*",
    "training_args.bin",
    "trainer_state.json",
)

CARD = "README.md"


def moved(source: str, target: str) -> list[str]:
    """Move the student's files one by one, each whole or not at all; returns their names."""
    files = _student_files(source)
    for name in files:
        os.makedirs(os.path.dirname(os.path.join(target, name)), exist_ok=True)
        _forget_local_base(Path(source, name))
        os.replace(os.path.join(source, name), os.path.join(target, name))
    return files


def copied(source: str, target: str) -> list[str]:
    """Copy the student's files one by one, each whole or not at all; returns their names."""
    files = _student_files(source)
    for name in files:
        goal = Path(target, name)
        goal.parent.mkdir(parents=True, exist_ok=True)
        beside = goal.with_name(f".{goal.name}.partial")
        shutil.copyfile(os.path.join(source, name), beside)
        _forget_local_base(beside, named=goal.name)
        os.replace(beside, goal)
    return files


def _forget_local_base(file: Path, named: str | None = None) -> None:
    """PEFT writes where the base model lay; a path on this disk helps nobody elsewhere, so it goes.

    Before the file has its place: what another thread is pushing from there never holds the path.
    """
    if (named or file.name) != "adapter_config.json":
        return
    config = json.loads(file.read_text(encoding="utf-8"))
    if config.get("base_model_name_or_path") and not looks_like_hub_id(config["base_model_name_or_path"]):
        config["base_model_name_or_path"] = None
        file.write_text(json.dumps(config, indent=2, sort_keys=True), encoding="utf-8")


def _student_files(folder: str) -> list[str]:
    """What `save_pretrained` of student and processor wrote: all but the state of the training.

    Folders in a checkpoint are sharded optimizer states (`global_step5`, `optimizer_0`), except those of adapters
    and chat templates.
    """
    found = []
    for path in sorted(Path(folder).rglob("*")):
        inside = path.relative_to(folder)
        top = Path(inside.parts[0])
        is_state = any(top.match(pattern) for pattern in (*_STATE_FILES, "global_step*", "pytorch_model_fsdp*"))
        if path.is_file() and not is_state and inside.name not in ("latest", "zero_to_fp32.py", CARD):
            found.append(str(inside))
    return found
