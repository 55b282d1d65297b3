"""What the student has said of each example so far, averaged over the epochs, as its teacher: temporal ensembling."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor

from hf_distill.errors import DataError, SettingError
from hf_distill.functional.rows import in_full_precision
from hf_distill.signals import Needs, Signals, SparseRows
from hf_distill.tasks import Batch, Task
from hf_distill.tasks.base import batch_size, first_tensor
from hf_distill.tasks.infer import forward_names, unwrapped
from hf_distill.teachers.base import StudentBatch, Teacher, TeacherSetup
from hf_distill.teachers.cache.keys import content_keys, key_columns

if TYPE_CHECKING:
    from hf_distill.objectives import Objective

_LABELS = ("labels", "start_positions", "end_positions")
Heard = tuple[list[bytes], list[Tensor]]  # the keys of examples, and the probabilities `[m v]` of the rows of each


class TemporalEnsemble(Teacher):
    """The mean of what the student said of an example in earlier epochs, later ones weighing more.

    Laine and Aila 2017 (section 2.2): of each example Z ← momentum · Z + (1 - momentum) · z with z the student's own
    predictions in training (dropout and augmentation included), and the target is Z / (1 - momentum^t) after t of them.
    No second forward, and no model beside the student.

    An example that was not seen yet has no target: of its rows nothing is listed, all columns together have probability
    1, and the divergence is exactly 0. So the first epoch learns from labels alone. The paper ramps the weight of this
    term up over many epochs: `alpha_schedule="linear"` from 0. Examples without a label take part.

    Where this differs: the paper compares probabilities by their squared difference; here a divergence of distributions
    does (any of the KL family, or total variation), at one temperature throughout. An example is known by the content
    that the student is shown (of an augmentation with `student_only=True`, by the clean one), or by `key`; one that is
    there twice is remembered as one and counts twice.

    Args:
        momentum: in [0, 1); 0.6 in the paper.
        key: a column of whole numbers, one an example, that says which example this is, for inputs that are never the
            same twice; None: by content.

    Raises:
        SettingError: a momentum that cannot be; a head that is not for classes; a temperature that moves.

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
        if isinstance(momentum, bool) or not isinstance(momentum, (int, float)) or not 0 <= momentum < 1:
            raise SettingError(f"TemporalEnsemble: momentum={momentum!r}: must lie in [0, 1).")
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
        """How many it remembers."""
        return len(self._memory)

    def bind(self, setup: TeacherSetup) -> None:
        """Start anew: nothing is remembered of another student."""
        student, task = setup.student, setup.task
        if not task.has_classes:
            raise SettingError(
                "TemporalEnsemble remembers predictions of classification, multiple_choice and token_classification; "
                f"this student's head is for {task}, whose predictions are no classes or too many to keep. Use "
                "MovingAverage."
            )
        if not setup.compares_predictions:
            raise SettingError(
                "TemporalEnsemble: nothing compares predictions, which is all that it knows. Give alpha."
            )
        if self.key is None:
            self.inputs = tuple(name for name in forward_names(student) if name not in _LABELS)
        self._main = getattr(unwrapped(student), "main_input_name", "input_ids")
        self._temperature, self._memory = None, {}

    def describe(self) -> str:
        return f"what the student itself said of each example in earlier epochs (momentum {self.momentum:g})"

    def check(self, needs: Needs, objectives: Iterable[Objective] = ()) -> None:
        if needs.activations:
            raise SettingError("TemporalEnsemble remembers predictions alone. Leave the objectives on the inside out.")

    def to(self, accelerator: Accelerator) -> None:
        self._processes = accelerator.num_processes

    def __call__(self, task: Task, batch: Batch, needs: Needs) -> Signals:
        keep = _kept(task, batch)
        b, r = keep.shape
        known = [self._memory.get(key) for key in self._keys(batch, keep)]
        if not torch.is_grad_enabled() and None in known:
            raise DataError(
                f"TemporalEnsemble: {known.count(None)} of {b} examples were never trained on, so it knows nothing of "
                "them. It cannot be asked in an evaluation: leave evaluate_with_teacher out."
            )
        like = next((z for z, _ in filter(None, known)), torch.zeros(0, 1))
        v = like.shape[-1]
        log_p = torch.full((b, r, v), -torch.inf, dtype=like.dtype)
        for row, mask, one in zip(log_p, keep, known, strict=True):
            if one is not None:
                row[mask] = (one[0] / (1 - self.momentum ** one[1])).log()
        listed = keep & torch.tensor([one is not None for one in known])[:, None]
        ids = torch.where(listed[..., None], torch.arange(v), -1)
        tail = torch.zeros(b, r, dtype=like.dtype).masked_fill(listed, -torch.inf)
        # A head with one row an example has no axis for it; a task that has one flattens it.
        one_row = task.select(log_p[..., :1], batch).dim() == 3
        ids, log_p, tail = (x[:, 0] if one_row else x for x in (ids, log_p, tail))
        device = first_tensor(batch).device
        temperature = self._temperature or needs.temperature
        return Signals(None, sparse=SparseRows(ids.to(device), log_p.to(device), tail.to(device), temperature))

    @torch.no_grad()
    def on_batch(self, batch: StudentBatch) -> None:
        """Remember the student's predictions.

        Raises:
            SettingError: the temperature has moved.
        """
        if self._temperature not in (None, batch.temperature):
            raise SettingError(
                f"temperature={batch.temperature:g}: what TemporalEnsemble remembers was softened with "
                f"{self._temperature:g}. Keep the temperature constant."
            )
        self._temperature = batch.temperature
        task, inputs = batch.task, batch.batch
        keep = _kept(task, inputs)
        rows = task.select(in_full_precision(batch.student.predictions()), inputs)
        said = (rows / batch.temperature).softmax(-1).cpu().unflatten(0, keep.shape)
        heard: Heard = self._keys(inputs, keep), [of_one[mask] for of_one, mask in zip(said, keep, strict=True)]
        for keys, examples in [heard] if self._processes == 1 else gather_object([heard]):
            for key, z in zip(keys, examples, strict=True):
                before, times = self._memory.get(key, (torch.zeros_like(z), 0))
                self._memory[key] = before.lerp(z, 1 - self.momentum), times + 1

    def state_dict(self) -> dict[str, Tensor]:
        """Keys, how often each was heard, how many rows it has, and all rows."""
        z, times = [z for z, _ in self._memory.values()], [times for _, times in self._memory.values()]
        keys = torch.tensor([list(key) for key in self._memory], dtype=torch.uint8)
        return {
            "keys": keys,
            "times": torch.tensor(times, dtype=torch.int64),
            "lengths": torch.tensor([len(one) for one in z], dtype=torch.int64),
            "rows": torch.cat(z) if z else torch.zeros(0, 1),
            "temperature": torch.tensor(self._temperature or 0.0, dtype=torch.float64),
        }

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Raises SettingError: of another kind of teacher."""
        if set(state) != set(self.state_dict()):
            raise SettingError(
                f"the checkpoint's teacher ({', '.join(sorted(state)[:3])}, ...) is no TemporalEnsemble. Resume with "
                "the teacher of that run."
            )
        keys = [bytes(key.tolist()) for key in state["keys"]]
        rows = state["rows"].split(state["lengths"].tolist()) if keys else ()
        self._memory = dict(zip(keys, zip(rows, state["times"].tolist(), strict=True), strict=True))
        self._temperature = float(state["temperature"]) or None

    def _keys(self, batch: Batch, keep: Tensor) -> list[bytes]:
        """Of each example, with how many rows count: where that differs, it is another example."""
        if self.key is None:
            columns = key_columns(batch, main=self._main, inputs=self.inputs, decodes=False)
            found = content_keys(batch, columns, main=self._main)
        elif isinstance(batch.get(self.key), Tensor):
            found = batch[self.key].detach().cpu().numpy().astype(np.int64)
        else:
            raise DataError(
                f"TemporalEnsemble(key={self.key!r}): the batch has no such column, only {sorted(batch)}. Give the "
                "dataset a column of whole numbers of that name, and keep it in the collator."
            )
        if len(found) != batch_size(batch) or len(found) != len(keep):
            raise DataError(
                f"TemporalEnsemble: {len(found)} keys for {len(keep)} examples: give one whole number each."
            )
        counts = keep.sum(-1).numpy().astype(np.int64)
        return [row.tobytes() + count.tobytes() for row, count in zip(found, counts, strict=True)]


def _kept(task: Task, batch: Batch) -> Tensor:
    """`[b r]` on the CPU: which of the r rows of each example count."""
    b = batch_size(batch)
    keep = task.keep(batch)
    if keep is None:
        return torch.ones(b, task.rows(batch) // b, dtype=torch.bool)
    return keep.cpu().view(b, -1)
