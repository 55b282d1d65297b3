"""L9, gradients: only the student gets one; the teacher is unchanged and in evaluation mode.

Optimizers, checkpoints, exports and pushes are tested with the trainer.
"""

from __future__ import annotations

import pytest
import torch

from hf_distill import Distiller
from tests.heads import HEADS
from tests.laws import measuring as m
from tests.laws.conformance import CASES, DIVERGENCE_ROWS, TWO_COLUMNS, walked


@pytest.mark.parametrize(("name", "divergence"), walked(CASES))
def test_only_the_student_gets_a_gradient(name: str, divergence: str) -> None:
    teacher = m.new_teacher(name)
    before = {key: value.clone() for key, value in teacher.state_dict().items()}
    distiller = m.distiller_of(name, divergence, teacher=teacher, alpha=1.0, divergence_kwargs={})
    _, gradient = m.step(distiller, m.student_of(name), [m.collated(name, HEADS[name].examples())])
    assert torch.isfinite(gradient).all() and gradient.norm() > 1e-4
    assert all(p.grad is None and not p.requires_grad for p in teacher.parameters())
    assert all(torch.equal(value, before[key]) for key, value in teacher.state_dict().items())


def test_dist_has_no_gradient_only_for_two_columns() -> None:
    """Confirms the reason in the table: with `intra_weight=0`, `dist` has no gradient for multi-label rows."""
    name, row = TWO_COLUMNS[0], DIVERGENCE_ROWS["dist"]
    distiller = m.distiller_of(name, "dist", alpha=1.0, divergence_kwargs=row.a_row_alone)
    _, gradient = m.step(distiller, m.student_of(name), [m.collated(name, HEADS[name].examples())])
    assert row.no_gradient_on_two_columns and gradient.norm() < 1e-9


@pytest.mark.parametrize("name", HEADS)
def test_training_leaves_the_teacher_bitwise_unchanged(name: str) -> None:
    student, teacher = HEADS[name].make(1).train(), HEADS[name].make(2).train()
    weights = {key: value.clone() for key, value in teacher.state_dict().items()}
    own = {key: value.clone() for key, value in student.state_dict().items()}
    distiller = Distiller(student, teacher, alpha=0.5 if HEADS[name].label_names else 1.0)
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
    for seed in range(3):
        optimizer.zero_grad()
        distiller(student, HEADS[name].batch(4, seed)).loss.backward()
        optimizer.step()
        distiller.end_step(student)
    assert all(torch.equal(value, weights[key]) for key, value in teacher.state_dict().items())
    assert any(not torch.equal(value, own[key]) for key, value in student.state_dict().items())
    assert set(own) == set(student.state_dict())  # no module was added to the student


DROPOUT = {
    "bert_single_label": {"hidden_dropout_prob": 0.5},
    "gpt2_causal_lm": {"embd_pdrop": 0.5},
    "bart_seq2seq": {"dropout": 0.5},
    "wav2vec2_ctc_mean": {"hidden_dropout": 0.5, "layerdrop": 0.5, "apply_spec_augment": True, "mask_time_prob": 0.3},
}


@pytest.mark.parametrize("name", DROPOUT)
def test_the_teacher_is_in_evaluation_mode_in_every_step(name: str) -> None:
    """Even if it, or only its submodules, was set to training mode after the previous step."""
    student, teacher = HEADS[name].make(1), HEADS[name].make(2, **DROPOUT[name])
    distiller = Distiller(student, teacher, alpha=1.0)
    batch = HEADS[name].batch(4)
    quiet = distiller(student, batch).loss.item()
    teacher.train()
    assert distiller(student, batch).loss.item() == quiet
    for part in teacher.children():
        part.train()
    assert distiller(student, batch).loss.item() == quiet
    assert not any(module.training for module in teacher.modules())


def test_the_student_keeps_its_mode() -> None:
    student = HEADS["bert_single_label"].make(1).train()
    Distiller(student, HEADS["bert_single_label"].make(2))(student, HEADS["bert_single_label"].batch(2))
    assert all(module.training for module in student.modules())
