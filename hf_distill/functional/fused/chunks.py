"""Chunks of rows: their size, products with a head, the sum of a head's gradient, and threads for their blocks."""

from __future__ import annotations

import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_distill.functional.fused.inputs import Head
from hf_distill.functional.fused.rows import Softening, Workspace, any_blocked, full_precision_of

MIB = 2**20
BUDGET_16_BITS, BUDGET = 96 * MIB, 384 * MIB
SUM_SHARE = 3  # a chunk may always take this part of the memory for the sum of the head's gradient
MOST_ROWS = 512  # products gain nothing from more
ENOUGH_ROWS = 256  # with fewer, products are slower, and the sum is added to too often
FEW_ROWS = 128  # rows of the student's logits at a time, if both sides' do not fit
ROUND_ROWS = 32  # products are fastest at multiples of this
BLOCK_CPU, BLOCK_ELSEWHERE = 2 * MIB, 64 * MIB  # one side of a block in full precision
TILE = 1024  # rows of a 16-bit head's gradient that are computed at a time, so that they are still in cache when added
PIECE = 16 * TILE  # rows of the head in one piece of its fp32 sum


@dataclass(frozen=True)
class ChunkRows:
    """Rows in a chunk: `whole` of the teacher's logits and the gradient, `part` of the student's logits."""

    whole: int
    part: int


