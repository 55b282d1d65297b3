"""What became of the stages: plain data that prints itself."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers.trainer_utils import TrainOutput

from hf_distill.errors import SettingError
from hf_distill.presets import Stage
from hf_distill.schedules import PROGRESS
from hf_distill.trainer.settings import DECIDING, plain, without_address

FINISHED_BEFORE = "finished before"


@dataclass(frozen=True)
class StageResult:
    """One stage.

    Attributes:
        name: as given.
        folder: with its student (in `student`), its checkpoints and its card.
        output: what `Trainer.train` returned.
        log_history: what it logged.
        how: "trained", "resumed" (from a checkpoint of its own) or "finished before".
    """

    name: str
    folder: str
    output: TrainOutput
    log_history: list[dict[str, Any]] = field(repr=False)
    how: str = "trained"


@dataclass(frozen=True)
class StagesResult:
    """All stages.

    Attributes:
        stages: in order.
        folder: with the last stage's student.
        trainer: the last stage's, which holds the student: to evaluate or push with.

    >>> output = TrainOutput(12, 0.5, {})
    >>> print(StagesResult((StageResult("intermediate", "out/1-intermediate", output, []),), "out"))
    stage           steps    loss  folder
    intermediate       12  0.5000  out/1-intermediate  (trained)
    student: out
    """

    stages: tuple[StageResult, ...]
    folder: str
    trainer: Any = field(default=None, repr=False, compare=False)

    def __str__(self) -> str:
        width = max(len("stage"), *(len(stage.name) for stage in self.stages))
        lines = [f"{'stage':<{width}}  {'steps':>7}  {'loss':>6}  folder"]
        for stage in self.stages:
            steps, loss = stage.output.global_step, stage.output.training_loss
            lines.append(f"{stage.name:<{width}}  {steps:>7}  {loss:.4f}  {stage.folder}  ({stage.how})")
        return "\n".join([*lines, f"student: {self.folder}"])


BEGUN, FINISHED = "stage.json", "stage_finished.json"


def described(stage: Stage, args: Any) -> dict[str, Any]:
    """What a stage is, as JSON: its name, its objectives with their weights, and the arguments that decide."""
    objectives = [f"{_weight(one)} × {one.name}: {without_address(repr(one))}" for one in stage.make_objectives()]
    names = dict.fromkeys([*DECIDING, *stage.arguments])
    arguments = {name: plain(getattr(args, name)) for name in names if hasattr(args, name)}
    return {"name": stage.name, "objectives": objectives, "arguments": arguments}


def _weight(objective: Any) -> str:
    values = [objective.weight(progress) for progress in PROGRESS]
    return f"{values[0]:g}" if len(set(values)) == 1 else " ".join(f"{value:g}" for value in values)


def write(folder: str, name: str, content: Mapping[str, Any]) -> None:
    """As JSON, whole or not at all."""
    target = Path(folder, name)
    target.parent.mkdir(parents=True, exist_ok=True)
    beside = target.with_name(f".{target.name}.partial")
    beside.write_text(json.dumps(content, indent=2), encoding="utf-8")
    os.replace(beside, target)


def read(folder: str, name: str) -> Any:
    """None where there is none."""
    path = Path(folder, name)
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def finished(stage: Stage, folder: str) -> StageResult | None:
    """What came of a stage that is finished."""
    found = read(folder, FINISHED)
    if found is None:
        return None
    output = TrainOutput(found["global_step"], found["training_loss"], found["metrics"])
    return StageResult(stage.name, folder, output, found["log_history"], FINISHED_BEFORE)


def outcome(result: StageResult) -> dict[str, Any]:
    """What `finished` reads."""
    output = result.output
    return {
        "global_step": output.global_step,
        "training_loss": output.training_loss,
        "metrics": output.metrics,
        "log_history": result.log_history,
    }


def check_what_was_begun(
    described_stages: list[dict[str, Any]], folders: list[str], output_dir: str, *, resume: bool
) -> None:
    """Refuse to go on from other stages than these, or to begin where others were begun.

    Raises:
        SettingError: it names what differs.
    """
    begun = sorted(os.path.join(output_dir, path.parent.name) for path in Path(output_dir).glob(f"*/{BEGUN}"))
    if begun and not resume:
        names = ", ".join(Path(folder).name for folder in begun)
        raise SettingError(
            f"{output_dir} holds stages of an earlier call: {names}. Pass resume_from_checkpoint=True to go on with "
            "them, or another output_dir."
        )
    strangers = [Path(folder).name for folder in begun if folder not in folders]
    if strangers:
        raise SettingError(
            f"{output_dir} holds {', '.join(strangers)}, and the stages now are "
            f"{', '.join(Path(folder).name for folder in folders)}. Give the stages that were begun, in their order, "
            "or another output_dir."
        )
    for now, folder in zip(described_stages, folders, strict=True):
        before = read(folder, BEGUN)
        if before is not None and before != now:
            raise SettingError(
                f"stage {now['name']!r} is not the one that was begun in {folder}: "
                f"{'; '.join(_differences(before, now))}. Give it as it was, or another output_dir."
            )


def _differences(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    found = []
    if before["objectives"] != now["objectives"]:
        found.append(f"objectives were {before['objectives']}, are {now['objectives']}")
    names = dict.fromkeys([*before["arguments"], *now["arguments"]])
    for name in names:
        old, new = before["arguments"].get(name, "not given"), now["arguments"].get(name, "not given")
        if old != new:
            found.append(f"{name} was {old!r}, is {new!r}")
    return found
