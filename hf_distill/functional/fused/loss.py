"""The fused loss: the labels' and the teacher's terms, with gradients, from hidden rows and output heads in chunks."""

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
    SUM_SHARE,
    Buffer,
    HeadGradient,
    Product,
    for_each_block,
    rows_a_block,
    rows_a_chunk,
)
from hf_distill.functional.fused.compiled import blend_compiled, use_compiled
from hf_distill.functional.fused.inputs import (
    IGNORED,
    FusedTeacher,
    Head,
    Labels,
    TeacherHidden,
    TeacherLogits,
    TeacherSparse,
    Terms,
    check_inputs,
    compared_columns,
)
from hf_distill.functional.fused.rows import BlockSpec, Softening, Workspace, blend_block, full_precision_of
from hf_distill.functional.properties import PROPERTIES


@dataclass(frozen=True)
class FusedOutput:
    """Result of the fused loss.

    Attributes:
        loss: labels_factor · labels_total + divergence_factor · T^p · divergence_total, a scalar with the student's
            graph; p is the divergence's `temperature_power`. Its backward can run once.
        labels_total: scalar without graph, including the weights of rows but not the factor; 0 without labels.
        divergence_total: scalar without graph, including the weights of rows but not factor and T^p; 0 without teacher.
        divergence_rows: `[n]` without graph, before weights; None without teacher.
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
) -> FusedOutput:
    """Cross-entropy with labels and a divergence from the teacher, as totals over the rows, with exact gradients.

    Equal to the plain computation (`DIVERGENCES` on whole logits, `cross_entropy`), but with memory for one chunk of
    rows. Products use the dtype of the inputs (autocast's if it is on), everything else fp32; the gradient of a 16-bit
    head is summed over the chunks in fp32. Tensors that need no gradient cost no product. Gradients are computed in
    the forward, chunk by chunk, as in Hsu et al. 2024 (Liger Kernel, section 3.2) for a cross-entropy; here with any
    divergence, and without the teacher's logits.

    Args:
        student_hidden: `[n d]` rows that count.
        student_head: its head, tied or not.
        teacher: `TeacherHidden`, `TeacherLogits` or `TeacherSparse`, never written to; None for labels only.
        terms: divergence, temperature and factors.
        labels: `[n]` ids, -100 for a row without label, or `Labels`; None for no labels' term.
        row_weights: `[n]` weight of each row in the divergence; where it is 0 the teacher's row may be NaN.
        budget_bytes: memory for one chunk of both sides' logits; the default is 96 MiB in 16 bits and 384 MiB in 32, or
            a third of the head's fp32 gradient if that is more. A chunk never has more than 512 rows.
        compiled: whether to use `torch.compile`, which takes seconds once; the default is true on CUDA with Triton.
            Unsupported blocks (sparse targets, −inf, divergences outside the KL family) stay eager.

    Raises:
        SettingError: if settings are invalid, heads differ in width without `columns`, or there are neither labels nor
            a teacher.
        DataError: if shapes or dtypes do not fit.

    >>> rows = torch.tensor([[2.0, 0.0, 1.0]], requires_grad=True)
    >>> teacher = TeacherHidden(rows.detach(), Head(torch.eye(3)))
    >>> output = fused_linear_distillation(rows, Head(torch.eye(3)), teacher=teacher, terms=Terms(temperature=2.0))
    >>> output.loss.backward()
    >>> output.divergence_total.item(), rows.grad.tolist()
    (0.0, [[0.0, 0.0, 0.0]])
    """
    labels = Labels(labels) if isinstance(labels, Tensor) else labels
    if labels is None and teacher is None:
        raise SettingError("neither labels nor a teacher: there is nothing to learn from. Pass one of them.")
    check_inputs(student_hidden, student_head, teacher, labels, row_weights)
    tensors = (student_hidden, student_head.weight, student_head.bias)
    wants = [torch.is_grad_enabled() and x is not None and x.requires_grad for x in tensors]
    with torch.no_grad():
        call = FusedCall(student_hidden, student_head, teacher, terms, labels, row_weights, wants, budget_bytes)
        call.compiled = use_compiled(compiled, student_hidden.device)
    loss, labels_total, divergence_total, divergence_rows = _Fused.apply(*tensors, call)
    return FusedOutput(loss, labels_total, divergence_total, None if teacher is None else divergence_rows)


class FusedCall:
    """One prepared call: products, factors, chunk sizes. The student's tensors are passed to `run`."""

    compiled = False

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
        self.teacher, self.labels, self.wants, self.value_weights = teacher, labels, wants, row_weights
        self.full = full_precision_of(hidden)
        properties, v = PROPERTIES[terms.divergence], head.weight.shape[0]
        temperature = terms.temperature if properties.softens and teacher is not None else 1.0
        columns = v if teacher is None else compared_columns(terms, v, teacher)
        student = self.student = Product(head, hidden, columns if labels is None else v, temperature)
        theirs = self.teacher_product = None
        if isinstance(teacher, TeacherHidden):
            theirs = self.teacher_product = Product(teacher.head, teacher.hidden, columns, temperature)
        label_weights, scaled_row_weights = self._set_factors(
            hidden.shape[0], terms, temperature, properties.temperature_power, head.logit_scale
        )
        self.spec = BlockSpec(
            terms=terms,
            temperature=temperature,
            columns=columns,
            student=student.softening,
            teacher=Softening(1 / temperature) if theirs is None else theirs.softening,
            owns_teacher=theirs is not None,
            labels=None if labels is None else labels.ids,
            smoothing=0.0 if labels is None else labels.smoothing,
            label_weights=label_weights,
            row_weights=scaled_row_weights,
            has_zero_weights=row_weights is not None and bool((row_weights == 0).any()),
            may_block=isinstance(teacher, TeacherLogits)
            or any(p is not None and p.may_block() for p in (student, theirs)),
            wants_gradient=any(wants),
        )
        default = BUDGET_16_BITS if student.dtype.itemsize == 2 else BUDGET
        if wants[1]:  # a chunk that is small beside the sum of the head's gradient does not raise the peak
            default = max(default, head.weight.numel() * self.full.itemsize // SUM_SHARE)
        self.rows = rows_a_chunk(
            hidden.shape[0],
            student.row_bytes,
            0 if theirs is None else theirs.row_bytes,
            budget or default,
            over_teacher=theirs is not None and (theirs.columns, theirs.dtype) == (student.columns, student.dtype),
        )

    def _set_factors(
        self, n: int, terms: Terms, temperature: float, power: int, logit_scale: float
    ) -> tuple[Tensor | None, Tensor | None]:
        """Split the factors of the gradient into one for all rows (`unit`) and one for each row; return the latter.

        `unit` is multiplied in last, so that a gradient in fp16 does not vanish under a small factor. In 16 bits it is
        a power of two, so that the gradient at the hidden rows is not rounded once more.
        """
        device = self.student.weight.device
        self.labels_factor, divergence_factor = (
            torch.as_tensor(factor, dtype=self.full, device=device)
            for factor in (terms.labels_factor, terms.divergence_factor)
        )
        self.divergence_factor = divergence_factor * temperature**power
        softened = self.divergence_factor / temperature  # at the logits, not at logits / T
        parts = [self.labels_factor.abs()] if self.labels is not None else []
        parts += [softened.abs()] if self.teacher is not None else []
        largest = torch.stack(parts).amax() * logit_scale
        self.unit = torch.where(largest > 0, largest, torch.ones_like(largest))
        if self.student.dtype.itemsize == 2:
            self.unit = torch.ldexp(torch.ones_like(self.unit), torch.frexp(self.unit).exponent - 1)
        unit = self.unit / logit_scale
        label_weights = None
        if self.labels is not None:
            known = (self.labels.ids != IGNORED).to(self.full)
            weights = known if self.labels.weights is None else known * self.labels.weights.to(self.full)
            label_weights = self.labels_factor / unit * weights
        weight = softened / unit
        if self.value_weights is not None:
            return label_weights, weight * self.value_weights.to(self.full)
        if self.teacher is None or (weight.is_cpu and weight == 1):  # reading it on an accelerator would synchronise
            return label_weights, None
        return label_weights, weight.expand(n)

    def run(self, hidden: Tensor, gradients: _Gradients) -> Tensor:
        """Process all chunks; return the values `[2 n]` of the labels' term and the divergence."""
        n, student, teacher = hidden.shape[0], self.student, self.teacher_product
        whole, part = self.rows.whole, self.rows.part
        values = torch.zeros(2, n, dtype=self.full, device=hidden.device)
        low = hidden.to(student.dtype)
        buffer = Buffer(None if gradients.head is None else gradients.head.spare())
        ours = buffer.take(part, student.columns, student.dtype, hidden.device)
        theirs = None
        if teacher is not None:
            theirs = buffer.take(whole, teacher.columns, teacher.dtype, hidden.device)
        alone = self.compiled or hidden.device.type != "cpu"  # a block then has threads of its own
        workers = [Workspace() for _ in range(1 if alone else torch.get_num_threads())]
        for first in range(0, n, whole):
            stop = min(first + whole, n)
            if teacher is not None and theirs is not None and isinstance(self.teacher, TeacherHidden):
                teacher.into(theirs, self.teacher.hidden[first:stop].to(teacher.dtype))
            at_logits = theirs if theirs is not None and part < whole else ours
            for begin in range(first, stop, part):
                end = min(begin + part, stop)
                logits = student.into(ours, low[begin:end])
                their_logits = None if theirs is None else theirs[begin - first : end - first]
                into = logits if at_logits is ours or their_logits is None else their_logits
                self._process(logits, their_logits, into, values[:, begin:end], begin, workers)
            if self.spec.wants_gradient:
                gradients.add(at_logits[: stop - first], low[first:stop], slice(first, stop))
        return values

    def _process(
        self, logits: Tensor, theirs: Tensor | None, into: Tensor, values: Tensor, begin: int, workers: list[Workspace]
    ) -> None:
        """Process rows from `begin` on in blocks; write `values [2 m]` and, to `into`, the gradient at the logits."""
        blend = blend_compiled if self.compiled else blend_block

        def work(part: slice, workspace: Workspace) -> None:
            rows = slice(begin + part.start, begin + part.stop)
            teacher: Tensor | TeacherSparse | None = None if theirs is None else theirs[part]
            if isinstance(self.teacher, (TeacherLogits, TeacherSparse)):
                teacher = self.teacher.rows(rows, self.spec.columns)
            ours = logits[part]
            found = blend(ours, teacher, self.spec.at(rows), workspace, into=ours if into is logits else into[part])
            for row, value in zip(values, found, strict=True):
                if value is not None:
                    row[part] = value

        for_each_block(len(logits), rows_a_block(len(logits), logits.shape[1], logits.device), work, workers)


class _Fused(torch.autograd.Function):
    """Computes values and gradients in the forward; the backward multiplies the gradients by the incoming one."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, call: FusedCall) -> tuple[Tensor, ...]:
        with torch.autocast(hidden.device.type, enabled=False):
            gradients = _Gradients(hidden, weight, bias, call)
            label_rows, divergence_rows = call.run(hidden, gradients)
            gradients.weight = None  # the cast copy is not needed any more
        labels_total = _total(label_rows, None if call.labels is None else call.labels.weights)
        divergence_total = _total(divergence_rows, call.value_weights)
        loss = call.labels_factor * labels_total + call.divergence_factor * divergence_total
        ctx.gradients = gradients
        ctx.mark_non_differentiable(labels_total, divergence_total, divergence_rows)
        return loss, labels_total, divergence_total, divergence_rows

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is None:
            raise RuntimeError(
                "the fused loss released its gradients in its first backward, to save memory. Call "
                "fused_linear_distillation again for a second backward."
            )
        return (*gradients.release(grad_loss), None)


def _total(values: Tensor, weights: Tensor | None) -> Tensor:
    """The weighted sum of the rows, without rows of weight 0, which may be NaN."""
    return values.sum() if weights is None else (values * weights).masked_fill(weights == 0, 0.0).sum()


class _Gradients:
    """The student's gradients, accumulated over chunks, without the factor that all rows share."""

    def __init__(self, hidden: Tensor, weight: Tensor, bias: Tensor | None, call: FusedCall) -> None:
        self.weight: Tensor | None = call.student.weight
        self._full, self._unit, dtype = call.full, call.unit, call.student.dtype
        self.hidden = torch.empty(hidden.shape, dtype=dtype, device=hidden.device) if call.wants[0] else None
        self.head = HeadGradient(weight, dtype) if call.wants[1] else None
        self.bias = torch.zeros(weight.shape[0], dtype=call.full, device=hidden.device) if call.wants[2] else None
        self._dtypes = (hidden.dtype, None if bias is None else bias.dtype)

    def add(self, at_logits: Tensor, hidden: Tensor, rows: slice) -> None:
        """Add the gradients of one chunk: `[m v]` at the logits, for hidden rows `[m d]`."""
        if self.hidden is not None:
            assert self.weight is not None
            torch.mm(at_logits, self.weight, out=self.hidden[rows])
        if self.head is not None:
            self.head.add(at_logits, hidden)
        if self.bias is not None:
            self.bias[: at_logits.shape[1]] += at_logits.sum(0, dtype=self._full)

    def release(self, grad_loss: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Return the gradients of hidden rows, weight and bias in their dtypes, times the shared factor."""
        factor = self._unit * grad_loss.to(self._full)
        hidden, bias = (
            None if x is None else (x.to(self._full) * factor).to(dtype)
            for x, dtype in zip((self.hidden, self.bias), self._dtypes, strict=True)
        )
        return hidden, None if self.head is None else self.head.release(factor), bias
