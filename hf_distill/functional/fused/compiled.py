"""The block function compiled by `torch.compile`, for accelerators.

Blocks that it does not support go to the eager function. A new compiled function is first compared with the eager one
on a few rows.
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
from hf_distill.functional.fused.rows import BlockSpec, Workspace, any_blocked, blend_block

logger = logging.getLogger(__name__)
TRIAL_ROWS = 8  # rows on which a new function is compared with the eager one
TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-4}  # relative to the largest entry; 1e-2 in 16 bits
MAX_FUNCTIONS = 4  # torch.compile gives up after more variants; a scheduled temperature is a new variant each step

BlockFunction = Callable[..., tuple[Tensor | None, Tensor | None]]
_functions: dict[Hashable, BlockFunction | None] = {}  # None if compiling failed, or gave another loss
_has_warned = False


def use_compiled(setting: bool | None, device: torch.device) -> bool:
    """Return the setting; if None, true on CUDA with Triton. Elsewhere compiling gains little."""
    return setting if setting is not None else device.type == "cuda" and find_spec("triton") is not None


def blend_compiled(
    student: Tensor, teacher: Tensor | TeacherSparse | None, spec: BlockSpec, workspace: Workspace, *, into: Tensor
) -> tuple[Tensor | None, Tensor | None]:
    """`blend_block` as one compiled function if possible; `workspace` is for the eager function."""
    over_teacher = into is not student
    if isinstance(teacher, Tensor) and _is_supported(student, teacher, spec):
        key = _key(student, teacher, spec, over_teacher=over_teacher)
        try:
            if key not in _functions and _may_add_function():
                _functions[key] = _checked_function(student, teacher, spec, over_teacher=over_teacher)
            function = _functions.get(key)
            if function is not None:
                return function(student, teacher, *spec.row_vectors)
        except compiler_error() as error:  # raised before anything ran, so the rows are unchanged
            _functions[key] = None
            logger.warning(f"torch.compile failed, so the loss is computed without it (slower, the same): {error}")
    return blend_block(student, teacher, spec, workspace, into=into)


def _may_add_function() -> bool:
    """Return whether one more function may be compiled; warn once if not."""
    global _has_warned
    if len(_functions) >= MAX_FUNCTIONS and not _has_warned:
        _has_warned = True
        logger.warning(
            f"The loss was compiled for {MAX_FUNCTIONS} kinds of step, and is computed without torch.compile for any "
            "other (slower, the same). A temperature that changes with each step makes each step a new kind."
        )
    return len(_functions) < MAX_FUNCTIONS


def _is_supported(student: Tensor, teacher: Tensor, spec: BlockSpec) -> bool:
    several = student.shape[0] > 1  # torch.compile would specialise on a single row
    return several and spec.terms.divergence in KERNELS and not (spec.may_block and any_blocked(student, teacher))


def _key(student: Tensor, teacher: Tensor, spec: BlockSpec, *, over_teacher: bool) -> Hashable:
    """Everything that a function is specialised on; the number of rows is not."""
    return (
        (student.device, student.dtype, teacher.dtype, torch.is_inference_mode_enabled(), over_teacher),
        tuple(vector is None for vector in spec.row_vectors),
        (spec.terms.divergence, tuple(sorted(spec.terms.settings.items()))),
        (spec.temperature, spec.columns, spec.student, spec.teacher, spec.owns_teacher),
        (spec.smoothing, spec.has_zero_weights, spec.wants_gradient, student.shape[1]),
    )


def _checked_function(student: Tensor, teacher: Tensor, spec: BlockSpec, *, over_teacher: bool) -> BlockFunction | None:
    """Return a new compiled function, or None if it differs from the eager one on a few rows."""
    few = slice(0, TRIAL_ROWS)
    few_spec, function, results = spec.at(few), _compiled(spec, over_teacher=over_teacher), []
    for is_compiled in (True, False):
        ours, theirs = student[few].clone(), teacher[few].clone()
        into = theirs if over_teacher else ours
        if is_compiled:
            values = function(ours, theirs, *few_spec.row_vectors)
        else:
            values = blend_block(ours, theirs, few_spec, Workspace(), into=into)
        results.append([x for x in (into if spec.wants_gradient else None, *values) if x is not None])
    if all(_close(ours, eager) for ours, eager in zip(*results, strict=True)):
        return function
    logger.warning("torch.compile computed another loss than eager mode, so the loss is computed without it (slower).")
    return None


def _close(found: Tensor, expected: Tensor) -> bool:
    tolerance = TOLERANCE.get(found.dtype, 1e-2) * float(expected.abs().nan_to_num().amax().clamp(min=1e-6))
    return torch.allclose(found, expected, rtol=0.0, atol=tolerance, equal_nan=True)


def _compiled(spec: BlockSpec, *, over_teacher: bool) -> BlockFunction:
    terms = Terms(spec.terms.divergence, dict(spec.terms.settings))
    bare = replace(spec.with_row_vectors(None, None, None), terms=terms, may_block=False)

    def block(student: Tensor, teacher: Tensor, *row_vectors: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        into = teacher if over_teacher else student
        return blend_block(student, teacher, bare.with_row_vectors(*row_vectors), Workspace(), into=into)

    return torch.compile(block, fullgraph=True, dynamic=True)
