"""How the teachers of an ensemble are weighted: the settings, checked, and where the labels of rows are."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from hf_distill.errors import DataError, SettingError, TeacherError, did_you_mean
from hf_distill.functional.rows import in_full_precision
from hf_distill.signals import Needs, Signals
from hf_distill.tasks import Batch, Task
from hf_distill.tasks.base import IGNORED
from hf_distill.teachers.base import Collator, StudentBatch, Teacher, TeacherSetup, numbered_inputs, teacher_inputs
from hf_distill.teachers.make import as_teacher
from hf_distill.vocabulary import HeadAlignment, LabelMatching

if TYPE_CHECKING:
    from hf_distill.objectives import Objective

MEANS = ("probabilities", "logits")
WEIGHTS = ("confidence", "entropy", "labels", "best")


def labels_in_place(logits: Tensor, task: Task, batch: Batch, columns: HeadAlignment) -> Tensor:
    """`[... 1]`: the label of each row where its logits are, -100 where there is none."""
    leading = logits.shape[:-1]
    where = torch.arange(leading.numel(), device=logits.device).view(*leading, 1)
    placed = torch.full((leading.numel(),), IGNORED, device=logits.device)
    labels = task.targets(batch)
    if labels is not None:
        placed[task.select(where, batch).flatten()] = columns.of_labels(labels)
    return placed.view(*leading, 1)


def checked_weights(weights: Sequence[float] | str | None, count: int) -> list[float] | str | None:
    """What an ensemble was given, as numbers that sum to 1, a name, or None: equal.

    Raises:
        SettingError: no such name, a number of weights that is not that of the teachers, or one not above 0.
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
    """A teacher that says what several say on average.

    `mean="probabilities"` is the mean of the distributions at the temperature of the moment (Hinton et al. 2015,
    section 5, the arithmetic mean); `mean="logits"` is their normalised geometric mean (ibid.), at every temperature
    the same. Rows of values (regression, embeddings) are averaged as they are. The teachers run one after the other.

    Args:
        teachers: at least two; each as `teacher_model` takes it, so that a folder may be a cache. They read the
            student's inputs, the same `teacher_` columns, or each its own (`teacher_0_input_ids`, `teacher_1_...`).
        mean: "probabilities" or "logits".
        weights: a number above 0 for each teacher (brought to a sum of 1); None: equal. Or, for each row anew:
            "confidence" (by its largest probability), "entropy" (by exp(-entropy)), "labels" (by the probability of the
            label; rows without one: equal), "best" (the one teacher with the largest probability of the label; without
            one, the most confident).

    Raises:
        SettingError: fewer than two, weights that cannot be, no such mean.
        TeacherError: teachers that share different columns of their heads with the student.

    >>> from transformers import BertConfig, BertForSequenceClassification as Bert
    >>> from hf_distill import Distiller
    >>> config = BertConfig(vocab_size=9, hidden_size=4, num_hidden_layers=1, num_attention_heads=1)
    >>> student, one, other = Bert(config), Bert(config), Bert(config)
    >>> distiller = Distiller(student, Ensemble([one, other], weights=[2, 1]))
    >>> batch = {"input_ids": torch.tensor([[1, 2]]), "labels": torch.tensor([0])}
    >>> sorted(distiller(student, batch).terms)
    ['labels', 'logits']
    """

    paper = "hinton2015distilling"

    def __init__(
        self,
        teachers: Sequence[Any],
        *,
        mean: str = "probabilities",
        weights: Sequence[float] | str | None = None,
    ) -> None:
        if mean not in MEANS:
            raise SettingError(f"Ensemble: mean={mean!r}: allowed are {', '.join(MEANS)}.{did_you_mean(mean, MEANS)}")
        if isinstance(teachers, (str, nn.Module)) or len(teachers) < 2:
            raise SettingError("Ensemble: give at least two teachers, as a list. One alone needs no ensemble.")
        self._given = list(teachers)
        self._mean = mean
        self._weights = checked_weights(weights, len(self._given))
        self._settings: list[dict[str, Any]] = [{} for _ in self._given]
        self.teachers: list[Teacher] = []
        self.alignment = HeadAlignment()

    def __repr__(self) -> str:
        return f"Ensemble({len(self._given)} teachers, mean={self._mean!r}, weights={self._weights!r})"

    @property
    def inputs(self) -> tuple[str, ...]:  # type: ignore[override]  # known after `bind`
        """What any of them reads, as columns that all share and as its own; known after `bind`."""
        shared = [name for teacher in self.teachers for name in teacher.inputs]
        own = [name for number, teacher in enumerate(self.teachers) for name in numbered_inputs(teacher.inputs, number)]
        return tuple(dict.fromkeys([*shared, *own]))

    @property
    def fixed_temperature(self) -> bool:
        several = self._mean == "probabilities" or isinstance(self._weights, str)
        return several or any(teacher.fixed_temperature for teacher in self.teachers)

    @property
    def reads_labels(self) -> bool:  # type: ignore[override]  # it follows from the members
        return self._weights in ("labels", "best") or any(teacher.reads_labels for teacher in self.teachers)

    def configure(
        self, *, processing_class: Any = None, dtype: str | None = None, label_matching: LabelMatching = "by_name"
    ) -> None:
        """Take the settings of members that are not loaded yet.

        Args:
            processing_class: of all members, or a list with one for each (None: it reads what the student reads).
            dtype: as `as_teacher`.
            label_matching: as `as_teacher`.

        Raises:
            SettingError: for a list of another length.
        """
        if (processing_class, dtype, label_matching) == (None, None, "by_name"):
            return
        several = isinstance(processing_class, (list, tuple))
        if several and len(processing_class) != len(self._given):
            raise SettingError(
                f"teacher_processing_class is a list of {len(processing_class)} for {len(self._given)} teachers. Give "
                "one for each, None for a teacher that reads what the student reads."
            )
        each = processing_class if several else [processing_class] * len(self._given)
        self._settings = [{"processing_class": one, "dtype": dtype, "label_matching": label_matching} for one in each]

    def bind(self, setup: TeacherSetup) -> None:
        """Each of them must be able to teach this student. See `Teacher.bind`."""
        if not self.teachers:
            made = zip(self._given, self._settings, strict=True)
            self.teachers = [as_teacher(one, str(setup.task), **settings) for one, settings in made]
        for number, teacher in enumerate(self.teachers):
            teacher.bind(replace(setup, slot=f"{setup.slot}{number}_"))
        compared = {teacher.alignment.student for teacher in self.teachers}
        if len(compared) > 1:
            raise TeacherError(
                "Ensemble: the teachers share different columns of their heads with the student "
                f"({', '.join(sorted(map(str, compared)))}), so their predictions cannot be averaged. Use teachers "
                "with the same labels or vocabulary."
            )
        self.alignment = HeadAlignment(student=self.teachers[0].alignment.student)
        if setup.task.on_values:
            self._fixed(len(self.teachers))

    def check(self, needs: Needs, objectives: Iterable[Objective] = ()) -> None:
        if needs.activations:
            raise SettingError("an Ensemble shows nothing of its teachers' inside. Leave the objectives on it out.")
        for number, teacher in enumerate(self.teachers):
            self._check_has_all_columns(number, teacher)
            teacher.check(Needs(logits=needs.logits, temperature=needs.temperature))

    def wrap_collator(self, collator: Collator) -> Collator:
        """Fetch the answers of the members that are caches.

        Raises:
            SettingError: before `bind`, which a distiller or a trainer calls.
        """
        if not self.teachers:
            raise SettingError("Ensemble.wrap_collator: make the Distiller first: it makes the teachers.")
        for teacher in self.teachers:
            collator = teacher.wrap_collator(collator)
        return collator

    @property
    def fetches_with_collator(self) -> bool:
        return any(teacher.fetches_with_collator for teacher in self.teachers)

    def describe(self) -> str:
        said = "the mean of their probabilities" if self._mean == "probabilities" else "the mean of their logits"
        if self._weights is None:
            return said
        weights = self._weights if isinstance(self._weights, str) else ", ".join(f"{w:.3g}" for w in self._weights)
        return f"{said}, weighted by {weights}"

    def __call__(self, task: Task, batch: Batch, needs: Needs) -> Signals:
        said = [
            self._predictions(number, teacher, task, teacher_inputs(batch, number), needs)
            for number, teacher in enumerate(self.teachers)
        ]
        return Signals(logits=self._averaged(said, task, batch, needs.temperature), alignment=self.alignment)

    def to(self, accelerator: Accelerator) -> None:
        for teacher in self.teachers:
            teacher.to(accelerator)

    def on_step(self, student: nn.Module) -> None:
        for teacher in self.teachers:
            teacher.on_step(student)

    def models(self) -> list[nn.Module]:
        return [model for teacher in self.teachers for model in teacher.models()]

    def members(self) -> list[Teacher]:
        return [member for teacher in self.teachers for member in teacher.members()]

    @property
    def changes_in_training(self) -> bool:
        return any(teacher.changes_in_training for teacher in self.teachers)

    @property
    def learns_from_batches(self) -> bool:
        return any(teacher.learns_from_batches for teacher in self.teachers)

    def on_batch(self, batch: StudentBatch) -> None:
        for teacher in self.teachers:
            teacher.on_batch(batch)

    def state_dict(self) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for index, teacher in enumerate(self.teachers):
            found |= {f"{index}.{name}": value for name, value in teacher.state_dict().items()}
        return found

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Raises SettingError: of other teachers, or of these in another order."""
        if set(state) != set(self.state_dict()):
            raise SettingError(
                "the saved state is of another Ensemble: of other teachers, or of these in another order. Resume with "
                "the same list."
            )
        for index, teacher in enumerate(self.teachers):
            start = f"{index}."
            own = {name[len(start) :]: value for name, value in state.items() if name.startswith(start)}
            if own:
                teacher.load_state_dict(own)

    def _check_has_all_columns(self, number: int, teacher: Teacher) -> None:
        if teacher.is_sparse:
            raise SettingError(
                f"Ensemble: teacher {number} ({teacher!r}) gives some of its columns, and a mean is over all of them. "
                "Build its cache with store=Dense(); or build one cache of the whole ensemble: "
                "TeacherCache.build(Ensemble([...]), ..., student=student, temperature=..., store=TopK(...))."
            )

    def _predictions(self, number: int, teacher: Teacher, task: Task, batch: Batch, needs: Needs) -> Tensor:
        try:
            signals = teacher(task, batch, Needs(logits=True, temperature=needs.temperature))
            return in_full_precision(signals.predictions())
        except (TeacherError, DataError) as error:
            raise type(error)(f"teacher {number} of the Ensemble: {error}") from error

    def _averaged(self, said: list[Tensor], task: Task, batch: Batch, temperature: float) -> Tensor:
        logits = torch.stack(said)  # [teachers ... v]
        if task.on_values:
            weights = torch.tensor(self._fixed(len(said)), device=logits.device, dtype=logits.dtype)
            return torch.tensordot(weights, logits, dims=1)
        log_p = (logits / temperature).log_softmax(-1)
        log_weights = self._log_weights(log_p, task, batch)  # [teachers ... 1]
        if self._mean == "probabilities":
            return temperature * torch.logsumexp(log_p + log_weights, 0)
        weights = log_weights.exp()
        # A column that one of them blocks is blocked for all: 0 · −inf would be NaN.
        blocked = ((logits == -torch.inf) & (weights > 0)).any(0)
        return (weights * logits.masked_fill(logits == -torch.inf, 0)).sum(0).masked_fill(blocked, -torch.inf)

    def _fixed(self, count: int) -> list[float]:
        if isinstance(self._weights, str):
            raise SettingError(
                f"Ensemble: weights={self._weights!r} are found from probabilities, and this task predicts values. "
                "Give a number for each teacher."
            )
        return self._weights or [1 / count] * count

    def _log_weights(self, log_p: Tensor, task: Task, batch: Batch) -> Tensor:
        """`[teachers ... 1]`, of rows that sum to 1 over the teachers."""
        if not isinstance(self._weights, str):
            fixed = torch.tensor(self._fixed(log_p.shape[0]), device=log_p.device, dtype=log_p.dtype).log()
            return fixed.view(-1, *[1] * (log_p.dim() - 1))
        confidence = log_p.amax(-1, keepdim=True)
        if self._weights == "confidence":
            return confidence.log_softmax(0)
        if self._weights == "entropy":
            p = log_p.exp()
            return (p * log_p.masked_fill(p == 0, 0)).sum(-1, keepdim=True).log_softmax(0)
        target = labels_in_place(log_p[0], task, batch, self.alignment)
        known = target != IGNORED
        of_label = log_p.gather(-1, target.clamp(min=0).expand(log_p.shape[0], *target.shape))
        if self._weights == "labels":
            return torch.where(known, of_label, 0.0).log_softmax(0)
        best = torch.where(known, of_label, confidence).argmax(0, keepdim=True)
        chosen = torch.arange(log_p.shape[0], device=log_p.device).view(-1, *[1] * (log_p.dim() - 1)) == best
        return torch.zeros_like(confidence).masked_fill(~chosen, -torch.inf)
