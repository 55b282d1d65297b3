"""How a student starts against what it is trained with, on SST-2: DistilBERT's ablation in miniature. Not speed.

Students of three layers of a fine-tuned MiniLM: four starts x five losses x three seeds, each with the same batches in
the same order and as many steps. Accuracy on dev; learning rates are chosen on sentences held out of train; test is
not looked at. Every finished run is a line of `--runs`, so the same command goes on where it was cut off.
"""

from __future__ import annotations

import argparse
import gc
import json
import logging
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the checkout, when run as a script

from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    PrinterCallback,
    set_seed,
)

from benchmarks import protocol
from benchmarks.sets.sst2_ablation import Data, Features, made_up, read_sst2
from hf_distill import (
    CosineEmbedding,
    DistillationArguments,
    DistillationTrainer,
    HiddenMatch,
    LayerMap,
    ModelTeacher,
    RelationMatch,
    Teacher,
    students,
)

LAYERS, TEMPERATURE = 3, 2.0
RANDOM, LABELS = "random", "labels"
STARTS: dict[str, Callable[[int], int | LayerMap] | None] = {
    RANDOM: None,
    "first three": lambda depth: LayerMap.first(LAYERS, depth),
    "evenly spaced": lambda depth: LAYERS,
    "first and last": lambda depth: LayerMap.first_last(LAYERS, depth),
}
# alpha, and the objectives beside it. Weights: such that each term is of the labels' order of size at the beginning.
LOSSES: dict[str, tuple[float, Callable[[], list[Any]]]] = {
    LABELS: (0.0, list),
    "labels + logits": (0.5, list),
    "labels + logits + cosine": (0.5, lambda: [CosineEmbedding(weight=1.0)]),
    "labels + logits + hidden": (0.5, lambda: [HiddenMatch("skip", weight=1.0)]),
    "labels + logits + relations": (0.5, lambda: [RelationMatch(weight=1.0)]),
}
Run = dict[str, Any]


class SharedTeacher(Teacher):
    """A teacher that is asked once a batch: the runs that see the same batches and read the same share its answers."""

    def __init__(self, model: nn.Module) -> None:
        self._teacher = ModelTeacher(model)
        self._answers: dict[bytes, Any] = {}
        self.inputs, self.capture = self._teacher.inputs, self._teacher.capture
        self.bind, self.to = self._teacher.bind, self._teacher.to
        self.asked = 0

    @property
    def alignment(self) -> Any:
        return self._teacher.alignment

    def __call__(self, task: Any, batch: Any, needs: Any) -> Any:
        key = batch["input_ids"].numpy().tobytes() + repr(sorted(needs.activations)).encode()
        if key not in self._answers:
            self._answers[key] = self._teacher(task, batch, needs)
            self.asked += 1
        return self._answers[key]


def make_student(teacher: Any, start: str, seed: int) -> Any:
    """Three layers. A student that is not random has the teacher's embeddings, pooler and head as well."""
    layers = STARTS[start]
    if layers is not None:
        return students.inherit(teacher, layers=layers(teacher.config.num_hidden_layers))
    set_seed(seed)
    config = BertConfig.from_dict({**teacher.config.to_dict(), "num_hidden_layers": LAYERS})
    return BertForSequenceClassification(config)


