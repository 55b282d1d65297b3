"""Values and gradients of both terms on a block of rows, given both sides' products.

Blocks are small enough to stay in a processor's cache during a dozen passes over them, most of them in place.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from hf_distill.functional.fused.inputs import IGNORED, TeacherSparse, Terms
from hf_distill.functional.fused.kernels import KERNELS, Block, BlockResult
from hf_distill.functional.properties import DIVERGENCES, PROPERTIES
from hf_distill.functional.sparse import student_outcomes, teacher_outcomes

LOG2_E, LN_2 = 1 / math.log(2), math.log(2)
LEAST_TAIL = 1e-7  # in fp32, 1 − Σ of probabilities is rounding error below this
POWERS = (1.0, 2.0, 3.0, 4.0)  # at these temperatures the softmax at T = 1 is a power of the softened softmax


@dataclass(frozen=True)
class Softening:
    """How products become softened logits: `x · before`, or `tanh(x · before) · after` if capped.

    If a factor is exact in the dtype of the products, the smaller hidden rows were multiplied by it already.
    """

    before: float = 1.0
    capped: bool = False
    after: float = 1.0


class Workspace:
    """Memory that one worker reuses for all its blocks, by name."""

    def __init__(self) -> None:
        self._memory: dict[str, Tensor] = {}

    def take(self, name: str, like: Tensor, columns: int) -> Tensor:
        """Return `[rows of like, columns]` in full precision, contiguous, with undefined contents."""
        size = like.shape[0] * columns
        memory = self._memory.get(name)
        if memory is None or memory.numel() < size:
            memory = self._memory[name] = torch.empty(size, dtype=full_precision_of(like), device=like.device)
        return memory[:size].view(like.shape[0], columns)


@dataclass(frozen=True)
class BlockSpec:
    """What to compute for every block; weights of rows are factors in the gradient."""

    terms: Terms  # the divergence and its settings
    temperature: float  # 1 for a divergence without temperature
    columns: int  # the number of leading columns that are compared
    student: Softening
    teacher: Softening
    owns_teacher: bool  # whether the teacher's chunk may be overwritten
    labels: Tensor | None  # `[n]` ids
    smoothing: float
    label_weights: Tensor | None  # `[n]`, 0 for ignored rows
    row_weights: Tensor | None  # `[n]` of the divergence; None means 1
    has_zero_weights: bool  # whether a row weight is 0
    may_block: bool  # whether −inf can occur on either side
    wants_gradient: bool

    @property
    def row_vectors(self) -> tuple[Tensor | None, ...]:
        """Labels, label weights and row weights."""
        return self.labels, self.label_weights, self.row_weights

    def with_row_vectors(self, *vectors: Tensor | None) -> BlockSpec:
        """Return a copy with other labels, label weights and row weights."""
        labels, label_weights, row_weights = vectors
        return replace(self, labels=labels, label_weights=label_weights, row_weights=row_weights)

    def at(self, rows: slice) -> BlockSpec:
        """Return the specification of some of the rows."""
        return self.with_row_vectors(*(None if vector is None else vector[rows] for vector in self.row_vectors))


@dataclass
class LabelStats:
    """Labels of a block, all `[r 1]`: ids (0 where ignored), whether each is known, and the target's mean logit."""

    ids: Tensor
    known: Tensor
    logit: Tensor

    def loss(self, log_normaliser: Tensor) -> Tensor:
        """Return the cross-entropy `[r]`, 0 where ignored."""
        return (log_normaliser - self.logit).masked_fill(~self.known, 0.0)[:, 0]


@dataclass
class StudentProbs:
    """Student probabilities at T = 1, as `unscaled [r v]` times `scale [r 1]`, and the labels' loss `value [r]`."""

    unscaled: Tensor
    scale: Tensor | float
    value: Tensor


def full_precision_of(rows: Tensor) -> torch.dtype:
    """Return fp64 for fp64 rows, else fp32."""
    return torch.float64 if rows.dtype == torch.float64 else torch.float32


