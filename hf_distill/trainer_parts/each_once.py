"""Evaluation in several processes counts each example once, as in one process.

Accelerate fills up the last batches with examples of the first. `Trainer` then cuts what it has gathered, but the loss
of a batch is the mean over its fillers too; `Seq2SeqTrainer` cuts nothing.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, MutableMapping
from typing import Any

import torch
from accelerate.data_loader import IterableDatasetShard
from accelerate.utils import recursively_apply
from torch import Tensor
from torch.utils.data import IterableDataset

from hf_distill.tasks.base import batch_size

logger = logging.getLogger(__name__)


class EachOnce:
    """Stands in for `Trainer.gather_function`: gathers what was found for the examples that are no fillers.

    A process's share of the last batch may be all fillers; it is computed, as the other processes wait for its part of
    each collective operation, and left out.

    Args:
        counted: counts the examples, where Accelerate does not know how many there are.
        whole_batches: each batch's loss counts as one of a whole batch, as with `Seq2SeqTrainer` in one process, rather
            than once an example.
    """

    def __init__(self, accelerator: Any, counted: Counted | None, *, whole_batches: bool) -> None:
        self._accelerator = accelerator
        self._whole_batches = whole_batches
        self._counted = counted
        self._examples = 0  # in this process's part of the batch, fillers included
        self._real: list[int] = []  # of each process, without fillers
        self._computed = 0  # the examples whose values are gathered
        self._loss_is_next = False
        self._warned = False

    def begin(self, batch: Any) -> None:
        """Take the fillers out of this process's part of a batch, in place."""
        self._examples = self._computed = batch_size(batch)
        processes, real = self._accelerator.num_processes, self._real_examples()
        starts = range(0, processes * self._examples, self._examples)
        self._real = [self._examples if real is None else min(max(0, real - s), self._examples) for s in starts]
        kept = self._real[self._accelerator.process_index]
        if not 0 < kept < self._examples:
            return
        tensors = {name: x for name, x in batch.items() if isinstance(x, Tensor) and x.dim() > 0}
        if isinstance(batch, MutableMapping) and all(x.shape[0] == self._examples for x in tensors.values()):
            batch.update({name: x[:kept] for name, x in tensors.items()})
            self._computed = kept
        elif not self._warned:
            self._warned = True
            logger.warning(
                f"In the last batch of the evaluation {self._examples - kept} of {self._examples} examples fill it up. "
                f"They cannot be taken out of {sorted(batch)}, so they are part of the mean loss of that batch."
            )

    def _real_examples(self) -> int | None:
        """How many examples of this step, over all processes, are no fillers; None: all of them."""
        state = self._accelerator.gradient_state
        if not state.end_of_dataloader:
            return None
        whole = self._examples * self._accelerator.num_processes
        remainder = state.remainder if self._counted is None else self._counted.seen % whole
        return remainder if remainder > 0 else None

    def loss_is_next(self) -> None:
        """The next tensor is the loss of the batch, once for each example of a whole batch."""
        self._loss_is_next = True

    def __call__(self, found: Any) -> Any:
        """Gather over the processes, without fillers; nested as `Accelerator.gather_for_metrics` takes it."""
        if not self._real:  # a prediction step that does not call ours
            return self._accelerator.gather_for_metrics(found)
        if self._loss_is_next:
            self._loss_is_next = False
            return self._losses(found)
        if all(real == self._examples for real in self._real):
            return self._accelerator.gather(found)
        return recursively_apply(self._rows, found)

    def _losses(self, losses: Tensor) -> Tensor:
        of_processes = self._accelerator.gather(losses[:1])
        times = [len(losses) * (real > 0) if self._whole_batches else real for real in self._real]
        return of_processes.repeat_interleave(torch.tensor(times, device=of_processes.device))

    def _rows(self, x: Tensor) -> Tensor:
        """Of a tensor with as many rows for each example."""
        if x.dim() == 0 or x.shape[0] == 0 or x.shape[0] % self._computed:
            return self._accelerator.gather(x)
        each = x.shape[0] // self._computed
        filled = x.new_zeros((each * self._examples, *x.shape[1:]))
        filled[: x.shape[0]] = x
        parts = self._accelerator.gather(filled).split(each * self._examples)
        return torch.cat([part[: each * real] for part, real in zip(parts, self._real, strict=True)])


class Counted(IterableDataset):
    """Counts the examples of a dataset while they are read."""

    def __init__(self, dataset: Any) -> None:
        self._dataset = dataset
        self.seen = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._dataset, name)

    def __len__(self) -> int:
        return len(self._dataset)

    def __iter__(self) -> Iterator[Any]:
        self.seen = 0
        for example in self._dataset:
            self.seen += 1
            yield example


@contextlib.contextmanager
def examples_counted(dataloader: Any) -> Iterator[Counted | None]:
    """Count the examples of a dataset that every process reads for itself (`dispatch_batches=False`).

    Accelerate knows how many fill up its last batch only if one process reads it for all; None then.
    """
    shard = getattr(dataloader, "dataset", None)
    if not isinstance(shard, IterableDatasetShard):
        yield None
        return
    if dataloader.num_workers > 0:
        logger.warning(
            "This dataset has no length and is read by worker processes, so how many examples fill up the last batches "
            "of the evaluation is not known: they are counted. Set dataloader_num_workers=0, or leave "
            "dispatch_batches to its default."
        )
        yield None
        return
    original, shard.dataset = shard.dataset, Counted(shard.dataset)
    try:
        yield shard.dataset
    finally:
        shard.dataset = original
