"""How the teachers of an ensemble are weighted: the settings, checked, and where the labels of rows are."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hf_distill.errors import DataError, SettingError, TeacherError, did_you_mean
from hf_distill.functional.rows import in_full_precision
from hf_distill.signals import Needs, Signals
from hf_distill.tasks import Batch, Task
from hf_distill.tasks.base import IGNORED
from hf_distill.teachers.base import StudentBatch, Teacher, numbered, of_member
from hf_distill.teachers.cache import CachedTeacher
from hf_distill.teachers.cache.source import is_bound
from hf_distill.teachers.make import as_teacher
from hf_distill.teachers.model import ModelTeacher
from hf_distill.vocabulary import HeadAlignment

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


class Ensemble:
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
        offload: "cpu": a model is on the accelerator only while it runs; None: all stay there.

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

    def __init__(
        self,
        teachers: Sequence[Any],
        *,
        mean: str = "probabilities",
        weights: Sequence[float] | str | None = None,
        offload: str | None = None,
    ) -> None:
        if mean not in MEANS:
            raise SettingError(f"Ensemble: mean={mean!r}: allowed are {', '.join(MEANS)}.{did_you_mean(mean, MEANS)}")
        if offload not in (None, "cpu"):
            raise SettingError(f"Ensemble: offload={offload!r}: allowed are None and 'cpu'.")
        if isinstance(teachers, (str, nn.Module)) or len(teachers) < 2:
            raise SettingError("Ensemble: give at least two teachers, as a list. One alone needs no ensemble.")
        self._given = list(teachers)
        self._mean = mean
        self._weights = checked_weights(weights, len(self._given))
        self._offload = offload
        self._accelerator: Any = None
        self._settings: list[dict[str, Any]] = [{} for _ in self._given]
        self.teachers: list[Teacher] = []
        self.columns = HeadAlignment()
        self.slot = ""  # of an ensemble in another one: see `CachedTeacher`

    @property
    def inputs(self) -> tuple[str, ...]:
        """What any of them reads, as columns that all share and as its own; known after `fit`."""
        shared = [name for teacher in self.teachers for name in teacher.inputs]
        own = [name for number, teacher in enumerate(self.teachers) for name in numbered(teacher.inputs, number)]
        return tuple(dict.fromkeys([*shared, *own]))

    @property
    def bound_to_temperature(self) -> bool:
        """Whether what they say together at one temperature says nothing of another."""
        return self._mean == "probabilities" or isinstance(self._weights, str) or any(map(is_bound, self.teachers))

    @property
    def reads_labels(self) -> bool:
        """Whether what they say together depends on the labels."""
        return self._weights in ("labels", "best") or any(getattr(one, "reads_labels", False) for one in self.teachers)

    def made_with(self, *, processor: Any = None, **settings: Any) -> None:
        """Keyword arguments of `as_teacher`, for those of them that are no Teacher yet.

        Args:
            processor: of all of them, or a list with one for each (None: it reads what the student reads).

        Raises:
            SettingError: a list of another length.
        """
        several = isinstance(processor, (list, tuple))
        if several and len(processor) != len(self._given):
            raise SettingError(
                f"teacher_processing_class is a list of {len(processor)} for {len(self._given)} teachers. Give one for "
                "each, None for a teacher that reads what the student reads."
            )
        each = processor if several else [processor] * len(self._given)
        self._settings = [{**settings, "processor": one} for one in each]

    def fit(
        self,
        student: nn.Module,
        task: Task,
        *,
        student_processor: Any = None,
        compares_predictions: bool = True,
        same_inputs: bool = False,
    ) -> None:
        """Each of them must be able to teach this student. See `Teacher.fit`."""
        if not self.teachers:
            made = zip(self._given, self._settings, strict=True)
            self.teachers = [as_teacher(one, task.kind, **settings) for one, settings in made]
        for number, teacher in enumerate(self.teachers):
            if isinstance(teacher, (CachedTeacher, Ensemble)):
                teacher.slot = f"{self.slot}{number}_"
            teacher.fit(
                student,
                task,
                student_processor=student_processor,
                compares_predictions=compares_predictions,
                same_inputs=same_inputs,
            )
        compared = {teacher.columns.student for teacher in self.teachers}
        if len(compared) > 1:
            raise TeacherError(
                "Ensemble: the teachers share different columns of their heads with the student "
                f"({', '.join(sorted(map(str, compared)))}), so their predictions cannot be averaged. Use teachers "
                "with the same labels or vocabulary."
            )
        self.columns = HeadAlignment(student=self.teachers[0].columns.student)
        if task.on_values:
            self._fixed(len(self.teachers))

    def check_needs(self, needs: Needs) -> None:
        """Raise SettingError for what one of them cannot be asked, before the first step."""
        if needs.reads:
            raise SettingError("an Ensemble shows nothing of its teachers' inside. Leave the objectives on it out.")
        for number, teacher in enumerate(self.teachers):
            self._refuse_lists(number, teacher)
            check = getattr(teacher, "check_needs", None)
            if check is not None:
                check(Needs(logits=needs.logits, temperature=needs.temperature))

    def collator(self, collator: Callable[..., Any]) -> Callable[..., Any]:
        """That collator, with the answers of those of them that are caches; for the training's data loader.

        Raises:
            SettingError: before `fit`, which a distiller or a trainer does.
        """
        if not self.teachers:
            raise SettingError("Ensemble.collator: make the Distiller first: it makes teachers of what was given.")
        for teacher in self.teachers:
            looks_up = getattr(teacher, "collator", None)
            collator = collator if looks_up is None else looks_up(collator)
        return collator

    def described(self) -> str:
        """How they are joined, for the card."""
        said = "the mean of their probabilities" if self._mean == "probabilities" else "the mean of their logits"
        if self._weights is None:
            return said
        weights = self._weights if isinstance(self._weights, str) else ", ".join(f"{w:.3g}" for w in self._weights)
        return f"{said}, weighted by {weights}"

    def __call__(self, task: Task, batch: Batch, needs: Needs) -> Signals:
        said = [
            self._ask(number, teacher, task, of_member(batch, number), needs)
            for number, teacher in enumerate(self.teachers)
        ]
        return Signals(logits=self._averaged(said, task, batch, needs.temperature), columns=self.columns)

    def place(self, accelerator: Any) -> None:
        self._accelerator = accelerator
        for teacher in self.teachers:
            if self._offload is None or not isinstance(teacher, ModelTeacher):
                teacher.place(accelerator)

    def after_step(self, student: nn.Module) -> None:
        for teacher in self.teachers:
            teacher.after_step(student)

    @property
    def hear(self) -> Callable[[StudentBatch], None] | None:
        """For those of them that learn too; None: none does."""
        learning = [hear for hear in (getattr(teacher, "hear", None) for teacher in self.teachers) if hear is not None]

        def tell(lesson: StudentBatch) -> None:
            for hear in learning:
                hear(lesson)

        return tell if learning else None

    def state(self) -> dict[str, Tensor]:
        """Of those that training changes."""
        found: dict[str, Tensor] = {}
        for index, teacher in enumerate(self.teachers):
            own: dict[str, Tensor] = getattr(teacher, "state", dict)()
            found |= {f"{index}.{name}": value for name, value in own.items()}
        return found

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Raises SettingError: of other teachers, or of these in another order."""
        if set(state) != set(self.state()):
            raise SettingError(
                "the saved state is of another Ensemble: of other teachers, or of these in another order. Resume with "
                "the same list."
            )
        for index, teacher in enumerate(self.teachers):
            start = f"{index}."
            own = {name[len(start) :]: value for name, value in state.items() if name.startswith(start)}
            if own:
                teacher.load_state(own)  # type: ignore[attr-defined]  # it had a state, so it can take one

    def _refuse_lists(self, number: int, teacher: Teacher) -> None:
        """Of one that tells some of its columns and the rest as one, no mean over columns can be taken."""
        cached = isinstance(teacher, CachedTeacher) and teacher.cache.store.lists_columns
        if cached or hasattr(teacher, "lists_columns"):
            what = f"a cache with {type(teacher.cache.store).__name__}" if cached else f"a {type(teacher).__name__}"  # type: ignore[attr-defined]  # a cache has a store
            raise SettingError(
                f"Ensemble: teacher {number} ({what}) tells some of its columns, and a mean is over all of them. "
                "Build its cache with store=Dense(); or build one cache of the whole ensemble: "
                "TeacherCache.build(Ensemble([...]), ..., student=student, temperature=..., store=TopK(...))."
            )

    def _ask(self, number: int, teacher: Teacher, task: Task, batch: Batch, needs: Needs) -> Tensor:
        away = self._offload is not None and isinstance(teacher, ModelTeacher) and self._accelerator is not None
        if away:
            teacher.place(self._accelerator)
        try:
            logits = teacher(task, batch, Needs(logits=True, temperature=needs.temperature)).predictions()
        except (TeacherError, DataError) as error:
            raise type(error)(f"teacher {number} of the Ensemble: {error}") from error
        if away:
            assert isinstance(teacher, ModelTeacher)
            teacher.model.to("cpu")
        return in_full_precision(logits)

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
        target = labels_in_place(log_p[0], task, batch, self.columns)
        known = target != IGNORED
        of_label = log_p.gather(-1, target.clamp(min=0).expand(log_p.shape[0], *target.shape))
        if self._weights == "labels":
            return torch.where(known, of_label, 0.0).log_softmax(0)
        best = torch.where(known, of_label, confidence).argmax(0, keepdim=True)
        chosen = torch.arange(log_p.shape[0], device=log_p.device).view(-1, *[1] * (log_p.dim() - 1)) == best
        return torch.zeros_like(confidence).masked_fill(~chosen, -torch.inf)
