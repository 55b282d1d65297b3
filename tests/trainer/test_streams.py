"""Datasets without a length: the last micro-batches of an epoch are dropped, with a warning, if too few for a step."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.utils.data import IterableDataset as TorchStream

from tests.heads import HEADS
from tests.trainer.tiny import as_stream, bert, examples, make, padded, update_difference, weights

LOGGER = "hf_distill.trainer.mixin"
ALPHA = 0.75


class Stream(TorchStream):
    """A torch stream without `__len__`."""

    def __init__(self, rows: list[dict[str, Any]]) -> None:
        self.rows = rows

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return iter(self.rows)


KINDS = {"datasets": as_stream, "torch": Stream}


def trained(folder: Any, data: Any, *, accumulation: int = 3, **changed: Any) -> tuple[Any, dict[str, torch.Tensor]]:
    student = bert().double()
    settings = {
        "alpha": ALPHA, "temperature": 3.0, "max_steps": 4, "logging_steps": 1, "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": accumulation, "train_dataset": data, **changed,
    }  # fmt: skip
    trainer = make(folder, student, bert(seed=1).double(), **settings)
    trainer.train()
    return trainer, weights(student)


def steps(trainer: Any) -> list[dict[str, float]]:
    return [entry for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("kind", KINDS)
def test_too_few_micro_batches_for_a_step_are_dropped(tmp_path, caplog, kind: str) -> None:
    """Eight examples, two at a time: a step of three micro-batches, and one left over, four times."""
    with caplog.at_level(logging.WARNING, LOGGER):
        stream, found = trained(tmp_path, KINDS[kind](examples(8)))
    messages = [record.getMessage() for record in caplog.records if "too few" in record.getMessage()]
    assert messages and all("last 1 micro-batches are too few for a step of 3" in text for text in messages)
    caplog.clear()
    with caplog.at_level(logging.WARNING, LOGGER):
        whole, expected = trained(tmp_path, examples(6), train_sampling_strategy="sequential")
    assert "too few" not in caplog.text
    assert update_difference(found, expected, weights(bert().double())) < 1e-6
    assert stream.state.global_step == whole.state.global_step == 4
    for ours, theirs in zip(steps(stream), steps(whole), strict=True):
        for name in ("loss", "loss/labels", "loss/logits"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-5)


@pytest.mark.parametrize(
    ("accumulation", "count"), [(2, 8), (2, 11), (3, 8), (3, 10), (3, 12), (4, 11), (4, 13)]
)  # fmt: skip
def test_the_loss_is_the_sum_of_its_terms_in_every_step(tmp_path, count: int, accumulation: int) -> None:
    trainer, _ = trained(tmp_path, Stream(examples(count)), accumulation=accumulation)
    assert len(steps(trainer)) == 4
    for entry in steps(trainer):
        blend = (1 - ALPHA) * entry["loss/labels"] + ALPHA * entry["loss/logits"]
        assert entry["loss"] == pytest.approx(blend, rel=1e-5)


@pytest.mark.parametrize("alpha", [0.0, 1.0])
@pytest.mark.parametrize("name", ["llama_causal_lm", "bert_tokens", "t5_seq2seq"])
def test_streams_with_heads_that_count_tokens(tmp_path, name: str, alpha: float) -> None:
    head = HEADS[name]
    found = []
    for data, sampling in (
        (Stream(head.examples(8)), {}),
        (head.examples(6), {"train_sampling_strategy": "sequential"}),
    ):
        student = head.make(0).double()
        trainer = make(
            tmp_path, student, head.make(1).double(), train_dataset=data, data_collator=head.collate, alpha=alpha,
            max_steps=3, logging_steps=1, per_device_train_batch_size=2, gradient_accumulation_steps=3, **sampling,
        )  # fmt: skip
        trainer.train()
        found.append((weights(student), [entry["loss"] for entry in steps(trainer)]))
    assert update_difference(found[0][0], found[1][0], weights(head.make(0).double())) < 1e-6
    assert found[0][1] == pytest.approx(found[1][1], rel=1e-5)


def test_a_stream_without_remainder_gives_no_warning(tmp_path, caplog) -> None:
    with caplog.at_level(logging.WARNING, LOGGER):
        trainer, _ = trained(tmp_path, Stream(examples(12)))
    assert "too few" not in caplog.text
    assert trainer.state.global_step == 4


def test_a_stream_too_short_for_one_step_ends(tmp_path, caplog) -> None:
    """Two micro-batches where a step needs three: no step is possible, and the loop must end."""
    with caplog.at_level(logging.WARNING, LOGGER):
        trainer, found = trained(tmp_path, Stream(examples(4)))
    assert "last 2 micro-batches are too few for a step of 3" in caplog.text
    assert trainer.state.global_step == 0
    assert all(torch.equal(value, weights(bert().double())[name]) for name, value in found.items())


@pytest.mark.parametrize("count", [5, 8, 11])
def test_a_dataset_with_a_length_drops_nothing(tmp_path, caplog, count: int) -> None:
    """The last micro-batches of an epoch form a smaller step."""
    seen = []

    def collate(features: Any) -> Any:
        seen.extend(tuple(feature["input_ids"]) for feature in features)
        return padded(features)

    with caplog.at_level(logging.WARNING, LOGGER):
        trained(tmp_path, examples(count), max_steps=-1, num_train_epochs=1, data_collator=collate)
    assert sorted(seen) == sorted(tuple(example["input_ids"]) for example in examples(count))
    assert "too few" not in caplog.text
