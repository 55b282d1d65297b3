"""A divergence that uses labels finds them among the compared columns: id gaps, padding, unknown tokens."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from hf_distill import Distiller, ModelTeacher
from hf_distill.functional import decoupled
from tests.heads import HEADS
from tests.tiny_tokenizers import tokenizer

T = 2.0
HOLES = (10, 20)
HOLED = {f"w{i}": i for i in range(40) if i not in HOLES}
NAMES = ("gpt2_causal_lm", "bert_masked_lm", "t5_seq2seq")


def rows(name: str, student: Any, teacher: Any, batch: dict[str, Any]) -> tuple[Any, Any, Any]:
    """Return the predictions of both models and the labels, by hand."""
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    labels = batch["labels"]
    if name == "t5_seq2seq":
        shifted = labels.roll(1, -1)
        shifted[:, 0] = 0
        inputs["decoder_input_ids"] = shifted.masked_fill(shifted == -100, 0)
    with torch.no_grad():
        ours, theirs = student(**inputs).logits, teacher(**inputs).logits
    if name == "gpt2_causal_lm":
        ours, theirs, labels = ours[:, :-1], theirs[:, :-1], labels[:, 1:]
    kept = labels != -100
    return ours[kept], theirs[kept], labels[kept]


def by_hand(name: str, student: Any, teacher: Any, batch: dict[str, Any], columns: list[int]) -> float:
    """`decoupled` over these columns; other labels become the teacher's class (-100)."""
    ours, theirs, labels = rows(name, student, teacher, batch)
    places = torch.tensor([columns.index(int(label)) if int(label) in columns else -100 for label in labels])
    return T**2 * decoupled(ours[:, columns] / T, theirs[:, columns] / T, places).mean().item()


def found(student: Any, teacher: Any, batch: dict[str, Any], ours: Any, theirs: Any) -> float:
    distiller = Distiller(
        student,
        ModelTeacher(teacher, processing_class=theirs),
        alpha=1.0,
        temperature=T,
        divergence="decoupled",
        processing_class=ours,
    )
    result = distiller(student, batch)
    result.loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in student.parameters() if p.grad is not None)
    return result.terms["logits"].item()


def without_holes(name: str) -> dict[str, Any]:
    """Return a batch without ids that the tokenizer does not have."""
    batch = HEADS[name].batch(6)
    for hole in HOLES:
        for key in ("input_ids", "labels"):
            batch[key][batch[key] == hole] = hole + 1
    return batch


@pytest.mark.parametrize("name", NAMES)
def test_tokenizer_with_gaps_in_its_ids(name: str) -> None:
    student, teacher, batch = HEADS[name].make(0), HEADS[name].make(1), without_holes(name)
    columns = sorted(HOLED.values())
    assert int((batch["labels"] > HOLES[0]).sum()) > 3  # some labels lie beyond a gap
    expected = by_hand(name, student, teacher, batch, columns)
    assert found(student, teacher, batch, tokenizer(HOLED), tokenizer(HOLED)) == pytest.approx(expected, rel=1e-4)
    ours, theirs, labels = rows(name, student, teacher, batch)
    unmapped = T**2 * decoupled(ours[:, columns] / T, theirs[:, columns] / T, labels.clamp(max=37)).mean().item()
    assert unmapped != pytest.approx(expected, rel=1e-3)  # so the comparison above is meaningful


@pytest.mark.parametrize("name", NAMES)
def test_a_label_unknown_to_the_teacher_uses_the_teachers_class(name: str) -> None:
    """Its column is not compared, so the teacher's likeliest class replaces it."""
    student, teacher, batch = (
        HEADS[name].make(0, vocab_size=42),
        HEADS[name].make(1, vocab_size=48),
        without_holes(name),
    )
    batch["labels"][0, (batch["labels"][0] != -100).nonzero()[-1]] = 41
    expected = by_hand(name, student, teacher, batch, list(range(40)))
    ours, theirs = tokenizer(added=["<user>", "<bot>"]), tokenizer()
    assert found(student, teacher, batch, ours, theirs) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_a_label_in_a_gap_of_the_teachers_ids(name: str) -> None:
    """The teacher's tokenizer does not have the label's id."""
    student, teacher, batch = HEADS[name].make(0), HEADS[name].make(1), without_holes(name)
    batch["labels"][0, (batch["labels"][0] != -100).nonzero()[-1]] = HOLES[1]
    expected = by_hand(name, student, teacher, batch, sorted(HOLED.values()))
    assert found(student, teacher, batch, tokenizer(), tokenizer(HOLED)) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("widths", [(40, 48), (48, 40), (48, 64)])
def test_labels_with_padded_heads(widths: tuple[int, int]) -> None:
    name = "gpt2_causal_lm"
    student, teacher = HEADS[name].make(0, vocab_size=widths[0]), HEADS[name].make(1, vocab_size=widths[1])
    batch = without_holes(name)
    expected = by_hand(name, student, teacher, batch, list(range(40)))
    assert found(student, teacher, batch, tokenizer(), tokenizer()) == pytest.approx(expected, rel=1e-4)


def test_classifier_labels_use_the_students_ids() -> None:
    """The teacher's columns are reordered to the student's; the label already is in that order."""
    head = HEADS["bert_single_label"]
    names = {"id2label": {0: "c", 1: "a", 2: "b"}, "label2id": {"c": 0, "a": 1, "b": 2}}
    ours = {"id2label": {0: "a", 1: "b", 2: "c"}, "label2id": {"a": 0, "b": 1, "c": 2}}
    student, teacher, batch = head.make(0, **ours), head.make(1, **names), head.batch(6)
    labels = batch.pop("labels")
    with torch.no_grad():
        q, p = student(**batch).logits, teacher(**batch).logits[:, [1, 2, 0]]
    expected = T**2 * decoupled(q / T, p / T, labels).mean().item()
    distiller = Distiller(student, teacher, alpha=1.0, temperature=T, divergence="decoupled")
    assert distiller(student, {**batch, "labels": labels}).loss.item() == pytest.approx(expected, rel=1e-4)
