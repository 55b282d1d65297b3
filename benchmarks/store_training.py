"""What a student learns where less is kept of its teacher: KL to the whole teacher on held-out inputs, at equal bytes.

A toy with the shape of a language model: the teacher's logits are a random network of an input, over a Zipf law of
2,000 columns; the student is a narrower network. Every run has the same inputs in the same order, as many steps and, of
one seed, the same start: random, or trained before on one drawn column an input (as a language model is on text). Draws
are made once, as in a cache, and seen again in every epoch. Labels (that column) beside the teacher with --alpha. No
time is taken.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import json
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the checkout, when run as a script

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.gradient_error import bytes_of
from hf_distill.functional import forward_kl
from hf_distill.functional.sparse import sampled_forward_kl, student_outcomes, teacher_outcomes
from hf_distill.teachers import Hybrid, Sampled, TopK

WIDTH, OF_TEACHER, OF_STUDENT = 64, 128, 96
HELD_OUT = 1024
TEACHERS = {"flat": 0.5, "peaked": 3.0}  # spread of the logits that depend on the input
RANDOM, ON_TEXT = "random start", "start trained on text"
Loss = Callable[[Tensor, Tensor], Tensor]  # the student's rows, and which inputs they are of


@dataclass(frozen=True)
class World:
    """Inputs `[n d]` and the teacher's rows `[n v]`; the last `HELD_OUT` are not trained on."""

    inputs: Tensor
    rows: Tensor

    @property
    def count(self) -> int:
        return len(self.inputs) - HELD_OUT


def network(seed: int, width: int, columns: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(WIDTH, width), nn.GELU(), nn.Linear(width, columns))


def world(spread: float, options: argparse.Namespace) -> World:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(options.inputs + HELD_OUT, WIDTH, generator=generator)
    law = -torch.arange(1, options.vocabulary + 1).float().log()
    with torch.no_grad():
        rows = network(1, OF_TEACHER, options.vocabulary)(inputs)
    rows = spread * rows / rows.std() + law[torch.randperm(options.vocabulary, generator=generator)]
    return World(inputs, rows)


def ways(vocabulary: int) -> dict[str, Any]:
    """By name: a store, None for all columns, or k where the k largest are normalised anew."""
    found: dict[str, Any] = {"all columns": None}
    for small, k in ((Sampled(32), 16), (Sampled(128), 64)):
        listed = TopK(k, temperatures=(1.0,))
        size = bytes_of(listed, vocabulary)
        mixed = Hybrid(10, 10) if k == 16 else Hybrid(32, 62)
        assert bytes_of(small, vocabulary) == size == bytes_of(mixed, vocabulary)
        found |= {
            f"top {k} normalised anew": k,
            f"TopK({k})": listed,
            f"Sampled({small.samples})": small,
            f"Hybrid({mixed.k}, {mixed.samples})": mixed,
        }
    return found


def loss_of(way: Any, given: World, seed: int) -> Loss:
    """What is kept is made once, of all inputs that are trained on."""
    rows = given.rows[: given.count]
    if way is None:
        return lambda q, at: forward_kl(q, rows[at])
    if isinstance(way, int):
        kept, ids = rows.topk(way, -1)
        return lambda q, at: forward_kl(q.gather(-1, ids[at]) - q.logsumexp(-1, keepdim=True), kept[at])
    store = dataclasses.replace(way, seed=seed) if hasattr(way, "seed") else way
    keys = np.stack([np.arange(len(rows)), np.zeros(len(rows))], 1).astype(np.uint64)
    encoded = store.encode(rows, keys, np.ones(len(rows), dtype=np.int64))
    told = store.sparse_rows({name: store.decode(name, values) for name, values in encoded.items()}, 1.0)
    ids, log_p, tail, weights = told.ids, told.log_probabilities, told.log_tail, told.weights
    if weights is None:
        return lambda q, at: forward_kl(student_outcomes(q, ids[at]), teacher_outcomes(log_p[at], tail[at]))
    return lambda q, at: sampled_forward_kl(q, ids[at], log_p[at], weights[at])


