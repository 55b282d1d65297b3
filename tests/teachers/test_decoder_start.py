"""A seq2seq teacher starts with its own start token, not with the student's.

The expected value comes from each model's own forward of the labels, in float64.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor

from hf_distill import Distiller, Ensemble, Seq2SeqDistillationArguments, Seq2SeqDistillationTrainer
from hf_distill.signals import Needs
from hf_distill.teachers.cache import CachedTeacher, Dense, TeacherCache
from tests.heads import HEADS
from tests.trainer.tiny import QUIET, arguments, make, softened_kl

# The head, and the start token of its teacher; the student keeps the head's start token.
STARTS = {"t5_seq2seq": 3, "bart_seq2seq": 1, "marian_seq2seq": 3, "whisper_seq2seq": 4}


def pair(name: str) -> tuple[Any, Any]:
    head = HEADS[name]
    student, teacher = head.make(1), head.make(2, decoder_start_token_id=STARTS[name])
    assert student.config.decoder_start_token_id != teacher.config.decoder_start_token_id
    return student, teacher


def from_own_start(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """Return `[n v]` in float64: the model's own forward of the labels."""
    with torch.no_grad():
        logits = model.double().eval()(
            **{k: v.double() if v.is_floating_point() else v for k, v in batch.items()}
        ).logits  # fmt: skip
    model.float()
    return logits[batch["labels"] != -100]


def right(student: Any, teacher: Any, batch: dict[str, Tensor]) -> float:
    return float(softened_kl(from_own_start(student, batch), from_own_start(teacher, batch), 2.0).mean())


@pytest.mark.parametrize("fused", [False, True], ids=["whole logits", "fused"])
@pytest.mark.parametrize("name", STARTS)
def test_a_live_teacher_uses_its_own_start_token(name: str, fused: bool, caplog) -> None:
    student, teacher = pair(name)
    batch = HEADS[name].batch(4)
    expected = right(student, teacher, batch)
    with caplog.at_level(logging.INFO, "hf_distill.teachers.model"):
        distiller = Distiller(student, teacher, alpha=1.0, temperature=2.0, fused_loss=fused)
    assert f"the teacher [{STARTS[name]}, 5, 6]" in caplog.text
    assert distiller(student.eval(), batch).loss.item() == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("of_student", [True, False], ids=["student given", "teacher alone"])
@pytest.mark.parametrize("name", STARTS)
def test_a_cached_teacher_uses_its_own_start_token(tmp_path: Path, name: str, of_student: bool) -> None:
    student, teacher = pair(name)
    head = HEADS[name]
    expected = right(student, teacher, head.batch(4))
    given = {"student": student} if of_student else {}
    cache = TeacherCache.build(
        teacher, head.examples(4), tmp_path, data_collator=head.collate, store=Dense(), progress=False, **given
    )
    distiller = Distiller(student.eval(), CachedTeacher(cache), alpha=1.0, temperature=2.0)
    assert distiller(student, head.batch(4)).loss.item() == pytest.approx(expected, rel=2e-3)


def test_ensemble_members_with_different_start_tokens() -> None:
    head = HEADS["t5_seq2seq"]
    student = head.make(1)
    members = [head.make(2, decoder_start_token_id=start) for start in (0, 3)]
    batch = head.batch(4)
    theirs = torch.stack([(from_own_start(one, batch) / 2).softmax(-1) for one in members]).mean(0).log() * 2
    expected = float(softened_kl(from_own_start(student, batch), theirs, 2.0).mean())
    distiller = Distiller(student.eval(), Ensemble(members), alpha=1.0, temperature=2.0)
    assert distiller(student, batch).loss.item() == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("trainer", ["plain", "seq2seq"])
