"""What became of the stages: plain data that prints itself."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from transformers.trainer_utils import TrainOutput

FINISHED_BEFORE = "finished before"


@dataclass(frozen=True)
class StageResult:
    """One stage.

    Attributes:
        name: as given. folder: with its student (in `student`), its checkpoints and its card.
        output: what `Trainer.train` returned. log_history: what it logged.
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
        stages: in order. folder: with the last stage's student.
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
