"""Chunks of rows: how many, their products with a head, the sum of a head's gradient, and blocks on several threads.

Nothing here knows what is done to a block.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from hf_distill.functional.fused_inputs import Head
from hf_distill.functional.fused_rows import Room, Softening, full_precision_of

MIB = 2**20
BUDGET_16_BITS, BUDGET = 128 * MIB, 256 * MIB
MOST_ROWS = 512  # products gain nothing from more
ROUND_ROWS = 32  # products like such numbers
BLOCK_CPU, BLOCK_ELSEWHERE = 2 * MIB, 64 * MIB  # one side of a block in full precision
TILE = 2048  # rows of a 16-bit head's gradient that are made at a time, so that they are still in cache when added
PIECE = 8 * TILE  # rows of the head in one piece of its fp32 sum


def rows_a_chunk(n: int, bytes_a_row: int, budget: int) -> int:
    """As many rows as fit the budget, a round number of them, at least one.

    >>> rows_a_chunk(2048, 2 * 2 * 131072, 128 * 2**20)
    256
    """
    rows = max(1, min(budget // bytes_a_row, MOST_ROWS))
    if rows > ROUND_ROWS:
        rows -= rows % ROUND_ROWS
    return max(1, min(rows, n))


def rows_a_block(chunk: int, columns: int, device: torch.device) -> int:
    """As many rows as leave one side of a block within a core's reach; elsewhere blocks only bound the memory."""
    size = BLOCK_CPU if device.type == "cpu" else BLOCK_ELSEWHERE
    return max(1, min(chunk, size // (4 * columns)))


def is_exact(factor: float, dtype: torch.dtype) -> bool:
    """Whether hidden rows may be multiplied by it without adding to the rounding of their product."""
    return dtype in (torch.float32, torch.float64) or math.frexp(factor)[0] == 0.5


class Product:
    """Rows times a head, in one type, with as much of the softening as is exact; `softening` is what is left.

    Args:
        head: weight and bias are detached, cast and cut to `columns`.
        dtype: of the product. columns: leading columns that are wanted.
        temperature: by which logits are to be divided.
    """

    def __init__(self, head: Head, *, dtype: torch.dtype, columns: int, temperature: float) -> None:
        self.weight = head.weight.detach()[:columns].to(dtype)
        self.dtype, self.columns = dtype, columns
        capped = head.softcap is not None
        before = head.logit_scale / (head.softcap if head.softcap is not None else temperature)
        after = head.softcap / temperature if head.softcap is not None else 1.0
        self.folded = before if is_exact(before, dtype) else 1.0
        self.softening = Softening(1.0 if is_exact(before, dtype) else before, capped, after)
        bias = head.bias
        self.bias = None if bias is None else (bias.detach()[:columns] * self.folded).to(dtype)

    def into(self, out: Tensor, hidden: Tensor) -> Tensor:
        """`[m d] -> [m columns]`, written over the first m rows of `out`."""
        out = out[: hidden.shape[0]]
        rows = hidden if self.folded == 1.0 else hidden * self.folded
        if self.bias is None:
            return torch.mm(rows, self.weight.T, out=out)
        return torch.addmm(self.bias, rows, self.weight.T, out=out)

    def may_block(self) -> bool:
        """−inf comes of a bias that has it, or of a product beyond fp16."""
        return self.dtype == torch.float16 or (self.bias is not None and bool(self.bias.amin() == -math.inf))


class HeadGradient:
    """The sum over chunks of `[v m] · [m d]`, in fp32 for 16-bit products.

    A 16-bit weight's sum is kept in pieces: each is freed when its part of the gradient has been made.
    """

    def __init__(self, weight: Tensor, dtype: torch.dtype) -> None:
        self._low = dtype in (torch.bfloat16, torch.float16)
        self._like = weight
        v, d = weight.shape
        full = full_precision_of(weight)
        self._piece = PIECE if weight.dtype != full else max(v, 1)
        self._pieces = [
            torch.zeros(min(self._piece, v - first), d, dtype=full, device=weight.device)
            for first in range(0, v, self._piece)
        ]
        self._tile = torch.empty(min(TILE, v), d, dtype=dtype, device=weight.device) if self._low else None

    def add(self, gradient: Tensor, hidden: Tensor) -> None:
        """Add gradientᵀ · hidden: `[m v], [m d]`; v may be less than the head's."""
        for number, piece in enumerate(self._pieces):
            columns = gradient[:, number * self._piece : (number + 1) * self._piece]
            width = columns.shape[1]
            if self._tile is None:
                piece[:width].addmm_(columns.T, hidden)
                continue
            for first in range(0, width, TILE):
                part = columns[:, first : first + TILE]
                piece[first : first + TILE][: part.shape[1]].add_(
                    torch.mm(part.T, hidden, out=self._tile[: part.shape[1]])
                )

    def hand_out(self, factor: Tensor) -> Tensor:
        """The sum times `factor`, in the weight's type. What is kept is given away: it can be asked once."""
        pieces, self._pieces = self._pieces, []
        if self._like.dtype == pieces[0].dtype:
            return pieces[0].mul_(factor)
        out = torch.empty_like(self._like)
        for number in range(len(pieces)):
            piece, pieces[number] = pieces[number], torch.empty(0)
            out[number * self._piece : (number + 1) * self._piece].copy_(piece.mul_(factor))
        return out


def for_each_block(rows: int, block: int, function: Callable[[slice, Room], None], rooms: list[Room]) -> None:
    """Call `function` with every block of a chunk, on as many threads as there are rooms.

    Each thread computes alone. Were every pass over a block shared out instead, each of thousands would wait for all
    threads, and on a busy machine one of them is always late.
    """
    blocks = [slice(first, min(first + block, rows)) for first in range(0, rows, block)]
    if len(rooms) == 1 or len(blocks) == 1:
        for one in blocks:
            function(one, rooms[0])
        return
    inference, threads = torch.is_inference_mode_enabled(), torch.get_num_threads()

    def work(number: int) -> None:
        with torch.inference_mode(inference), torch.no_grad():
            for one in blocks[number :: len(rooms)]:
                function(one, rooms[number])

    try:
        with ThreadPoolExecutor(len(rooms), initializer=torch.set_num_threads, initargs=(1,)) as pool:
            for _ in pool.map(work, range(len(rooms))):
                pass
    finally:
        torch.set_num_threads(threads)  # a new thread's number is also what later threads start with