@pytest.mark.parametrize("from_collator", [False, True], ids=["labels", "decoder inputs of the collator"])
def test_start_tokens_in_training_and_evaluation(tmp_path, trainer: str, from_collator: bool) -> None:
    """`DataCollatorForSeq2Seq(model=student)` makes decoder inputs with the student's rule."""
    head = HEADS["t5_seq2seq"]
    student, teacher = pair("t5_seq2seq")
    expected = right(student, teacher, head.batch(8))

    def collate(features: list[Any]) -> dict[str, Tensor]:
        batch = head.collate(features)
        made = {"decoder_input_ids": student.prepare_decoder_input_ids_from_labels(batch["labels"])}
        return {**batch, **made} if from_collator else batch

    settings = {
        "alpha": 1.0, "temperature": 2.0, "max_steps": 1, "learning_rate": 0.0, "per_device_train_batch_size": 8,
        "per_device_eval_batch_size": 8, "logging_steps": 1, "evaluate_with_teacher": True,
    }  # fmt: skip
    data = {"train_dataset": head.examples(8), "eval_dataset": head.examples(8), "data_collator": collate}
    if trainer == "plain":
        made = make(tmp_path, student, teacher, **data, **settings)
    else:
        args = arguments(tmp_path, Seq2SeqDistillationArguments, **{**QUIET, **settings})
        made = Seq2SeqDistillationTrainer(model=student, teacher_model=teacher, args=args, **data)
    made.train()
    assert made.state.log_history[0]["loss"] == pytest.approx(expected, rel=1e-4)
    assert made.evaluate()["eval_divergence"] == pytest.approx(expected, rel=1e-4)


def seen(student: Any, teacher: Any, batch: dict[str, Tensor]) -> list[list[int]]:
    """Return the decoder inputs of the teacher."""
    read: list[Any] = []
    handle = teacher.register_forward_pre_hook(lambda _, __, inputs: read.append(inputs), with_kwargs=True)
    distiller = Distiller(student, teacher, alpha=1.0)
    distiller.teacher_signals(distiller.prepare(batch), Needs(logits=True))
    handle.remove()
    return read[0]["decoder_input_ids"].tolist()


def test_a_decoder_prompt_of_the_collator_is_shared_unchanged() -> None:
    """Whisper's: <|startofprev|>, a prompt, <|startoftranscript|> and so on; its labels are ignored up to the text."""
    student, teacher = pair("whisper_seq2seq")
    batch = HEADS["whisper_seq2seq"].batch(2)
    prompted = torch.tensor([[9, 5, 6, 1, 20, 21, 22], [1, 20, 21, 22, 23, 0, 0]])
    batch["decoder_input_ids"] = prompted
    batch["labels"] = torch.tensor([[-100, -100, -100, 20, 21, 22, 2], [20, 21, 22, 23, 2, -100, -100]])
    expected = [prompted[0].tolist(), [4, 20, 21, 22, 23, 2, 0]]  # the second follows the student's rule up to its end
    assert seen(student, teacher, batch) == expected


def test_without_labels_the_teachers_start_token_is_used() -> None:
    student, teacher = pair("bart_seq2seq")  # start tokens 2 and 1
    batch = HEADS["bart_seq2seq"].batch(2)
    del batch["labels"]
    batch["decoder_input_ids"] = torch.tensor([[2, 7, 8], [9, 2, 8]])
    assert seen(student, teacher, batch) == [[1, 7, 8], [9, 2, 8]]


def test_teacher_decoder_inputs_are_used_unchanged() -> None:
    student, teacher = pair("bart_seq2seq")
    batch = HEADS["bart_seq2seq"].batch(2)
    batch["teacher_input_ids"], batch["teacher_decoder_input_ids"] = batch["input_ids"], batch["labels"].clamp(min=2)
    assert seen(student, teacher, batch) == batch["labels"].clamp(min=2).tolist()


def test_a_teacher_without_its_own_rule_gets_the_students_inputs() -> None:
    student, teacher = HEADS["t5_seq2seq"].make(1, decoder_start_token_id=3), HEADS["t5_seq2seq"].make(2)
    teacher.config.decoder_start_token_id = None
    assert [row[0] for row in seen(student, teacher, HEADS["t5_seq2seq"].batch(2))] == [3, 3]


def test_mbart_moves_the_last_token_to_the_front() -> None:
    """mBART starts with the language token at the end of the labels."""
    shape = {**HEADS["bart_seq2seq"].settings, "decoder_start_token_id": None}
    torch.manual_seed(0)
    teacher = hf.MBartForConditionalGeneration(hf.MBartConfig(**shape))
    student = HEADS["bart_seq2seq"].make(1)
    batch = HEADS["bart_seq2seq"].batch(2)
    batch["labels"] = torch.tensor([[5, 6, 2, 30], [7, 2, 31, -100]])
    assert seen(student, teacher, batch) == [[30, 5, 6, 2], [31, 7, 2, 31]]
