"""L12: permuting the teacher's labels together with its `label2id` changes nothing; other label sets raise."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from hf_distill import Distiller, TeacherError
from hf_distill.tasks import TASKS
from tests.heads import HEADS, LABELS
from tests.laws import measuring as m
from tests.laws.conformance import CASES, DIVERGENCE_ROWS, TASK_ROWS, walked

NAMES = ("cold", "warm", "hot")
ORDER = (2, 0, 1)  # the teacher's column i is the student's column ORDER[i]
NAMED = [case for case in CASES if TASK_ROWS[HEADS[case[0]].kind].not_permuted is None]
NAMED_HEADS = sorted({name for name, _ in NAMED})


def named(names: tuple[str, ...] = NAMES) -> dict[str, Any]:
    return {"label2id": {name: i for i, name in enumerate(names)}, "id2label": dict(enumerate(names))}


def permuted(name: str) -> Any:
    """Return the teacher of seed 2 with its labels in another order, in its config too."""
    teacher = HEADS[name].make(2, **named(tuple(NAMES[i] for i in ORDER))).double()
    heads = [layer for layer in teacher.modules() if isinstance(layer, nn.Linear) and layer.out_features == LABELS]
    assert len(heads) == 1
    with torch.no_grad():
        heads[0].weight.copy_(heads[0].weight[list(ORDER)].clone())
        heads[0].bias.copy_(heads[0].bias[list(ORDER)].clone())
    return teacher


def test_named_tasks_agree_with_the_table() -> None:
    named_kinds = {kind for kind, row in TASK_ROWS.items() if row.not_permuted is None}
    by_labels = {kind for kind, task in TASKS.items() if task.matched_by == "labels"}
    assert named_kinds == by_labels - {"regression"}  # its only column cannot be swapped


@pytest.mark.parametrize(("name", "divergence"), walked(NAMED))
def test_the_order_of_the_teachers_labels_does_not_matter(name: str, divergence: str) -> None:
    student = HEADS[name].make(1, **named()).double()
    batch = m.collated(name, HEADS[name].examples())
    losses, gradients = [], []
    for teacher in (HEADS[name].make(2, **named()).double(), permuted(name)):
        kwargs = DIVERGENCE_ROWS[divergence].a_row_alone
        distiller = Distiller(student, teacher, divergence=divergence, divergence_kwargs=kwargs)
        loss, gradient = m.step(distiller, student, [batch])
        losses.append(loss)
        gradients.append(gradient)
    assert losses[1] == pytest.approx(losses[0], rel=1e-12)
    assert m.difference(gradients[1], gradients[0]) < 1e-9


@pytest.mark.parametrize("name", NAMED_HEADS)
def test_an_undeclared_permutation_changes_the_loss(name: str) -> None:
    """Otherwise the law above could hold because the permutation has no effect."""
    student, silent = HEADS[name].make(1, **named()).double(), permuted(name)
    silent.config.label2id, silent.config.id2label = named()["label2id"], named()["id2label"]
    batch = m.collated(name, HEADS[name].examples())
    right = Distiller(student, HEADS[name].make(2, **named()).double())(student, batch).loss.item()
    wrong = Distiller(student, silent)(student, batch).loss.item()
    assert abs(right - wrong) > 1e-3 * abs(right)


@pytest.mark.parametrize("name", NAMED_HEADS)
def test_other_label_sets_raise(name: str) -> None:
    student = HEADS[name].make(1, **named())
    teacher = HEADS[name].make(2, **named(("cold", "warm", "boiling")))
    with pytest.raises(TeacherError, match=r"names differ: student \{cold, warm, hot\}, teacher \{cold, warm, boil"):
        Distiller(student, teacher)
    assert all(p.requires_grad for p in teacher.parameters())  # raised before the teacher was changed
