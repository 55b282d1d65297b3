"""A batch is moved to the device once: student and teacher receive the same tensors where both use them.

Features are copied on the device for each model, as some models modify them.
"""

from __future__ import annotations

from typing import Any

import accelerate.data_loader
import pytest
import torch

from tests.heads import HEADS
from tests.teachers.reading import inputs_of
from tests.trainer.tiny import bert, make, padded

WAYS = [(name, None) for name in ("bert_tokens", "llama_causal_lm", "t5_seq2seq", "wav2vec2_ctc_mean")]
WAYS += [("llama_causal_lm", True), ("t5_seq2seq", True)]  # fused
Batch = dict[str, torch.Tensor]


@pytest.fixture
def moved(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Batch, bool]]:
    """Record batches as they reach the device, and whether by a non-blocking copy.

    They are copied, as from host to device: on a CPU, a move would return the same tensor.
    """
    arrived: list[tuple[Batch, bool]] = []

    def send(batch: Batch, device: Any, non_blocking: bool = False, **_: Any) -> Batch:
        arrived.append(({name: value.clone() for name, value in batch.items()}, non_blocking))
        return arrived[-1][0]

    monkeypatch.setattr(accelerate.data_loader, "send_to_device", send)
    return arrived


@pytest.mark.parametrize(("name", "fused"), WAYS)
def test_both_models_receive_the_moved_tensors(tmp_path, moved, name: str, fused: bool | None) -> None:
    head = HEADS[name]
    student, teacher = head.make(0), head.make(1)
    trainer = make(
        tmp_path, student, teacher, train_dataset=head.examples(8), data_collator=head.collate, max_steps=2,
        gradient_accumulation_steps=2, per_device_train_batch_size=2, fused_loss=fused,
    )  # fmt: skip
    ours, theirs = inputs_of(student), inputs_of(teacher)
    trainer.train()
    assert len(moved) == 4  # micro-batches; none is moved again for the teacher
    # With the fused loss, each model runs once more for the trial.
    for (batch, _), student_read, teacher_read in zip(moved, ours[-4:], theirs[-4:], strict=True):
        shared = [x for x in teacher_read if isinstance(teacher_read[x], torch.Tensor) and x in student_read]
        assert {x for x in batch if x != "labels"} <= set(shared)  # and decoder inputs made for both
        for x in shared:
            if student_read[x].is_floating_point():
                assert torch.equal(teacher_read[x], batch[x]) and torch.equal(student_read[x], batch[x]), x
                continue
            assert teacher_read[x] is student_read[x], x
            assert x not in batch or student_read[x] is batch[x], x


def test_teacher_columns_are_moved_with_the_batch(tmp_path, moved) -> None:
    def collate(features: list[dict[str, Any]]) -> Batch:
        batch = padded(features)
        return {**batch, "teacher_input_ids": batch["input_ids"].flip(0)}

    student, teacher = bert(), bert(seed=1)
    theirs = inputs_of(teacher)
    make(tmp_path, student, teacher, data_collator=collate).train()
    assert len(moved) == len(theirs) == 2
    for (batch, _), read in zip(moved, theirs, strict=True):
        assert read["input_ids"] is batch["teacher_input_ids"]


@pytest.mark.parametrize("asked", [True, False])
def test_pinned_memory_and_non_blocking_copies_follow_the_arguments(tmp_path, moved, asked: bool) -> None:
    head = HEADS["llama_causal_lm"]
    trainer = make(
        tmp_path, head.make(0), head.make(1), train_dataset=head.examples(4), data_collator=head.collate, max_steps=1,
        accelerator_config={"non_blocking": asked},
    )  # fmt: skip
    trainer.args.dataloader_pin_memory = asked  # use_cpu has disabled it
    assert trainer.get_train_dataloader().base_dataloader.pin_memory is asked
    trainer.train()
    assert [non_blocking for _, non_blocking in moved] == [asked]
