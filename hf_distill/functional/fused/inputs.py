"""What the fused loss is given: an output head, what the teacher shows of the rows, labels, terms. No mathematics.

All rows are those that count, gathered by the caller: student and teacher rows are paired by position.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from hf_distill.errors import DataError, SettingError, did_you_mean
from hf_distill.functional.properties import DIVERGENCE_ALIASES, DIVERGENCES, PROPERTIES
from hf_distill.functional.sparse import OUTCOME_DIVERGENCES, SAMPLE_DIVERGENCES

IGNORED = -100  # the label of a row that has none


@dataclass(frozen=True)
class Head:
    """An output head: logits = cap · tanh(x / cap) with x = logit_scale · (hidden · weightᵀ + bias).

    Attributes:
        weight: `[v d]`. bias: `[v]`.
        logit_scale: a factor on the logits (Cohere's `logit_scale`, one over Granite's `logits_scaling`).
        softcap: the bound of Gemma 2 (Gemma Team 2024, section 2); None: logits are not bounded.
        dtype: of the products, which rows and head are cast to; None: that of the rows, or of autocast where it is on.
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
        _positive("logit_scale", self.logit_scale)
        if self.softcap is not None:
            _positive("softcap", self.softcap)


@dataclass(frozen=True)
class TeacherHidden:
    """The teacher's last hidden rows `[n d]` and its head: its logits are made chunk by chunk."""

    hidden: Tensor
    head: Head


@dataclass(frozen=True)
class TeacherLogits:
    """The teacher's logits `[n v]`, as its head gave them. They are only read."""

    logits: Tensor


@dataclass(frozen=True)
class TeacherSparse:
    """k columns a row, and one bucket for all the others: the divergence is over k + 1 outcomes. Or weighted samples.

    A divergence of the coarser outcomes is never above that of all columns, and equal to it where k = v.

    Attributes:
        ids: `[n k]` distinct columns of each row; -1 where a row lists fewer.
        logits: `[n k]` logits, or log-probabilities at temperature 1, of these columns.
        tail: `[n]` log of the sum of exp(logit / T) over all other columns, at the temperature of the loss, where
            −inf says that there is no other column. None: `logits` are log-probabilities and the temperature is 1;
            what is left to 1 is the tail, but never less than 1e-7, which is what rounding leaves of 1 − Σ.
        weights: `[n k]`, of samples: there is no bucket, and forward KL is Σ_k w_k (log p_k − log q_k) with q over all
            columns (`sparse.sampled_forward_kl`) and log p_k = logits / T. No other divergence.
    """

    ids: Tensor
    logits: Tensor
    tail: Tensor | None = None
    weights: Tensor | None = None


FusedTeacher = TeacherHidden | TeacherLogits | TeacherSparse


@dataclass(frozen=True)
class Labels:
    """The label of each row.

    Attributes:
        ids: `[n]`, -100 where there is none.
        weights: `[n]` weight of a row in the labels' total.
        smoothing: the share of the target that is spread over all columns, as Trainer's `label_smoothing_factor`.
    """

    ids: Tensor
    weights: Tensor | None = None
    smoothing: float = 0.0


@dataclass(frozen=True)
class Terms:
    """Which terms, and what each total is multiplied by.

    Gradients are made in the forward, so what totals are divided by must be known there: a factor is weight over
    denominator, as (1 - alpha) / labels of the step.

    Attributes:
        divergence: a name in `DIVERGENCES` whose rows stand alone. settings: its keyword arguments.
        temperature: softens both sides in the divergence, never the labels.
        labels_factor, divergence_factor: numbers, or scalar tensors (no synchronisation on an accelerator).
        columns: compare only the first so many columns of both heads, where they are padded; None: all, and then
            the heads must be equally wide. The labels' term is over the student's whole head.
    """

    divergence: str = "forward_kl"
    settings: Mapping[str, Any] = field(default_factory=dict)
    temperature: float = 1.0
    labels_factor: float | Tensor = 1.0
    divergence_factor: float | Tensor = 1.0
    columns: int | None = None

    def __post_init__(self) -> None:
        if self.divergence not in DIVERGENCES:
            raise SettingError(
                f"divergence={self.divergence!r}: no such divergence. Allowed: {', '.join(fusable())}."
                f"{did_you_mean(self.divergence, fusable(), DIVERGENCE_ALIASES)}"
            )
        if PROPERTIES[self.divergence].couples_rows and self.settings.get("intra_weight", 1.0) != 0:
            raise SettingError(
                f"divergence={self.divergence!r} compares rows with each other, so it cannot be taken chunk by chunk. "
                f"Use it on whole logits, or one of {', '.join(fusable())}."
            )
        _positive("temperature", self.temperature)
        rows = torch.zeros(1, 2)
        try:
            DIVERGENCES[self.divergence](rows, rows, **self.settings)
        except TypeError as error:
            raise SettingError(f"settings={dict(self.settings)} of divergence={self.divergence!r}: {error}") from error


def fusable() -> list[str]:
    """The divergences whose rows stand alone, by name."""
    return [name for name, properties in PROPERTIES.items() if not properties.couples_rows]


def _positive(knob: str, value: float) -> None:
    if not 0 < value < math.inf:
        raise SettingError(f"{knob}={value}: must be a number above 0.")