def trained(student: nn.Module, loss: Loss, given: World, seed: int, options: argparse.Namespace) -> nn.Module:
    student = copy.deepcopy(student)
    optimizer = torch.optim.Adam(student.parameters(), lr=options.learning_rate)
    generator = torch.Generator().manual_seed(seed)
    total = options.epochs * -(-given.count // options.batch)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 1 / total, total)
    for _ in range(options.epochs):
        for at in torch.randperm(given.count, generator=generator).split(options.batch):
            optimizer.zero_grad()
            loss(student(given.inputs[at]), at).mean().backward()
            optimizer.step()
            schedule.step()
    return student


def start(name: str, given: World, seed: int, options: argparse.Namespace) -> nn.Module:
    student = network(100 + seed, OF_STUDENT, options.vocabulary)
    if name == RANDOM:
        return student
    return trained(student, labels(given, seed), given, seed, options)


def labels(given: World, seed: int) -> Loss:
    """Cross-entropy of one column an input, drawn from the teacher's probabilities."""
    generator = torch.Generator().manual_seed(seed)
    text = given.rows[: given.count].softmax(-1).multinomial(1, generator=generator)[:, 0]
    return lambda q, at: F.cross_entropy(q, text[at], reduction="none")


def blended(of_teacher: Loss, of_labels: Loss, alpha: float) -> Loss:
    if alpha == 1:
        return of_teacher
    return lambda q, at: alpha * of_teacher(q, at) + (1 - alpha) * of_labels(q, at)


@torch.no_grad()
def apart(student: nn.Module, given: World) -> float:
    """KL of the whole rows, in nats, on held-out inputs."""
    return forward_kl(student(given.inputs[given.count :]), given.rows[given.count :]).mean().item()


def measure(options: argparse.Namespace) -> dict[str, dict[str, list[float]]]:
    """By teacher and start, and by way: the KL of each seed."""
    found: dict[str, dict[str, list[float]]] = {}
    for teacher, spread in TEACHERS.items():
        given = world(spread, options)
        for begun in (RANDOM, ON_TEXT):
            of_ways = found[f"{teacher} teacher, {begun}"] = {}
            for seed in range(options.seeds):
                student, text = start(begun, given, seed, options), labels(given, seed)
                of_ways.setdefault("the start", []).append(apart(student, given))
                for name, way in ways(options.vocabulary).items():
                    loss = blended(loss_of(way, given, seed), text, options.alpha)
                    done = trained(student, loss, given, seed, options)
                    of_ways.setdefault(name, []).append(apart(done, given))
    return found


def table(found: dict[str, dict[str, list[float]]], vocabulary: int) -> list[str]:
    """Means over seeds, and the largest distance of a seed from its mean."""
    sizes = {name: bytes_of(way, vocabulary) for name, way in ways(vocabulary).items() if hasattr(way, "fields")}
    sizes["all columns"] = 2 * vocabulary
    lines = [f"| kept | bytes | {' | '.join(found)} |", "| --- | ---: |" + " ---: |" * len(found)]
    for name in next(iter(found.values())):
        cells = []
        for of_ways in found.values():
            mean = statistics.mean(of_ways[name])
            cells.append(f"{mean:.3f} ± {max(abs(one - mean) for one in of_ways[name]):.3f}")
        lines.append(f"| {name} | {sizes.get(name, '')} | {' | '.join(cells)} |")
    return lines


def main(arguments: list[str] | None = None) -> None:
    """Read the command line, train, print, and keep the figures where asked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--vocabulary", type=int, default=2000)
    parser.add_argument("--inputs", type=int, default=4096)
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--alpha", type=float, default=1.0, help="weight of the teacher's term beside the labels'")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--output", type=Path, help="a JSON file for all figures")
    options = parser.parse_args(arguments)
    found = measure(options)
    print("\n".join(table(found, options.vocabulary)))
    if options.output is not None:
        options.output.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
