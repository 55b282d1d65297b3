"""The most likely tokens that a server returned for each position, as tensors.

Axes: r positions, k returned columns.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from hf_distill.errors import TeacherError

# Log-probabilities come from fp32 sums; a smaller tail could be rounding.
LEAST_TAIL = 1e-6
_TOLERANCE = 1e-3  # by which probabilities may sum to more than 1: rounding of a half-precision server
_IMPOSSIBLE = -9998.0  # vLLM writes -9999 for -inf, which JSON does not have


@dataclass(frozen=True)
class TopRows:
    """The most likely compared columns of each row.

    Attributes:
        ids: `[r k]` compared columns, -1 if a row has fewer than k.
        log_probabilities: `[r k]`, -inf where there is no column.
        log_tail: `[r]` of all other compared columns together; -inf if there are none.
    """

    ids: Tensor
    log_probabilities: Tensor
    log_tail: Tensor

    def has_all_columns(self, width: int) -> bool:
        return bool(((self.ids >= 0).sum(-1) == width).all())

    def softened(self, temperature: float) -> Tensor:
        """Return the log-probabilities at a temperature `[r k]`; exact only if each row has all columns."""
        return (self.log_probabilities / temperature).log_softmax(-1)


def top_rows(rows: Sequence[Mapping[int, float]], columns: np.ndarray) -> TopRows:
    """Return rows over the compared columns.

    Other tokens (the server's padding, tokens that the student does not have) are left out and the rest is normalised.

    Args:
        rows: token id → log-probability, for each position.
        columns: `[tokens]`, the compared column of each token id, or -1.

    Raises:
        TeacherError: if a row is no distribution, or only one over tokens that the student does not have.

    >>> rows = top_rows([{2: np.log(0.5), 0: np.log(0.3)}], np.arange(4))
    >>> rows.ids.tolist(), [round(p, 4) for p in rows.log_tail.exp().tolist()]
    ([[2, 0]], [0.2])
    """
    ids, log_p = _pad(rows)
    with np.errstate(over="ignore"):
        p = np.exp(log_p)
    if not (p.sum(-1) <= 1 + _TOLERANCE).all():  # NaN is refused too
        raise TeacherError(
            "the teacher's server gave log-probabilities that are no numbers, or of which a row sums to more than 1. "
            "It must give those of the whole distribution at temperature 1 (vLLM: --logprobs-mode raw_logprobs)."
        )
    known = (ids >= 0) & (ids < len(columns))
    ids = np.where(known, columns[np.where(known, ids, 0)], -1)
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
    return TopRows(torch.from_numpy(ids), torch.from_numpy(log_p).float(), torch.from_numpy(log_tail).float())


def _pad(rows: Sequence[Mapping[int, float]]) -> tuple[np.ndarray, np.ndarray]:
    k = max((len(row) for row in rows), default=0)
    ids = np.full((len(rows), k), -1, dtype=np.int64)
    log_p = np.full((len(rows), k), -np.inf)
    for index, row in enumerate(rows):
        ids[index, : len(row)] = list(row)
        log_p[index, : len(row)] = list(row.values())
    log_p[log_p <= _IMPOSSIBLE] = -np.inf
    return ids, log_p
