"""Rows are compared position by position: packed documents stay separate, and rows of another shape raise."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from peft import PromptTuningConfig, get_peft_model
from transformers import DataCollatorWithFlattening

from hf_distill import (
    AttentionMatch,
    CosineEmbedding,
    DataError,
    Distiller,
    HiddenMatch,
    RelationMatch,
    SimilarityMatch,
    TeacherError,
)
from tests.heads import HEADS
from tests.laws import measuring as m
from tests.trainer.tiny import softened_kl

CAUSAL = ("gpt2_causal_lm", "llama_causal_lm")
ATTENTION = ("eager", "sdpa")
T = 3.0


def packed(name: str, examples: Any = None) -> dict[str, Any]:
    """Return all documents in one row, packed as by transformers."""
    examples = HEADS[name].examples(6) if examples is None else examples
    return DataCollatorWithFlattening(return_tensors="pt")(copy.deepcopy(examples))


def one_by_one(name: str, student: Any, teacher: Any) -> float:
    """Return the mean over valid tokens of each document alone, without padding and packing."""
    found = []
    for example in HEADS[name].examples(6):
        ids = torch.tensor([example["input_ids"]])
        counted = torch.tensor(example["labels"])[1:] != -100
        with torch.no_grad():
            ours, theirs = (model(input_ids=ids).logits[0, :-1][counted] for model in (student, teacher))
        found.append(softened_kl(ours, theirs, T))
    return torch.cat(found).mean().item()


# Packed documents.


@pytest.mark.parametrize("attention", ATTENTION)
@pytest.mark.parametrize("name", CAUSAL)
def test_equal_models_have_zero_loss_on_a_packed_batch(name: str, attention: str) -> None:
    student = HEADS[name].make(1, attn_implementation=attention).double()
    distiller = Distiller(student, copy.deepcopy(student), alpha=1.0)
    batch = packed(name)
    assert batch["input_ids"].shape[0] == 1 and "attention_mask" not in batch  # the batch is really packed
    found = distiller(student, batch)
    found.loss.backward()
    assert abs(found.loss.item()) < 1e-9
    assert m.gradient_of(student).norm() < 1e-7


@pytest.mark.parametrize("attention", ATTENTION)
@pytest.mark.parametrize("name", CAUSAL)
def test_a_packed_batch_equals_its_documents(name: str, attention: str) -> None:
    student, teacher = (HEADS[name].make(seed, attn_implementation=attention).double().eval() for seed in (1, 2))
    expected = one_by_one(name, student, teacher)
    distiller = Distiller(student, teacher, alpha=1.0, temperature=T)
    for batch in (packed(name), HEADS[name].batch(6)):
        assert distiller(student, batch).terms["logits"].item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("name", CAUSAL)
def test_packing_works_with_any_use_cache(name: str, use_cache: bool) -> None:
    student, teacher = HEADS[name].make(1, use_cache=use_cache), HEADS[name].make(2, use_cache=not use_cache)
    expected = one_by_one(name, student, teacher)
    distiller = Distiller(student, teacher, alpha=1.0, temperature=T)
    assert distiller(student, packed(name)).terms["logits"].item() == pytest.approx(expected, rel=1e-4)
    assert (student.config.use_cache, teacher.config.use_cache) == (use_cache, not use_cache)  # configs are unchanged


def test_packing_without_positions_changes_the_loss() -> None:
    """Otherwise the tests above could not fail: without positions the documents attend to each other."""
    name = "llama_causal_lm"
    student, teacher = HEADS[name].make(1), HEADS[name].make(2)
    batch = packed(name)
    distiller = Distiller(student, teacher, alpha=1.0, temperature=T)
    apart = distiller(student, batch).terms["logits"].item()
    batch.pop("position_ids")
    assert distiller(student, batch).terms["logits"].item() != pytest.approx(apart, rel=1e-3)


@pytest.mark.parametrize("objective", [HiddenMatch, CosineEmbedding, AttentionMatch, RelationMatch])
@pytest.mark.parametrize("name", CAUSAL)
def test_activations_of_a_packed_batch_equal_those_of_its_documents(name: str, objective: Any) -> None:
    """Compared with a padded batch. RelationMatch must exclude pairs from different documents."""
    student, teacher = (HEADS[name].make(seed).double() for seed in (1, 2))
    distiller = Distiller(student, teacher, alpha=None, objectives=objective())
    found, apart = (distiller(student, batch).loss.item() for batch in (packed(name), HEADS[name].batch(6)))
    assert found == pytest.approx(apart, rel=1e-6)


def test_objectives_on_whole_examples_reject_packing() -> None:
    name = "llama_causal_lm"
    student, teacher = (HEADS[name].make(seed) for seed in (1, 2))
    for objective, what in (
        (SimilarityMatch(), "SimilarityMatch"),
        (HiddenMatch(pooling="first"), "pooling='first'"),
        (HiddenMatch(pooling="last"), "pooling='last'"),
    ):
        distiller = Distiller(student, teacher, alpha=None, objectives=objective)
        with pytest.raises(
            DataError, match=f"{what} needs an example a row, .* Leave packing out, or use HiddenMatch or"
        ):
            distiller(student, packed(name))
        assert distiller(student, HEADS[name].batch(2)).loss > 0


# Masks of student and teacher.


def test_a_position_counts_if_both_models_attend_to_it() -> None:
    """The teacher attends to at most three tokens; other positions are not compared."""
    head = HEADS["bert_tokens"]
    student, teacher, batch = head.make(0), head.make(1), head.batch(4)
    shorter = batch["attention_mask"].clone()
    shorter[:, 3:] = 0
    assert shorter.sum() < batch["attention_mask"].sum()
    given = {**batch, "teacher_input_ids": batch["input_ids"], "teacher_attention_mask": shorter}
    with torch.no_grad():
        ours = student.bert(batch["input_ids"], batch["attention_mask"]).last_hidden_state
        theirs = teacher.bert(batch["input_ids"], shorter).last_hidden_state
    expected = (ours - theirs)[shorter.bool()].square().mean().item()
    found = Distiller(student, teacher, alpha=None, objectives=HiddenMatch(projection="none"))(student, given)
    assert found.loss.item() == pytest.approx(expected, rel=1e-5)


# Rows of another shape.


def refused(student: Any, teacher: Any, batch: dict[str, Any], *words: str) -> None:
    distiller = Distiller(student, teacher, alpha=1.0)
    with pytest.raises(TeacherError) as raised:
        distiller(student, batch)
    for word in (*words, "They must predict at the same positions"):
        assert word in str(raised.value), (word, str(raised.value))


@pytest.mark.parametrize("name", ["wav2vec2_ctc_mean", "hubert_ctc_sum"])
@pytest.mark.parametrize("slower", ["student", "teacher"])
def test_ctc_models_with_different_frame_rates_raise(name: str, slower: str) -> None:
    head = HEADS[name]
    models = {"student": head.make(0), "teacher": head.make(1)}
    models[slower] = head.make(2, conv_stride=(4, 2))
    refused(models["student"], models["teacher"], head.batch(4), "rows of ctc", "the same frame rate (CTC)")


@pytest.mark.parametrize("name", ["bert_tokens", "bert_masked_lm", "gpt2_causal_lm", "llama_causal_lm"])
@pytest.mark.parametrize("labelled", [True, False])
@pytest.mark.parametrize("more", [-1, 3])
def test_teacher_inputs_of_another_length_raise(name: str, labelled: bool, more: int) -> None:
    head = HEADS[name]
    batch = head.batch(4, labelled=labelled)
    length = batch["input_ids"].shape[1] + more
    batch["teacher_input_ids"] = torch.ones(4, length, dtype=torch.long)
    refused(head.make(0), head.make(1), batch, "teacher_ columns as long as the student's")


@pytest.mark.parametrize("more", [-1, 3])
def test_teacher_inputs_of_another_length_raise_for_spans(more: int) -> None:
    head = HEADS["bert_span"]
    batch = head.batch(4)
    batch["teacher_input_ids"] = torch.ones(4, batch["input_ids"].shape[1] + more, dtype=torch.long)
    with pytest.raises(TeacherError, match="teacher_ columns as long as the student's"):
        Distiller(head.make(0), head.make(1), alpha=1.0)(head.make(0), batch)


@pytest.mark.parametrize("name", ["t5_seq2seq", "bart_seq2seq"])
def test_decoder_inputs_of_another_length_raise(name: str) -> None:
    head = HEADS[name]
    batch = head.batch(4)
    batch["teacher_decoder_input_ids"] = torch.ones(4, batch["labels"].shape[1] + 2, dtype=torch.long)
    batch["teacher_input_ids"] = batch["input_ids"]
    refused(head.make(0), head.make(1), batch, "rows of seq2seq")


@pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"
)  # peft asks by the old name
@pytest.mark.parametrize("side", ["student", "teacher"])
@pytest.mark.parametrize("name", CAUSAL)
def test_rows_added_by_prompt_tuning_raise(name: str, side: str) -> None:
    head = HEADS[name]
    models = {"student": head.make(0), "teacher": head.make(1)}
    tuning = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    models[side] = get_peft_model(models[side], tuning)
    refused(models["student"], models["teacher"], head.batch(4), "no virtual tokens of prompt tuning")


def test_teacher_inputs_of_the_same_length_are_accepted() -> None:
    """The teacher's inputs may differ if the positions correspond."""
    head = HEADS["bert_tokens"]
    student, teacher, batch = head.make(0), head.make(1), head.batch(4)
    other = batch["input_ids"].flip(1).clamp(min=1)
    kept = batch["labels"] != -100
    with torch.no_grad():
        ours = student(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[kept]
        theirs = teacher(input_ids=other).logits[kept]
    given = {**batch, "teacher_input_ids": other, "teacher_attention_mask": torch.ones_like(other)}
    found = Distiller(student, teacher, alpha=1.0, temperature=T)(student, given).terms["logits"].item()
    assert found == pytest.approx(softened_kl(ours, theirs, T).mean().item(), rel=1e-4)
