"""One block of rows: labels' term and divergence side by side, and the gradient written over one side's logits.

Weights of rows are in the gradient; what all rows have in common is left out, and multiplied in at the very end.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hf_distill.functional.fused_inputs import IGNORED, TeacherSparse, Terms
from hf_distill.functional.fused_kernels import KERNELS
from hf_distill.functional.fused_rows import (
    Compared,
    Room,
    Softening,
    any_blocked,
    compare_in_place,
    compare_plainly,
    compare_sparsely,
    soften,
    softmax_,
)

POWERS = (1.0, 2.0, 3.0, 4.0)  # at these temperatures the softmax at T = 1 is made as a power of the softened one


@dataclass(frozen=True)
class Work:
    """What is to be done to every block.

    Attributes:
        terms: the divergence and its settings. temperature: 1 for a divergence that takes none.
        columns: how many leading columns are compared.
        student, teacher: how their chunks become softened logits. teacher_is_ours: its chunk may be written over.
        labels: `[n]` ids, or None. smoothing: of the labels. label_weights: `[n]` in the gradient, 0 where ignored.
        row_weights: `[n]` of the divergence in the gradient; None: 1. some_weigh_nothing: whether one of them is 0.
        may_block: −inf is possible on one of the two sides.
        wants_gradient: whether the gradient is to be written at all.
    """

    terms: Terms
    temperature: float
    columns: int
    student: Softening
    teacher: Softening
    teacher_is_ours: bool
    labels: Tensor | None
    smoothing: float
    label_weights: Tensor | None
    row_weights: Tensor | None
    some_weigh_nothing: bool
    may_block: bool
    wants_gradient: bool


@dataclass
class Gold:
    """Labels of a block, all `[r 1]`: ids (0 where there is none), which there are, and the target's mean logit."""

    ids: Tensor
    known: Tensor
    logit: Tensor


@dataclass
class Likely:
    """Student probabilities at T = 1 are `unscaled [r v]` times `scale [r 1]`; `value [r]` is the labels' loss."""

    unscaled: Tensor
    scale: Tensor | float
    value: Tensor


def blend_block(
    student: Tensor, teacher: Tensor | TeacherSparse | None, work: Work, rows: slice, room: Room, *, into: Tensor
) -> tuple[Tensor | None, Tensor | None]:
    """The labels' term and the divergence of each row `[r]`, before weights; None where there is no such term.

    Args:
        student: `[r v]` of the chunk of products, written over.
        teacher: `[r columns]` of the teacher's products (written over) or logits (only read), or sparse targets.
        rows: which of the n rows these are. into: where the gradient goes: `student`, or `teacher` where it is ours.
    """
    softened, slope = soften(student, work.student, room, "student", slope=work.wants_gradient)
    gold = None if work.labels is None else _gold(softened, work, work.labels[rows])
    whole = work.columns == student.shape[1]
    theirs, quick = _theirs(softened, teacher, work, room)
    likely = found = None
    if gold is not None and not (quick and whole and work.temperature in POWERS):
        unscaled = torch.mul(softened, work.temperature, out=room.take("likely", student, student.shape[1]))
        likely = Likely(unscaled, 1.0, _loss(softmax_(unscaled), gold))  # before `softened` is written over
    if theirs is not None:
        ours = softened if whole else room.take("compared", student, work.columns).copy_(softened[:, : work.columns])
        found = _compare(ours, theirs, work, rows, room, quick=quick)
        if gold is not None and likely is None:
            likely = _as_a_power(found, int(work.temperature), gold)
    if work.wants_gradient:
        _write(into, found, likely, gold, slope, work, rows)
    return None if likely is None else likely.value, None if found is None else found.value


def _gold(softened: Tensor, work: Work, labels: Tensor) -> Gold:
    known = (labels != IGNORED)[:, None]
    ids = labels[:, None].masked_fill(~known, 0)
    logit = softened.gather(1, ids)
    if work.smoothing > 0:
        logit = torch.lerp(logit, softened.mean(-1, keepdim=True), work.smoothing)
    return Gold(ids, known, logit * work.temperature)


