"""Loss and backward over a large vocabulary: time by the matrix products' floor, peak memory, error. No training.

The floor is four products in the chunks that are fastest here, over memory that is there already: both sides' logits,
and the student's gradients at hidden rows and head. Ways take turns within a process; each one's memory is measured
in a process of its own, beyond what the rows and heads take, gradients included.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the checkout, when run as a script

import torch

from benchmarks.own_process import NotMeasured, figure, why_not
from benchmarks.peers import WAYS, Absent, Rows, reference
from hf_distill.errors import require

MIB = 2**20
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp16": torch.float16}
FLOOR, FLOOR_CHUNKS = "floor", (256, 512)
ERROR_SIZE = (512, 8192)  # n, v at which gradients are compared with float64
Found = dict[str, Any]


def floor_of(rows: Rows, chunk: int) -> Callable[[], None]:
    """The four products a step cannot do without, chunk by chunk."""
    (n, _), (v, _) = rows.student.shape, rows.student_head.shape
    chunk = min(chunk, n)
    logits = torch.empty(chunk, v, dtype=rows.student.dtype, device=rows.student.device)
    of_hidden, of_head = torch.empty_like(rows.student), torch.zeros_like(rows.student_head)

    @torch.no_grad()
    def run() -> None:
        for first in range(0, n, chunk):
            part = slice(first, first + chunk)
            out = logits[: len(rows.student[part])]
            torch.mm(rows.teacher[part], rows.teacher_head.T, out=out)
            torch.mm(rows.student[part], rows.student_head.T, out=out)
            torch.mm(out, rows.student_head, out=of_hidden[part])
            of_head.addmm_(out.T, rows.student[part])

    return run


def step_of(way: str, rows: Rows) -> Callable[[], None]:
    """Loss and backward by one way; gradients are dropped afterwards."""
    loss_of, prepare = WAYS[way].make(), WAYS[way].prepare
    given = rows if prepare is None else prepare(rows)

    def run() -> None:
        loss_of(given).backward()
        given.student.grad = given.student_head.grad = None

    return run


def seconds(run: Callable[[], None], device: str) -> tuple[float, float]:
    """By the wall's clock, and of this process."""
    if device != "cpu":
        torch.cuda.synchronize()
    begin = time.perf_counter(), time.process_time()
    run()
    if device != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter() - begin[0], time.process_time() - begin[1]


def timed(rows: Rows, ways: Sequence[str], *, rounds: int, device: str) -> tuple[Found, dict[str, str]]:
    """Way → seconds of each round on both clocks, and why others are absent. The first round warms up."""
    runs = {f"{FLOOR} {chunk}": floor_of(rows, chunk) for chunk in FLOOR_CHUNKS}
    absent = {}
    for way in ways:
        try:
            runs[way] = step_of(way, rows)
        except Absent as why:
            absent[way] = str(why)
    found: Found = {way: [] for way in runs}
    for turn in range(rounds + 1):
        for way, run in runs.items():
            took = seconds(run, device)
            if turn:
                found[way].append(took)
    return found, absent


def memory_of(way: str, options: argparse.Namespace, v: int, dtype: str) -> float:
    """MiB beyond rows and heads, of one loss and backward in a process of its own; raises `NotMeasured`."""
    command = [sys.executable, __file__, "--memory-of", way, "--vocabularies", str(v), "--dtypes", dtype]
    command += ["--rows", str(options.rows), "--widths", *map(str, options.widths), "--device", options.device]
    return figure(command, environment={**os.environ, "OMP_NUM_THREADS": str(options.threads)})


def print_memory(way: str, rows: Rows, device: str) -> None:
    """What `memory_of` reads. A first step on few rows loads what is loaded once."""
    step_of(way, Rows.drawn(8, 64, (16, 16), rows.student.dtype, device))()
    run = step_of(way, rows)
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        print((torch.cuda.max_memory_allocated() - before) / MIB)
        return
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from what is there now
    before = resident("VmRSS")
    run()
    print(resident("VmHWM") - before)


def resident(what: str) -> float:
    """MiB of this process, by the kernel."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(float(line.split()[1]) / 1024 for line in lines if line.startswith(f"{what}:"))


def error_of(way: str, dtype: torch.dtype, widths: tuple[int, int], device: str) -> tuple[float, float] | None:
    """Relative distance of the gradients at hidden rows and head from float64, on the same numbers."""
    n, v = ERROR_SIZE
    rows = Rows.drawn(n, v, widths, dtype, device)
    prepare = WAYS[way].prepare
    given = rows if prepare is None else prepare(rows)
    WAYS[way].make()(given).backward()
    leaves = (given.student.grad, given.student_head.grad)
    if any(x is None for x in leaves):
        return None
    exact = reference(rows, labels=WAYS[way].labels)
    return tuple(float((x.double() - y).norm() / y.norm()) for x, y in zip(leaves, exact, strict=True))  # type: ignore[union-attr, return-value]  # two, and none of them None


def table(found: Found, *, clock: int) -> list[str]:
    """One line a way: the fastest and the median round by the floor's fastest."""
    best = {way: min(turn[clock] for turn in turns) for way, turns in found["seconds"].items()}
    floor = min(best[f"{FLOOR} {chunk}"] for chunk in FLOOR_CHUNKS)
    lines = ["| way | s, fastest | × floor, fastest | × floor, median | peak extra MiB | error: hidden | head |"]
    lines += ["| --- | ---: | ---: | ---: | ---: | ---: | ---: |"]
    for way, turns in found["seconds"].items():
        middle = median(turn[clock] for turn in turns) / floor
        memory, errors = found["memory"].get(way), found["errors"].get(way)
        shown = ["" if memory is None else f"{memory:,.0f}"]
        shown += ["", ""] if errors is None else [f"{error:.1e}" for error in errors]
        lines.append(f"| {way} | {best[way]:.3f} | {best[way] / floor:.2f} | {middle:.2f} | {' | '.join(shown)} |")
    lines += [f"| {way} | absent: {why} | | | | | |" for way, why in found["absent"].items()]
    return [*lines, *(f"\n{line}" for line in why_not(found["no_memory"]))]


