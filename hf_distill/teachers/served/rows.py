"""What a server lists of each position → tensors: the listed columns, their log-probabilities, and the tail's.

Axes: r positions, k listed columns, w columns that are compared.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from hf_distill.errors import TeacherError

# Log-probabilities come from fp32 sums: a smaller tail cannot be told from their rounding.
LEAST_TAIL = 1e-6
_ABOVE_ONE = 1e-3  # so much more than 1 the listed probabilities may sum to: rounding of a half-precision server
_IMPOSSIBLE = -9998.0  # vLLM writes -9999 for what cannot be, since JSON has no infinity


@dataclass(frozen=True)
class ListedRows:
    """Attributes:
    ids: `[r k]` compared columns, -1 where fewer are listed. log_probabilities: `[r k]`, -inf there.
    log_tail: `[r]` of all other compared columns together; -inf where there is none.
    """

    ids: Tensor
    log_probabilities: Tensor
    log_tail: Tensor

    def all_columns(self, width: int) -> bool:
        return bool(((self.ids >= 0).sum(-1) == width).all())

    def softened(self, temperature: float) -> Tensor:
        """`[r k]` log-probabilities at a temperature, exact where every column is listed, and only there."""
        return (self.log_probabilities / temperature).log_softmax(-1)


def listed_rows(rows: Sequence[Mapping[int, float]], columns: np.ndarray) -> ListedRows:
    """The rows over the compared columns.

    What the server says of other tokens (its own padding, tokens that the student does not have) is taken out, and the
    rest is normalised anew, as between two models.

    Args:
        rows: token id → log-probability.
        columns: token id → compared column, -1: none.

    Raises:
        TeacherError: no distribution, or one of tokens that the student does not have.

    >>> found = listed_rows([{2: np.log(0.5), 0: np.log(0.3)}], np.arange(4))
    >>> found.ids.tolist(), [round(p, 4) for p in found.log_tail.exp().tolist()]
    ([[2, 0]], [0.2])
    """
    ids, log_p = _padded(rows)
    _check_distribution(log_p)
    p = np.exp(log_p)
    inside = (ids >= 0) & (ids < len(columns))
    ids = np.where(inside, columns[np.where(inside, ids, 0)], -1)
    kept = np.where(ids >= 0, p, 0.0).sum(-1)
    tail = 1 - p.sum(-1)
    has_tail = (ids >= 0).sum(-1) < (columns >= 0).sum()
    tail = np.where(has_tail, np.maximum(tail, LEAST_TAIL), 0.0)
    foreign = p.sum(-1) - kept
    if (kept + tail < 1e-3).any():
        raise TeacherError(
            f"the teacher gives {foreign.max():.2%} of the probability at one position to tokens that the student does "
            "not have, so there is nothing to learn from there. Use a teacher with the student's vocabulary."
        )
    log_total = np.log(kept + tail)
    with np.errstate(divide="ignore"):
        log_tail = np.log(tail) - log_total
    log_p = np.where(ids >= 0, log_p - log_total[:, None], -np.inf)
    return ListedRows(torch.from_numpy(ids), torch.from_numpy(log_p).float(), torch.from_numpy(log_tail).float())


def _padded(rows: Sequence[Mapping[int, float]]) -> tuple[np.ndarray, np.ndarray]:
    k = max((len(row) for row in rows), default=0)
    ids = np.full((len(rows), k), -1, dtype=np.int64)
    log_p = np.full((len(rows), k), -np.inf)
    for index, row in enumerate(rows):
        ids[index, : len(row)] = list(row)
        log_p[index, : len(row)] = list(row.values())
    log_p[log_p <= _IMPOSSIBLE] = -np.inf
    return ids, log_p


def _check_distribution(log_p: np.ndarray) -> None:
    with np.errstate(over="ignore"):
        total = np.exp(log_p).sum(-1)
    if not (total <= 1 + _ABOVE_ONE).all():  # nor is NaN
        raise TeacherError(
            "the teacher's server gave log-probabilities that are no numbers, or of which a row sums to more than 1. "
            "It must give those of the whole distribution at temperature 1 (vLLM: --logprobs-mode raw_logprobs)."
        )
