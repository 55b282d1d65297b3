"""The results of a run, stage by stage or link by link, with their tables: plain text, Markdown, terminal and JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from rich.table import Table
from transformers.trainer_utils import TrainOutput

from hf_distill.teachers import Ensemble

FINISHED_BEFORE = "finished before"
UNKNOWN = "-"
INTERRUPTED = "its training was interrupted, and the time before that is not known"
NO_EVALUATION = "there was no eval_dataset"


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


@dataclass(frozen=True)
class LinkResult:
    """One link.

    Attributes:
        name: as given.
        teacher: who taught it.
        folder: with the student.
        parameters: of the student.
        metrics: what `Trainer.evaluate` found, of the student that is saved.
        seconds: of training alone; None: see `not_measured`.
        how: "trained", "resumed" or "finished before".
        kind: of its head.
        not_measured: what is not known, and why.
    """

    name: str
    teacher: str
    folder: str
    parameters: int
    metrics: dict[str, Any] = field(default_factory=dict, repr=False)
    seconds: float | None = None
    how: str = "trained"
    kind: str = ""
    not_measured: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class ChainResult:
    """All links.

    Attributes:
        links: in order.
        folder: with the student that is kept.
        metric: what they were compared by; None: they were not.
        greater_is_better: what is best of it.
        best: the name of the best link; None where they were not compared.
        kept: the name of the one in `folder`.

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
        return next(one for one in self.links if one.name == name)

    def ensemble(self, *, mean: str = "probabilities", weights: Any = None) -> Ensemble:
        """All students as one teacher, read from their folders when it is put to use. Arguments: `Ensemble`'s.

        Born-again ensembles: Furlanello et al. 2018, section 3.1.
        """
        return Ensemble([one.folder for one in self.links], mean=mean, weights=weights)

    def table(self) -> Table:
        """For the terminal."""
        table = Table(title="chain", title_justify="left", box=None, padding=(0, 2, 0, 0), pad_edge=False)
        for heading, left in self._headings():
            table.add_column(heading, justify="left" if left else "right")
        for row in self._rows():
            table.add_row(*row)
        return table

    def sentence(self) -> str:
        """Which is best, and which is kept."""
        kept = f"Kept in {self.folder}: {self.kept}"
        if self.best is None:
            return f"{kept} (the last; the students were not compared: {NO_EVALUATION})."
        why = ""
        if self.best != self.kept:
            larger = self.link(self.best).parameters > self.links[-1].parameters
            why = f" ({self.best} is larger than the last student)" if larger else " (keep='last')"
        return f"Best by {self.metric}: {self.best}. {kept}{why}."

    def markdown(self) -> str:
        """A table, which is best, and what was not measured."""
        headings = self._headings()
        lines = [[name for name, _ in headings], [":--" if left else "--:" for _, left in headings], *self._rows()]
        table = "".join("| " + " | ".join(line) + " |\n" for line in lines)
        missing = "".join(
            f"- {one.name}, `{name}`: {why}.\n" for one in self.links for name, why in one.not_measured.items()
        )
        return table + f"\n{self.sentence()}\n" + (f"\nNot measured:\n\n{missing}" if missing else "")

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=2, ensure_ascii=False) + "\n"

    def __str__(self) -> str:
        return self.markdown().rstrip()

    def _headings(self) -> list[tuple[str, bool]]:
        middle = [] if self.metric is None else [(self.metric, False)]
        return [("student", True), ("teacher", True), ("parameters", False), *middle, ("seconds", False)]

    def _rows(self) -> list[list[str]]:
        rows = []
        for one in self.links:
            seconds = UNKNOWN if one.seconds is None else f"{one.seconds:.1f}"
            middle = [] if self.metric is None else [f"{one.metrics[f'eval_{self.metric}']:.4f}"]
            rows.append([one.name, one.teacher, f"{one.parameters:,}", *middle, seconds])
        return rows


def best_of(links: Sequence[LinkResult], metric: str, *, greater_is_better: bool) -> LinkResult:
    """The first of the best; what is no number is worst."""

    def value(one: LinkResult) -> float:
        found = float(one.metrics[f"eval_{metric}"])
        signed = found if greater_is_better else -found
        return -math.inf if math.isnan(signed) else signed

    return max(links, key=value)