def plot(options: argparse.Namespace, path: Path) -> None:
    """Seconds of ours and naive over rows, columns, and the share of rows that are ignored."""
    pyplot = require("matplotlib.pyplot", extra="report")
    n, v = options.rows, options.vocabularies[0]
    panels = {
        "rows": [(n // 8, v, 0.0), (n // 4, v, 0.0), (n // 2, v, 0.0), (n, v, 0.0)],
        "columns": [(n // 4, v // 4, 0.0), (n // 4, v // 2, 0.0), (n // 4, v, 0.0), (n // 4, 2 * v, 0.0)],
        f"share of {n:,} rows that are ignored": [(n, v, 0.0), (n, v, 0.25), (n, v, 0.5), (n, v, 0.75), (n, v, 0.85)],
    }
    drawn, axes = pyplot.subplots(1, len(panels), figsize=(12, 3.5), sharey=True)
    for axis, (title, sizes), which in zip(axes, panels.items(), range(len(panels)), strict=True):
        for way, marker, label in (("ours", "o", "hf-distill, chunk by chunk"), ("naive", "s", "whole logits")):
            took = [fastest(way, size, options) for size in sizes]
            axis.plot([size[which] for size in sizes], took, marker=marker, label=label)
        axis.set_xlabel(title)
        axis.locator_params(axis="x", nbins=5)
        axis.set_xlim(left=0)
        axis.set_ylim(bottom=0)
    axes[0].set_ylabel("seconds, loss and backward")
    axes[0].legend()
    drawn.tight_layout()
    drawn.savefig(path, dpi=120)
    pyplot.close(drawn)
    print(f"\nPlot: {path}")


def fastest(way: str, size: tuple[int, int, float], options: argparse.Namespace) -> float:
    """Seconds of n rows and v columns: ours of the rows that count, gathered within the clock; naive of all of them."""
    n, v, ignored = size
    rows = Rows.drawn(n, v, tuple(options.widths), DTYPES[options.dtypes[0]], options.device)
    counted = torch.randperm(n, generator=torch.Generator().manual_seed(0))[: n - int(ignored * n)].sort().values
    loss_of = WAYS[way].make()

    def run() -> None:
        loss_of(rows.gathered(counted.to(options.device)) if way == "ours" else rows).backward()
        rows.student.grad = rows.student_head.grad = None

    run()
    return min(seconds(run, options.device)[options.processor_time] for _ in range(options.rounds))


def main() -> None:
    """Read the command line, measure, print a table a type and vocabulary."""
    options = parse()
    torch.set_num_threads(options.threads)
    sizes = [(dtype, v) for dtype in options.dtypes for v in options.vocabularies]
    widths = tuple(options.widths)
    if options.memory_of:
        ((dtype, v),) = sizes
        rows = Rows.drawn(options.rows, v, widths, DTYPES[dtype], options.device)
        return print_memory(options.memory_of, rows, options.device)
    everything = []
    for dtype, v in sizes:
        rows = Rows.drawn(options.rows, v, widths, DTYPES[dtype], options.device)
        found: Found = {"dtype": dtype, "v": v}
        found["seconds"], found["absent"] = timed(rows, options.ways, rounds=options.rounds, device=options.device)
        del rows
        there = [way for way in options.ways if way not in found["absent"]]
        found["memory"], found["no_memory"] = {}, {}
        for way in () if options.no_memory else there:
            try:
                found["memory"][way] = memory_of(way, options, v, dtype)
            except NotMeasured as why:
                found["no_memory"][way] = str(why)
        found["errors"] = {way: error_of(way, DTYPES[dtype], widths, options.device) for way in there}
        clock = "processor time" if options.processor_time else "wall clock"
        print(
            f"\n{dtype}, n {options.rows}, d {widths[0]} and {widths[1]}, v {v}, {options.threads} thread(s), {clock}\n"
        )
        print("\n".join(table(found, clock=int(options.processor_time))), flush=True)
        everything.append(found)
    if options.output:
        options.output.write_text(json.dumps(everything))
    if options.plot:
        plot(options, options.plot)


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=2048, help="n")
    parser.add_argument("--vocabularies", type=int, nargs="+", default=[32768, 131072], help="columns of both heads")
    parser.add_argument("--widths", type=int, nargs=2, default=[512, 1024], help="d of student and teacher")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=["bf16", "fp32"])
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS), metavar="WAY", help=", ".join(WAYS))
    parser.add_argument("--rounds", type=int, default=3, help="how often each way has its turn, after one to warm up")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--processor-time", action="store_true", help="for a busy machine; counts all threads")
    parser.add_argument("--no-memory", action="store_true", help="leave out the processes that measure memory")
    parser.add_argument("--plot", type=Path, help="PNG of the cost over n and v")
    parser.add_argument("--output", type=Path, help="JSON file for every number")
    parser.add_argument("--memory-of", choices=WAYS, help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
