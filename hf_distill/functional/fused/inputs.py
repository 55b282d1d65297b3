"""Inputs of the fused loss: output heads, the teacher's rows, labels and terms, with the checks that they fit.

All rows are rows that count, selected by the caller. Student and teacher rows are paired by position.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from hf_distill.errors import DataError, SettingError, check_choice
from hf_distill.functional.properties import DIVERGENCE_ALIASES, DIVERGENCES, PROPERTIES, check_within
from hf_distill.functional.sparse import OUTCOME_DIVERGENCES, SAMPLE_DIVERGENCES

IGNORED = -100  # the label of a row without one


@dataclass(frozen=True)
class Head:
    """An output head: logits = cap · tanh(x / cap) with x = logit_scale · (hidden · weightᵀ + bias).

    Attributes:
        weight: `[v d]`.
        bias: `[v]`.
        logit_scale: a factor of the logits (Cohere's `logit_scale`, the inverse of Granite's `logits_scaling`).
        softcap: the bound of Gemma 2 (Gemma Team 2024, section 2); None means that logits are not bounded.
        dtype: the dtype of the product, to which rows and head are cast; None means autocast's dtype if it is on, else
            that of the rows.
    """

    weight: Tensor
    bias: Tensor | None = None
    logit_scale: float = 1.0
    softcap: float | None = None
    dtype: torch.dtype | None = None

    def __post_init__(self) -> None:
        if self.weight.dim() != 2 or (self.bias is not None and self.bias.shape != self.weight.shape[:1]):
            bias = None if self.bias is None else list(self.bias.shape)
            raise SettingError(f"a head is a weight [v d] and a bias [v]; got {list(self.weight.shape)} and {bias}.")
        check_within("logit_scale", self.logit_scale, "(0, inf)")
        check_within("softcap", 1.0 if self.softcap is None else self.softcap, "(0, inf)")

    def product_dtype(self, hidden: Tensor) -> torch.dtype:
        """Return the dtype of the product with these rows; fp64 rows stay fp64, as under autocast."""
        if self.dtype is not None or hidden.dtype == torch.float64:
            return self.dtype or hidden.dtype
        device = hidden.device.type
        return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype

    def check_rows(self, whose: str, hidden: Tensor) -> None:
        """Raise DataError if these hidden rows cannot be multiplied with the weight."""
        if hidden.dim() != 2 or hidden.shape[1] != self.weight.shape[1]:
            raise DataError(
                f"the {whose}'s hidden rows are {list(hidden.shape)} and its head is {list(self.weight.shape)}: rows "
                f"must be [n {self.weight.shape[1]}]. Flatten batch and time first."
            )
        is_cast = self.dtype is not None or torch.is_autocast_enabled(hidden.device.type)
        if not is_cast and hidden.dtype != self.weight.dtype:
            raise DataError(
                f"the {whose}'s hidden rows are {hidden.dtype} and its head is {self.weight.dtype}. Cast one of them, "
                "set Head(dtype=...), or run under autocast."
            )


@dataclass(frozen=True)
class TeacherHidden:
    """The teacher's last hidden rows `[n d]` and its head, from which logits are computed chunk by chunk."""

    hidden: Tensor
    head: Head


@dataclass(frozen=True)
class TeacherLogits:
    """The teacher's logits `[n v]`, as its head returned them. They are only read."""

    logits: Tensor

    def rows(self, rows: slice, columns: int) -> Tensor:
        """Return some rows of the first `columns` columns."""
        return self.logits[rows, :columns]


@dataclass(frozen=True)
class TeacherSparse:
    """Sparse targets: k columns a row and one bucket for all others, or weighted samples.

    A divergence of the k + 1 outcomes is at most that of all columns, and equal to it at k = v.

    Attributes:
        ids: `[n k]` distinct columns of each row; -1 fills rows that list fewer.
        logits: `[n k]` logits, or log-probabilities at temperature 1, of these columns.
        tail: `[n]` log of the sum of exp(logit / T) over all other columns, at the temperature of the loss; −inf if
            there are none. None means that `logits` are log-probabilities and the temperature is 1: the tail is then
            1 − Σ, but at least 1e-7, the size of rounding errors.
        weights: `[n k]` weights of samples. Then there is no bucket, and the only divergence is the forward KL
            Σ_k w_k (log p_k − log q_k) with q over all columns (`sparse.sampled_forward_kl`) and log p_k = logits / T.
    """

    ids: Tensor
    logits: Tensor
    tail: Tensor | None = None
    weights: Tensor | None = None

    def rows(self, rows: slice, columns: int) -> TeacherSparse:
        """Return some rows; `columns` has no effect, as columns are given by id."""
        tail = None if self.tail is None else self.tail[rows]
        return TeacherSparse(
            self.ids[rows], self.logits[rows], tail, None if self.weights is None else self.weights[rows]
        )


FusedTeacher = TeacherHidden | TeacherLogits | TeacherSparse


@dataclass(frozen=True)
class Labels:
    """The label of each row.

    Attributes:
        ids: `[n]` columns, -100 for a row without label.
        weights: `[n]` weight of each row in the labels' total; None means 1.
        smoothing: the share of the target that is spread over all columns, as Trainer's `label_smoothing_factor`.
    """

    ids: Tensor
    weights: Tensor | None = None
    smoothing: float = 0.0


