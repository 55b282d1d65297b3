"""Columns of predictions with other tools' names: never dropped silently, and how to use them."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from datasets import Dataset

from hf_distill import SettingError, Teacher
from hf_distill.signals import Needs, Signals
from hf_distill.tasks import Batch, Task
from hf_distill.vocabulary import HeadAlignment
from tests.trainer.refusals import refused
from tests.trainer.tiny import bert, examples, make, padded, softened_kl

NAMES = ("teacher_logits", "logits", "logprobs", "teacher_logprobs", "top_logprobs", "soft_labels", "teacher_scores")
READ = ("teacher_input_ids", "teacher_labels", "teacher_attention_mask", "teacher_0_input_ids")


def with_column(name: str, value: Any = (0.5, 0.2, 0.3)) -> list[dict[str, Any]]:
    return [{**row, name: value if isinstance(value, str) else list(value)} for row in examples()]


def warnings_of(folder: Any, caplog: Any, data: Any, **given: Any) -> list[str]:
    with caplog.at_level(logging.WARNING):
        make(folder, bert(), given.pop("teacher", bert(seed=1)), train_dataset=data, **given)
    return [record.getMessage() for record in caplog.records if "is not read" in record.getMessage()]


@pytest.mark.parametrize("name", NAMES)
def test_a_column_of_predictions_gives_one_warning_with_advice(tmp_path, caplog, name: str) -> None:
    for data in (with_column(name), Dataset.from_list(with_column(name))):
        (message,) = warnings_of(tmp_path, caplog, data)
        assert message.startswith(f"The dataset has {name}, which is not read.")
        assert "a Teacher of your own" in message and "TeacherCache" in message and "docs/teachers.md" in message
        caplog.clear()


@pytest.mark.parametrize("name", [*READ, "note", "labels_text", "logits_note"])
def test_used_and_unrelated_columns_give_no_warning(tmp_path, caplog, name: str) -> None:
    assert warnings_of(tmp_path, caplog, with_column(name, (1, 2))) == []


def test_no_warning_without_a_teacher(tmp_path, caplog) -> None:
    assert warnings_of(tmp_path, caplog, with_column("teacher_logits"), teacher=None, alpha=0.0) == []


def test_answer_masks_for_another_head_give_a_warning(tmp_path, caplog) -> None:
    (message,) = warnings_of(tmp_path, caplog, with_column("assistant_masks", (0, 1)))
    assert message.startswith(
        "The dataset has assistant_masks, which is not read: it is read for causal language models"
    )


@pytest.mark.parametrize("name", ["teacher_logits", "soft_labels"])
def test_the_error_without_a_teacher_mentions_the_column(tmp_path, name: str) -> None:
    with refused(tmp_path, SettingError, "there is no teacher", name, "a Teacher of your own"):
        make(tmp_path, bert(), train_dataset=with_column(name))


class FromColumn(Teacher):
    """The example in docs/teachers.md: a teacher that returns the column `teacher_logits`."""

    inputs = ("logits",)

    def __init__(self) -> None:
        self.alignment = HeadAlignment()

    def __call__(self, task: Task, batch: Batch, needs: Needs) -> Signals:
        return Signals(batch["teacher_logits"], alignment=self.alignment)


@pytest.mark.parametrize("collator", [padded, None])
def test_the_suggested_teacher_works(tmp_path, caplog, collator: Any) -> None:
    """The column is kept, collated and compared, without a warning."""
    rows = [{"input_ids": [1, 2 + i, 3], "labels": i % 3, "teacher_logits": [1.0 * i, 0.5, -1.0]} for i in range(8)]
    data = Dataset.from_list(rows)
    settings = {"max_steps": 1, "learning_rate": 0.0, "logging_steps": 1, "per_device_train_batch_size": 8}
    student = bert()
    with caplog.at_level(logging.WARNING):
        trainer = make(
            tmp_path, student, FromColumn(), train_dataset=data, data_collator=collator, alpha=1.0, **settings
        )
        trainer.train()
    with torch.no_grad():
        ours = student.double().eval()(input_ids=torch.tensor([row["input_ids"] for row in rows])).logits
    expected = softened_kl(ours, torch.tensor([row["teacher_logits"] for row in rows]), 2.0).mean().item()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(expected, rel=1e-5)
    assert "not read" not in caplog.text
