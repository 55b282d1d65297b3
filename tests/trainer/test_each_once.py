"""Duplicates are removed from the last batch, process by process. Real processes: `test_two_processes`."""

from __future__ import annotations

import logging
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate.data_loader import IterableDatasetShard

from hf_distill.trainer.evaluation import EachOnce, examples_counted
from tests.trainer.each_once import Stream


class TwoProcesses:
    """A stand-in for an Accelerator: gathers this process's values and those of the other process."""

    num_processes = 2

    def __init__(self, rank: int, *, remainder: int, last: bool = True) -> None:
        self.process_index = rank
        self.gradient_state = SimpleNamespace(end_of_dataloader=last, remainder=remainder)
        self.others: Any = None

    def gather(self, x: Any) -> Any:
        parts = [x, self.others] if self.process_index == 0 else [self.others, x]
        return torch.cat(parts)


def batch() -> dict[str, Any]:
    return {"input_ids": torch.tensor([[1, 2], [3, 4]]), "labels": torch.tensor([5, 6])}


@pytest.mark.parametrize(
    ("remainder", "kept"), [(1, (1, 2)), (2, (2, 2)), (3, (2, 1)), (0, (2, 2)), (-1, (2, 2))], ids=str
)
def test_duplicates_are_removed_from_the_last_batch(remainder: int, kept: tuple[int, int]) -> None:
    """Two processes with two examples each; a share of only duplicates is left unchanged, and not gathered."""
    for rank in (0, 1):
        shown = batch()
        EachOnce(TwoProcesses(rank, remainder=remainder), None, whole_batches=False).begin(shown)
        assert len(shown["input_ids"]) == len(shown["labels"]) == kept[rank]
        before = batch()
        EachOnce(TwoProcesses(rank, remainder=remainder, last=False), None, whole_batches=False).begin(before)
        assert len(before["labels"]) == 2


@pytest.mark.parametrize("whole_batches", [False, True])
def test_gathered_rows_exclude_duplicates(whole_batches: bool) -> None:
    """Three examples; the second process has one and a duplicate. Two rows per example."""
    accelerator = TwoProcesses(1, remainder=3)
    once = EachOnce(accelerator, None, whole_batches=whole_batches)
    once.begin(batch())
    once.loss_is_next()
    accelerator.others = torch.tensor([0.5])
    assert once(torch.full((2,), 9.0)).tolist() == [0.5, 0.5, 9.0] + [9.0] * whole_batches
    accelerator.others = torch.arange(4.0)[:, None]
    assert once(torch.tensor([[4.0], [5.0]])).flatten().tolist() == [0, 1, 2, 3, 4, 5]
    nested = once((torch.tensor([[4.0], [5.0]]),))
    assert isinstance(nested, tuple) and len(nested[0]) == 6


def test_a_batch_with_other_rows_than_examples_is_unchanged_with_a_warning(caplog) -> None:
    """Packed images: three patches for two examples."""
    once = EachOnce(TwoProcesses(1, remainder=3), None, whole_batches=False)
    shown = {**batch(), "patches": torch.zeros(3, 4)}
    with caplog.at_level(logging.WARNING, logger="hf_distill"):
        once.begin(shown)
        once.begin(shown)
    assert len(shown["labels"]) == 2
    [record] = caplog.records
    assert "1 of 2 examples fill it up" in record.getMessage() and "'patches'" in record.getMessage()


@pytest.mark.parametrize("workers", [0, 2])
def test_examples_of_a_sharded_stream_are_counted(caplog, workers: int) -> None:
    shard = IterableDatasetShard(Stream(list(range(5))), batch_size=2, num_processes=2)
    original = shard.dataset
    loader = SimpleNamespace(dataset=shard, num_workers=workers)
    with caplog.at_level(logging.WARNING, logger="hf_distill"), examples_counted(loader) as counted:
        assert len(list(shard)) == 4  # filled up to two batches of two
    assert shard.dataset is original
    assert (counted is None) == (workers > 0) and len(caplog.records) == (workers > 0)
    if counted is not None:
        assert counted.seen == 5
    else:
        assert "dataloader_num_workers=0" in caplog.text


def test_other_loaders_need_no_count() -> None:
    with examples_counted(SimpleNamespace(dataset=[1, 2])) as counted:
        assert counted is None