@dataclass(frozen=True)
class Terms:
    """The divergence, and the factor of each total.

    Gradients are computed in the forward, so denominators must be known there: a factor is weight over denominator,
    such as (1 - alpha) / number of labels in the step. Tensor factors avoid a synchronisation on an accelerator.

    Attributes:
        divergence: a name in `DIVERGENCES` whose rows are independent.
        settings: keyword arguments of the divergence.
        temperature: divides the logits of both sides in the divergence, never in the labels' term.
        labels_factor: number or scalar tensor.
        divergence_factor: number or scalar tensor.
        columns: the number of leading columns of both heads that are compared, if the rest is padding; None means all,
            and then the heads must have equal widths. The labels' term covers the student's whole head.
    """

    divergence: str = "forward_kl"
    settings: Mapping[str, Any] = field(default_factory=dict)
    temperature: float = 1.0
    labels_factor: float | Tensor = 1.0
    divergence_factor: float | Tensor = 1.0
    columns: int | None = None

    def __post_init__(self) -> None:
        if self.divergence not in DIVERGENCES:
            check_choice("divergence", self.divergence, fusable(), DIVERGENCE_ALIASES)
        if PROPERTIES[self.divergence].couples_rows and self.settings.get("intra_weight", 1.0) != 0:
            raise SettingError(
                f"divergence={self.divergence!r} compares rows with each other, so it needs whole logits. In chunks "
                f"use one of {', '.join(fusable())}."
            )
        check_within("temperature", self.temperature, "(0, inf)")
        rows = torch.zeros(1, 2)
        try:
            DIVERGENCES[self.divergence](rows, rows, **self.settings)
        except TypeError as error:
            raise SettingError(f"settings={dict(self.settings)} of divergence={self.divergence!r}: {error}") from error


def fusable() -> list[str]:
    """Return the names of the divergences whose rows are independent."""
    return [name for name, properties in PROPERTIES.items() if not properties.couples_rows]


def check_inputs(
    hidden: Tensor, head: Head, teacher: FusedTeacher | None, labels: Labels | None, row_weights: Tensor | None
) -> None:
    """Raise DataError or SettingError if shapes, dtypes or labels do not fit, before anything is computed."""
    head.check_rows("student", hidden)
    n, v = hidden.shape[0], head.weight.shape[0]
    matrices: dict[str, Tensor] = {}
    vectors = {"row_weights": row_weights}
    if labels is not None:
        vectors |= {"labels": labels.ids, "label weights": labels.weights}
    if isinstance(teacher, TeacherHidden):
        teacher.head.check_rows("teacher", teacher.hidden)
        matrices["the teacher's hidden rows"] = teacher.hidden
    elif isinstance(teacher, TeacherLogits):
        matrices["the teacher's logits"] = teacher.logits
    elif teacher is not None:
        matrices["the teacher's ids"] = teacher.ids
        vectors["the sparse tail"] = teacher.tail
        for name, tensor in {"logits": teacher.logits, "weights": teacher.weights}.items():
            if tensor is not None and tensor.shape != teacher.ids.shape:
                raise DataError(f"sparse ids {list(teacher.ids.shape)} and {name} {list(tensor.shape)} differ.")
    for name, tensor in matrices.items():
        if tensor.dim() != 2 or tensor.shape[0] != n:
            raise DataError(
                f"{name} are {list(tensor.shape)}; the student has {n} rows, so they must be [{n} columns]."
            )
    for name, vector in vectors.items():
        if vector is not None and vector.shape != (n,):
            raise DataError(f"{name}: the shape is {list(vector.shape)}, but must be [{n}], one number for each row.")
    if labels is None:
        return
    check_within("smoothing", labels.smoothing, "[0, 1)")
    if labels.ids.is_cpu and n > 0:
        wrong = labels.ids[(labels.ids != IGNORED) & ((labels.ids < 0) | (labels.ids >= v))]
        if len(wrong):
            raise DataError(f"label {int(wrong[0])}: must be a column, 0 to {v - 1}, or {IGNORED} for no label.")


def compared_columns(terms: Terms, student_width: int, teacher: FusedTeacher) -> int:
    """Return the number of leading columns that the divergence compares; raise SettingError if it cannot compare."""
    if isinstance(teacher, TeacherSparse):
        _check_sparse(terms, teacher)
        width = student_width
    else:
        width = teacher.head.weight.shape[0] if isinstance(teacher, TeacherHidden) else teacher.logits.shape[1]
    if terms.columns is None and width != student_width:
        raise SettingError(
            f"student and teacher have {student_width} and {width} columns. Pass columns=, the number of leading "
            "columns that mean the same on both sides, if the others are padding."
        )
    narrower = min(width, student_width)
    columns = narrower if terms.columns is None else terms.columns
    if not 0 < columns <= narrower:
        raise SettingError(f"columns={columns}: must lie in [1, {narrower}], the width of the narrower head.")
    return columns


def _check_sparse(terms: Terms, teacher: TeacherSparse) -> None:
    allowed = OUTCOME_DIVERGENCES if teacher.weights is None else SAMPLE_DIVERGENCES
    if terms.divergence not in allowed:
        kind = "some columns and a bucket" if teacher.weights is None else "weighted samples"
        raise SettingError(
            f"divergence={terms.divergence!r} cannot be computed from {kind}. Use one of {', '.join(allowed)}, or pass "
            "the teacher's whole logits."
        )
    if teacher.weights is None and teacher.tail is None and terms.temperature != 1:
        raise SettingError(
            "sparse targets without a tail are log-probabilities at temperature 1, but the temperature is "
            f"{terms.temperature}. Pass tail=, the log of the sum of exp(logit / T) over all other columns."
        )
