"""One call of the fused loss made ready: products, factors, weights of rows, rows a chunk. It computes no loss."""

from __future__ import annotations

import torch
from torch import Tensor

from hf_distill.functional.fused_blocks import Work
from hf_distill.functional.fused_chunks import BUDGET, BUDGET_16_BITS, OF_THE_SUM, Product, rows_a_chunk
from hf_distill.functional.fused_inputs import (
    IGNORED,
    FusedTeacher,
    Head,
    Labels,
    TeacherHidden,
    TeacherLogits,
    Terms,
    compared_columns,
)
from hf_distill.functional.fused_rows import Softening, full_precision_of
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
