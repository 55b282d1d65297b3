"""Tools of the laws: models and batches in float64, losses, gradients."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hf_distill import Distiller, ModelTeacher
from hf_distill.objectives import LogitsMatch
from hf_distill.schedules import constant
from hf_distill.signals import Signals
from hf_distill.tasks import Task
from hf_distill.vocabulary import HeadAlignment
from tests.heads import HEADS, Example
from tests.laws.conformance import DIVERGENCE_ROWS, Batch
from tests.laws.objective_rows import Case


@functools.cache
def student_of(name: str) -> Any:
    """Return a shared student in float64 and training mode; no test may change its weights."""
    return new_student(name)


@functools.cache
def teacher_of(name: str) -> Any:
    """Return a shared teacher in float64, different from the student."""
    return new_teacher(name)


def new_student(name: str) -> Any:
    """Return the same model, not shared."""
    return HEADS[name].make(1).double().train()


def new_teacher(name: str) -> Any:
    """Return the same model, not shared."""
    return HEADS[name].make(2).double()


def in_double(batch: Batch) -> Batch:
    return {name: x.double() if x.is_floating_point() else x for name, x in batch.items()}


def collated(name: str, examples: Sequence[Example], pad_to: int | None = None) -> Batch:
    return in_double(HEADS[name].collate(examples, pad_to))


def distiller_of(name: str, divergence: str | None = None, *, teacher: Any = None, **settings: Any) -> Distiller:
    """Return a distiller with temperature 2, independent rows, and alpha 0.5 if the head has its own loss."""
    alone = DIVERGENCE_ROWS[divergence].a_row_alone if divergence else {}
    settings.setdefault("divergence_kwargs", alone)
    settings.setdefault("alpha", 0.5 if HEADS[name].label_names else 1.0)
    return Distiller(student_of(name), teacher or teacher_of(name), divergence=divergence, **settings)


# For objectives on activations: two layers are matched with three, through projections from width 16 to 24.


@functools.cache
def deep_student_of(name: str) -> Any:
    """Return a shared student in float64 and training mode; no test may change its weights."""
    return new_deep_student(name)


def new_deep_student(name: str) -> Any:
    """Return the same model, not shared."""
    return HEADS[name].make(1, layers=2).double().train()


@functools.cache
def wide_teacher_of(name: str, width: int = 24) -> ModelTeacher:
    """Return a shared teacher in float64, deeper and, by default, wider than the student."""
    return ModelTeacher(HEADS[name].make(2, layers=3, width=width).double())


def inside_distiller(name: str, objectives: Any, *, teacher: Any = None, **settings: Any) -> Distiller:
    """Return a distiller of the objectives alone, unless alpha is passed."""
    settings = {"alpha": None, "seed": 3, **settings}
    return Distiller(deep_student_of(name), teacher or wide_teacher_of(name), objectives=objectives, **settings)


@functools.cache
def distiller_for(case: Case) -> Distiller:
    """Return a shared distiller of the case's objective alone; its projections are never trained."""
    return inside_distiller(case.head, case.make())


def shown(distiller: Distiller, name: str, batch: Batch) -> tuple[Batch, Signals, Signals]:
    """Return the prepared batch, and both models' signals."""
    batch, student = distiller.prepare(batch), deep_student_of(name)
    needs, teacher_needs = distiller.blending.needs(0.0)
    with torch.no_grad(), distiller.capture() as inside:
        outputs = student(**distiller.student_inputs(batch, labels=False))
    return (
        batch,
        distiller.student_signals(outputs, batch, needs, inside),
        distiller.teacher_signals(batch, teacher_needs),
    )


def step(distiller: Distiller, student: Any, micro_batches: Sequence[Batch], **keywords: Any) -> tuple[float, Tensor]:
    """Return one optimizer step's loss, and the gradient of the student and of learned modules as one vector."""
    counts = distiller.begin_step(micro_batches, **keywords)
    student.zero_grad(set_to_none=True)
    distiller.learned.zero_grad()
    total = 0.0
    for batch in micro_batches:
        loss = distiller(student, batch, counts).loss
        loss.backward()
        total += loss.item()
    return total, gradient_of(student, distiller.learned.module)


def gradient_of(*models: Any) -> Tensor:
    """Return all gradients of the models as one vector, 0 where there is none."""
    every = [p.grad if p.grad is not None else torch.zeros_like(p) for model in models for p in model.parameters()]
    return torch.cat([gradient.flatten().double() for gradient in every])


def difference(found: Tensor, expected: Tensor) -> float:
    """Return the distance of two vectors relative to the second."""
    return ((found - expected).norm() / expected.norm().clamp(min=1e-30)).item()


@functools.cache
def task_of(name: str) -> Task:
    return distiller_of(name).task


@functools.cache
def read_logits(name: str) -> tuple[Batch, Tensor, Tensor]:
    """Return a batch, and the predictions of both models as the task selects them."""
    task, student = task_of(name), student_of(name)
    batch = task.prepare(collated(name, HEADS[name].examples()), student)
    inputs = task.without_labels(batch)
    with torch.no_grad():
        read = [
            task.read(model(**inputs), batch, HeadAlignment(), teacher=model is not student)
            for model in (student, teacher_of(name))
        ]
    return batch, read[0], read[1]


def term(
    task: Task,
    batch: Batch,
    student: Tensor,
    teacher: Tensor,
    divergence: str | None,
    *,
    temperature: float = 2.0,
    **settings: Any,
) -> tuple[float, int, Tensor]:
    """Return total, count and the student's gradient of the logits objective for given predictions."""
    student = student.detach().clone().requires_grad_()
    match = LogitsMatch(divergence, divergence_kwargs=settings, temperature=constant(temperature))
    found = match(Signals(student), Signals(teacher), task, batch)
    found.value.backward()
    assert student.grad is not None
    return found.value.item(), int(found.count), student.grad
