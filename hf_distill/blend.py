"""Blend: the terms of the loss and their weights. Step: their denominators and weights in one optimizer step."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from operator import or_
from typing import Any

import torch
from torch import Tensor, nn

from hf_distill.errors import SettingError, did_you_mean
from hf_distill.finite import FiniteCheck
from hf_distill.functional import Divergence
from hf_distill.objectives import OBJECTIVES, LogitsMatch, Objective
from hf_distill.schedules import PROGRESS, Schedule, checked_schedule
from hf_distill.signals import Needs, Outputs, Signals
from hf_distill.tasks import Batch, Task
from hf_distill.teachers.base import StudentBatch

LABELS = "labels"
LOGITS = "logits"
# Other names that people use for the settings; only proposed in messages.
SETTING_ALIASES: dict[str, str] = {
    **dict.fromkeys(("t", "temp", "tau", "kd_temperature", "distillation_temperature"), "temperature"),
    **dict.fromkeys(("kd_alpha", "alpha_kd", "kd_weight", "kd_ratio", "distillation_weight", "lambda_kd"), "alpha"),
    **dict.fromkeys(("loss", "loss_type", "kd_loss", "distillation_loss", "divergence_type"), "divergence"),
}
Objectives = Objective | Sequence[Objective] | Mapping[str, Objective] | None


@dataclass(frozen=True)
class Step:
    """Everything about an optimizer step that is known before its first forward.

    Attributes:
        denominators: term → scalar, the number of rows over all micro-batches and processes.
        weights: term → its weight in this step; terms of weight 0 are left out.
        scale: the factor that undoes the averaging over processes and Accelerate's division by its accumulation steps:
            the denominators already are those of the whole step.
        active: the objectives whose weight is not 0.
        progress: the fraction of the training that is done, 0 → 1, for schedules.
        temperature: the temperature that softens the predictions.
        student_needs: what the student must compute.
        teacher_needs: what the teacher must compute.
        micro_batches: the number of micro-batches in this process.
        is_whole: whether there is one micro-batch, in one process.
        finite_check: sees the loss of each micro-batch.
    """

    denominators: Mapping[str, Tensor]
    weights: Mapping[str, float]
    scale: float
    active: tuple[str, ...]
    progress: float
    temperature: float
    student_needs: Needs
    teacher_needs: Needs
    micro_batches: int
    is_whole: bool
    finite_check: FiniteCheck


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
    outputs: Outputs


@dataclass(frozen=True)
class FusedTerms:
    """Terms that were computed within the student's forward, without whole logits.

    Attributes:
        loss: their weighted sum, scalar with a graph.
        terms: each before its weight, detached.
    """

    loss: Tensor
    terms: dict[str, Tensor]


class Blend:
    """`(1 - alpha) * labels + alpha * logits + Σ weight * objective`; if alpha is None, only the objectives.

    Args:
        objectives: one, several, or a dictionary name → objective. Their weights are not normalised with alpha.

    Raises:
        SettingError: if two terms share a name, or something is not an objective.
    """

    def __init__(self, objectives: Objectives = None) -> None:
        self.alpha: Schedule | None = None
        self.logits_match = LogitsMatch()
        self.labels_alone = False  # whether only the labels' term ever has a weight
        # Copies, because an objective learns from one run and the user may pass the same object to several.
        self._others = {name: copy.copy(one) for name, one in _named(objectives).items()}
        self.objectives: dict[str, Objective] = dict(self._others)

    def set(
        self,
        *,
        temperature: float | Schedule,
        alpha: float | Schedule | None,
        divergence: str | Divergence | None,
        divergence_kwargs: Mapping[str, float] | None,
    ) -> None:
        """Set alpha and the objective on the logits; the other objectives stay."""
        softening = checked_schedule("temperature", temperature)
        schedule = None if alpha is None else checked_schedule("alpha", alpha)
        match = LogitsMatch(divergence, divergence_kwargs=divergence_kwargs, temperature=softening)
        if alpha is None and not self._others:
            raise SettingError("alpha=None is a loss of the objectives alone, and there are none. Pass objectives=.")
        self.alpha = schedule
        self.logits_match = match
        self.objectives = {LOGITS: match, **self._others}
        self.labels_alone = schedule is not None and not self.ever_active()

    def weights(self, progress: float) -> dict[str, float]:
        """Return the weight of each term at this progress; terms of weight 0 are left out."""
        alpha = None if self.alpha is None else self.alpha(progress)
        weights = {LABELS: 0.0 if alpha is None else 1 - alpha, LOGITS: alpha or 0.0}
        weights |= {name: objective.weight(progress) for name, objective in self._others.items()}
        return {name: weight for name, weight in weights.items() if weight > 0}

    def weight(self, name: str, progress: float) -> float:
        """Return the weight of an objective's term."""
        if name == LOGITS:
            return 0.0 if self.alpha is None else self.alpha(progress)
        return self.objectives[name].weight(progress)

    def ever_active(self) -> list[str]:
        """Return the objectives whose weight is not 0 at some point of the training."""
        return [name for name in self.objectives if any(self.weight(name, p) > 0 for p in PROGRESS)]

    def compares_positions(self) -> bool:
        """Return whether an objective compares the models position by position (for the logits, the task says)."""
        return any(self.objectives[name].needs_same_inputs for name in self.ever_active())

    def check_has_teacher(self) -> None:
        """Raise SettingError if a term needs a teacher."""
        asked, alpha = [name for name in self.ever_active() if self.objectives[name].needs_teacher], self.alpha
        if not asked:
            return
        why = f"alpha is {alpha(0.0):g}" if LOGITS in asked and alpha else f"{', '.join(asked)} ask for a teacher"
        raise SettingError(
            f"{why} but there is no teacher. Pass teacher_model= (a model, a folder or a Hub id), or alpha=0 and no "
            "objectives to train without one."
        )

    def uses_labels(self) -> bool:
        return self.alpha is not None and any(self.alpha(p) < 1 for p in PROGRESS)

    def total(
        self,
        step: Step,
        task: Task,
        batch: Batch,
        signals: tuple[Signals, Signals] | None,
        *,
        labels_mean: Tensor | None = None,
        only: str | None = None,
        fused: FusedTerms | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss of a micro-batch, and its terms before their weights.

        Args:
            step: the optimizer step that the micro-batch belongs to.
            task: reads rows and labels.
            batch: the micro-batch.
            signals: those of student and teacher; None if no active objective is left to compute.
            labels_mean: the model's mean loss on the labels, or None if the labels' term is fused or has weight 0.
            only: the name of the one objective to compare, or None for all.
            fused: terms that are already computed.
        """
        terms: dict[str, Tensor] = {} if fused is None else dict(fused.terms)
        weighted: list[Tensor] = [] if fused is None else [fused.loss]
        if labels_mean is not None:
            share = labels_mean
            if not task.sums_over_examples:
                rows = task.label_count(batch).to(labels_mean.device)
                share = torch.where(rows > 0, labels_mean, torch.zeros_like(labels_mean))  # a mean over no row is NaN
                share = share * (rows / step.denominators[LABELS].clamp(min=1))  # times 1.0 if this is the whole step
            terms[LABELS] = share * step.scale
            weight = step.weights[LABELS]
            weighted.append(terms[LABELS] if weight == 1 else weight * terms[LABELS])
        active = [name for name in step.active if only in (None, name) and name not in terms]
        if signals is not None:
            student, teacher = signals
            for name in active:
                found = self.objectives[name](student, teacher, task, batch, progress=step.progress)
                terms[name] = found.value / step.denominators[name].clamp(min=1) * step.scale
                weighted.append(step.weights[name] * terms[name])
        loss = weighted[0]
        for part in weighted[1:]:
            loss = loss + part
        return loss, terms

    def student_batch(self, step: Step, student: Signals, task: Task, batch: Batch) -> StudentBatch:
        """Return this micro-batch for a teacher that learns from it."""
        shown = Signals(logits=student.predictions().detach(), alignment=student.alignment)

        def loss_of(labels_mean: Tensor | None, own: Signals) -> Tensor:
            return self.total(step, task, batch, (own, shown), labels_mean=labels_mean, only=LOGITS)[0]

        return StudentBatch(
            shown, task, batch, step.temperature, step.progress, LABELS in step.weights, step.scale, loss_of
        )

    def needs(self, progress: float) -> tuple[Needs, Needs]:
        """Return what the student and the teacher must compute."""
        objectives = [self.objectives[name] for name in self.weights(progress) if name != LABELS]
        student = reduce(or_, (objective.needs for objective in objectives)) if objectives else Needs()
        teacher = reduce(or_, (objective.teacher_needs for objective in objectives)) if objectives else Needs()
        return student, replace(teacher, temperature=self.logits_match.temperature(progress))

    def scheduled_values(self) -> dict[str, Schedule]:
        """Return the values of all settings that may follow a schedule, by the name they are logged under."""
        moving = {} if self.alpha is None else {"alpha": self.alpha}
        weights = {f"weight/{name}": one.weight for name, one in self._others.items()}
        return {**moving, "temperature": self.logits_match.temperature, **weights}

    def described(self, name: str) -> str:
        """Return a description of an objective, with its weight if that follows a schedule."""
        start, end = self.weight(name, 0.0), self.weight(name, 1.0)
        return repr(self.objectives[name]) + ("" if start == end else f", weight {start:g} → {end:g}")

    def learned(self) -> nn.ModuleDict:
        """Return the parameters that the objectives learn, by term."""
        return nn.ModuleDict({name: o.learned for name, o in self.objectives.items() if o.learned is not None})


def compares_nothing(alpha: Schedule | None, objectives: Objectives) -> bool:
    """Return whether the blend is only the labels' term: alpha is always 0, and there are no objectives."""
    return alpha is not None and not _named(objectives) and not any(alpha(p) > 0 for p in PROGRESS)


def uses_teacher(alpha: Schedule | None, objectives: Objectives) -> bool:
    """Return whether the blend needs a teacher at any point of the training."""
    others = _named(objectives).values()
    return any(other.needs_teacher for other in others) or (alpha is not None and any(alpha(p) > 0 for p in PROGRESS))


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


def _check_objective(one: object) -> None:
    """Raise SettingError if it is not an objective, with what was probably meant."""
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
    if isinstance(one, Objective):
        return
    is_short = one is None or isinstance(one, (str, int, float, type))
    also = {word: name for kind, name in _ADDED.items() for word in (kind, kind.replace("_", ""), f"{kind}_match")}
    raise SettingError(
        f"objectives: {repr(one) if is_short else f'a {type(one).__name__}'} is no objective. Give instances of "
        f"{', '.join(_ADDED.values())}, or of your own subclass of hf_distill.objectives.Objective."
        f"{did_you_mean(one, _ADDED.values(), also)}"
    )
