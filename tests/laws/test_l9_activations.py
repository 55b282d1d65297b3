"""L9 for activations: the teacher is unchanged, hooks are removed, and learned modules are not part of the student.

That projections are in no checkpoint of the student, no export and no push: tests/trainer/test_objectives_saving.py.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from hf_distill import Distiller
from tests.heads import HEADS
from tests.laws.objective_rows import INSIDE, Case, walked
from tests.trainer.tiny import assert_moved, assert_same_bits, weights

FIRST = [case for case in INSIDE if case == next(c for c in INSIDE if (c[:2], c.side) == (case[:2], case.side))]

DROPOUT = ("bert_tokens", "bart_seq2seq", "vit_image_class")


def hooks_of(model: Any) -> int:
    """Count the hooks of any kind on all modules."""
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks", "_state_dict_hooks")
    return sum(len(getattr(module, kind)) for module in model.modules() for kind in kinds)


@pytest.mark.parametrize("case", walked(FIRST))
def test_training_changes_only_weights(case: Case) -> None:
    head = HEADS[case.head]
    student, teacher = head.make(1, layers=2).train(), head.make(2, layers=3, width=24).train()
    with torch.no_grad():  # transformers adds hooks of its own to some models at their first forward
        student(**head.batch(4)), teacher(**head.batch(4))
    before, own, hooks = weights(teacher), weights(student), (hooks_of(student), hooks_of(teacher))
    parts = {id(module) for module in student.modules()}
    distiller = Distiller(student, teacher, alpha=None, objectives=case.make(), seed=0)
    learned = weights(distiller.learned.module)
    optimizer = torch.optim.SGD([*student.parameters(), *distiller.learned.parameters()], lr=0.01)
    for seed in range(2):
        optimizer.zero_grad()
        distiller(student, head.batch(4, seed)).loss.backward()
        assert all(p.grad is None and not p.requires_grad for p in teacher.parameters())
        optimizer.step()
        assert (hooks_of(student), hooks_of(teacher)) == hooks
    assert_same_bits(weights(teacher), before)
    assert_moved(weights(student), own)
    assert set(student.state_dict()) == set(own) and {id(module) for module in student.modules()} == parts
    if case.objective in ("hidden", "cosine"):
        assert_moved(weights(distiller.learned.module), learned)
    else:
        assert not learned


@pytest.mark.parametrize("case", walked([case for case in FIRST if case.head in DROPOUT and case.side is None]))
def test_the_teacher_is_captured_in_evaluation_mode(case: Case) -> None:
    """A teacher with dropout has the same activations twice, even after it was set to training mode."""
    head = HEADS[case.head]
    dropout = {key: 0.5 for key in head.settings if "drop" in key and "layer" not in key}
    student, teacher = head.make(1, layers=2), head.make(2, layers=3, width=24, **dropout)
    distiller, batch = Distiller(student, teacher, alpha=None, objectives=case.make(), seed=0), head.batch(4)
    quiet = distiller(student, batch).loss.item()
    teacher.train()
    assert distiller(student, batch).loss.item() == quiet