def blend_block(
    student: Tensor, teacher: Tensor | TeacherSparse | None, spec: BlockSpec, workspace: Workspace, *, into: Tensor
) -> tuple[Tensor | None, Tensor | None]:
    """Return the labels' loss and the divergence of each row `[r]`, before weights; None for a missing term.

    Args:
        student: `[r v]` products, overwritten.
        teacher: `[r columns]` products (overwritten) or logits (only read), or sparse targets.
        spec: what to compute, with labels and weights of these rows.
        workspace: memory for intermediate results.
        into: where the gradient is written: `student`, or `teacher` if it may be overwritten.
    """
    softened, slope = soften(student, spec.student, workspace, "student", wants_slope=spec.wants_gradient)
    labels = None if spec.labels is None else _label_stats(softened, spec, spec.labels)
    all_columns = spec.columns == student.shape[1]
    theirs, has_kernel = teacher, False
    if isinstance(teacher, Tensor):
        theirs, _ = soften(
            teacher, spec.teacher, workspace, "teacher", like=softened, overwrite=spec.owns_teacher, wants_slope=False
        )
        has_kernel = spec.terms.divergence in KERNELS and not (spec.may_block and any_blocked(softened, theirs))
    probs = result = None
    if labels is not None and not (has_kernel and all_columns and spec.temperature in POWERS):
        # Computed before `softened` is overwritten.
        unscaled = torch.mul(softened, spec.temperature, out=workspace.take("probabilities", student, student.shape[1]))
        probs = StudentProbs(unscaled, 1.0, labels.loss(softmax_(unscaled)))
    if theirs is not None:
        ours = softened
        if not all_columns:
            ours = workspace.take("compared", student, spec.columns).copy_(softened[:, : spec.columns])
        if isinstance(theirs, TeacherSparse):
            result = compare_sparse(ours, theirs, spec)
        elif has_kernel:
            result = compare_in_place(ours, theirs, spec, workspace)
        else:
            result = compare_plainly(ours, theirs, spec)
        if labels is not None and probs is None:
            probs = _probs_as_power(result, int(spec.temperature), labels)
    if spec.wants_gradient:
        _write_gradient(into, result, probs, labels, slope, spec)
    return None if probs is None else probs.value, None if result is None else result.value


