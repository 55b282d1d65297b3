"""The laws with a cached teacher, for every head: L11 (equal to the live one), L4, L9, L12; and the padding side."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from hf_distill import Distiller
from hf_distill.signals import Needs
from hf_distill.teachers import CachedTeacher, Dense
from tests.heads import HEADS, of_each_kind
from tests.laws import measuring as m
from tests.teachers.cache.built import build, left_padded, made, shuffled
from tests.trainer.tiny import assert_same_bits, weights


def loss_of(distiller: Distiller, student: Any, batch: dict) -> tuple[float, torch.Tensor]:
    student.zero_grad(set_to_none=True)
    loss = distiller(student, batch).loss
    loss.backward()
    return loss.item(), m.gradient_of(student)


@pytest.mark.parametrize("name", of_each_kind(9))
def test_l11_a_cached_teacher_equals_the_live_teacher(tmp_path: Path, name: str) -> None:
    """Value and gradient, with other batches, another order, more padding; looked up by the collator or the loss."""
    head, teacher, examples, cached = made(tmp_path, name)
    student = head.make(1)
    live, alpha = Distiller(student, teacher, alpha=1.0), {"alpha": 1.0}
    stored = Distiller(student, cached, **alpha)
    some = shuffled(examples, 7)
    for batch in (head.collate(some), head.collate(some, head.longest + 3 if head.pads else None)):
        loss, gradient = loss_of(live, student, batch)
        found, of_cached = loss_of(stored, student, batch)
        assert found == pytest.approx(loss, rel=1e-5, abs=1e-7) and loss > 1e-3
        assert m.difference(of_cached, gradient) < 1e-5
    with_answers = cached.wrap_collator(head.collate)(some)
    assert any(key.startswith("teacher_cached_") for key in with_answers)
    loss, gradient = loss_of(live, student, head.collate(some))
    found, of_cached = loss_of(stored, student, with_answers)
    assert found == pytest.approx(loss, rel=1e-5, abs=1e-7) and m.difference(of_cached, gradient) < 1e-5


@pytest.mark.parametrize(("dtype", "bits"), [("float16", 11), ("bfloat16", 8), ("float32", 24)])
def test_l11_holds_to_the_precision_of_the_store(tmp_path: Path, dtype: str, bits: int) -> None:
    """Each logit's distance from the largest in its row equals the teacher's, rounded to `bits` bits: half a unit in
    the last place, plus fp32's own error."""
    name = "bert_tokens"
    head, teacher, examples, cached = made(tmp_path, name, store=Dense(dtype))
    distiller = Distiller(head.make(1), cached, alpha=1.0)
    batch = head.collate(examples)
    found = distiller.teacher_signals(batch).predictions()
    with torch.no_grad():
        expected = teacher.eval()(**{k: v for k, v in batch.items() if k != "labels"}).logits
    real = batch["attention_mask"].bool()
    error = (found - expected)[real].abs()
    below = expected.amax(-1, keepdim=True) - expected
    assert found.dtype == torch.float32 and (error <= 2.0**-bits * below[real] + 1e-5).all()
    assert dtype == "float32" or error.max() > 1e-5  # it is rounded
    assert (found[~real] == 0).all()


@pytest.mark.parametrize("name", of_each_kind(10))
def test_l4_accumulation_changes_nothing(tmp_path: Path, name: str) -> None:
    head, _, examples, cached = made(tmp_path, name)
    distiller = m.distiller_of(name, teacher=cached)
    eight = examples[:8]
    pad_to = head.longest if head.labels_see_padding else None

    def split(parts: int) -> list[dict]:
        size = 8 // parts
        collate = cached.wrap_collator(head.collate)
        if pad_to is not None:
            return [m.in_double(head.collate(eight[i : i + size], pad_to)) for i in range(0, 8, size)]
        return [
            {k: v.double() if v.is_floating_point() and not k.startswith("teacher_") else v for k, v in batch.items()}
            for batch in (collate(eight[i : i + size]) for i in range(0, 8, size))
        ]

    loss, gradient = m.step(distiller, m.student_of(name), split(1))
    assert gradient.norm() > 1e-3
    for parts in (2, 8):
        found, of_parts = m.step(distiller, m.student_of(name), split(parts))
        assert found == pytest.approx(loss, rel=1e-6) and m.difference(of_parts, gradient) < 1e-6


