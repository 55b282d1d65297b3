"""One student and every kind of teacher, on SST-2: labels, one teacher, three, a chain, generations, its own average.

Two layers of a fine-tuned MiniLM. Of one seed, all start from the same weights and see the same batches in the same
order, with as many optimizer steps; a chain's earlier links have theirs before. Settings are chosen on dev with the
first seed, test is scored once at the end. Quality, not speed. Finished runs are lines of WORK_DIR/runs.jsonl.
"""

from __future__ import annotations

import argparse
import gc
import json
import logging
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the checkout, when run as a script

import torch
from torch import nn

from benchmarks import protocol
from benchmarks.init_ablation import counted, say, signed
from benchmarks.kinds_training import (
    AVERAGE,
    GENERATIONS,
    KINDS,
    LABELS,
    LONGER,
    ONE,
    TEMPERATURE,
    Laboratory,
    read_student,
)
from benchmarks.sets.sst2_kinds import Data, read_sst2, tiny

AGAINST = {ONE: LABELS, AVERAGE: LABELS}  # what a row is compared with; the others with the student of one teacher
Run = dict[str, Any]


class Together(nn.Module):
    """The mean of the softened probabilities of several models: to score what an ensemble says."""

    def __init__(self, models: Sequence[nn.Module]) -> None:
        super().__init__()
        self.models = nn.ModuleList(models)

    def forward(self, **batch: torch.Tensor) -> SimpleNamespace:
        said = [(model(**batch).logits / TEMPERATURE).softmax(-1) for model in self.models]
        return SimpleNamespace(logits=torch.stack(said).mean(0).log())


class Runs:
    """Finished runs, a JSON line each with their students' weights beside; one that is asked for again is read back."""

    def __init__(self, laboratory: Laboratory) -> None:
        self._laboratory, self._folder = laboratory, laboratory.folder
        options = laboratory.options
        self._common = {"steps": options.steps, "batch": options.batch, "examples": len(laboratory.data.train)}
        self._lines = self._folder / "runs.jsonl"
        self._kept: list[Run] = []
        if self._lines.is_file():
            self._kept = [json.loads(line) for line in self._lines.read_text(encoding="utf-8").splitlines()]

    def __call__(self, kind: str, seed: int, alpha: float, rate: float, born_of: Run | None = None) -> Run:
        """Args: born_of: the run whose student is the first generation."""
        run: Run = {"kind": kind, "seed": seed, "alpha": alpha, "rate": rate, **self._common}
        if kind == GENERATIONS and born_of is not None:
            run["first"] = born_of["weights"][0]
        for kept in self._kept:
            if run.items() <= kept.items():
                return kept
        began = time.process_time()
        first = self._folder / run["first"] if "first" in run else None
        models = self._laboratory.trained(kind, seed, alpha, rate, first)
        run["seconds"] = time.process_time() - began
        run["dev"] = [accuracy(self._laboratory.data, model, "dev") for model in models]
        run["weights"] = [f"run-{len(self._kept)}_student-{i}.pt" for i in range(len(models))]
        for model, name in zip(models, run["weights"], strict=True):
            torch.save(model.state_dict(), self._folder / name)
        self._kept.append(run)
        with self._lines.open("a", encoding="utf-8") as file:
            file.write(json.dumps(run) + "\n")
        dev = ", ".join(f"{row} {value:.4f}" for row, value in zip(KINDS[kind], run["dev"], strict=True))
        say(f"seed {seed}, alpha {alpha:g}, lr {rate:g}: dev {dev}; {run['seconds']:.0f} s of processor time")
        return run


def accuracy(data: Data, model: nn.Module, split: str) -> float:
    """Share of right classes."""
    classes, labels = protocol.predict(data, model, getattr(data, split))  # type: ignore[arg-type]  # reads two fields
    return float((classes == labels).mean())


def measure(laboratory: Laboratory) -> dict[str, Any]:
    """All runs. The first seed chooses: the rate with labels alone, alpha for each kind; of equals, the first."""
    options, data = laboratory.options, laboratory.data
    laboratory.ask_teachers()
    runs, first = Runs(laboratory), options.seeds[0]
    tried = [runs(LABELS, first, 0.0, rate) for rate in options.learning_rates]
    rate = best(tried)["rate"]
    chosen: dict[str, list[Run]] = {LABELS: [best(tried)]}
    for kind in (kind for kind in KINDS if kind in (ONE, *options.kinds) and kind not in (LABELS, LONGER)):
        born_of = chosen[ONE][0] if kind == GENERATIONS else None
        mine = [runs(kind, first, alpha, rate, born_of) for alpha in options.alphas]
        tried += mine
        chosen[kind] = [best(mine)]
    for seed in options.seeds[1:]:
        for kind, made in chosen.items():
            made.append(runs(kind, seed, made[0]["alpha"], rate, chosen[ONE][-1] if kind == GENERATIONS else None))
    if LONGER in options.kinds:  # last, as it is what can be left out
        alpha = chosen[ONE][0]["alpha"]
        chosen[LONGER] = [runs(LONGER, seed, alpha, rate) for seed in options.seeds]
    teachers = [*data.teachers, Together(data.teachers)]
    return {
        "options": {name: value for name, value in vars(options).items() if isinstance(value, (int, float, list))},
        "rate": rate,
        "tried": tried,
        "rows": {
            row: scored(laboratory, made, place)
            for kind, made in chosen.items()
            for place, row in enumerate(KINDS[kind])
        },
        "teachers": [{split: accuracy(data, one, split) for split in ("dev", "test")} for one in teachers],
    }