def soften(
    rows: Tensor,
    how: Softening,
    workspace: Workspace,
    name: str,
    *,
    like: Tensor | None = None,
    overwrite: bool = True,
    wants_slope: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """Return softened logits `[r v]` in the full precision of `like` (default: `rows`), and if capped 1 − tanh²."""
    v, like = rows.shape[1], rows if like is None else like
    if overwrite and rows.dtype == full_precision_of(like) and rows.is_contiguous():
        x = rows
    else:
        x = workspace.take(name, like, v).copy_(rows)
    if how.before != 1.0:
        x.mul_(how.before)
    if not how.capped:
        return x, None
    x.tanh_()
    slope = torch.mul(x, x, out=workspace.take(f"slope of {name}", like, v)).neg_().add_(1) if wants_slope else None
    return x.mul_(how.after), slope


def softmax_(x: Tensor) -> Tensor:
    """Replace each row by its softmax; return the log of the normaliser `[r 1]`.

    Uses powers of two if possible: eager `exp2` costs a quarter of `exp`, and is more accurate over long rows.
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


def any_blocked(*rows: Tensor) -> bool:
    """Return whether a column is −inf, even beside NaN. Synchronises on an accelerator.

    Looks at the minimum first, which costs one short pass.
    """

    def is_blocking(x: Tensor) -> bool:
        least = x.amin()
        return bool((least == -math.inf) | least.isnan()) and bool(x.isneginf().any())

    return any(is_blocking(x) for x in rows if x.numel() > 0)


def compare_in_place(student: Tensor, teacher: Tensor, spec: BlockSpec, workspace: Workspace) -> BlockResult:
    """A divergence of the KL family, without −inf. Both blocks of softened logits are overwritten."""
    columns = student.shape[1]
    difference = torch.sub(teacher, student, out=workspace.take("difference", student, columns))
    log_normaliser = softmax_(student)
    shift = log_normaliser - softmax_(teacher)
    block = Block(student, teacher, difference, shift, lambda: workspace.take("scratch", student, columns))
    result = KERNELS[spec.terms.divergence](block, **spec.terms.settings)
    result.q, result.log_normaliser = student, log_normaliser
    return result


def compare_plainly(student: Tensor, teacher: Tensor, spec: BlockSpec) -> BlockResult:
    """Any divergence whose rows are independent, with −inf, by its function and autograd. Blocks are only read."""
    settings = spec.terms.settings
    if PROPERTIES[spec.terms.divergence].wants_target:
        labels = spec.labels
        target = None if labels is None else labels.masked_fill(labels >= spec.columns, IGNORED)
        settings = {**settings, "target": target}
    function = DIVERGENCES[spec.terms.divergence]
    return _by_autograd(lambda rows: function(rows, teacher, **settings), student, spec)


def compare_sparse(student: Tensor, teacher: TeacherSparse, spec: BlockSpec) -> BlockResult:
    """A divergence of k columns and a bucket for the others, or from samples. `student` may be overwritten."""
    theirs = teacher.logits.to(student.dtype) / spec.temperature
    if teacher.weights is not None:
        return _compare_samples(student, teacher.ids, theirs, teacher.weights.to(student.dtype))
    theirs = theirs.masked_fill(teacher.ids < 0, -math.inf)
    tail = teacher.tail
    if tail is None:
        tail = torch.log1p(-theirs.exp().sum(-1).clamp(max=1 - LEAST_TAIL))
    outcomes, function = teacher_outcomes(theirs, tail.to(theirs)), DIVERGENCES[spec.terms.divergence]
    return _by_autograd(
        lambda rows: function(student_outcomes(rows, teacher.ids), outcomes, **spec.terms.settings), student, spec
    )


def _compare_samples(student: Tensor, ids: Tensor, log_p: Tensor, weights: Tensor) -> BlockResult:
    """`sparse.sampled_forward_kl` in place: Σ_k w_k (log p_k − x_k) + Σ w · log Σ eˣ, without columns that are −inf."""
    missing = ids < 0
    ids = ids.clamp(min=0)
    ours = student.gather(1, ids).masked_fill(missing, -math.inf)
    known = ours > -math.inf
    weights = weights.masked_fill(~known, 0.0)
    log_normaliser = softmax_(student)
    value = (weights * torch.where(known, log_p - ours + log_normaliser, 0.0)).sum(-1)
    return BlockResult(value, student.mul_(weights.sum(-1, keepdim=True)).scatter_add_(1, ids, -weights))


def _by_autograd(function: Callable[[Tensor], Tensor], student: Tensor, spec: BlockSpec) -> BlockResult:
    if not spec.wants_gradient:
        return BlockResult(function(student), student)
    with torch.enable_grad():
        leaf = student.detach().requires_grad_()
        value = function(leaf)
        (gradient,) = torch.autograd.grad(value.sum(), leaf)
    return BlockResult(value.detach(), gradient)


def _label_stats(softened: Tensor, spec: BlockSpec, labels: Tensor) -> LabelStats:
    known = (labels != IGNORED)[:, None]
    ids = labels[:, None].masked_fill(~known, 0)
    logit = softened.gather(1, ids)
    if spec.smoothing > 0:
        logit = torch.lerp(logit, softened.mean(-1, keepdim=True), spec.smoothing)
    return LabelStats(ids, known, logit * spec.temperature)


def _probs_as_power(result: BlockResult, temperature: int, labels: LabelStats) -> StudentProbs:
    """softmax(s) from q = softmax(s / T): qᵀ over its sum; log Σ eˢ = T · log Σ e^(s/T) + log Σ qᵀ."""
    assert result.q is not None and result.log_normaliser is not None and result.free is not None
    if temperature == 1:
        return StudentProbs(result.q, 1.0, labels.loss(result.log_normaliser))
    power = torch.mul(result.q, result.q, out=result.free)
    if temperature > 2:
        power.mul_(result.q if temperature == 3 else power)
    total = power.sum(-1, keepdim=True)
    return StudentProbs(power, total.reciprocal(), labels.loss(temperature * result.log_normaliser + total.log()))


def _write_gradient(
    into: Tensor,
    result: BlockResult | None,
    probs: StudentProbs | None,
    labels: LabelStats | None,
    slope: Tensor | None,
    spec: BlockSpec,
) -> None:
    """label weight · (probabilities − target) + row weight · gradient of the divergence, times the slope."""
    gradient = None if result is None else result.gradient
    if gradient is not None and spec.row_weights is not None:
        weights = spec.row_weights[:, None]
        gradient.mul_(weights)
        if spec.has_zero_weights:  # 0 · NaN
            gradient.masked_fill_(weights == 0, 0.0)
    if probs is not None and labels is not None and spec.label_weights is not None:
        weights = spec.label_weights[:, None]
        gradient = _add_probs(gradient, probs, weights * probs.scale, into=into)
        if torch.compiler.is_compiling():  # one more term of a pass, where a scatter would be a pass of its own
            at_label = torch.arange(gradient.shape[1], device=gradient.device) == labels.ids
            gradient.add_(torch.where(at_label, weights * (spec.smoothing - 1), 0.0))
        else:
            gradient.scatter_add_(1, labels.ids, weights * (spec.smoothing - 1))
        if spec.smoothing > 0:
            gradient.sub_(weights * (spec.smoothing / gradient.shape[1]))
    assert gradient is not None
    if slope is not None:
        gradient.mul_(slope)
    if gradient is not into:
        into.copy_(gradient)


def _add_probs(gradient: Tensor | None, probs: StudentProbs, factors: Tensor, *, into: Tensor) -> Tensor:
    """`factors` · probabilities + gradient, in full precision; written to `into` if that is in full precision."""
    if gradient is None:
        return probs.unscaled.mul_(factors)
    columns = gradient.shape[1]
    if columns == probs.unscaled.shape[1]:
        out = into if into.dtype == gradient.dtype and into.is_contiguous() else gradient
        return torch.addcmul(gradient, probs.unscaled, factors, out=out)
    out = probs.unscaled.mul_(factors)
    out[:, :columns].add_(gradient)
    return out
