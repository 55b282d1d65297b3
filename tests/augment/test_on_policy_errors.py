"""OnPolicy rejects unsuitable trainings before any text is generated, with advice."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from accelerate.utils import DistributedType
from transformers import DataCollatorWithFlattening

from hf_distill import DataError, SettingError
from hf_distill.augment import OnPolicy
from hf_distill.trainer.checks import check_on_policy
from tests.heads import HEADS
from tests.teachers.cache.built import made
from tests.trainer.tiny import assert_same_bits, make, weights

LLAMA = HEADS["llama_causal_lm"]


def trainer_of(folder: Any, teacher: Any = None, *, student_share: float = 1.0, **settings: Any) -> Any:
    given = {"train_dataset": LLAMA.examples(8), "data_collator": LLAMA.collate, "max_steps": 1, **settings}
    view = OnPolicy(student_share=student_share, max_new_tokens=4)
    return make(folder, LLAMA.make(1), teacher or LLAMA.make(2), on_policy=view, alpha=1.0, **given)


@pytest.mark.parametrize("how", ["FSDP", "DeepSpeed", "tensor parallelism"])
def test_a_student_split_across_processes_raises_at_the_first_step(tmp_path, monkeypatch, how: str) -> None:
    """As marked by Accelerate, or by transformers for a model split by heads."""
    trainer = trainer_of(tmp_path)
    check_on_policy(trainer)  # unchanged, it is allowed
    trainer._on_policy_checked = None
    if how == "tensor parallelism":
        trainer.model._tp_size = 2
    else:
        monkeypatch.setattr(type(trainer.accelerator), "distributed_type", DistributedType[how.upper()])
    with pytest.raises(
        SettingError, match=rf"and with {how} no process holds all of it\. Use data parallelism \(DDP\)"
    ):
        trainer.get_batch_samples(iter([LLAMA.batch(2)]), 1, trainer.args.device)


def test_a_precomputed_teacher_raises(tmp_path) -> None:
    _, _, examples, cached = made(tmp_path / "cache", "llama_causal_lm")
    for student_share in (0.0, 1.0):
        with pytest.raises(SettingError, match=r"a cached teacher has no answers for them\. Use a model as teacher"):
            trainer_of(tmp_path, cached, student_share=student_share, train_dataset=examples)


def with_kinds(rows: list[dict[str, Any]]) -> dict[str, Any]:
    batch = LLAMA.collate(rows)
    return {**batch, "token_type_ids": torch.zeros_like(batch["input_ids"])}


@pytest.mark.parametrize(
    ("collator", "message"),
    [
        (DataCollatorWithFlattening(return_tensors="pt"), "packed into a row, which cannot be continued. Use a collat"),
        (with_kinds, "Leave the other columns out: they would not fit the new texts"),
    ],
)
def test_batches_that_cannot_be_continued_raise(tmp_path, collator: Any, message: str) -> None:
    """The training stops before its first step."""
    trainer = trainer_of(tmp_path, data_collator=collator, remove_unused_columns=False)
    before = weights(trainer.model)
    with pytest.raises(DataError, match=message):
        trainer.train()
    assert_same_bits(weights(trainer.model), before)
