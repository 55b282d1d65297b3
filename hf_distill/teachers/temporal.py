"""Temporal ensembling: the student's past predictions for each example, averaged over epochs, as its teacher."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor

from hf_distill.errors import DataError, SettingError, check_below_one
from hf_distill.functional.rows import in_full_precision
from hf_distill.signals import Needs, Signals, SparseRows
from hf_distill.tasks import Batch, Task
from hf_distill.tasks.base import batch_size, first_tensor
from hf_distill.tasks.infer import forward_names, main_input_of
from hf_distill.teachers.base import StudentBatch, Teacher, TeacherSetup
from hf_distill.teachers.cache.keys import content_keys, key_columns

if TYPE_CHECKING:
    from hf_distill.objectives import Objective

_LABELS = ("labels", "start_positions", "end_positions")


class TemporalEnsemble(Teacher):
    """The mean of the student's predictions for an example in earlier epochs, with more weight on later ones.

    Laine and Aila 2017 (section 2.2): for each example Z ← momentum · Z + (1 - momentum) · z, where z are the student's
    predictions in training (with dropout and augmentation), and the target is Z / (1 - momentum^t) after t updates.
    There is no second forward and no second model.

    An example that was not seen yet has no target: its rows are sparse rows without columns, for which the divergence
    is exactly 0. So the first epoch learns from labels only. The paper increases the weight of this term over many
    epochs: `alpha_schedule="linear"` from 0. Unlabelled examples take part.

    The paper compares probabilities by their squared difference; here any divergence of the KL family or total
    variation does, at a constant temperature. An example is identified by the student's inputs (with an augmentation
    with `student_only=True`, by the clean inputs), or by `key`. Duplicates share one memory and count twice.

    Args:
        momentum: in [0, 1); 0.6 in the paper.
        key: a column of whole numbers that identifies the example, for inputs that differ each time; None identifies
            examples by their inputs.

    Raises:
        SettingError: if momentum is out of range, the head has no classes, or the temperature changes.

    >>> from transformers import BertConfig, BertForSequenceClassification as Bert
    >>> from hf_distill import Distiller
    >>> shape = dict(vocab_size=9, hidden_size=4, num_hidden_layers=1, num_attention_heads=1)
    >>> _, student = torch.manual_seed(0), Bert(BertConfig(**shape, initializer_range=1.0)).train()
    >>> distiller = Distiller(student, TemporalEnsemble(momentum=0.6), temperature=1.0)
    >>> batch = {"input_ids": torch.tensor([[1, 2]]), "labels": torch.tensor([0])}
    >>> first, second = (distiller(student, batch).terms["logits"].item() for _ in range(2))
    >>> first, second > 0
    (0.0, True)
    """

    paper = "laine2017temporal"

    def __init__(self, *, momentum: float = 0.6, key: str | None = None) -> None:
        check_below_one("TemporalEnsemble: momentum", momentum)
        self.momentum = float(momentum)
        self.key = key
        self.inputs: tuple[str, ...] = () if key is None else (key,)
        self._main = "input_ids"
        self._processes = 1
        self._temperature: float | None = None
        self._memory: dict[bytes, tuple[Tensor, int]] = {}

    def __repr__(self) -> str:
        key = "" if self.key is None else f", key={self.key!r}"
        return f"TemporalEnsemble(momentum={self.momentum:g}{key})"

    @property
    def examples(self) -> int:
        """The number of remembered examples."""
        return len(self._memory)

    def bind(self, setup: TeacherSetup) -> None:
        """Forget all examples: the predictions of another student do not count."""
        student, task = setup.student, setup.task
        if not task.has_classes:
            raise SettingError(f"TemporalEnsemble needs a head for classes, not for {task}. Use MovingAverage.")
        if not setup.compares_predictions:
            raise SettingError("TemporalEnsemble: nothing compares predictions. Give alpha.")
        if self.key is None:
            self.inputs = tuple(name for name in forward_names(student) if name not in _LABELS)
        self._main = main_input_of(student)
        self._temperature, self._memory = None, {}

    def describe(self) -> str:
        return f"the student's own predictions for each example in earlier epochs (momentum {self.momentum:g})"

    def check(self, needs: Needs, objectives: Iterable[Objective] = ()) -> None:
        if needs.activations:
            raise SettingError("TemporalEnsemble remembers predictions only. Leave out objectives on activations.")

    def to(self, accelerator: Accelerator) -> None:
        self._processes = accelerator.num_processes

    def __call__(self, task: Task, batch: Batch, needs: Needs) -> Signals:
        keep = _rows_that_count(task, batch)
        b, r = keep.shape
        known = [self._memory.get(key) for key in self._keys(batch, keep)]
        if not torch.is_grad_enabled() and None in known:
            unknown = f"{known.count(None)} of {b} examples were never trained on"
            raise DataError(f"TemporalEnsemble: {unknown}. In evaluations leave out evaluate_with_teacher.")
        like = next((z for z, _ in filter(None, known)), torch.zeros(0, 1))
        v = like.shape[-1]
        log_p = torch.full((b, r, v), -torch.inf, dtype=like.dtype)
        for row, mask, memory in zip(log_p, keep, known, strict=True):
            if memory is not None:
                z, times = memory
                row[mask] = (z / (1 - self.momentum**times)).log()
        has_target = keep & torch.tensor([memory is not None for memory in known])[:, None]
        ids = torch.where(has_target[..., None], torch.arange(v), -1)
        tail = torch.zeros(b, r, dtype=like.dtype).masked_fill(has_target, -torch.inf)
        # A head with one row an example has no axis of rows; `select` of other tasks flattens that axis.
        one_row = task.select(log_p[..., :1], batch).dim() == 3
        ids, log_p, tail = (x[:, 0] if one_row else x for x in (ids, log_p, tail))
        device = first_tensor(batch).device
        temperature = self._temperature or needs.temperature
        return Signals(None, sparse=SparseRows(ids.to(device), log_p.to(device), tail.to(device), temperature))

    @torch.no_grad()
    def on_batch(self, batch: StudentBatch) -> None:
        """Remember the student's predictions.

        Raises:
            SettingError: if the temperature has changed.
        """
        if self._temperature not in (None, batch.temperature):
            new, old = batch.temperature, self._temperature
            raise SettingError(
                f"temperature={new:g}: TemporalEnsemble's targets were softened with {old:g}. Keep it constant."
            )
        self._temperature = batch.temperature
        task, inputs = batch.task, batch.batch
        keep = _rows_that_count(task, inputs)
        rows = task.select(in_full_precision(batch.student.predictions()), inputs)
        p = (rows / batch.temperature).softmax(-1).cpu().unflatten(0, keep.shape)
        # The key of each example and the probabilities `[m v]` of its rows, from every process.
        pairs = list(zip(self._keys(inputs, keep), (p[i, keep[i]] for i in range(len(keep))), strict=True))
        for gathered in [pairs] if self._processes == 1 else gather_object([pairs]):
            for key, z in gathered:
                before, times = self._memory.get(key, (torch.zeros_like(z), 0))
                self._memory[key] = before.lerp(z, 1 - self.momentum), times + 1

    def state_dict(self) -> dict[str, Tensor]:
        """Return each example's key, number of updates and number of rows, and the rows of all examples."""
        z, times = [z for z, _ in self._memory.values()], [times for _, times in self._memory.values()]
        keys = torch.tensor([list(key) for key in self._memory], dtype=torch.uint8)
        return {
            "keys": keys,
            "times": torch.tensor(times, dtype=torch.int64),
            "lengths": torch.tensor([len(rows) for rows in z], dtype=torch.int64),
            "rows": torch.cat(z) if z else torch.zeros(0, 1),
            "temperature": torch.tensor(self._temperature or 0.0, dtype=torch.float64),
        }

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Continue from a checkpoint; raise SettingError if it belongs to another kind of teacher."""
        if set(state) != set(self.state_dict()):
            names = ", ".join(sorted(state)[:3])
            raise SettingError(
                f"the checkpoint's teacher ({names}, ...) is no TemporalEnsemble. Resume with that teacher."
            )
        keys = [bytes(key.tolist()) for key in state["keys"]]
        rows = state["rows"].split(state["lengths"].tolist()) if keys else ()
        self._memory = dict(zip(keys, zip(rows, state["times"].tolist(), strict=True), strict=True))
        self._temperature = float(state["temperature"]) or None

    def _keys(self, batch: Batch, keep: Tensor) -> list[bytes]:
        """Return the key of each example: its identity and the number of its rows that count."""
        if self.key is None:
            columns = key_columns(batch, main=self._main, inputs=self.inputs, decodes=False)
            found = content_keys(batch, columns, main=self._main)
        elif isinstance(batch.get(self.key), Tensor):
            found = batch[self.key].detach().cpu().numpy().astype(np.int64)
        else:
            problem = f"the batch has no such column, only {sorted(batch)}"
            raise DataError(f"TemporalEnsemble(key={self.key!r}): {problem}. Keep this column in dataset and collator.")
        if len(found) != batch_size(batch) or len(found) != len(keep):
            raise DataError(f"TemporalEnsemble: {len(found)} keys for {len(keep)} examples. Give one for each.")
        counts = keep.sum(-1).numpy().astype(np.int64)
        return [row.tobytes() + count.tobytes() for row, count in zip(found, counts, strict=True)]


def _rows_that_count(task: Task, batch: Batch) -> Tensor:
    """Return which of the r rows of each example count, `[b r]` on the CPU."""
    b = batch_size(batch)
    keep = task.keep(batch)
    if keep is None:
        return torch.ones(b, task.rows(batch) // b, dtype=torch.bool)
    return keep.cpu().view(b, -1)
