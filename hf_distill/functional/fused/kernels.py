"""In-place kernels of the KL family: value and gradient of a block of rows. No labels, no −inf.

With student probabilities q, teacher probabilities p and r = log(p / q) in each column, every divergence here is
Σ F(p, q), and its gradient at the student's softened logits is q · (h − Σ q h) with h = ∂F/∂q.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

# If one side is e⁸⁰ times the other, the smaller is below the range of fp32, and its exact ratio has no effect.
LARGEST_RATIO = 80.0
LONG_ROW = 4096  # from this length on a loop over rows with BLAS's dot is faster than a product and a sum


@dataclass
class Block:
    """A block of rows of both sides. A kernel may overwrite `p`, `difference` and scratch memory, but not `q`."""

    q: Tensor  # `[r v]` student probabilities
    p: Tensor  # `[r v]` teacher probabilities
    difference: Tensor  # `[r v]` teacher minus student softened logits
    shift: Tensor  # `[r 1]`, the constant that turns `difference` into log(p / q)
    scratch: Callable[[], Tensor]  # returns another `[r v]`, with undefined contents


@dataclass
class BlockResult:
    """A divergence of a block, with student probabilities if they were computed."""

    value: Tensor  # `[r]`
    gradient: Tensor  # `[r v]` at the softened student logits; undefined if no gradient is wanted
    free: Tensor | None = None  # `[r v]` memory that is not used any more
    q: Tensor | None = None  # `[r v]` softened student probabilities
    log_normaliser: Tensor | None = None  # `[r 1]` log of the normaliser of q


def row_dot(x: Tensor, y: Tensor) -> Tensor:
    """Σ x y of each row: `[r v], [r v] -> [r 1]`."""
    if torch.compiler.is_compiling():
        return (x * y).sum(-1, keepdim=True)
    if x.device.type == "cpu" and x.shape[-1] >= LONG_ROW and x.shape[0] > 0:
        return torch.stack([torch.dot(a, b) for a, b in zip(x, y, strict=True)])[:, None]
    return torch.linalg.vecdot(x, y)[:, None]


def _centred(h: Tensor, q: Tensor, *, factor: float = 1.0) -> Tensor:
    """factor · q · (h − Σ q h), written over h."""
    h.sub_(row_dot(q, h)).mul_(q)
    return h if factor == 1.0 else h.mul_(factor)


def forward_kl(rows: Block) -> BlockResult:
    """Σ p r; the gradient is q − p."""
    value = row_dot(rows.p, rows.difference) + rows.shift
    return BlockResult(value[:, 0], torch.sub(rows.q, rows.p, out=rows.p), rows.difference)


def reverse_kl(rows: Block) -> BlockResult:
    """−Σ q r; h = −r, and the shift cancels in h − Σ q h."""
    mean = row_dot(rows.q, rows.difference)
    gradient = torch.sub(mean, rows.difference, out=rows.difference).mul_(rows.q)
    return BlockResult((-mean - rows.shift)[:, 0], gradient, rows.p)


def jeffreys(rows: Block) -> BlockResult:
    """Σ p r − Σ q r, in which the shift cancels; the gradient is q − p plus that of reverse KL."""
    mean = row_dot(rows.q, rows.difference)
    value = row_dot(rows.p, rows.difference) - mean
    slope = torch.sub(mean + 1, rows.difference, out=rows.difference)
    return BlockResult(value[:, 0], slope.mul_(rows.q).sub_(rows.p), rows.p)


def jensen_shannon(rows: Block, *, beta: float = 0.5) -> BlockResult:
    """β Σ p (r − e) − (1 − β) Σ q e with e = log(m / q) = log(1 + β (eʳ − 1)); h = −(1 − β) e."""
    if beta == 0.0:
        return forward_kl(rows)
    if beta == 1.0:
        return reverse_kl(rows)
    r = rows.difference.add_(rows.shift).clamp_(max=LARGEST_RATIO)
    e = torch.expm1(r, out=rows.scratch()).mul_(beta).log1p_()
    value = beta * (row_dot(rows.p, r) - row_dot(rows.p, e)) - (1 - beta) * row_dot(rows.q, e)
    return BlockResult(value[:, 0], _centred(e, rows.q, factor=beta - 1), rows.p)


def skewed_forward_kl(rows: Block, *, skew: float = 0.1) -> BlockResult:
    """−Σ p log x with x = m / p = 1 + (1 − skew) (e⁻ʳ − 1); h = −(1 − skew) / x."""
    if skew == 0.0:
        return forward_kl(rows)
    x = rows.difference.add_(rows.shift).neg_().clamp_(max=LARGEST_RATIO).expm1_().mul_(1 - skew)
    value = -row_dot(rows.p, torch.log1p(x, out=rows.scratch()))
    return BlockResult(value[:, 0], _centred(x.add_(1).reciprocal_(), rows.q, factor=skew - 1), rows.p)


def skewed_reverse_kl(rows: Block, *, skew: float = 0.1) -> BlockResult:
    """−Σ q log x with x = m / q = 1 + (1 − skew) (eʳ − 1); h = −log x − skew / x."""
    if skew == 0.0:
        return reverse_kl(rows)
    x = rows.difference.add_(rows.shift).clamp_(max=LARGEST_RATIO).expm1_().mul_(1 - skew)
    log_x = torch.log1p(x, out=rows.p)
    value = -row_dot(rows.q, log_x)
    h = x.add_(1).reciprocal_().mul_(skew).add_(log_x)
    return BlockResult(value[:, 0], _centred(h, rows.q, factor=-1.0), rows.p)


def total_variation(rows: Block) -> BlockResult:
    """½ Σ |q − p|; h = ½ sign(q − p), 0 where they are equal."""
    apart = torch.sub(rows.q, rows.p, out=rows.p)
    h = torch.sign(apart, out=rows.difference)
    value = 0.5 * row_dot(apart, h)
    return BlockResult(value[:, 0], _centred(h, rows.q, factor=0.5), rows.p)


_FAMILY = (forward_kl, reverse_kl, jeffreys, jensen_shannon, skewed_forward_kl, skewed_reverse_kl, total_variation)
KERNELS: Mapping[str, Callable[..., BlockResult]] = {kernel.__name__: kernel for kernel in _FAMILY}