def best(tried: Sequence[Run]) -> Run:
    """By the last student's accuracy on dev."""
    return max(tried, key=lambda run: run["dev"][-1])


def scored(laboratory: Laboratory, made: Sequence[Run], place: int) -> dict[str, Any]:
    """One row's students of all seeds, on test as well."""
    test = []
    for run, teacher in zip(made, laboratory.data.teachers, strict=True):
        student = read_student(teacher, laboratory.folder / run["weights"][place])
        test.append(accuracy(laboratory.data, student, "test"))
    facts = {"alpha": made[0]["alpha"], "seconds": [run["seconds"] for run in made]}
    return {**facts, "dev": [run["dev"][place] for run in made], "test": test}


def gains(found: dict[str, Any], row: str, split: str) -> list[float]:
    """Seed by seed, against what this row is compared with."""
    rows = found["rows"]
    return [a - b for a, b in zip(rows[row][split], rows[AGAINST.get(row, ONE)][split], strict=True)]


def markdown(found: dict[str, Any]) -> str:
    """The table, gains seed by seed, what was tried, and the teachers themselves."""
    lines = [
        "| student | alpha | dev accuracy | test accuracy | against | gain on dev | gain on test | seed by seed |",
        "| --- | ---: | ---: | ---: | --- | ---: | ---: | --- |",
    ]
    for row, entry in found["rows"].items():
        cells = [f"{entry['alpha']:g}", protocol.spread(entry["dev"]), protocol.spread(entry["test"])]
        if row == LABELS:
            cells += ["", "", "", ""]
        else:
            on_test = gains(found, row, "test")
            each = ", ".join(f"{gain:+.4f}" for gain in on_test)
            against = AGAINST.get(row, ONE)
            cells += [against, signed(gains(found, row, "dev")), signed(on_test), f"{each}; {counted(on_test)}"]
        lines.append(f"| {row} | {' | '.join(cells)} |")
    lines += ["", "Tried with the first seed, on dev:"]
    for run in found["tried"]:
        lines.append(f"- {KINDS[run['kind']][-1]}, lr {run['rate']:g}, alpha {run['alpha']:g}: {run['dev'][-1]:.4f}")
    *alone, together = found["teachers"]
    each = ", ".join(f"{one['dev']:.4f} / {one['test']:.4f}" for one in alone)
    lines += ["", f"Teachers, dev / test: {each}; together {together['dev']:.4f} / {together['test']:.4f}."]
    return "\n".join(lines)


def main() -> None:
    """Read the command line, run what is not done yet, print the table."""
    options = parse()
    logging.getLogger("transformers").setLevel(logging.ERROR)
    options.work_dir.mkdir(parents=True, exist_ok=True)
    data = tiny(options) if options.smoke else read_sst2(options, options.work_dir)
    gc.collect()
    gc.freeze()  # Accelerate collects garbage at the start of every training
    found = measure(Laboratory(data, options.work_dir, options))
    beside = options.work_dir / ".found.json.partial"
    beside.write_text(json.dumps(found, indent=1), encoding="utf-8")
    os.replace(beside, options.work_dir / "found.json")
    say(f"\n{markdown(found)}")


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", help="folder with sst2/; or $HF_DISTILL_DATA")
    parser.add_argument("--encoder", help="folder of a pretrained BERT encoder (default: the installed MiniLM package)")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS), metavar="KIND", help=f"{[*KINDS]}")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="a teacher each; at least two")
    parser.add_argument("--steps", type=int, default=240, help="optimizer steps of a student, of each link of a chain")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--examples", type=int, default=7680, help="phrases that students learn from, at most")
    parser.add_argument("--learning-rates", type=float, nargs="+", default=[1e-4, 3e-4], help="tried with labels alone")
    parser.add_argument("--alphas", type=float, nargs="+", default=[0.9, 0.5], help="tried with each kind of teacher")
    parser.add_argument("--teacher-steps", type=int, default=1000, help="optimizer steps of a teacher, of 32")
    parser.add_argument("--work-dir", type=Path, required=True, help="keeps what is finished; the same command goes on")
    parser.add_argument("--smoke", action="store_true", help="tiny teachers and made-up data: to try out the script")
    return parser.parse_args()


if __name__ == "__main__":
    main()
