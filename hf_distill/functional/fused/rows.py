"""A block of rows of both sides: softened, compared, with the gradient at the softened logits. No labels, no products.

Blocks are small enough to stay in a processor's cache while a dozen passes go over them, most of them in place.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hf_distill.functional.fused.inputs import IGNORED, TeacherSparse, Terms
from hf_distill.functional.fused.kernels import KERNELS, Pair
from hf_distill.functional.properties import DIVERGENCES, PROPERTIES

LOG2_E, LN_2 = 1 / math.log(2), math.log(2)
LEAST_TAIL = 1e-7  # of fp32 log-probabilities: what is left of 1 − Σ is rounding below this


@dataclass(frozen=True)
class Softening:
    """How a chunk of products becomes softened logits: `x · before`, or `tanh(x · before) · after` where capped.

    What of `before` is exact in the products' type went into the hidden rows already, which are fewer.
    """

    before: float = 1.0
    capped: bool = False
    after: float = 1.0


class Room:
    """Memory that one worker writes over again and again, by name."""

    def __init__(self) -> None:
        self._kept: dict[str, Tensor] = {}

    def take(self, name: str, like: Tensor, columns: int) -> Tensor:
        """`[rows of like, columns]` in full precision, contiguous, with anything in it."""
        size = like.shape[0] * columns
        kept = self._kept.get(name)
        if kept is None or kept.numel() < size:
            kept = self._kept[name] = torch.empty(size, dtype=full_precision_of(like), device=like.device)
        return kept[:size].view(like.shape[0], columns)


def full_precision_of(rows: Tensor) -> torch.dtype:
    """fp32, or fp64 for fp64."""
    return torch.float64 if rows.dtype == torch.float64 else torch.float32


def soften(
    rows: Tensor,
    how: Softening,
    room: Room,
    name: str,
    *,
    like: Tensor | None = None,
    ours: bool = True,
    slope: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """Softened logits `[r v]` in the full precision of `like`, and where capped the slope 1 − tanh².

    Args:
        like: the other side; None: `rows` themselves. ours: `rows` may be written over. slope: whether it is wanted.
    """
    v, like = rows.shape[1], rows if like is None else like
    if ours and rows.dtype == full_precision_of(like) and rows.is_contiguous():
        x = rows
    else:
        x = room.take(name, like, v).copy_(rows)
    if how.before != 1.0:
        x.mul_(how.before)
    if not how.capped:
        return x, None
    x.tanh_()
    of_tanh = torch.mul(x, x, out=room.take(f"slope of {name}", like, v)).neg_().add_(1) if slope else None
    return x.mul_(how.after), of_tanh


def softmax_(x: Tensor) -> Tensor:
    """Softmax of each row over itself; returns the log of what it was divided by, `[r 1]`.

    By powers of two where that can be: eager `exp2` costs a quarter of `exp`, and errs less over long rows than
    `torch.softmax`.
    """
    if x.dtype == torch.float64 or torch.compiler.is_compiling():
        log_normaliser = x.logsumexp(-1, keepdim=True)
        x.sub_(log_normaliser).exp_()
        return log_normaliser
    largest = x.amax(-1, keepdim=True).mul_(LOG2_E)
    torch.add(largest.neg(), x, alpha=LOG2_E, out=x).exp2_()
    total = x.sum(-1, keepdim=True)
    x.mul_(total.reciprocal())
    return total.log_().add_(largest, alpha=LN_2)


@dataclass
class Compared:
    """A divergence of a block.

    Attributes:
        value: `[r]`. gradient: `[r v]` at the softened student logits.
        q: `[r v]` softened student probabilities, with the log of their normaliser `[r 1]` and a free `[r v]`; None
            where they were not made.
    """

    value: Tensor
    gradient: Tensor
    q: Tensor | None = None
    log_normaliser: Tensor | None = None
    free: Tensor | None = None


def compare_in_place(name: str, student: Tensor, teacher: Tensor, settings: Mapping[str, Any], room: Room) -> Compared:
    """One of the KL family, without −inf; both blocks of softened logits are written over."""
    difference = torch.sub(teacher, student, out=room.take("difference", student, student.shape[1]))
    log_normaliser = softmax_(student)
    shift = log_normaliser - softmax_(teacher)
    pair = Pair(student, teacher, difference, shift, lambda: room.take("more", student, student.shape[1]))
    found = KERNELS[name](pair, **settings)
    return Compared(found.value, found.gradient, student, log_normaliser, found.free)


def compare_plainly(
    name: str,
    student: Tensor,
    teacher: Tensor,
    settings: Mapping[str, Any],
    target: Tensor | None,
    *,
    wants_gradient: bool = True,
) -> Compared:
    """Any divergence whose rows stand alone, with −inf, by the plain function and autograd; blocks are only read."""
    if PROPERTIES[name].wants_target:
        settings = {**settings, "target": target}
    if not wants_gradient:
        return Compared(DIVERGENCES[name](student, teacher, **settings), student)  # no gradient is read
    with torch.enable_grad():
        leaf = student.detach().requires_grad_()
        value = DIVERGENCES[name](leaf, teacher, **settings)
        (gradient,) = torch.autograd.grad(value.sum(), leaf)
    return Compared(value.detach(), gradient)


def compare_sparsely(
    name: str,
    student: Tensor,
    teacher: TeacherSparse,
    settings: Mapping[str, Any],
    *,
    temperature: float,
    wants_gradient: bool = True,
) -> Compared:
    """The divergence of k columns and a bucket for the others, or of samples; `student` is written over."""
    theirs = teacher.logits.to(full_precision_of(student)) / temperature
    none = teacher.ids < 0
    # Where a row lists fewer, a column is named twice, and what is added there is 0. Where it lists none, column 0 is
    # named, which changes nothing: a bucket alone is one outcome, equal on both sides.
    ids = torch.where(none, teacher.ids.amax(-1, keepdim=True).clamp(min=0), teacher.ids)
    ours = student.gather(1, ids).masked_fill(none, -math.inf)
    if teacher.weights is not None:
        return _of_samples(student, ids, ours, theirs, teacher.weights.to(theirs.dtype))
    others = student.scatter_(1, ids, -math.inf)
    ours_tail = others.logsumexp(-1)
    theirs = theirs.masked_fill(none, -math.inf)
    few = compare_plainly(
        name,
        torch.cat((ours, ours_tail[:, None]), 1),
        torch.cat((theirs, _tail_of(teacher, theirs).to(theirs)[:, None]), 1),
        settings,
        None,
        wants_gradient=wants_gradient,
    )
    if not wants_gradient:
        return few
    none_left = ours_tail == -math.inf  # k = v: no other column, nothing to spread the bucket's gradient over
    spread = others.sub_(ours_tail.masked_fill(none_left, 0.0)[:, None]).exp_().mul_(few.gradient[:, -1:])
    return Compared(few.value, spread.scatter_add_(1, ids, few.gradient[:, :-1]))


def _of_samples(student: Tensor, ids: Tensor, ours: Tensor, theirs: Tensor, weights: Tensor) -> Compared:
    """Σ_k w_k (log p_k − x_k) + Σ w · log Σ eˣ; of columns that the student blocks (−inf) nothing is asked."""
    listed = ours > -math.inf
    weights = weights.masked_fill(~listed, 0.0)
    log_normaliser = softmax_(student)
    value = (weights * torch.where(listed, theirs - ours + log_normaliser, 0.0)).sum(-1)
    return Compared(value, student.mul_(weights.sum(-1, keepdim=True)).scatter_add_(1, ids, -weights))


def _tail_of(teacher: TeacherSparse, softened: Tensor) -> Tensor:
    if teacher.tail is not None:
        return teacher.tail
    return torch.log1p(-softened.exp().sum(-1).clamp(max=1 - LEAST_TAIL))


def any_blocked(*rows: Tensor) -> bool:
    """Whether some column is −inf. On an accelerator this waits for it."""
    return any(is_blocking(x) for x in rows if x.numel() > 0)


def is_blocking(x: Tensor) -> bool:
    """Whether there is a −inf, also beside a NaN. Looked for by the least number, which costs one short pass."""
    least = x.amin()
    return bool((least == -math.inf) | least.isnan()) and bool(x.isneginf().any())


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
