"""The results of a run, stage by stage or link by link, with their tables."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from rich.table import Table
from transformers.trainer_utils import TrainOutput

from hf_distill.compare.table import UNKNOWN, markdown_rows, rich_table
from hf_distill.teachers import Ensemble
from hf_distill.trainer.mixin import DistillationMixin

How = Literal["trained", "resumed", "finished before"]

INTERRUPTED = "the training was interrupted, and the time before the interruption is not known"
NO_EVALUATION = "there was no eval_dataset"
_LEFT = ("student", "teacher")


@dataclass(frozen=True)
class StageResult:
    """The result of a stage.

    Attributes:
        name: the name of the stage.
        folder: holds the student (in `student`), the checkpoints and the card.
        output: the return value of `Trainer.train`.
        log_history: the entries that it logged.
        how: whether the stage was trained in this call, resumed from a checkpoint, or finished before.
    """

    name: str
    folder: str
    output: TrainOutput
    log_history: list[dict[str, Any]] = field(repr=False)
    how: How = "trained"


@dataclass(frozen=True)
class StagesResult:
    """The results of all stages.

    Attributes:
        stages: the results in order.
        folder: holds the student of the last stage.
        trainer: the trainer of the last stage, with the student, to evaluate or push it.

    >>> output = TrainOutput(12, 0.5, {})
    >>> print(StagesResult((StageResult("intermediate", "out/1-intermediate", output, []),), "out", trainer=None))
    stage           steps    loss  folder
    intermediate       12  0.5000  out/1-intermediate  (trained)
    student: out
    """

    stages: tuple[StageResult, ...]
    folder: str
    trainer: DistillationMixin = field(repr=False, compare=False)

    def __str__(self) -> str:
        width = max(len("stage"), *(len(stage.name) for stage in self.stages))
        lines = [f"{'stage':<{width}}  {'steps':>7}  {'loss':>6}  folder"]
        for stage in self.stages:
            steps, loss = stage.output.global_step, stage.output.training_loss
            lines.append(f"{stage.name:<{width}}  {steps:>7}  {loss:.4f}  {stage.folder}  ({stage.how})")
        return "\n".join([*lines, f"student: {self.folder}"])


@dataclass(frozen=True)
class LinkResult:
    """The result of a link of a chain.

    Attributes:
        name: the name of the link.
        teacher: the name of its teacher.
        folder: holds the student.
        parameters: the number of parameters of the student.
        metrics: the return value of `Trainer.evaluate` for the saved student.
        seconds: the duration of the training, or None if `not_measured` has a reason.
        how: whether the link was trained in this call, resumed, or finished before.
        kind: the kind of head, a name in `TASKS`.
        not_measured: the reason for each value that is not known.
    """

    name: str
    teacher: str
    folder: str
    parameters: int
    metrics: dict[str, Any] = field(default_factory=dict, repr=False)
    seconds: float | None = None
    how: How = "trained"
    kind: str = ""
    not_measured: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class ChainResult:
    """The results of all links of a chain.

    Attributes:
        links: the results in order.
        folder: holds the kept student.
        metric: the metric that compares the students, or None if they were not compared.
        greater_is_better: whether more of the metric is better.
        best: the name of the best link, or None if they were not compared.
        kept: the name of the link whose student is in `folder`.

    >>> links = [LinkResult("half", "teacher", "out/1-half", 4000, {"eval_accuracy": 0.9}, 12.0)]
    >>> links += [LinkResult("quarter", "half", "out/2-quarter", 1000, {"eval_accuracy": 0.8}, 7.5)]
    >>> print(ChainResult(tuple(links), "out", "accuracy", True, best="half", kept="quarter"))
    | student | teacher | parameters | accuracy | seconds |
    | :-- | :-- | --: | --: | --: |
    | half | teacher | 4,000 | 0.9000 | 12.0 |
    | quarter | half | 1,000 | 0.8000 | 7.5 |
    <BLANKLINE>
    Best by accuracy: half. Kept in out: quarter (half is larger than the last student).
    """

    links: tuple[LinkResult, ...]
    folder: str
    metric: str | None
    greater_is_better: bool
    best: str | None
    kept: str

    def link(self, name: str) -> LinkResult:
        """Return the result of the link with this name."""
        return next(link for link in self.links if link.name == name)

    def ensemble(
        self, *, mean: Literal["probabilities", "logits"] = "probabilities", weights: Sequence[float] | None = None
    ) -> Ensemble:
        """Return all students as one teacher, which loads them from their folders when it is used.

        Born-again ensembles: Furlanello et al. 2018, section 3.1.

        Args:
            mean: as in `Ensemble`.
            weights: as in `Ensemble`.
        """
        return Ensemble([link.folder for link in self.links], mean=mean, weights=weights)

    def table(self) -> Table:
        """Return the table for a terminal."""
        return rich_table("chain", self._headings(), self._rows(), left=_LEFT)

    def sentence(self) -> str:
        """Return which student is best and which is kept, in words."""
        kept = f"Kept in {self.folder}: {self.kept}"
        if self.best is None:
            return f"{kept} (the last; the students were not compared: {NO_EVALUATION})."
        reason = ""
        if self.best != self.kept:
            larger = self.link(self.best).parameters > self.links[-1].parameters
            reason = f" ({self.best} is larger than the last student)" if larger else " (keep='last')"
        return f"Best by {self.metric}: {self.best}. {kept}{reason}."

    def markdown(self) -> str:
        """Return the table, the sentence, and what was not measured."""
        missing = "".join(
            f"- {link.name}, `{name}`: {reason}.\n" for link in self.links for name, reason in link.not_measured.items()
        )
        table = markdown_rows(self._headings(), self._rows(), left=_LEFT)
        return f"{table}\n{self.sentence()}\n" + (f"\nNot measured:\n\n{missing}" if missing else "")

    def to_json(self) -> str:
        """Return the results as JSON text."""
        return json.dumps(asdict(self), indent=2, ensure_ascii=False) + "\n"

    def __str__(self) -> str:
        return self.markdown().rstrip()

    def _headings(self) -> list[str]:
        return ["student", "teacher", "parameters", *([] if self.metric is None else [self.metric]), "seconds"]

    def _rows(self) -> list[list[str]]:
        rows = []
        for link in self.links:
            seconds = UNKNOWN if link.seconds is None else f"{link.seconds:.1f}"
            metric = [] if self.metric is None else [f"{link.metrics[f'eval_{self.metric}']:.4f}"]
            rows.append([link.name, link.teacher, f"{link.parameters:,}", *metric, seconds])
        return rows


def best_of(links: Sequence[LinkResult], metric: str, *, greater_is_better: bool) -> LinkResult:
    """Return the best link, the first of several equal ones; NaN is worst."""

    def value(link: LinkResult) -> float:
        found = float(link.metrics[f"eval_{metric}"])
        signed = found if greater_is_better else -found
        return -math.inf if math.isnan(signed) else signed

    return max(links, key=value)
