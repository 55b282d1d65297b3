"""The conformance tables of tasks, divergences and schedules, a row each; objectives: `objective_rows.py`.

`test_conformance.py` compares them with the catalogues, so a new member without a row fails the suite. If a law
does not hold for a member, its row gives the reason; there are no other exceptions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from tests.heads import HEADS, IGNORED

Batch = dict[str, Any]


@dataclass(frozen=True)
class TaskRow:
    """The properties of a task that the laws need.

    Attributes:
        silence: turns a batch into the same batch in which no row counts. all_rows_count: why there is none (L2, L3).
        knobs: constructor settings, each with a task built with a value other than the default (L8).
        not_knobs: constructor settings determined by the student, with the reason.
        not_permuted: why L12 does not apply, or None if its labels have names.
        not_widened: why L7 does not apply, or None if its columns are a vocabulary.
    """

    silence: Callable[[Batch], Batch] | None = None
    all_rows_count: str | None = None
    knobs: dict[str, Any] = field(default_factory=dict)
    not_knobs: dict[str, str] = field(default_factory=dict)
    not_permuted: str | None = None
    not_widened: str | None = None


@dataclass(frozen=True)
class DivergenceRow:
    """The properties of a divergence that the laws need.

    Attributes:
        a_row_alone: settings under which rows do not depend on each other (L3, L4).
        knobs: settings, each with a value other than the default (L8).
        not_zero_at_equality: why L1 does not hold directly; a one-hot teacher is used instead.
        kinked: why rounding may show in the gradient at equality; L1 then compares logits that are equal bit for bit.
        blind_on_two_columns: settings that change nothing for rows of two columns (multi-label), with the reason.
        no_gradient_on_two_columns: why such rows have no gradient.
    """

    a_row_alone: dict[str, Any] = field(default_factory=dict)
    knobs: dict[str, Any] = field(default_factory=dict)
    not_zero_at_equality: str | None = None
    kinked: str | None = None
    blind_on_two_columns: dict[str, str] = field(default_factory=dict)
    no_gradient_on_two_columns: str | None = None


def _unlabelled(batch: Batch) -> Batch:
    return {**batch, "labels": torch.full_like(batch["labels"], IGNORED)}


def _answers_cut_off(batch: Batch) -> Batch:
    return {**batch, **{name: torch.full_like(batch[name], 999) for name in ("start_positions", "end_positions")}}


def _too_short(batch: Batch) -> Batch:
    """Cut to three samples, shorter than the first convolution, so there is no frame."""
    mask = torch.zeros_like(batch["attention_mask"])
    mask[:, :3] = 1
    return {**batch, "attention_mask": mask}


_NO_NAMES = "columns are tokens, which tokenizers name: L7 and the vocabulary tests"
_NO_VOCABULARY = "columns are no vocabulary, so there is no padding to it"

TASK_ROWS: dict[str, TaskRow] = {
    "classification": TaskRow(
        all_rows_count="an example without a label is still distilled",
        not_knobs={"config": "the student's own"},
        not_widened=_NO_VOCABULARY,
    ),
    "regression": TaskRow(
        all_rows_count="every example has a value",
        not_permuted="one column",
        not_widened=_NO_VOCABULARY,
    ),
    "multiple_choice": TaskRow(
        all_rows_count="every question has an answer",
        not_permuted="columns are the choices, in the order both models are shown",
        not_widened=_NO_VOCABULARY,
    ),
    "token_classification": TaskRow(
        silence=_unlabelled,
        knobs={"rows": "attended"},
        not_widened=_NO_VOCABULARY,
    ),
    "span": TaskRow(
        silence=_answers_cut_off,
        not_permuted="columns are positions of the input",
        not_widened=_NO_VOCABULARY,
    ),
    "masked_lm": TaskRow(silence=_unlabelled, not_permuted=_NO_NAMES),
    "causal_lm": TaskRow(silence=_unlabelled, not_permuted=_NO_NAMES),
    "seq2seq": TaskRow(silence=_unlabelled, not_permuted=_NO_NAMES),
    "ctc": TaskRow(
        silence=_too_short,
        not_knobs={
            "frame_lengths": "the student's own convolutions",
            "sums_over_examples": "the student's own config.ctc_loss_reduction",
            "config": "the student's own",
        },
        not_permuted=_NO_NAMES,
    ),
    "embedding": TaskRow(
        all_rows_count="every example has an embedding",
        knobs={"pooling": "last"},
        not_permuted="columns are the width of the model",
        not_widened=_NO_VOCABULARY,
    ),
}

_TWO_COLUMNS = "two points always correlate at +1 or −1, so the part within a row is a constant"

DIVERGENCE_ROWS: dict[str, DivergenceRow] = {
    "forward_kl": DivergenceRow(),
    "reverse_kl": DivergenceRow(),
    "jeffreys": DivergenceRow(),
    "jensen_shannon": DivergenceRow(knobs={"beta": 0.2}),
    "skewed_forward_kl": DivergenceRow(knobs={"skew": 0.4}),
    "skewed_reverse_kl": DivergenceRow(knobs={"skew": 0.4}),
    "total_variation": DivergenceRow(kinked="an absolute value: even a difference by rounding has its full slope"),
    "mean_squared_error": DivergenceRow(),
    "dist": DivergenceRow(
        a_row_alone={"intra_weight": 0.0},
        knobs={"inter_weight": 3.0, "intra_weight": 3.0},
        no_gradient_on_two_columns=_TWO_COLUMNS,
    ),
    "decoupled": DivergenceRow(
        knobs={"target_weight": 3.0, "others_weight": 3.0},
        blind_on_two_columns={"others_weight": "beside the target there is only one class, and nothing to weigh in it"},
    ),
    "hard": DivergenceRow(not_zero_at_equality="a cross-entropy with the teacher's argmax; 0 where both are one-hot"),
}

# name → arguments, and the values at progress 0, 0.5 and 1
SCHEDULE_ROWS: dict[str, tuple[tuple[float, float], tuple[float, float, float]]] = {
    "constant": ((2.0, 2.0), (2.0, 2.0, 2.0)),
    "linear": ((4.0, 1.0), (4.0, 2.5, 1.0)),
    "cosine": ((4.0, 1.0), (4.0, 2.5, 1.0)),
}

ON_VALUES = ("regression", "embedding")
VALUE_DIVERGENCES = ("mean_squared_error",)
TWO_COLUMNS = ("bert_multi_label",)


def allowed(head: str, divergence: str) -> bool:
    """Whether this divergence suits the head's predictions: values require a divergence of values."""
    return HEADS[head].kind not in ON_VALUES or divergence in VALUE_DIVERGENCES


