"""Blend: the terms of the loss by name, how much each weighs at a moment of the training, and their weighted sum."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from hf_distill.ddp import Counts
from hf_distill.errors import SettingError, did_you_mean
from hf_distill.functional import Divergence
from hf_distill.objectives import OBJECTIVES, LabelsTerm, LogitsMatch, Objective
from hf_distill.schedules import PROGRESS, Schedule, checked_schedule
from hf_distill.signals import Needs, Signals
from hf_distill.tasks import Batch, Task
from hf_distill.teachers.base import StudentBatch

LABELS = "labels"
LOGITS = "logits"
# What people call the settings; only proposed in messages.
SETTING_ALIASES: dict[str, str] = {
    **dict.fromkeys(("t", "temp", "tau", "kd_temperature", "distillation_temperature"), "temperature"),
    **dict.fromkeys(("kd_alpha", "alpha_kd", "kd_weight", "kd_ratio", "distillation_weight", "lambda_kd"), "alpha"),
    **dict.fromkeys(("loss", "loss_type", "kd_loss", "distillation_loss", "divergence_type"), "divergence"),
}
Objectives = Objective | Sequence[Objective] | Mapping[str, Objective] | None


@dataclass(frozen=True)
class DistillerOutput:
    """One micro-batch's part of the optimizer step's loss.

    Attributes:
        loss: scalar with a graph: call backward on it, once a micro-batch, without dividing it.
        terms: each term before its weight, detached; `loss` is their weighted sum.
        outputs: what the student's forward returned.
    """

    loss: Tensor
    terms: dict[str, Tensor]
    outputs: Any


@dataclass(frozen=True)
class FusedTerms:
    """Terms that were made within the student's forward, without whole logits.

    Attributes:
        loss: their weighted sum, scalar with a graph. terms: each before its weight, detached.
    """

    loss: Tensor
    terms: dict[str, Tensor]


class Blend:
    """`(1 - alpha) * labels + alpha * logits + Σ weight * objective`; with alpha None, the objectives alone.

    Args:
        objectives: one, several, or name → objective. Their own weights are beside alpha, and not normalised.

    Raises:
        SettingError: two terms of one name, or what is no objective.
    """

    def __init__(self, objectives: Objectives = None) -> None:
        self.alpha: Schedule | None = None
        self.labels_alone = False  # whether alpha is 0 throughout, and no objective ever weighs anything
        # Copies: what one learns of a run stays with the run, though several are made with the same object.
        self._others = {name: copy.copy(one) for name, one in _named(objectives).items()}
        self.objectives: dict[str, Objective] = dict(self._others)

    def set(
        self,
        *,
        temperature: float | Schedule,
        alpha: float | Schedule | None,
        divergence: str | Divergence | None,
        divergence_kwargs: Mapping[str, Any] | None,
    ) -> None:
        """Choose alpha and what becomes of the logits; the other objectives stay."""
        softening = checked_schedule("temperature", temperature)
        schedule = None if alpha is None else checked_schedule("alpha", alpha)
        match = LogitsMatch(divergence, settings=divergence_kwargs, temperature=softening)
        if alpha is None and not self._others:
            raise SettingError("alpha=None is a loss of the objectives alone, and there are none. Pass objectives=.")
        self.alpha = schedule
        self.objectives = {LOGITS: match, **self._others}
        self.labels_alone = schedule is not None and not self.ever_active()

    @property
    def logits_match(self) -> LogitsMatch:
        objective = self.objectives[LOGITS]
        assert isinstance(objective, LogitsMatch)
        return objective

    def labels_weight(self, progress: float) -> float:
        return 0.0 if self.alpha is None else 1 - self.alpha(progress)

    def weight(self, name: str, progress: float) -> float:
        """Of an objective's term."""
        if name == LOGITS:
            return 0.0 if self.alpha is None else self.alpha(progress)
        return self.objectives[name].weight(progress)

    def active(self, progress: float) -> list[str]:
        """The objectives that weigh something now."""
        return [name for name in self.objectives if self.weight(name, progress) > 0]

    def ever_active(self) -> list[str]:
        """The objectives that weigh something at some moment."""
        return [name for name in self.objectives if any(self.weight(name, p) > 0 for p in PROGRESS)]

    def compares_positions(self) -> bool:
        """Whether an objective compares position with position; of the logits the task knows."""
        return any(self.objectives[name].needs_same_inputs for name in self.ever_active())

    def refuse_without_teacher(self) -> None:
        """Raise SettingError where some term asks for a teacher."""
        asked, alpha = [name for name in self.ever_active() if needs_teacher(self.objectives[name])], self.alpha
        if not asked:
            return
        why = f"alpha is {alpha(0.0):g}" if LOGITS in asked and alpha else f"{', '.join(asked)} ask for a teacher"
        raise SettingError(
            f"{why} but there is no teacher. Pass teacher_model= (a model, a folder or a Hub id), or alpha=0 and no "
            "objectives to train without one."
        )

    def uses_labels(self) -> bool:
        return any(self.labels_weight(p) > 0 for p in PROGRESS)

    def count(
        self, task: Task, micro_batches: Sequence[Batch], device: Any, progress: float
    ) -> tuple[list[str], Tensor]:
        """The terms of this moment, and over how many rows each is, summed over these micro-batches.

        Raises:
            DataError: a label is needed and missing, or is one that the head cannot take.
            SettingError: every term weighs 0.
        """
        terms = self.active(progress)
        if self.labels_weight(progress) > 0:
            task.require_labels(micro_batches[0])
            for batch in micro_batches:
                task.check_labels(batch)
            terms.insert(0, LABELS)
        if not terms:
            raise SettingError(
                f"at {progress:.0%} of the training every term weighs 0, so there is no loss. Give alpha or an "
                "objective a weight throughout."
            )
        sums = []
        for term in terms:
            source = LabelsTerm() if term == LABELS else self.objectives[term]
            sums.append(torch.stack([source.count(task, batch).to(device) for batch in micro_batches]).sum())
        return terms, torch.stack(sums)

    def total(
        self,
        labels: Tensor | None,
        ask: Callable[[], tuple[Signals, Signals]],
        task: Task,
        batch: Batch,
        counts: Counts,
        progress: float,
        *,
        only: str | None = None,
        made: FusedTerms | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of a micro-batch, and its terms before their weights.

        Args:
            labels: their part of the step's mean; None where they weigh nothing. ask: student and teacher.
            only: this one of the objectives; None: all. made: terms that are there already.
        """
        terms: dict[str, Tensor] = {} if made is None else dict(made.terms)
        weighted: list[Tensor] = [] if made is None else [made.loss]
        if labels is not None:
            terms[LABELS] = labels * counts.scale
            weight = self.labels_weight(progress)
            weighted.append(terms[LABELS] if weight == 1 else weight * terms[LABELS])
        active = [name for name in self.active(progress) if only in (None, name) and name not in terms]
        if active:
            student, teacher = ask()
            for name in active:
                found = self.objectives[name](student, teacher, task, batch, progress=progress)
                terms[name] = found.over(denominator_of(name, counts, progress)) * counts.scale
                weighted.append(self.weight(name, progress) * terms[name])
        loss = weighted[0]
        for part in weighted[1:]:
            loss = loss + part
        return loss, terms

    def lesson(self, student: Signals, task: Task, batch: Batch, counts: Counts, progress: float) -> StudentBatch:
        """This micro-batch for a teacher that learns of it."""
        heard = Signals(logits=student.predictions().detach(), columns=student.columns)

        def loss_of(labels_mean: Tensor | None, own: Signals) -> Tensor:
            labels = None if labels_mean is None else labels_part(labels_mean, task, batch, counts, progress)
            return self.total(labels, lambda: (own, heard), task, batch, counts, progress, only=LOGITS)[0]

        uses_labels, temperature = self.labels_weight(progress) > 0, self.logits_match.temperature(progress)
        return StudentBatch(heard, task, batch, temperature, progress, uses_labels, counts.scale, loss_of)

    def needs(self, progress: float) -> tuple[Needs, Needs]:
        """What must be computed of the student and of the teacher."""
        student = teacher = Needs()
        for name in self.active(progress):
            student, teacher = student | self.objectives[name].needs, teacher | self.objectives[name].teacher_needs
        return student, replace(teacher, temperature=self.logits_match.temperature(progress))

    def knobs(self) -> dict[str, Schedule]:
        """Whatever may move with the training, by the name it is logged under."""
        moving = {} if self.alpha is None else {"alpha": self.alpha}
        weights = {f"weight/{name}": one.weight for name, one in self._others.items()}
        return {**moving, "temperature": self.logits_match.temperature, **weights}

    def described(self, name: str) -> str:
        """An objective in words, with its weight where that moves."""
        start, end = self.weight(name, 0.0), self.weight(name, 1.0)
        return repr(self.objectives[name]) + ("" if start == end else f", weight {start:g} → {end:g}")

    def learned(self) -> nn.ModuleDict:
        """What the objectives learn, by term."""
        return nn.ModuleDict({name: o.learned for name, o in self.objectives.items() if o.learned is not None})


def compares_nothing(alpha: Schedule | None, objectives: Objectives) -> bool:
    """Whether such a blend is the labels' term alone: alpha 0 throughout, and no objectives."""
    return alpha is not None and not _named(objectives) and not any(alpha(p) > 0 for p in PROGRESS)


def uses_teacher(alpha: Schedule | None, objectives: Objectives) -> bool:
    """Whether a teacher is asked at some moment."""
    others = _named(objectives).values()
    return any(map(needs_teacher, others)) or (alpha is not None and any(alpha(p) > 0 for p in PROGRESS))


def needs_teacher(objective: Objective) -> bool:
    """Whether an objective compares with a teacher; most do, and do not say so."""
    return getattr(objective, "needs_teacher", True)


def denominator_of(term: str, counts: Counts, progress: float) -> Tensor:
    """What a term of this moment is divided by. Raises SettingError where another moment was counted."""
    if term not in counts.denominators:
        raise SettingError(
            f"{term} weighs something at {progress:.0%} of the training, and was not counted. Give count() the same "
            "progress= as the call."
        )
    return counts.denominators[term]


def labels_part(mean: Tensor, task: Task, batch: Batch, counts: Counts, progress: float) -> Tensor:
    """What a model's own mean loss over this micro-batch is of the step's."""
    if task.sums_over_examples:
        return mean
    return LabelsTerm()(mean, task, batch).over(denominator_of(LABELS, counts, progress))


def _named(objectives: Objectives) -> dict[str, Objective]:
    if objectives is None:
        return {}
    if isinstance(objectives, Mapping):
        pairs: Iterable[tuple[str, Any]] = objectives.items()
    else:
        given: Any = objectives
        several = given if isinstance(given, Sequence) and not isinstance(given, str) else [given]
        pairs = [(getattr(one, "name", type(one).__name__), one) for one in several]
    named: dict[str, Objective] = {}
    for name, one in pairs:
        _check_objective(one)
        if not isinstance(name, str) or not name or "." in name or hasattr(nn.ModuleDict, name):
            raise SettingError(
                f"objectives: {name!r} cannot be the name of a term: a word without dots, and none that torch's "
                "ModuleDict uses (keys, values, ...)."
            )
        if name in named or name in (LABELS, LOGITS):
            raise SettingError(
                f"objectives: two terms are called {name!r}. Give one of them another name: HiddenMatch(..., name=...)."
            )
        named[name] = one
    return named


_ADDED = {name: one.__name__ for name, one in OBJECTIVES.items() if name != LOGITS}


def _check_objective(one: Any) -> None:
    """Raise SettingError for what is not an objective, with what was probably meant."""
    if isinstance(one, LogitsMatch):
        raise SettingError("objectives: the logits' term is there already. Say divergence=, temperature=, alpha=.")
    if hasattr(one, "stages"):  # a Preset, which this module does not know
        way_out = (
            "Its parts are `.objectives` and `.arguments`: pass objectives=preset.objectives to the trainer, and "
            "DistillationArguments(..., **preset.arguments)."
            if len(one.stages) == 1
            else f"It has {len(one.stages)} trainings: train_in_stages(preset, model=..., teacher_model=..., args=...)."
        )
        raise SettingError(f"objectives: {getattr(one, 'name', type(one).__name__)!r} is a preset. {way_out}")
    if all(hasattr(one, part) for part in ("weight", "count", "fit", "needs")):
        return
    is_short = one is None or isinstance(one, (str, int, float, type))
    also = {word: name for kind, name in _ADDED.items() for word in (kind, kind.replace("_", ""), f"{kind}_match")}
    raise SettingError(
        f"objectives: {repr(one) if is_short else f'a {type(one).__name__}'} is no objective. Give instances of "
        f"{', '.join(_ADDED.values())}, or of your own class with the methods of hf_distill.objectives.Objective."
        f"{did_you_mean(one, _ADDED.values(), also)}"
    )
