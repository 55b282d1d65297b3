"""The arguments and keywords of each stage, from those of the run and its own; what cannot be is refused before any."""

from __future__ import annotations

import dataclasses
import inspect
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from hf_distill.errors import SettingError, did_you_mean
from hf_distill.presets import Preset, Stage

# Whatever is in several stages the same, or is a stage's own, comes from elsewhere.
_KEYWORDS = {
    "model_init": "pass model=: every stage goes on with the same student",
    "objectives": "give each Stage its objectives",
    "distiller": "give each Stage its objectives and arguments",
    "optimizers": "every stage makes its own; pass optimizer_cls_and_kwargs=",
}
_ARGUMENTS = {
    "output_dir": "each stage has a folder in that of the run",
    "teacher_dtype": "the teacher is loaded once; set it in args",
    "push_to_hub": "the last stage's student is pushed; set it in args",
    "resume_from_checkpoint": "pass it to train_in_stages",
}


def checked_stages(stages: Preset | Iterable[Stage]) -> tuple[Stage, ...]:
    """Raises SettingError: none, no stages, two of one name, or a name that is no folder's."""
    listed = stages.stages if isinstance(stages, Preset) else tuple(stages)
    if not listed:
        raise SettingError("train_in_stages: no stages. Give a Preset, or Stage(name, objectives, arguments) in order.")
    for stage in listed:
        if not isinstance(stage, Stage):
            raise SettingError(f"train_in_stages: {stage!r} is no Stage. Give Stage(name, objectives, arguments).")
        if not re.fullmatch(r"[\w.-]+", stage.name):
            raise SettingError(f"stage {stage.name!r}: it names a folder. Use letters, digits, '_', '-' and '.' alone.")
    names = [stage.name for stage in listed]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise SettingError(f"two stages are called {twice[0]!r}; the stages are {', '.join(names)}. Rename one.")
    return listed


def folder_of(output_dir: str, number: int, stage: Stage) -> str:
    """`<output_dir>/1-<name>`; stages are counted from 1."""
    return os.path.join(output_dir, f"{number}-{stage.name}")


def stage_arguments(stages: Sequence[Stage], args: Any) -> list[Any]:
    """The arguments of each stage: those of the run, with the stage's over them.

    Raises:
        SettingError: a name that is no field, or a value that cannot be.
    """
    fields = {one.name for one in dataclasses.fields(args) if one.init}
    made = []
    for number, stage in enumerate(stages, 1):
        _refuse(stage, "argument", stage.arguments, fields, _ARGUMENTS)
        changed: dict[str, Any] = {"output_dir": folder_of(args.output_dir, number, stage), **stage.arguments}
        if args.push_to_hub and number < len(stages):
            changed["push_to_hub"] = False
        elif args.push_to_hub and args.hub_model_id is None:
            changed["hub_model_id"] = Path(args.output_dir).absolute().name
        try:
            made.append(dataclasses.replace(args, **changed))
        except ValueError as error:
            raise SettingError(f"stage {stage.name!r}: {error}") from error
    return made


def check_keywords(stages: Sequence[Stage], keywords: Mapping[str, Any], trainer_class: type) -> None:
    """Refuse keywords that the trainer does not have, now rather than after the first stage."""
    known: set[str] = set()
    for one in trainer_class.__mro__:
        if "__init__" in vars(one) and one is not object:
            known |= set(inspect.signature(one.__init__).parameters)  # type: ignore[misc]  # of a class, as meant
    known -= {"self", "model", "args", "teacher_model"}
    for stage in (None, *stages):
        _refuse(stage, "keyword", keywords if stage is None else stage.keywords, known, _KEYWORDS)


def _refuse(
    stage: Stage | None, what: str, given: Mapping[str, Any], known: set[str], reasons: Mapping[str, str]
) -> None:
    where = "train_in_stages" if stage is None else f"stage {stage.name!r}"
    for name in given:
        if name in reasons:
            raise SettingError(f"{where}: {name}= does not go here: {reasons[name]}.")
        if name not in known:
            hint = did_you_mean(name, known) or f" It must be one of: {', '.join(sorted(known))}."
            raise SettingError(f"{where}: there is no {what} {name!r}.{hint}")