def default_of(head: str) -> str:
    """Return the default divergence of this head."""
    return "mean_squared_error" if HEADS[head].kind in ON_VALUES else "forward_kl"


PAIRS = [(head, divergence) for head in HEADS for divergence in DIVERGENCE_ROWS]
CASES = [pair for pair in PAIRS if allowed(*pair)]
REFUSED = [pair for pair in PAIRS if not allowed(*pair)]


def quick_cases() -> set[tuple[str, str]]:
    """Return each divergence with each task, on one head in turn, and each head with its default divergence.

    A divergence sees rows, which the task selects, so testing all pairs would hardly find more.
    """
    special = [d for d, row in DIVERGENCE_ROWS.items() if row.blind_on_two_columns or row.no_gradient_on_two_columns]
    chosen = {(head, divergence) for head in TWO_COLUMNS for divergence in special}
    chosen |= {(head, default_of(head)) for head in HEADS}
    for kind in TASK_ROWS:
        heads = [name for name, head in HEADS.items() if head.kind == kind]
        divergences = [name for name in DIVERGENCE_ROWS if allowed(heads[0], name)]
        for turn in range(max(len(heads), len(divergences))):
            chosen.add((heads[turn % len(heads)], divergences[turn % len(divergences)]))
    return chosen


def walked(cases: Iterable[tuple[str, ...]]) -> list[Any]:
    """Return test parameters (head, divergence, ...); those beyond the quick cases are slow."""
    quick = quick_cases()
    return [pytest.param(*case, marks=() if case[:2] in quick else pytest.mark.slow) for case in cases]
