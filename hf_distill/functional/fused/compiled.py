"""A block of rows in one compiled function, for accelerators: the eager block's own code through torch.compile.

What it does not carry goes to the eager block. A new function is compared with the eager block first, on a few rows.
It chooses no chunks and makes no products.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable
from dataclasses import replace
from importlib.util import find_spec

import torch
from torch import Tensor

from hf_distill._compat import compiler_error
from hf_distill.functional.fused.inputs import TeacherSparse, Terms
from hf_distill.functional.fused.kernels import KERNELS
from hf_distill.functional.fused.rows import Room, Work, any_blocked, blend_block

logger = logging.getLogger(__name__)
TRIED = 8  # rows on which a new function is compared with the eager block
TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-4}  # of the largest; 16 bits: 1e-2
MOST_FUNCTIONS = 4  # torch.compile gives up on a function of more kinds; a scheduled temperature is a new kind a step

Block = Callable[..., tuple[Tensor | None, Tensor | None]]
_functions: dict[Hashable, Block | None] = {}  # None: the compiler could not, or made another loss
_is_said = False


def goes_compiled(asked: bool | None, device: torch.device) -> bool:
    """What is asked for; else on CUDA where Triton is. Elsewhere it needs a C++ compiler and gains little."""
    return asked if asked is not None else device.type == "cuda" and find_spec("triton") is not None


def blend_compiled(
    student: Tensor, teacher: Tensor | TeacherSparse | None, work: Work, rows: slice, room: Room, *, into: Tensor
) -> tuple[Tensor | None, Tensor | None]:
    """`blend_block`, in one compiled function where it can be; `room` is for where it cannot."""
    over_teacher = into is not student
    if isinstance(teacher, Tensor) and _carries(student, teacher, work):
        vectors = [None if x is None else x[rows] for x in (work.labels, work.label_weights, work.row_weights)]
        kind = _kind(student, teacher, vectors, work, over_teacher=over_teacher)
        try:
            if kind not in _functions and _is_room():
                _functions[kind] = _tried(student, teacher, vectors, work, over_teacher=over_teacher)
            function = _functions.get(kind)
            if function is not None:
                return function(student, teacher, *vectors)
        except compiler_error() as error:  # before anything ran: the rows are as they were
            _functions[kind] = None
            logger.warning(f"torch.compile failed, so the loss is computed without it (slower, the same): {error}")
    return blend_block(student, teacher, work, rows, room, into=into)


def _is_room() -> bool:
    """For one more function; says once that there is none."""
    if len(_functions) < MOST_FUNCTIONS:
        return True
    global _is_said
    if not _is_said:
        _is_said = True
        logger.warning(
            f"The loss was compiled for {MOST_FUNCTIONS} kinds of step, and is computed without torch.compile for any "
            "other (slower, the same): a temperature that changes with each step is a kind a step."
        )
    return False


def _carries(student: Tensor, teacher: Tensor, work: Work) -> bool:
    several = student.shape[0] > 1  # one row alone would be compiled for itself
    return several and work.terms.divergence in KERNELS and not (work.may_block and any_blocked(student, teacher))


def _kind(
    student: Tensor, teacher: Tensor, vectors: list[Tensor | None], work: Work, *, over_teacher: bool
) -> Hashable:
    """Whatever a function is compiled for, but for the number of rows."""
    return (
        (student.device, student.dtype, teacher.dtype, torch.is_inference_mode_enabled(), over_teacher),
        tuple(x is None for x in vectors),
        (work.terms.divergence, tuple(sorted(work.terms.settings.items()))),
        (work.temperature, work.columns, work.student, work.teacher, work.teacher_is_ours),
        (work.smoothing, work.some_weigh_nothing, work.wants_gradient, student.shape[1]),
    )


def _tried(
    student: Tensor, teacher: Tensor, vectors: list[Tensor | None], work: Work, *, over_teacher: bool
) -> Block | None:
    """A new function; None: it does not say on some rows what the eager block says."""
    few = slice(0, TRIED)
    labels, label_weights, row_weights = (None if x is None else x[few] for x in vectors)
    here = replace(work, labels=labels, label_weights=label_weights, row_weights=row_weights)
    compiled, found = _compiled(work, over_teacher=over_teacher), []
    for is_compiled in (True, False):
        ours, theirs = student[few].clone(), teacher[few].clone()
        into = theirs if over_teacher else ours
        if is_compiled:
            values = compiled(ours, theirs, labels, label_weights, row_weights)
        else:
            values = blend_block(ours, theirs, here, slice(None), Room(), into=into)
        found.append([x for x in (into if work.wants_gradient else None, *values) if x is not None])
    if all(_close(one, other) for one, other in zip(*found, strict=True)):
        return compiled
    logger.warning("torch.compile made a loss that is not the eager one, so the loss is computed without it (slower).")
    return None


def _close(one: Tensor, other: Tensor) -> bool:
    tolerance = TOLERANCE.get(one.dtype, 1e-2) * float(other.abs().nan_to_num().amax().clamp(min=1e-6))
    return torch.allclose(one, other, rtol=0.0, atol=tolerance, equal_nan=True)


def _compiled(work: Work, *, over_teacher: bool) -> Block:
    bare = replace(
        work,
        terms=Terms(work.terms.divergence, dict(work.terms.settings)),
        labels=None,
        label_weights=None,
        row_weights=None,
        may_block=False,
    )

    def block(
        student: Tensor,
        teacher: Tensor,
        labels: Tensor | None,
        label_weights: Tensor | None,
        row_weights: Tensor | None,
    ) -> tuple[Tensor | None, Tensor | None]:
        here = replace(bare, labels=labels, label_weights=label_weights, row_weights=row_weights)
        into = teacher if over_teacher else student
        return blend_block(student, teacher, here, slice(None), Room(), into=into)

    return torch.compile(block, fullgraph=True, dynamic=True)
