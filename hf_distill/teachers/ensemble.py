"""Ensemble: the mean of several teachers, equal or weighted."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, get_args

import torch
from torch import Tensor, nn

from hf_distill._types import Collator, Keywords
from hf_distill.errors import DataError, SettingError, TeacherError, did_you_mean
from hf_distill.functional.rows import in_full_precision
from hf_distill.signals import Needs, Signals
from hf_distill.tasks import Batch, Task
from hf_distill.tasks.base import IGNORED
from hf_distill.teachers.base import (
    Processors,
    Teacher,
    TeacherSetup,
    numbered_inputs,
    teacher_inputs,
)
from hf_distill.teachers.make import as_teacher
from hf_distill.vocabulary import HeadAlignment, LabelMatching

if TYPE_CHECKING:
    from hf_distill.objectives import Objective

Mean: TypeAlias = Literal["probabilities", "logits"]
WeightRule: TypeAlias = Literal["confidence", "entropy", "labels", "best"]
MEANS, WEIGHTS = get_args(Mean), get_args(WeightRule)


def _normalised_weights(weights: Sequence[float] | str | None, count: int) -> list[float] | str | None:
    """Return the weights of an ensemble as numbers that sum to 1, as a name in `WEIGHTS`, or None for equal weights.

    Args:
        weights: as for `Ensemble`.
        count: the number of teachers.

    Raises:
        SettingError: if there is no such name, or not one number above 0 for each teacher.
    """
    if weights is None:
        return None
    if isinstance(weights, str):
        if weights not in WEIGHTS:
            hint = did_you_mean(weights, WEIGHTS)
            raise SettingError(f"Ensemble: weights={weights!r}: allowed are {', '.join(WEIGHTS)}, or numbers.{hint}")
        return weights
    numbers = [float(weight) for weight in weights]
    if len(numbers) != count or not all(0 < weight < float("inf") for weight in numbers):
        raise SettingError(f"Ensemble: weights={list(weights)}: give one number above 0 for each of {count} teachers.")
    return [weight / sum(numbers) for weight in numbers]


class Ensemble(Teacher):
    """The mean of several teachers.

    `mean="probabilities"` is the arithmetic mean of the distributions at the current temperature (Hinton et al. 2015,
    section 5); `mean="logits"` is their normalised geometric mean (same section), which is the same at every
    temperature. Rows of values (regression, embeddings) are averaged directly. The teachers run one after the other.

    Args:
        teachers: at least two, each as for `teacher_model` (a folder may be a cache). They read the student's inputs,
            the same `teacher_` columns, or each its own (`teacher_0_input_ids`, `teacher_1_...`).
        mean: "probabilities" or "logits".
        weights: a number above 0 for each teacher (divided by their sum), or None for equal weights. Or a rule that
            weights the teachers in each row: "confidence" (by the largest probability), "entropy" (by exp(-entropy)),
            "labels" (by the probability of the label; equal in rows without one), "best" (only the teacher with the
            largest probability of the label, or, in rows without a label, the most confident teacher).

    Raises:
        SettingError: if there are fewer than two teachers, or weights or mean are not allowed.
        TeacherError: if the teachers share different columns of their heads with the student.

    >>> from transformers import BertConfig, BertForSequenceClassification as Bert
    >>> from hf_distill import Distiller
    >>> config = BertConfig(vocab_size=9, hidden_size=4, num_hidden_layers=1, num_attention_heads=1)
    >>> student, *teachers = Bert(config), Bert(config), Bert(config)
    >>> distiller = Distiller(student, Ensemble(teachers, weights=[2, 1]))
    >>> batch = {"input_ids": torch.tensor([[1, 2]]), "labels": torch.tensor([0])}
    >>> sorted(distiller(student, batch).terms)
    ['labels', 'logits']
    """

    paper = "hinton2015distilling"

    def __init__(
        self,
        teachers: Sequence[Any],
        *,
        mean: Mean = "probabilities",
        weights: Sequence[float] | WeightRule | None = None,
    ) -> None:
        if mean not in MEANS:
            raise SettingError(f"Ensemble: mean={mean!r}: allowed are {', '.join(MEANS)}.{did_you_mean(mean, MEANS)}")
        if isinstance(teachers, (str, nn.Module)) or len(teachers) < 2:
            raise SettingError("Ensemble: give at least two teachers, as a list.")
        self._given = list(teachers)
        self._mean = mean
        self._weights = _normalised_weights(weights, len(self._given))
        self._settings: list[Keywords] = [{} for _ in self._given]
        self.teachers: list[Teacher] = []
        self.alignment = HeadAlignment()

    def __repr__(self) -> str:
        return f"Ensemble({len(self._given)} teachers, mean={self._mean!r}, weights={self._weights!r})"

    @property
    def _rule(self) -> str | None:
        """The rule that weights the teachers in each row, or None for fixed weights."""
        return self._weights if isinstance(self._weights, str) else None

    @property
    def parts(self) -> list[Teacher]:  # type: ignore[override]  # known after `bind`
        return self.teachers

    @property
    def inputs(self) -> tuple[str, ...]:  # type: ignore[override]  # known after `bind`
        """The inputs of all members, as shared columns and as each member's own; known after `bind`."""
        shared = [name for teacher in self.teachers for name in teacher.inputs]
        own = [name for index, teacher in enumerate(self.teachers) for name in numbered_inputs(teacher.inputs, index)]
        return tuple(dict.fromkeys([*shared, *own]))

    @property
    def fixed_temperature(self) -> bool:
        mixes_probabilities = self._mean == "probabilities" or self._rule is not None
        return mixes_probabilities or any(teacher.fixed_temperature for teacher in self.teachers)

    @property
    def reads_labels(self) -> bool:  # type: ignore[override]  # it follows from the members
        return self._rule in ("labels", "best") or any(teacher.reads_labels for teacher in self.teachers)

    def configure(
        self,
        *,
        processing_class: Processors = None,
        dtype: str | None = None,
        label_matching: LabelMatching = "by_name",
    ) -> None:
        """Take the settings of members that are not loaded yet.

        Args:
            processing_class: one for all members, or a list with one for each (None for one with the student's inputs).
            dtype: as for `as_teacher`.
            label_matching: as for `as_teacher`.

        Raises:
            SettingError: if the list has another length.
        """
        if (processing_class, dtype, label_matching) == (None, None, "by_name"):
            return
        count = len(self._given)
        each = processing_class if isinstance(processing_class, (list, tuple)) else [processing_class] * count
        if len(each) != count:
            given = len(each)
            raise SettingError(f"teacher_processing_class is a list of {given} for {count} teachers. Give one each.")
        self._settings = [{"processing_class": one, "dtype": dtype, "label_matching": label_matching} for one in each]

    def bind(self, setup: TeacherSetup) -> None:
        """Make the members, and check that each can teach this student. See `Teacher.bind`."""
        if not self.teachers:
            given = zip(self._given, self._settings, strict=True)
            self.teachers = [as_teacher(teacher, str(setup.task), **settings) for teacher, settings in given]
        for index, teacher in enumerate(self.teachers):
            teacher.bind(replace(setup, slot=f"{setup.slot}{index}_"))
        compared = {teacher.alignment.student for teacher in self.teachers}
        if len(compared) > 1:
            columns = ", ".join(sorted(map(str, compared)))
            raise TeacherError(f"Ensemble: the teachers share different columns with the student ({columns}).")
        self.alignment = HeadAlignment(student=self.teachers[0].alignment.student)
        if setup.task.on_values:
            self._fixed_weights()

    def check(self, needs: Needs, objectives: Iterable[Objective] = ()) -> None:
        if needs.activations:
            raise SettingError("an Ensemble has no activations. Leave out objectives on activations.")
        for index, teacher in enumerate(self.teachers):
            if teacher.is_sparse:
                raise SettingError(
                    f"Ensemble: teacher {index} ({teacher!r}) gives some of its columns, and a mean is over all of "
                    "them. Build its cache with store=Dense(), or one cache of the whole Ensemble with store=TopK(...)."
                )
            teacher.check(Needs(logits=needs.logits, temperature=needs.temperature))

    def wrap_collator(self, collator: Collator) -> Collator:
        """Return a collator that also fetches the predictions of members that are caches.

        Raises:
            SettingError: if it is called before `bind`.
        """
        if not self.teachers:
            raise SettingError("Ensemble.wrap_collator: make the Distiller first, which makes the teachers.")
        return super().wrap_collator(collator)

    def describe(self) -> str:
        mean = f"the mean of their {self._mean}"
        if self._weights is None:
            return mean
        return f"{mean}, weighted by {self._rule or ', '.join(f'{weight:.3g}' for weight in self._fixed_weights())}"

    def __call__(self, task: Task, batch: Batch, needs: Needs) -> Signals:
        logits = torch.stack([self._predictions(index, task, batch, needs) for index in range(len(self.teachers))])
        return Signals(logits=self._average(logits, task, batch, needs.temperature), alignment=self.alignment)

    def state_dict(self) -> dict[str, Tensor]:
        return {
            f"{index}.{name}": value
            for index, teacher in enumerate(self.teachers)
            for name, value in teacher.state_dict().items()
        }

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Continue from a checkpoint; raise SettingError if it belongs to other teachers or another order."""
        if set(state) != set(self.state_dict()):
            raise SettingError("the saved state belongs to another Ensemble. Resume with the same list of teachers.")
        for index, teacher in enumerate(self.teachers):
            start = f"{index}."
            own = {name[len(start) :]: value for name, value in state.items() if name.startswith(start)}
            if own:
                teacher.load_state_dict(own)

    def _predictions(self, index: int, task: Task, batch: Batch, needs: Needs) -> Tensor:
        needs = Needs(logits=True, temperature=needs.temperature)
        try:
            signals = self.teachers[index](task, teacher_inputs(batch, index), needs)
            return in_full_precision(signals.predictions())
        except (TeacherError, DataError) as error:
            raise type(error)(f"teacher {index} of the Ensemble: {error}") from error

    def _average(self, logits: Tensor, task: Task, batch: Batch, temperature: float) -> Tensor:
        """Return the mean `[... v]` of `[teachers ... v]`."""
        if task.on_values:
            weights = torch.tensor(self._fixed_weights(), device=logits.device, dtype=logits.dtype)
            return torch.tensordot(weights, logits, dims=1)
        log_p = (logits / temperature).log_softmax(-1)
        log_weights = self._log_weights(log_p, task, batch)
        if self._mean == "probabilities":
            return temperature * torch.logsumexp(log_p + log_weights, 0)
        weights = log_weights.exp()
        # A column that one teacher excludes is excluded for all: 0 · −inf would be NaN.
        excluded = ((logits == -torch.inf) & (weights > 0)).any(0)
        return (weights * logits.masked_fill(logits == -torch.inf, 0)).sum(0).masked_fill(excluded, -torch.inf)

    def _fixed_weights(self) -> list[float]:
        if isinstance(self._weights, str):
            raise SettingError(f"Ensemble: weights={self._weights!r} need probabilities; this task predicts values.")
        return self._weights or [1 / len(self.teachers)] * len(self.teachers)

    def _log_weights(self, log_p: Tensor, task: Task, batch: Batch) -> Tensor:
        """Return the log of each teacher's weight in each row, `[teachers ... 1]`."""
        if self._rule is None:
            fixed = torch.tensor(self._fixed_weights(), device=log_p.device, dtype=log_p.dtype).log()
            return fixed.view(-1, *[1] * (log_p.dim() - 1))
        confidence = log_p.amax(-1, keepdim=True)
        if self._rule == "confidence":
            return confidence.log_softmax(0)
        if self._rule == "entropy":
            p = log_p.exp()
            return (p * log_p.masked_fill(p == 0, 0)).sum(-1, keepdim=True).log_softmax(0)
        target = self._labels_of_rows(log_p[0], task, batch)
        has_label = target != IGNORED
        log_p_of_label = log_p.gather(-1, target.clamp(min=0).expand(log_p.shape[0], *target.shape))
        if self._rule == "labels":
            return torch.where(has_label, log_p_of_label, 0.0).log_softmax(0)
        best = torch.where(has_label, log_p_of_label, confidence).argmax(0, keepdim=True)
        chosen = torch.arange(log_p.shape[0], device=log_p.device).view(-1, *[1] * (log_p.dim() - 1)) == best
        return torch.zeros_like(confidence).masked_fill(~chosen, -torch.inf)

    def _labels_of_rows(self, logits: Tensor, task: Task, batch: Batch) -> Tensor:
        """Return the label of each row of `[... v]` as a compared column, `[... 1]`; -100 if it has none."""
        leading = logits.shape[:-1]
        places = torch.arange(leading.numel(), device=logits.device).view(*leading, 1)
        found = torch.full((leading.numel(),), IGNORED, device=logits.device)
        labels = task.targets(batch)
        if labels is not None:
            found[task.select(places, batch).flatten()] = self.alignment.of_labels(labels)
        return found.view(*leading, 1)