def refuse_what_does_not_fit(
    hidden: Tensor, head: Head, teacher: FusedTeacher | None, labels: Labels | None, row_weights: Tensor | None
) -> None:
    """Shapes and types that cannot be paired, named before anything is computed."""
    _refuse_a_head_that_does_not_fit("student", hidden, head)
    n = hidden.shape[0]
    if isinstance(teacher, TeacherHidden):
        _refuse_a_head_that_does_not_fit("teacher", teacher.hidden, teacher.head)
        of_rows = {"the teacher's hidden rows": teacher.hidden}
    elif isinstance(teacher, TeacherLogits):
        of_rows = {"the teacher's logits": teacher.logits}
    elif teacher is not None:
        of_rows = {"the teacher's ids": teacher.ids, "the teacher's sparse logits": teacher.logits}
        if teacher.ids.shape != teacher.logits.shape:
            raise DataError(f"sparse ids {list(teacher.ids.shape)} and logits {list(teacher.logits.shape)} differ.")
        if teacher.weights is not None and teacher.weights.shape != teacher.ids.shape:
            raise DataError(f"sparse ids {list(teacher.ids.shape)} and weights {list(teacher.weights.shape)} differ.")
    else:
        of_rows = {}
    vectors = {"row_weights": row_weights}
    if labels is not None:
        vectors |= {"labels": labels.ids, "label weights": labels.weights}
    vectors["the sparse tail"] = teacher.tail if isinstance(teacher, TeacherSparse) else None
    for name, tensor in of_rows.items():
        if tensor.dim() != 2 or tensor.shape[0] != n:
            raise DataError(f"{name} are {list(tensor.shape)}; the student has {n} rows, so [{n} columns] is needed.")
    for name, vector in vectors.items():
        if vector is not None and vector.shape != (n,):
            raise DataError(f"{name}: shape {list(vector.shape)}; one a row is needed, [{n}].")
    if labels is not None and not 0 <= labels.smoothing < 1:
        raise SettingError(f"smoothing={labels.smoothing}: must lie in [0, 1).")
    if labels is not None and labels.ids.is_cpu and n > 0:
        v = head.weight.shape[0]
        wrong = labels.ids[(labels.ids != IGNORED) & ((labels.ids < 0) | (labels.ids >= v))]
        if len(wrong):
            raise DataError(f"label {int(wrong[0])}: the student's head has columns 0 to {v - 1}; {IGNORED} is none.")


def _refuse_a_head_that_does_not_fit(whose: str, hidden: Tensor, head: Head) -> None:
    if hidden.dim() != 2 or hidden.shape[1] != head.weight.shape[1]:
        raise DataError(
            f"the {whose}'s hidden rows are {list(hidden.shape)} and its head is {list(head.weight.shape)}: rows "
            f"[n {head.weight.shape[1]}] are needed. Flatten batch and time first."
        )
    cast = head.dtype is not None or torch.is_autocast_enabled(hidden.device.type)
    if not cast and hidden.dtype != head.weight.dtype:
        raise DataError(
            f"the {whose}'s hidden rows are {hidden.dtype} and its head is {head.weight.dtype}. Cast one of them, "
            "name the products' type in Head(dtype=...), or run under autocast."
        )


def compared_columns(terms: Terms, student_width: int, teacher: FusedTeacher) -> int:
    """How many leading columns the divergence compares."""
    if isinstance(teacher, TeacherSparse):
        if teacher.weights is not None and terms.divergence not in SAMPLE_DIVERGENCES:
            raise SettingError(
                f"divergence={terms.divergence!r} of weighted samples: only {', '.join(SAMPLE_DIVERGENCES)} is linear "
                "in the teacher's probabilities, so samples do not bend it. Use it, or sparse targets without weights."
            )
        if teacher.weights is None and terms.divergence not in OUTCOME_DIVERGENCES:
            raise SettingError(
                f"divergence={terms.divergence!r} of some columns and a bucket: it is no sum over outcomes. Use one of "
                f"{', '.join(OUTCOME_DIVERGENCES)}, or pass the teacher's whole logits."
            )
        if teacher.weights is None and teacher.tail is None and terms.temperature != 1:
            raise SettingError(
                "sparse targets without a tail are log-probabilities at temperature 1; the temperature is "
                f"{terms.temperature}. Pass tail=, the log of the sum of exp(logit / T) over all other columns: it "
                "cannot be had from probabilities at another temperature."
            )
        columns = student_width if terms.columns is None else terms.columns
        return _at_most(columns, student_width, "student's head")
    width = teacher.head.weight.shape[0] if isinstance(teacher, TeacherHidden) else teacher.logits.shape[1]
    if terms.columns is None:
        if width != student_width:
            raise SettingError(
                f"student and teacher have {student_width} and {width} columns. Pass columns=, the number of leading "
                "columns that mean the same on both sides; the others are padding."
            )
        return width
    return _at_most(terms.columns, min(width, student_width), "narrower head")


def _at_most(columns: int, width: int, what: str) -> int:
    if not 0 < columns <= width:
        raise SettingError(f"columns={columns}: must lie in [1, {width}], the width of the {what}.")
    return columns
