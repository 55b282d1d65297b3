"""Chunks of rows: how many, their products with a head, the sum of a head's gradient, and blocks on several threads.

Nothing here knows what is done to a block.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_distill.functional.fused.inputs import Head
from hf_distill.functional.fused.rows import Room, Softening, full_precision_of, is_blocking

MIB = 2**20
BUDGET_16_BITS, BUDGET = 96 * MIB, 384 * MIB
OF_THE_SUM = 3  # a chunk may always take this part of what the sum of the head's gradient takes
MOST_ROWS = 512  # products gain nothing from more
ENOUGH_ROWS = 256  # with fewer, products slow down, and the sum is added to too often
FEW_ROWS = 128  # of the student's logits at a time, where both sides' do not fit
ROUND_ROWS = 32  # products like such numbers
BLOCK_CPU, BLOCK_ELSEWHERE = 2 * MIB, 64 * MIB  # one side of a block in full precision
TILE = 1024  # rows of a 16-bit head's gradient that are made at a time, so that they are still in cache when added
PIECE = 16 * TILE  # rows of the head in one piece of its fp32 sum


@dataclass(frozen=True)
class ChunkRows:
    """`whole` rows of the teacher's logits and of the gradient at a time, `part` rows of the student's logits."""

    whole: int
    part: int


def rows_a_chunk(n: int, student: int, teacher: int, budget: int, *, over_teacher: bool) -> ChunkRows:
    """As many rows as fit the budget, a round number of them, at least one.

    Args:
        student, teacher: bytes of a row of logits. over_teacher: the gradient can be written over the teacher's logits,
            so that the student's need not all be there at once.

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
        alike = math.ceil(n / math.ceil(n / rows))  # no short one at the end
        return min(rows, math.ceil(alike / ROUND_ROWS) * ROUND_ROWS)

    both = fitting(budget, student + teacher, MOST_ROWS)
    if not over_teacher or both >= min(n, ENOUGH_ROWS):
        return ChunkRows(both, both)
    part = min(FEW_ROWS, both)
    whole = fitting(max(0, budget - part * student), teacher, ENOUGH_ROWS)
    return ChunkRows(whole, part) if whole > both else ChunkRows(both, both)


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
        return self.dtype == torch.float16 or (self.bias is not None and is_blocking(self.bias))


class Space:
    """Memory for chunks: some that is there already and free as long as chunks are worked off, then fresh memory.

    On a CPU memory is dear at its first touch: all of a call's may cost what half of its softmaxes do.
    """

    def __init__(self, spare: Tensor | None) -> None:
        self._spare = spare

    def take(self, rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """`[rows columns]` with anything in it."""
        spare, size = self._spare, rows * columns
        if spare is None or spare.dtype != dtype or spare.numel() < size:
            return torch.empty(rows, columns, dtype=dtype, device=device)
        self._spare = spare[size:]
        return spare[:size].view(rows, columns)


class HeadGradient:
    """The sum over chunks of `[v m] · [m d]`, in fp32 for 16-bit products.

    A 16-bit weight's sum is kept in pieces: each is freed when its part of the gradient has been made. That gradient's
    own memory is written last; on a CPU, where it costs nothing until it is touched, chunks may have it before.
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
        """Memory that is free until the gradient is handed out, `[v · d]` in the weight's type."""
        return None if self._out is None else self._out.view(-1)

    def add(self, gradient: Tensor, hidden: Tensor) -> None:
        """Add gradientᵀ · hidden: `[m v], [m d]`; v may be less than the head's."""
        for number, piece in enumerate(self._pieces):
            columns = gradient[:, number * self._piece : (number + 1) * self._piece]
            width = columns.shape[1]
            if self._tile is None:
                if self._is_empty:
                    piece.zero_()  # touched first in order: were it within the product, it would cost twice that
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

    def hand_out(self, factor: Tensor) -> Tensor:
        """The sum times `factor`, in the weight's type. What is kept is given away: it can be asked once."""
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
