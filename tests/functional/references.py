"""Every divergence once more, in numpy, from the papers' formulas, row by row. It shares no code with the library."""

from __future__ import annotations

from typing import Any

import numpy as np

Row = np.ndarray


def probabilities(logits: Row) -> Row:
    weights = np.exp(logits - logits.max())
    return weights / weights.sum()


def kl(p: Row, q: Row) -> float:
    """KL(p ‖ q) = Σ p log(p / q), where p log p is 0 at p = 0."""
    some = p > 0
    return float(np.sum(p[some] * (np.log(p[some]) - np.log(q[some]))))


def forward_kl(q: Row, p: Row) -> float:
    return kl(probabilities(p), probabilities(q))


def reverse_kl(q: Row, p: Row) -> float:
    return kl(probabilities(q), probabilities(p))


def jeffreys(q: Row, p: Row) -> float:
    """Σ (p − q) log(p / q), Jeffreys's own form."""
    q, p = probabilities(q), probabilities(p)
    return float(np.sum((p - q) * (np.log(p) - np.log(q))))


def jensen_shannon(q: Row, p: Row, beta: float = 0.5) -> float:
    q, p = probabilities(q), probabilities(p)
    m = beta * p + (1 - beta) * q
    return beta * kl(p, m) + (1 - beta) * kl(q, m)


def skewed_forward_kl(q: Row, p: Row, skew: float = 0.1) -> float:
    q, p = probabilities(q), probabilities(p)
    return kl(p, skew * p + (1 - skew) * q)


def skewed_reverse_kl(q: Row, p: Row, skew: float = 0.1) -> float:
    q, p = probabilities(q), probabilities(p)
    return kl(q, skew * q + (1 - skew) * p)


def total_variation(q: Row, p: Row) -> float:
    return float(0.5 * np.abs(probabilities(q) - probabilities(p)).sum())


def mean_squared_error(q: Row, p: Row) -> float:
    return float(np.mean((q - p) ** 2))


def hard(q: Row, p: Row) -> float:
    return float(-np.log(probabilities(q)[int(np.argmax(p))]))


def decoupled(q: Row, p: Row, target: int = -100, target_weight: float = 1.0, others_weight: float = 8.0) -> float:
    """DKD, equations 1 to 7: binary probabilities of the target, and probabilities among the others."""
    q, p = probabilities(q), probabilities(p)
    t = int(np.argmax(p)) if target < 0 else target
    others_p, others_q = np.delete(p, t), np.delete(q, t)
    b_p, b_q = np.array([p[t], others_p.sum()]), np.array([q[t], others_q.sum()])
    hat_p, hat_q = others_p / others_p.sum(), others_q / others_q.sum()
    return target_weight * kl(b_p, b_q) + others_weight * kl(hat_p, hat_q)


def inter(q: Row, p: Row) -> float:
    """DIST, equation 9, of one row."""
    return float(1 - np.corrcoef(probabilities(q), probabilities(p))[0, 1])


def intra(student: np.ndarray, teacher: np.ndarray) -> float:
    """DIST, equation 10: down the columns, over the rows of the batch."""
    q = np.array([probabilities(row) for row in student])
    p = np.array([probabilities(row) for row in teacher])
    return float(np.mean([1 - np.corrcoef(q[:, c], p[:, c])[0, 1] for c in range(q.shape[1])]))


def sorted_distance(student: list[float], teacher: list[float]) -> float:
    """Boizard et al. 2024, section 3: the Wasserstein-1 distance in closed form, a number at a time."""
    q, p = (sorted(np.exp(np.array(row)) / np.exp(np.array(row)).sum(), reverse=True) for row in (student, teacher))
    longest = max(len(q), len(p))
    q, p = ([*row, *[0.0] * (longest - len(row))] for row in (q, p))
    return float(sum(abs(a - b) for a, b in zip(q, p, strict=True)))


A_ROW: dict[str, Any] = {
    "forward_kl": forward_kl,
    "reverse_kl": reverse_kl,
    "jeffreys": jeffreys,
    "jensen_shannon": jensen_shannon,
    "skewed_forward_kl": skewed_forward_kl,
    "skewed_reverse_kl": skewed_reverse_kl,
    "total_variation": total_variation,
    "mean_squared_error": mean_squared_error,
    "hard": hard,
    "decoupled": decoupled,
    "dist": inter,  # with intra_weight=0
}
