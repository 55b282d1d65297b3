"""Whole training steps over a vocabulary: time and peak memory of ours, TRL's GKDTrainer and a bare loop. No quality.

What the ways are, and that they have one loss: `step_ways.py`. Blocks of steps take turns within a process; memory is
measured in a process for each way.
"""

from __future__ import annotations

import argparse
import gc
import json
import logging
import os
import sys
import warnings
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the checkout, when run as a script

import torch

from benchmarks.own_process import NotMeasured, figure, why_not
from benchmarks.peers import Absent
from benchmarks.step_ways import BARE, MODELS, WAYS, Found, Setting, Steps
from hf_distill.errors import require

VOCABULARIES = {"causal_lm": 32000, "masked_lm": 30522}


def measured(options: argparse.Namespace) -> Found:
    """Way → seconds of each step on both clocks, first loss, peak memory; why others are absent."""
    setting = Setting(options)
    found: Found = {"seconds": {way: [] for way in options.ways}, "loss": {}, "memory": {}}
    found |= {"absent": {}, "no_memory": {}}  # and why
    for turn in range(options.blocks):
        for place in range(len(options.ways)):
            way = options.ways[(turn + place) % len(options.ways)]
            if way in found["absent"]:
                continue
            steps = Steps(options.device)
            try:
                WAYS[way](setting, steps)
            except Absent as why:
                found["absent"][way] = str(why)
                continue
            found["seconds"][way] += steps.seconds(warm_up=options.warm_up)
            found["loss"].setdefault(way, steps.first_loss)
    for way in options.ways:
        if way in found["absent"] or options.no_memory:
            continue
        try:
            found["memory"][way] = memory_of(way)
        except NotMeasured as why:
            found["no_memory"][way] = str(why)
    return found


def memory_of(way: str) -> float:
    """MiB, of two steps in a process of their own with the same options; raises `NotMeasured`."""
    return figure([sys.executable, __file__, *sys.argv[1:], "--memory-of", way])


def table(found: Found, *, clock: int) -> str:
    """One line a way; ratios are to the bare loop."""
    middle = {way: median(step[clock] for step in steps) for way, steps in found["seconds"].items() if steps}
    lines = [
        "| way | s a step | × bare loop | peak MiB of a step | first loss |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for way, seconds in middle.items():
        ratio = f"{seconds / middle[BARE]:.2f}" if BARE in middle else ""
        memory = found["memory"].get(way)
        shown = "" if memory is None else f"{memory:,.0f}"
        lines.append(f"| {way} | {seconds:.3f} | {ratio} | {shown} | {found['loss'][way]:.4f} |")
    lines += [f"| {way} | absent: {why} | | | |" for way, why in found["absent"].items()]
    return "\n".join([*lines, *(f"\n{line}" for line in why_not(found["no_memory"]))])


def plot(found: Found, path: Path, *, clock: int) -> None:
    """Bars: seconds a step, and MiB; none where they were not measured."""
    pyplot = require("matplotlib.pyplot", extra="report")
    ways = [way for way, steps in found["seconds"].items() if steps]
    drawn, axes = pyplot.subplots(1, 2, figsize=(9, 2.5), sharey=True)
    axes[0].barh(ways, [median(step[clock] for step in found["seconds"][way]) for way in ways])
    axes[1].barh(ways, [found["memory"].get(way, float("nan")) for way in ways])
    axes[0].set_xlabel("seconds a step")
    axes[1].set_xlabel("peak MiB of a step")
    axes[0].invert_yaxis()
    drawn.tight_layout()
    drawn.savefig(path, dpi=120)
    pyplot.close(drawn)
    print(f"\nPlot: {path}")


def main() -> None:
    """Read the command line, measure, print the table."""
    options = parse()
    torch.set_num_threads(options.threads)
    logging.getLogger("transformers").setLevel(logging.ERROR)
    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
    warnings.filterwarnings("ignore", module="trl|torch|torchao")
    gc.collect()
    gc.freeze()  # Accelerate collects garbage at the start of every training
    if options.memory_of:
        options.warm_up, options.steps = 0, 2
        steps = Steps(options.device)
        WAYS[options.memory_of](Setting(options), steps)
        return print(steps.peak())
    found, clock = measured(options), int(options.processor_time)
    if options.output:
        options.output.write_text(json.dumps({"options": vars(options), **found}, default=str))
    print(
        f"{options.kind}, {options.batch} x {options.length} tokens, vocabulary {options.vocabulary}, student "
        f"{options.student}, teacher {options.teacher}, alpha {options.alpha:g}, T {options.temperature:g}, "
        f"{'bf16' if options.bf16 else 'fp32'}, {options.threads} thread(s), {options.blocks} rounds of "
        f"{options.steps} steps, {'processor time' if clock else 'wall clock'}\n\n{table(found, clock=clock)}"
    )
    if options.plot:
        plot(found, options.plot, clock=clock)


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--kind", choices=MODELS, default="causal_lm", help="Llama, or BERT with 15 of 100 tokens masked")
    add("--batch", type=int, default=8)
    add("--length", type=int, default=256, help="tokens an example")
    add("--vocabulary", type=int, help="32000 or, for masked_lm, 30522")
    add("--student", type=int, nargs=2, default=[4, 256], metavar=("LAYERS", "WIDTH"))
    add("--teacher", type=int, nargs=2, default=[8, 512], metavar=("LAYERS", "WIDTH"))
    add("--alpha", type=float, default=1.0, help="below 1 there is a labels' term, and TRL is left out")
    add("--temperature", type=float, default=1.0, help="other than 1, TRL is left out")
    add("--ways", nargs="+", choices=WAYS, default=list(WAYS), metavar="WAY", help=", ".join(WAYS))
    add("--blocks", type=int, default=4, help="how often each way has its turn")
    add("--steps", type=int, default=4, help="steps counted in a block")
    add("--warm-up", type=int, default=1, help="steps at the start of a block that are not counted")
    add("--threads", type=int, default=1)
    add("--device", default="cpu", help="cpu or cuda")
    add("--bf16", action="store_true", help="mixed precision")
    add("--processor-time", action="store_true", help="for a busy machine; counts all threads")
    add("--no-memory", action="store_true", help="leave out the processes that measure memory")
    add("--plot", type=Path, help="PNG of time and memory")
    add("--output", type=Path, help="JSON file for every number")
    add("--memory-of", choices=WAYS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.vocabulary = options.vocabulary or VOCABULARIES[options.kind]
    return options


if __name__ == "__main__":
    main()
