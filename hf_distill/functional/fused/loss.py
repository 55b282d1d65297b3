"""One call of the fused loss made ready: products, factors, weights of rows, rows a chunk. It computes no loss."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from hf_distill.errors import SettingError
from hf_distill.functional.fused.chunks import (
    BUDGET,
    BUDGET_16_BITS,
    OF_THE_SUM,
    HeadGradient,
    Product,
    Space,
    for_each_block,
    rows_a_block,
    rows_a_chunk,
)
from hf_distill.functional.fused.compiled import blend_compiled, goes_compiled
from hf_distill.functional.fused.inputs import (
    IGNORED,
    FusedTeacher,
    Head,
    Labels,
    TeacherHidden,
    TeacherLogits,
    TeacherSparse,
    Terms,
    compared_columns,
    refuse_what_does_not_fit,
)
from hf_distill.functional.fused.rows import Room, Softening, Work, blend_block, full_precision_of
from hf_distill.functional.properties import PROPERTIES


class Job:
    """One call, made ready: products, weights of rows, chunk sizes. The student's tensors come with the call."""

    def __init__(
        self,
        hidden: Tensor,
        head: Head,
        teacher: FusedTeacher | None,
        terms: Terms,
        labels: Labels | None,
        row_weights: Tensor | None,
        wants: list[bool],
        budget: int | None,
    ) -> None:
        self.teacher, self.labels, self.wants = teacher, labels, wants
        self.compiled = False
        self.full = full_precision_of(hidden)
        properties = PROPERTIES[terms.divergence]
        self.temperature = terms.temperature if properties.softens and teacher is not None else 1.0
        v = head.weight.shape[0]
        columns = v if teacher is None else compared_columns(terms, v, teacher)
        self.product = Product(
            head,
            dtype=head.dtype or _product_dtype(hidden),
            columns=v if labels is not None else columns,
            temperature=self.temperature,
        )
        self.of_teacher = None
        softening = Softening(1 / self.temperature)
        if isinstance(teacher, TeacherHidden):
            self.of_teacher = Product(
                teacher.head,
                dtype=teacher.head.dtype or _product_dtype(teacher.hidden),
                columns=columns,
                temperature=self.temperature,
            )
            softening = self.of_teacher.softening
        self._set_factors(terms, properties.temperature_power, row_weights, head.logit_scale)
        self.work = Work(
            terms=terms,
            temperature=self.temperature,
            columns=columns,
            student=self.product.softening,
            teacher=softening,
            teacher_is_ours=self.of_teacher is not None,
            labels=None if labels is None else labels.ids,
            smoothing=0.0 if labels is None else labels.smoothing,
            label_weights=self.label_weights,
            row_weights=self.row_weights,
            some_weigh_nothing=row_weights is not None and bool((row_weights == 0).any()),
            may_block=isinstance(teacher, TeacherLogits)
            or self.product.may_block()
            or (self.of_teacher is not None and self.of_teacher.may_block()),
            wants_gradient=any(wants),
        )
        ours, theirs = self.product, self.of_teacher
        self.rows = rows_a_chunk(
            hidden.shape[0],
            ours.columns * ours.dtype.itemsize,
            0 if theirs is None else theirs.columns * theirs.dtype.itemsize,
            budget or self._budget(head.weight),
            over_teacher=theirs is not None and (ours.columns, ours.dtype) == (theirs.columns, theirs.dtype),
        )

    def _budget(self, weight: Tensor) -> int:
        """Bytes for both sides' logits of a chunk: little beside the sum of the head's gradient is nothing."""
        least = BUDGET_16_BITS if self.product.dtype.itemsize == 2 else BUDGET
        return max(least, weight.numel() * self.full.itemsize // OF_THE_SUM) if self.wants[1] else least

    def _set_factors(self, terms: Terms, power: int, row_weights: Tensor | None, logit_scale: float) -> None:
        """Split each factor of the gradient into what all rows share (`unit`) and what a row has of it.

        The shared part is multiplied in last, so that a gradient in fp16 does not vanish under a small factor. In 16
        bits it is a power of two, so that the gradient at the hidden rows is not rounded once more.
        """
        device = self.product.weight.device
        of_labels, of_divergence = (
            torch.as_tensor(factor, dtype=self.full, device=device)
            for factor in (terms.labels_factor, terms.divergence_factor)
        )
        self.labels_factor = of_labels
        self.divergence_factor = of_divergence * self.temperature**power
        softened = self.divergence_factor / self.temperature  # of the gradient at the logits, not at logits / T
        parts = [of_labels.abs()] if self.labels is not None else []
        parts += [softened.abs()] if self.teacher is not None else []
        largest = torch.stack(parts).amax() * logit_scale
        self.unit = torch.where(largest > 0, largest, torch.ones_like(largest))
        if self.product.dtype.itemsize == 2:
            self.unit = torch.ldexp(torch.ones_like(self.unit), torch.frexp(self.unit).exponent - 1)
        unit = self.unit / logit_scale
        self.label_weights = None
        if self.labels is not None:
            known = (self.labels.ids != IGNORED).to(self.full)
            given = known if self.labels.weights is None else known * self.labels.weights.to(self.full)
            self.label_weights = of_labels / unit * given
        self.value_weights = row_weights
        weight = softened / unit
        self.row_weights: Tensor | None = None
        if row_weights is not None:
            self.row_weights = weight * row_weights.to(self.full)
        elif not (weight.is_cpu and weight == 1):  # without a look at it on an accelerator
            n = 0 if self.teacher is None else _rows_of(self.teacher)
            self.row_weights = weight.expand(n)


def _rows_of(teacher: FusedTeacher) -> int:
    return (teacher.hidden if isinstance(teacher, TeacherHidden) else teacher.logits).shape[0]


def _product_dtype(hidden: Tensor) -> torch.dtype:
    """That of the rows, or of autocast where it is on; fp64 is left alone, as autocast does."""
    device = hidden.device.type
    if torch.is_autocast_enabled(device) and hidden.dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    return hidden.dtype


@dataclass(frozen=True)
class FusedLoss:
    """What came of the rows.

    Attributes:
        loss: scalar with the student's graph: labels_factor · labels_total + divergence_factor · T^p ·
            divergence_total, with p of `PROPERTIES`. Its backward can run once.
        labels_total, divergence_total: scalars without a graph; weights of rows are in them, factors and T^p not. 0
            where there is no such term.
        divergence_rows: `[n]` without a graph, before weights; None where there is no teacher.
    """

    loss: Tensor
    labels_total: Tensor
    divergence_total: Tensor
    divergence_rows: Tensor | None


@torch.compiler.disable
def fused_linear_distillation(
    student_hidden: Tensor,
    student_head: Head,
    *,
    teacher: FusedTeacher | None,
    terms: Terms,
    labels: Labels | Tensor | None = None,
    row_weights: Tensor | None = None,
    budget_bytes: int | None = None,
    compiled: bool | None = None,
) -> FusedLoss:
    """Cross-entropy with labels and a divergence from the teacher, as totals over the rows, with exact gradients.

    The same numbers as the plain path (`DIVERGENCES` on whole logits, `cross_entropy`), with memory for a chunk of
    rows. Products are in the inputs' type (that of autocast where it is on), everything else in fp32, and the
    gradient of a 16-bit head is summed in fp32 over the chunks. Whatever needs no gradient costs no product.

    Args:
        student_hidden: `[n d]` rows that count. student_head: its head; tied or not makes no difference.
        teacher: `TeacherHidden`, `TeacherLogits` or `TeacherSparse`, never written to; None: labels only.
        terms: divergence, temperature, factors.
        labels: `[n]` ids, -100 where there is none, or `Labels`; None: no such term.
        row_weights: `[n]` weight of a row in the divergence; where it is 0 the teacher may say NaN.
        budget_bytes: for the logits of one chunk of both sides; None: 96 MiB in 16 bits, 384 MiB in 32, or a third of
            the head's gradient in fp32 if that is more; never more than 512 rows.
        compiled: whether blocks go through `torch.compile`, which takes seconds once; None: on CUDA, where Triton is.
            What it does not carry (sparse targets, −inf, divergences outside of the KL family) stays eager.

    Raises:
        SettingError: a setting that cannot be, heads of different width without `columns`, neither labels nor teacher.
        DataError: shapes or types that do not fit.

    Gradients in the forward, chunk by chunk: Hsu et al. 2024, Liger Kernel, section 3.2, for a cross-entropy. Here
    with any divergence, and without the teacher's logits.

    >>> rows = torch.tensor([[2.0, 0.0, 1.0]], requires_grad=True)
    >>> teacher = TeacherHidden(rows.detach(), Head(torch.eye(3)))
    >>> found = fused_linear_distillation(rows, Head(torch.eye(3)), teacher=teacher, terms=Terms(temperature=2.0))
    >>> found.loss.backward()
    >>> found.divergence_total.item(), rows.grad.tolist()
    (0.0, [[0.0, 0.0, 0.0]])
    """
    labels = Labels(labels) if isinstance(labels, Tensor) else labels
    if labels is None and teacher is None:
        raise SettingError("neither labels nor a teacher: there is nothing to learn from. Pass one of them.")
    refuse_what_does_not_fit(student_hidden, student_head, teacher, labels, row_weights)
    tensors = (student_hidden, student_head.weight, student_head.bias)
    wants = [torch.is_grad_enabled() and x is not None and x.requires_grad for x in tensors]
    with torch.no_grad():
        job = Job(student_hidden, student_head, teacher, terms, labels, row_weights, wants, budget_bytes)
        job.compiled = goes_compiled(compiled, student_hidden.device)
    loss, labels_total, divergence_total, divergence_rows = _Fused.apply(*tensors, job)
    return FusedLoss(loss, labels_total, divergence_total, None if teacher is None else divergence_rows)


class _Fused(torch.autograd.Function):
    """Makes values and gradients in the forward; the backward multiplies them by what comes from above."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, job: Job) -> tuple[Tensor, ...]:
        with torch.autocast(hidden.device.type, enabled=False):
            gradients = _Gradients(hidden, weight, bias, job)
            of_labels, of_divergence = _run(hidden, job, gradients)
            gradients.complete()
        weights = None if job.labels is None else job.labels.weights
        labels_total = _total(of_labels, weights)
        divergence_total = _total(of_divergence, job.value_weights)
        loss = job.labels_factor * labels_total + job.divergence_factor * divergence_total
        ctx.gradients = gradients
        ctx.mark_non_differentiable(labels_total, divergence_total, of_divergence)
        return loss, labels_total, divergence_total, of_divergence

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, from_above: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is None:
            raise RuntimeError(
                "the fused loss gave its gradients away in its first backward, to hold them only once. Call "
                "fused_linear_distillation again for a second backward."
            )
        return (*gradients.hand_out(from_above), None)


def _total(values: Tensor, weights: Tensor | None) -> Tensor:
    """Sum of the rows that weigh something: 0 · NaN is 0 here."""
    if weights is None:
        return values.sum()
    return (values * weights).masked_fill(weights == 0, 0.0).sum()


class _Gradients:
    """The student's gradients as they grow, less the factor that all rows share."""

    def __init__(self, hidden: Tensor, weight: Tensor, bias: Tensor | None, job: Job) -> None:
        self._weight: Tensor | None = job.product.weight
        self._full, self._unit = job.full, job.unit
        self.hidden = torch.empty(hidden.shape, dtype=job.product.dtype, device=hidden.device) if job.wants[0] else None
        self.head = HeadGradient(weight, job.product.dtype) if job.wants[1] else None
        self.bias = torch.zeros(weight.shape[0], dtype=job.full, device=hidden.device) if job.wants[2] else None
        self.types = (hidden.dtype, None if bias is None else bias.dtype)

    def add(self, at_logits: Tensor, hidden: Tensor, rows: slice) -> None:
        """Of one chunk: `[m v]` at the logits, `[m d]` hidden rows."""
        if self.hidden is not None:
            assert self._weight is not None  # until they are complete
            torch.mm(at_logits, self._weight, out=self.hidden[rows])
        if self.head is not None:
            self.head.add(at_logits, hidden)
        if self.bias is not None:
            self.bias[: at_logits.shape[1]] += at_logits.sum(0, dtype=self._full)

    def complete(self) -> None:
        """Nothing is added any more: what was cast for the products is let go."""
        self._weight = None

    def hand_out(self, from_above: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """All three times the shared factor, in the types of what they belong to."""
        factor = self._unit * from_above.to(self._full)
        of_hidden, of_bias = (
            None if x is None else (x.to(self._full) * factor).to(dtype)
            for x, dtype in zip((self.hidden, self.bias), self.types, strict=True)
        )
        return of_hidden, None if self.head is None else self.head.hand_out(factor), of_bias


def _run(hidden: Tensor, job: Job, gradients: _Gradients) -> tuple[Tensor, Tensor]:
    """Every chunk: both sides' logits, their blocks, the gradients. Values of the labels' term and the divergence."""
    n, product, of_teacher = hidden.shape[0], job.product, job.of_teacher
    values = torch.zeros(2, n, dtype=job.full, device=hidden.device)
    low = hidden.to(product.dtype)
    space = Space(None if gradients.head is None else gradients.head.spare())
    ours = space.take(job.rows.part, product.columns, product.dtype, hidden.device)
    theirs = None
    if of_teacher is not None:
        theirs = space.take(job.rows.whole, of_teacher.columns, of_teacher.dtype, hidden.device)
    alone = job.compiled or hidden.device.type != "cpu"  # then what works off a block has threads of its own
    rooms = [Room() for _ in range(1 if alone else torch.get_num_threads())]
    for first in range(0, n, job.rows.whole):
        rows = slice(first, min(first + job.rows.whole, n))
        if of_teacher is not None and theirs is not None and isinstance(job.teacher, TeacherHidden):
            of_teacher.into(theirs, job.teacher.hidden[rows].to(of_teacher.dtype))
        at_logits = ours
        for begin in range(first, rows.stop, job.rows.part):
            part = slice(begin, min(begin + job.rows.part, rows.stop))
            logits = into = product.into(ours, low[part])
            there = None if theirs is None else theirs[begin - first : part.stop - first]
            if job.rows.part < job.rows.whole and theirs is not None and there is not None:
                at_logits, into = theirs, there
            _work_off(job, logits, there, into, part, values, rooms)
        if job.work.wants_gradient:
            gradients.add(at_logits[: rows.stop - first], low[rows], rows)
    return values[0], values[1]


def _work_off(
    job: Job,
    logits: Tensor,
    theirs: Tensor | None,
    into: Tensor,
    rows: slice,
    values: Tensor,
    rooms: list[Room],
) -> None:
    """Every block of `rows`: values into `values`, the gradient at the logits into `into`, one of the two sides."""

    blend = blend_compiled if job.compiled else blend_block

    def work(part: slice, room: Room) -> None:
        whole = slice(rows.start + part.start, rows.start + part.stop)
        teacher = _teacher_block(job, theirs, part, whole)
        ours = logits[part]
        found = blend(ours, teacher, job.work, whole, room, into=ours if into is logits else into[part])
        for row, value in zip(values, found, strict=True):
            if value is not None:
                row[whole] = value

    for_each_block(len(logits), rows_a_block(len(logits), logits.shape[1], logits.device), work, rooms)


def _teacher_block(job: Job, theirs: Tensor | None, part: slice, whole: slice) -> Tensor | TeacherSparse | None:
    """What the teacher shows of a block: `part` of the chunk, `whole` of the n rows."""
    if theirs is not None:
        return theirs[part]
    if isinstance(job.teacher, TeacherLogits):
        return job.teacher.logits[whole, : job.work.columns]
    if isinstance(job.teacher, TeacherSparse):
        tail, weights = job.teacher.tail, job.teacher.weights
        return TeacherSparse(
            job.teacher.ids[whole],
            job.teacher.logits[whole],
            None if tail is None else tail[whole],
            None if weights is None else weights[whole],
        )
    return None