def _loss(log_normaliser: Tensor, gold: Gold) -> Tensor:
    return (log_normaliser - gold.logit).masked_fill(~gold.known, 0.0)[:, 0]


def _theirs(
    softened: Tensor, teacher: Tensor | TeacherSparse | None, work: Work, room: Room
) -> tuple[Tensor | TeacherSparse | None, bool]:
    """The teacher's side, softened, and whether a kernel can compare it with the student's."""
    if teacher is None or isinstance(teacher, TeacherSparse):
        return teacher, False
    theirs, _ = soften(teacher, work.teacher, room, "teacher", like=softened, ours=work.teacher_is_ours, slope=False)
    quick = work.terms.divergence in KERNELS and not (work.may_block and any_blocked(softened, theirs))
    return theirs, quick


def _compare(
    ours: Tensor, theirs: Tensor | TeacherSparse, work: Work, rows: slice, room: Room, *, quick: bool
) -> Compared:
    name, settings = work.terms.divergence, work.terms.settings
    if isinstance(theirs, TeacherSparse):
        return compare_sparsely(
            name, ours, theirs, settings, temperature=work.temperature, wants_gradient=work.wants_gradient
        )
    if quick:
        return compare_in_place(name, ours, theirs, settings, room)
    target = None
    if work.labels is not None:
        target = work.labels[rows].masked_fill(work.labels[rows] >= work.columns, IGNORED)
    return compare_plainly(name, ours, theirs, settings, target, wants_gradient=work.wants_gradient)


def _as_a_power(found: Compared, temperature: int, gold: Gold) -> Likely:
    """softmax(s) from q = softmax(s / T): qᵀ over its sum; log Σ eˢ = T · log Σ e^(s/T) + log Σ qᵀ."""
    assert found.q is not None and found.log_normaliser is not None and found.free is not None
    if temperature == 1:
        return Likely(found.q, 1.0, _loss(found.log_normaliser, gold))
    power = torch.mul(found.q, found.q, out=found.free)
    if temperature > 2:
        power.mul_(found.q if temperature == 3 else power)
    total = power.sum(-1, keepdim=True)
    return Likely(power, total.reciprocal(), _loss(temperature * found.log_normaliser + total.log(), gold))


def _write(
    into: Tensor,
    found: Compared | None,
    likely: Likely | None,
    gold: Gold | None,
    slope: Tensor | None,
    work: Work,
    rows: slice,
) -> None:
    """label weight · (likely − target) + row weight · gradient of the divergence, times the slope."""
    if found is not None and work.row_weights is not None:
        weights = work.row_weights[rows, None]
        found.gradient.mul_(weights)
        if work.some_weigh_nothing:  # 0 · NaN
            found.gradient.masked_fill_(weights == 0, 0.0)
    if likely is None or gold is None or work.label_weights is None:
        assert found is not None
        out = found.gradient
    else:
        weights = work.label_weights[rows, None]
        out = _with_labels(found, likely, weights * likely.scale, into=into)
        if torch.compiler.is_compiling():  # one more term of the pass, where scattering would be a pass of its own
            at_label = torch.arange(out.shape[1], device=out.device) == gold.ids
            out.add_(torch.where(at_label, weights * (work.smoothing - 1), 0.0))
        else:
            out.scatter_add_(1, gold.ids, weights * (work.smoothing - 1))
        if work.smoothing > 0:
            out.sub_(weights * (work.smoothing / out.shape[1]))
    if slope is not None:
        out.mul_(slope)
    if out is not into:
        into.copy_(out)


def _with_labels(found: Compared | None, likely: Likely, factors: Tensor, *, into: Tensor) -> Tensor:
    """`factors` · likely + gradient, in full precision; over `into` where it is in full precision itself."""
    if found is None:
        return likely.unscaled.mul_(factors)
    columns = found.gradient.shape[1]
    if columns == likely.unscaled.shape[1]:
        out = into if into.dtype == found.gradient.dtype and into.is_contiguous() else found.gradient
        return torch.addcmul(found.gradient, likely.unscaled, factors, out=out)
    out = likely.unscaled.mul_(factors)
    out[:, :columns].add_(found.gradient)
    return out
