"""Documents packed into one row (`DataCollatorWithFlattening`) in the trainer: no document sees another one."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from transformers import DataCollatorWithFlattening

from tests.heads import HEADS
from tests.trainer.tiny import make, softened_kl

T = 3.0


def one_by_one(student: Any, teacher: Any, examples: list[dict[str, Any]]) -> float:
    """The mean over every token that counts, of each document alone: no padding and no packing."""
    found = []
    for example in examples:
        ids = torch.tensor([example["input_ids"]])
        counted = torch.tensor(example["labels"])[1:] != -100
        with torch.no_grad():
            ours, theirs = (model(input_ids=ids).logits[0, :-1][counted] for model in (student, teacher))
        found.append(softened_kl(ours, theirs, T))
    return torch.cat(found).mean().item()


@pytest.mark.parametrize("cut", [(6, 1), (2, 3)], ids=str)
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("name", ["gpt2_causal_lm", "llama_causal_lm"])
def test_a_packed_step_is_its_documents(tmp_path, name: str, attention: str, cut: tuple[int, int]) -> None:
    student, other = (HEADS[name].make(seed, attn_implementation=attention) for seed in (1, 2))
    for teacher in (copy.deepcopy(student), other):
        expected = one_by_one(student, teacher, HEADS[name].examples(6))
        trainer = make(
            tmp_path, copy.deepcopy(student), teacher, train_dataset=HEADS[name].examples(6),
            data_collator=DataCollatorWithFlattening(return_tensors="pt"), remove_unused_columns=False, alpha=1.0,
            temperature=T, max_steps=1, logging_steps=1, per_device_train_batch_size=cut[0],
            gradient_accumulation_steps=cut[1],
        )  # fmt: skip
        trainer.train()
        assert trainer.state.log_history[0]["loss/logits"] == pytest.approx(expected, rel=1e-4, abs=1e-6)
    assert expected > 0.01