def test_l9_the_teacher_runs_only_at_the_build_and_is_unchanged(tmp_path: Path) -> None:
    name = "bert_single_label"
    head, dropout = HEADS[name], {"hidden_dropout_prob": 0.5}
    teacher, examples = head.make(2, **dropout).train(), head.examples(12)
    before, asked = weights(teacher), []
    teacher.register_forward_hook(lambda module, *_: asked.append(module.training))
    cached = CachedTeacher(build(tmp_path, head, teacher, examples))
    assert_same_bits(weights(teacher), before)
    calls = len(asked)
    assert calls >= 4 and not any(asked)  # in evaluation mode, although it was passed in training mode
    student = head.make(1)
    own = set(student.state_dict())
    distiller = Distiller(student, cached, alpha=0.5)
    for start in (0, 6):
        distiller(student, head.collate(examples[start : start + 6])).loss.backward()
        distiller.end_step(student)
    assert len(asked) == calls and set(student.state_dict()) == own
    assert all(parameter.grad is None for parameter in teacher.parameters())


@pytest.mark.parametrize("name", ["bert_single_label", "bert_multi_label", "bert_tokens"])
def test_l12_labels_are_matched_by_name(tmp_path: Path, name: str) -> None:
    """A teacher with permuted labels and permuted columns has the same predictions."""
    head, order = HEADS[name], [2, 0, 1]
    names = {"id2label": {0: "a", 1: "b", 2: "c"}, "label2id": {"a": 0, "b": 1, "c": 2}}
    student, teacher, examples = head.make(1, **names), head.make(2, **names), head.examples(8)
    moved = head.make(2, id2label=dict(enumerate("cab")), label2id={"c": 0, "a": 1, "b": 2})
    with torch.no_grad():
        moved.classifier.weight.copy_(teacher.classifier.weight[order])
        moved.classifier.bias.copy_(teacher.classifier.bias[order])
    batch, losses = head.collate(examples), []
    for number, one in enumerate((teacher, moved)):
        cached = CachedTeacher(build(tmp_path / str(number), head, one, examples, student=student))
        losses.append(Distiller(student, cached, alpha=1.0)(student, batch).loss.item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-6) and losses[0] > 1e-3


def test_a_cached_teacher_with_left_padding(tmp_path: Path) -> None:
    """Llama's positions are relative, so left padding does not change its predictions."""
    name = "llama_causal_lm"
    head, teacher, examples, cached = made(tmp_path, name)
    student = head.make(1)
    batch = left_padded(shuffled(examples, 5))
    expected = Distiller(student, teacher, alpha=1.0)(student, batch).loss.item()
    stored = Distiller(student, cached, alpha=1.0)
    assert stored(student, batch).loss.item() == pytest.approx(expected, rel=1e-4)
    right = head.collate(shuffled(examples, 5))
    assert stored(student, right).loss.item() == pytest.approx(expected, rel=1e-4)
    predictions = stored.teacher(stored.task, batch, Needs(logits=True)).predictions()
    assert (predictions[~batch["attention_mask"].bool()] == 0).all()


def test_decoder_inputs_made_by_the_collator(tmp_path: Path) -> None:
    """The cache is keyed by them, even if a training derives them from the labels."""
    name = "bart_seq2seq"
    head = HEADS[name]
    student, teacher, examples = head.make(1), head.make(2), head.examples(8)

    def collate(some: list) -> dict:
        batch = head.collate(some)
        return {**batch, "decoder_input_ids": student.prepare_decoder_input_ids_from_labels(batch["labels"])}

    cached = CachedTeacher(build(tmp_path, head, teacher, examples, data_collator=collate))
    assert cached.cache.columns == ("decoder_input_ids", "input_ids")
    stored, some = Distiller(student, cached, alpha=1.0), shuffled(examples, 5)
    expected = Distiller(student, teacher, alpha=1.0)(student, head.collate(some)).loss.item()
    for batch in (
        collate(some),
        head.collate(some),
        cached.wrap_collator(head.collate)(some),
        cached.wrap_collator(collate)(some),
    ):
        assert stored(student, batch).loss.item() == pytest.approx(expected, rel=1e-5)
