"""ExitMatch: early exits learn from the student's own final prediction, and from labels.

It uses no teacher. The student's head must classify: one row for each sequence, image, recording or token.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hf_distill.errors import DataError, SettingError, check_choice, is_number, is_whole
from hf_distill.functional import forward_kl
from hf_distill.functional.rows import in_full_precision
from hf_distill.models.positions import PositionRule, check_positions
from hf_distill.objectives.base import Objective, ObjectiveSetup, like_student
from hf_distill.objectives.layers import ValidPositions, checked_weight
from hf_distill.objectives.logits import kept_of
from hf_distill.schedules import Schedule, checked_schedule
from hf_distill.signals import HIDDEN, ActivationKey, LossSum, Needs, Side, Signals
from hf_distill.tasks import Batch, Classification, Task
from hf_distill.tasks.base import batch_size, rows_of
from hf_distill.tasks.regression import POOLING, POOLING_ALIASES, Pooling


class ExitHead(nn.Module):
    """The head of an exit: hidden states `[n d]` → features of the last block's width `[n w]`, and logits `[n v]`."""

    def __init__(self, width: int, last: int, columns: int) -> None:
        super().__init__()
        self.features = nn.Linear(width, last)
        self.classifier = nn.Linear(last, columns)

    def forward(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        features = self.features(rows.to(self.features.weight.dtype))
        return features, self.classifier(features.tanh())


class ExitMatch(Objective):
    """Early exits learn from the student's final prediction and from the labels.

    Zhang et al. 2019 (Be Your Own Teacher, section 3): the sum over exits of
    `(1 - alpha) · labels + alpha · T² · KL(last ‖ exit) + feature_weight · ‖features of the exit − last features‖²`.
    The final prediction and features act as the teacher and get no gradient from this term; the final head learns from
    the labels' term of the blend (alpha=0 there without a `teacher_model` is the paper's method). Each exit has its own
    head: a linear bottleneck to the last block's width (its output is the features), tanh, and a linear classifier.

    The heads are trained with the student but are not part of it: they are in `distiller.learned` and saved beside each
    checkpoint, and are not exported. `distiller.learned.save(folder)` keeps them; `predictions` returns their outputs.

    Args:
        layers: blocks of the student, from 0 (negative numbers count from the end), except the last.
        alpha: weight of the final prediction in an exit's loss, in [0, 1]; the labels have 1 - alpha.
        temperature: above 0, for the KL term only. The defaults of alpha, temperature and feature_weight are those of
            the paper's code.
        feature_weight: weight of the features' term; 0 leaves it out.
        pooling: "mean", "first" or "last" of the valid positions, for a head with one row for each example.
        weight: weight of the term in the loss.
        side, name, student_stack: as `HiddenMatch`.

    Raises:
        SettingError: for another kind of head, an unknown or the last block, or a setting that is not allowed.

    >>> from transformers import BertConfig, BertForSequenceClassification as Bert
    >>> from hf_distill import Distiller
    >>> student = Bert(BertConfig(vocab_size=9, hidden_size=4, num_hidden_layers=3, num_attention_heads=1))
    >>> distiller = Distiller(student, alpha=0.0, objectives=ExitMatch([0, 1]))
    >>> batch = {"input_ids": torch.tensor([[1, 2]]), "labels": torch.tensor([0])}
    >>> sorted(distiller(student, batch).terms)
    ['exits', 'labels']
    """

    paper = "zhang2019byot"
    needs_teacher = False

    def __init__(
        self,
        layers: Sequence[int],
        *,
        alpha: float = 0.3,
        temperature: float = 3.0,
        feature_weight: float = 0.0,
        pooling: Pooling = "mean",
        weight: float | Schedule = 1.0,
        side: Side | None = None,
        name: str = "exits",
        student_stack: str | None = None,
    ) -> None:
        if not layers or not all(map(is_whole, layers)):
            raise SettingError(f"ExitMatch: layers={layers!r}: give a list of blocks by number, such as [2, 5].")
        check_choice("ExitMatch: pooling", pooling, POOLING, POOLING_ALIASES)
        if not is_number(feature_weight) or not 0 <= feature_weight < float("inf"):
            raise SettingError(f"ExitMatch: feature_weight={feature_weight!r}: must be at least 0 and finite.")
        self.exits, self.pooling, self.name = tuple(layers), pooling, name
        self.alpha = checked_schedule("alpha", alpha)(0.0)
        self.temperature = checked_schedule("temperature", temperature)(0.0)
        self.feature_weight = feature_weight
        self.weight = checked_weight("ExitMatch", weight)
        self.side, self.stack = side, student_stack
        self._heads: dict[int, ExitHead] = {}

    def bind(self, setup: ObjectiveSetup) -> None:
        """Find the blocks and make the heads."""
        task, model = setup.task, setup.model
        if not task.has_exits:
            raise SettingError(
                f"ExitMatch is for classification and token_classification, not {task}. Use MovingAverage or Snapshot."
            )
        blocks = setup.student.blocks(self.side, self.stack)
        self._last = blocks.length - 1
        chosen = [one + blocks.length if one < 0 else one for one in self.exits]
        if len(set(chosen)) < len(chosen) or not all(0 <= one < self._last for one in chosen):
            raise SettingError(
                f"ExitMatch: layers={list(self.exits)} of a student with {blocks.length} blocks: each must be one of "
                f"0 … {self._last - 1}, once. The last block is the teacher."
            )
        widths = {layer: width for layer in (*chosen, self._last) if (width := blocks.width_of(layer)) is not None}
        if len(widths) <= len(chosen):
            raise SettingError("ExitMatch: the width of the hidden states is not known. Set hidden_size in the config.")
        self._positions = PositionRule(model, task, of_decoder=blocks.of_decoder)
        read = [*chosen, self._last] if self.feature_weight else chosen
        self.needs = Needs(logits=True, activations=frozenset(self._read(layer) for layer in read))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(setup.seed)
            columns = model.config.num_labels
            assert columns is not None  # a classifier has labels
            self._heads = {layer: ExitHead(widths[layer], widths[self._last], columns) for layer in chosen}
        heads = nn.ModuleDict({str(layer): head for layer, head in self._heads.items()})
        self.learned = like_student(heads, model)

    def count(self, task: Task, batch: Batch) -> Tensor:
        if self.alpha < 1:
            task.require_labels(batch)
        if task.axis == "example":
            self._positions.check_not_packed(batch, "ExitMatch")
        return task.count(batch)

    def __call__(
        self, student: Signals, teacher: Signals, task: Task, batch: Batch, *, progress: float = 0.0
    ) -> LossSum:
        logits = student.predictions()
        with torch.autocast(logits.device.type, enabled=False):  # autocast would multiply in half precision
            last = _kept(task, rows_of(in_full_precision(logits.detach()), task, batch, whose="student"), batch)
            # The graph reaches the last head with a zero gradient, so that DDP does not wait for one.
            total = logits.flatten()[:0].sum().to(last.dtype)
            aim = self._rows(student, self._last, task, batch).detach() if self.feature_weight else None
            t = self.temperature
            for layer, (features, rows) in self._outputs(student, task, batch).items():
                if rows.shape != last.shape:
                    raise DataError(
                        f"exit {layer} gives {list(rows.shape)} [rows, columns], the student's head "
                        f"{list(last.shape)}. Every example needs a position that is not masked."
                    )
                total = total + self.alpha * t**2 * forward_kl(rows / t, last / t).sum()
                if self.alpha < 1:
                    total = total + (1 - self.alpha) * _loss_on_labels(rows, task, batch)
                if aim is not None:
                    total = total + self.feature_weight * (features - aim.to(features.dtype)).square().sum()
        return LossSum(total, task.count(batch).to(total.device))

    @torch.no_grad()
    def predictions(self, student: Signals, task: Task, batch: Batch) -> dict[int, Tensor]:
        """Return the logits `[m v]` of each exit for the valid rows, by block.

        Args:
            student: from `Distiller.student_signals`, with the activations of its exits.
        """
        return {layer: rows for layer, (_, rows) in self._outputs(student, task, batch).items()}

    def _outputs(self, student: Signals, task: Task, batch: Batch) -> dict[int, tuple[Tensor, Tensor]]:
        """Return the features `[m d]` and the task's rows of logits of each exit."""
        found = {}
        multi_label = isinstance(task, Classification) and task.is_multi_label(batch)
        for layer, head in self._heads.items():
            features, logits = head(self._rows(student, layer, task, batch))
            if multi_label:
                logits = torch.stack((logits, torch.zeros_like(logits)), -1).flatten(0, 1)
            found[layer] = features, logits
        return found

    def _rows(self, student: Signals, layer: int, task: Task, batch: Batch) -> Tensor:
        """Return the hidden states `[m d]` of the valid rows, or pooled ones."""
        x = in_full_precision(student.activations[self._read(layer)])
        if task.axis == "input":
            return _kept(task, rows_of(x, task, batch, whose="student"), batch)
        kept = ValidPositions(self._positions.keep(batch), None, batch_size(batch))
        what = f"hidden states of block {layer}"
        check_positions(kept.mask, x.shape[:2], examples=kept.examples, whose="student", what=what)
        return kept.pooled(x, self.pooling)

    def _read(self, layer: int) -> ActivationKey:
        return ActivationKey(HIDDEN, layer, self.side, self.stack)

    def __repr__(self) -> str:
        """Return the call that makes it, for logs and cards."""
        features = f", feature_weight={self.feature_weight:g}" if self.feature_weight else ""
        return (
            f"ExitMatch(exits {', '.join(map(str, self._heads or self.exits))}, alpha={self.alpha:g}, "
            f"temperature={self.temperature:g}{features}, pooling={self.pooling!r})"
        )


def _kept(task: Task, rows: Tensor, batch: Batch) -> Tensor:
    kept = kept_of(rows, task, batch)
    return rows if kept is None else rows.index_select(0, kept)


def _loss_on_labels(rows: Tensor, task: Task, batch: Batch) -> Tensor:
    """Return the cross-entropy summed over the labelled rows, a scalar; for multi-label heads the binary one."""
    target = task.targets(batch)
    if target is None:
        labels = batch["labels"].flatten().to(rows.dtype)
        return F.binary_cross_entropy_with_logits(rows[:, 0] - rows[:, 1], labels, reduction="sum")
    kept = task.kept_rows(batch)
    target = target if kept is None else target.index_select(0, kept)
    return F.cross_entropy(rows, target, ignore_index=-100, reduction="sum")