def train(data: Data, run: Run, teacher: Any, *, seed: int) -> Any:
    """A student trained as the run says; seeds set its dropout and the order of the data, and the random start."""
    alpha, objectives = LOSSES[run["loss"]]
    student = make_student(data.teacher, run["start"], seed)
    with tempfile.TemporaryDirectory() as folder:
        common = protocol.settings_of(
            steps=run["steps"],
            batch_size=run["batch"],
            learning_rate=run["learning_rate"],
            seed=seed,
            folder=folder,
        )
        args = DistillationArguments(**common, alpha=alpha, temperature=TEMPERATURE)
        trainer = DistillationTrainer(
            model=student,
            teacher_model=teacher,
            args=args,
            objectives=objectives() or None,
            train_dataset=data.train,
            data_collator=data.collator,
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return student


def accuracy(data: Data, model: Any, rows: Features) -> float:
    """Share of right classes."""
    classes, labels = protocol.predict(data, model, rows)  # type: ignore[arg-type]  # it reads collator and lengths_of
    return float((classes == labels).mean())


class Runs:
    """Finished runs, a JSON line each; one that is asked for again is read back."""

    def __init__(self, data: Data, path: Path | None, common: Run) -> None:
        self._data, self._path, self._common = data, path, common
        self._kept: list[Run] = []
        if path is not None and path.is_file():
            self._kept = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]

    def __call__(self, start: str, loss: str, seed: int, rate: float, teacher: Any, *, held_out: bool = False) -> Run:
        """Args: held_out: also measure the accuracy on the held-out sentences."""
        run = {"start": start, "loss": loss, "seed": seed, "learning_rate": rate, **self._common}
        for kept in self._kept:
            if run.items() <= kept.items() and (kept["held_out"] is not None or not held_out):
                return kept
        began = time.process_time()
        student = train(self._data, run, teacher, seed=seed)
        run["seconds"] = time.process_time() - began
        run["held_out"] = accuracy(self._data, student, self._data.held_out) if held_out else None
        run["dev"] = accuracy(self._data, student, self._data.dev)
        self._kept.append(run)
        if self._path is not None:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(run) + "\n")
        say(f"{start}, {loss}, seed {seed}, lr {rate:g}: dev {run['dev']:.4f} in {run['seconds']:.0f} s")
        return run


def measure(data: Data, options: argparse.Namespace) -> dict[str, Any]:
    """All runs, seed by seed. A start's rate is chosen with labels alone and the first seed; of equals, the first."""
    common = {"steps": options.steps, "batch": options.batch, "examples": len(data.train)}
    runs = Runs(data, options.runs, common)
    losses = [loss for loss in LOSSES if loss == LABELS or loss in options.losses]
    rates, tried, before = {}, {}, {}
    for start in options.starts:
        before[start] = accuracy(data, make_student(data.teacher, start, options.seeds[0]), data.dev)
        found = [runs(start, LABELS, options.seeds[0], rate, None, held_out=True) for rate in options.learning_rates]
        rates[start] = max(found, key=lambda run: run["held_out"])["learning_rate"]
        tried[start] = {f"{run['learning_rate']:g}": run["held_out"] for run in found}
    done = []
    for seed in options.seeds:
        for loss in losses:
            teacher = SharedTeacher(data.teacher) if LOSSES[loss][0] else None
            done += [runs(start, loss, seed, rates[start], teacher) for start in options.starts]
    teachers = accuracy(data, data.teacher, data.dev)
    told = {"starts": options.starts, "losses": losses, "rates": rates, "held_out": tried, "before": before}
    return {**common, **told, "teacher_dev": teachers, "runs": done}


def of(found: dict[str, Any], start: str, loss: str) -> list[float]:
    """Accuracies on dev, a seed each."""
    return [run["dev"] for run in found["runs"] if run["start"] == start and run["loss"] == loss]


def gains(found: dict[str, Any], start: str, loss: str) -> list[float]:
    """By how much a loss is better than the labels alone, with the same start and seed."""
    return [a - b for a, b in zip(of(found, start, loss), of(found, start, LABELS), strict=True)]


def markdown(found: dict[str, Any]) -> str:
    """The tables: accuracy, and gains of the losses; then what each is worth, and how rates were chosen."""
    starts, losses = found["starts"], found["losses"]
    trained = {start: [protocol.spread(of(found, start, loss)) for loss in losses] for start in starts}
    cells = [[f"{found['before'][start]:.4f}", *trained[start]] for start in starts]
    lines = table(found, ["dev accuracy", "before any step", *losses], cells)
    others = [loss for loss in losses if loss != LABELS]
    if others:
        cells = [[signed(gains(found, start, loss)) for loss in others] for start in starts]
        lines += ["", *table(found, ["minus labels alone, same start and seed", *others], cells)]
    lines += ["", *effects(found, others), ""]
    lines.append("Learning rates, chosen with labels alone and the first seed; accuracy on the held-out sentences:")
    for start, tried in found["held_out"].items():
        figures = ", ".join(f"{rate} {value:.4f}" for rate, value in tried.items())
        lines.append(f"{start} {found['rates'][start]:g} ({figures});")
    seconds = sum(run["seconds"] for run in found["runs"])
    lines.append(
        f"teacher on dev: {found['teacher_dev']:.4f}. {found['steps']} steps of {found['batch']}, "
        f"{len(found['runs'])} runs, {seconds:.0f} s of processor time in training."
    )
    return "\n".join(lines)