def rows_a_chunk(n: int, student: int, teacher: int, budget: int, *, over_teacher: bool) -> ChunkRows:
    """Return how many rows fit the budget: a round number, at least one.

    Args:
        n: the number of rows in all.
        student: bytes in a row of the student's logits.
        teacher: bytes in a row of the teacher's logits, 0 if they are given.
        budget: bytes for both.
        over_teacher: whether the gradient can overwrite the teacher's logits, so that a chunk does not need all of the
            student's logits at once.

    >>> rows_a_chunk(2048, 2 * 32768, 2 * 32768, 128 * 2**20, over_teacher=True)
    ChunkRows(whole=512, part=512)
    >>> rows_a_chunk(2048, 2 * 131072, 2 * 131072, 96 * 2**20, over_teacher=True)
    ChunkRows(whole=256, part=128)
    """

    def fitting(memory: int, bytes_a_row: int, most: int) -> int:
        rows = max(1, min(memory // bytes_a_row, most))
        if rows >= n:
            return max(1, n)
        if rows > ROUND_ROWS:
            rows -= rows % ROUND_ROWS
        even = math.ceil(n / math.ceil(n / rows))  # avoids a short last chunk
        return min(rows, math.ceil(even / ROUND_ROWS) * ROUND_ROWS)

    both = fitting(budget, student + teacher, MOST_ROWS)
    if not over_teacher or both >= min(n, ENOUGH_ROWS):
        return ChunkRows(both, both)
    part = min(FEW_ROWS, both)
    whole = fitting(max(0, budget - part * student), teacher, ENOUGH_ROWS)
    return ChunkRows(whole, part) if whole > both else ChunkRows(both, both)


def rows_a_block(chunk: int, columns: int, device: torch.device) -> int:
    """Return how many rows keep one side of a block in a core's cache; on an accelerator, bound its memory."""
    size = BLOCK_CPU if device.type == "cpu" else BLOCK_ELSEWHERE
    return max(1, min(chunk, size // (4 * columns)))


class Product:
    """Product of rows `[m d]` and the first columns of a head, divided by the temperature.

    It includes the factors of the softening that are exact in its dtype; `softening` is the rest.
    """

    def __init__(self, head: Head, hidden: Tensor, columns: int, temperature: float) -> None:
        self.dtype, self.columns = head.product_dtype(hidden), columns
        dtype = self.dtype
        self.weight = head.weight.detach()[:columns].to(dtype)
        before, after = head.logit_scale / temperature, 1.0
        if head.softcap is not None:
            before, after = head.logit_scale / head.softcap, head.softcap / temperature
        # Multiplying 16-bit rows by a factor adds no rounding error only if it is a power of two.
        is_exact = dtype in (torch.float32, torch.float64) or math.frexp(before)[0] == 0.5
        self.folded = before if is_exact else 1.0
        self.softening = Softening(1.0 if is_exact else before, head.softcap is not None, after)
        bias = head.bias
        self.bias = None if bias is None else (bias.detach()[:columns] * self.folded).to(dtype)

    @property
    def row_bytes(self) -> int:
        """Bytes in a row of the product."""
        return self.columns * self.dtype.itemsize

    def into(self, out: Tensor, hidden: Tensor) -> Tensor:
        """Write the product `[m columns]` of rows `[m d]` over the first m rows of `out`."""
        out = out[: hidden.shape[0]]
        rows = hidden if self.folded == 1.0 else hidden * self.folded
        if self.bias is None:
            return torch.mm(rows, self.weight.T, out=out)
        return torch.addmm(self.bias, rows, self.weight.T, out=out)

    def may_block(self) -> bool:
        """Return whether the product can be −inf: from a bias that is, or beyond the range of fp16."""
        return self.dtype == torch.float16 or (self.bias is not None and any_blocked(self.bias))


class Buffer:
    """Memory for chunks: first spare memory that is unused while chunks are processed, then new memory.

    On a CPU the first touch of memory is expensive: for all memory of a call, half as much as its softmaxes.
    """

    def __init__(self, spare: Tensor | None) -> None:
        self._spare = spare

    def take(self, rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Return `[rows columns]` with undefined contents."""
        spare, size = self._spare, rows * columns
        if spare is None or spare.dtype != dtype or spare.numel() < size:
            return torch.empty(rows, columns, dtype=dtype, device=device)
        self._spare = spare[size:]
        return spare[:size].view(rows, columns)


class HeadGradient:
    """The sum over chunks of `[v m] · [m d]`, in fp32 for 16-bit products.

    The sum of a 16-bit weight is stored in pieces, each freed once its part of the gradient is computed. The memory of
    that gradient is written last; on a CPU, where it costs nothing until it is touched, chunks may use it before.
    """

    def __init__(self, weight: Tensor, dtype: torch.dtype) -> None:
        self._like = weight
        v, d = weight.shape
        full = full_precision_of(weight)
        self._piece = PIECE if weight.dtype != full else max(v, 1)
        self._pieces = [
            torch.empty(min(self._piece, v - first), d, dtype=full, device=weight.device)
            for first in range(0, v, self._piece)
        ]
        low = dtype in (torch.bfloat16, torch.float16)
        self._tile = torch.empty(min(TILE, v), d, dtype=dtype, device=weight.device) if low else None
        self._is_empty = True
        early = weight.device.type == "cpu" and weight.dtype != full
        self._out = torch.empty(v, d, dtype=weight.dtype) if early else None

    def spare(self) -> Tensor | None:
        """Return memory `[v · d]` in the weight's dtype that is unused until `release`."""
        return None if self._out is None else self._out.view(-1)

    def add(self, gradient: Tensor, hidden: Tensor) -> None:
        """Add gradientᵀ · hidden of `[m v], [m d]`; v may be less than the head's."""
        for number, piece in enumerate(self._pieces):
            columns = gradient[:, number * self._piece : (number + 1) * self._piece]
            width = columns.shape[1]
            if self._tile is None:
                if self._is_empty:
                    piece.zero_()  # touches memory in order, which takes half as long as within the product
                piece[:width].addmm_(columns.T, hidden)
                continue
            if self._is_empty:
                piece[width:].zero_()
            for first in range(0, width, TILE):
                tile = self._tile[: min(TILE, width - first)]
                torch.mm(columns[:, first : first + TILE].T, hidden, out=tile)
                part = piece[first : first + len(tile)]
                if self._is_empty:
                    part.copy_(tile)
                else:
                    part.add_(tile)
        self._is_empty = False

    def release(self, factor: Tensor) -> Tensor:
        """Return the sum times `factor` in the weight's dtype, and free the sum: it can be called once."""
        pieces, self._pieces, out, self._out = self._pieces, [], self._out, None
        if self._is_empty:
            return torch.zeros_like(self._like)
        if self._like.dtype == pieces[0].dtype:
            return pieces[0].mul_(factor)
        out = torch.empty_like(self._like) if out is None else out
        for number in range(len(pieces)):
            piece, pieces[number] = pieces[number], torch.empty(0)
            for rows, into in zip(piece.split(TILE), out[number * self._piece :].split(TILE), strict=False):
                into.copy_(rows.mul_(factor))
        return out


def for_each_block(
    rows: int, size: int, function: Callable[[slice, Workspace], None], workers: list[Workspace]
) -> None:
    """Call `function` with every block of a chunk, in as many threads as there are workspaces.

    Each thread computes its blocks alone. If each of thousands of passes were split over all threads instead, it would
    wait for all of them, and on a busy machine one is always late.
    """
    blocks = [slice(first, min(first + size, rows)) for first in range(0, rows, size)]
    if len(workers) == 1 or len(blocks) == 1:
        for block in blocks:
            function(block, workers[0])
        return
    inference, threads = torch.is_inference_mode_enabled(), torch.get_num_threads()

    def work(number: int) -> None:
        with torch.inference_mode(inference), torch.no_grad():
            for block in blocks[number :: len(workers)]:
                function(block, workers[number])

    try:
        with ThreadPoolExecutor(len(workers), initializer=torch.set_num_threads, initargs=(1,)) as pool:
            for _ in pool.map(work, range(len(workers))):
                pass
    finally:
        torch.set_num_threads(threads)  # the number set by a new thread would also be used by later ones