def effects(found: dict[str, Any], others: Sequence[str]) -> list[str]:
    """A line each: starts against the random one, and losses against labels alone where a start is the teacher's."""
    lines = []
    inherited = [start for start in found["starts"] if start != RANDOM]
    for start in inherited if RANDOM in found["starts"] else []:
        pairs = [zip(of(found, start, loss), of(found, RANDOM, loss), strict=True) for loss in found["losses"]]
        pooled = [a - b for pair in pairs for a, b in pair]
        lines.append(f"- {start}, minus {RANDOM} with the same loss and seed: {signed(pooled)}, {counted(pooled)}.")
    for loss in others if inherited else []:
        pooled = [gain for start in inherited for gain in gains(found, start, loss)]
        lines.append(f"- {loss}, minus labels alone, starts from the teacher: {signed(pooled)}, {counted(pooled)}.")
    return lines


def counted(values: Sequence[float]) -> str:
    """How many are better, and how many worse."""
    return f"better in {sum(x > 0 for x in values)} of {len(values)}, worse in {sum(x < 0 for x in values)}"


def table(found: dict[str, Any], head: Sequence[str], cells: Sequence[Sequence[str]]) -> list[str]:
    """Starts down."""
    rows = [f"| {start} | {' | '.join(row)} |" for start, row in zip(found["starts"], cells, strict=True)]
    return [f"| {' | '.join(head)} |", f"| --- |{' ---: |' * (len(head) - 1)}", *rows]


def signed(values: Sequence[float]) -> str:
    """Mean with its sign, and the sample standard deviation."""
    return f"{'+' if statistics.mean(values) >= 0 else ''}{protocol.spread(values)}"


def say(line: str) -> None:
    print(line, flush=True)


def main() -> None:
    """Read the command line, run what is not done yet, print the tables."""
    options = parse()
    logging.getLogger("transformers").setLevel(logging.ERROR)
    data = made_up(options) if options.smoke else read_sst2(options)
    gc.collect()
    gc.freeze()  # Accelerate collects garbage at the start of every training
    found = measure(data, options)
    say(f"\n{markdown(found)}")


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", help="folder with sst2/; or $HF_DISTILL_DATA")
    parser.add_argument("--encoder", help="folder of a pretrained BERT encoder (default: the installed MiniLM package)")
    parser.add_argument(
        "--starts", nargs="+", choices=STARTS, default=list(STARTS), metavar="START", help=f"{[*STARTS]}"
    )
    parser.add_argument(
        "--losses", nargs="+", choices=LOSSES, default=list(LOSSES), metavar="LOSS", help=f"{[*LOSSES]}"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="the first chooses the learning rates")
    parser.add_argument("--steps", type=int, default=120, help="optimizer steps of a student")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--examples", type=int, default=10_000, help="phrases that students learn from, at most")
    parser.add_argument("--held-out", type=int, default=400, help="sentences on which learning rates are chosen")
    parser.add_argument("--learning-rates", type=float, nargs="+", default=[1e-4, 3e-4, 1e-3], help="tried a start")
    parser.add_argument("--teacher-steps", type=int, default=1000, help="optimizer steps of the teacher, of 32")
    parser.add_argument("--work-dir", type=Path, help="keeps the fine-tuned teacher; real_data.py's may be given")
    parser.add_argument("--runs", type=Path, help="JSON lines, one a finished run; what is in it is not run again")
    parser.add_argument("--smoke", action="store_true", help="a tiny teacher and made-up data: to try out the script")
    return parser.parse_args()


if __name__ == "__main__":
    main()
