"""How far gradients in 16 bits are from float64, with whole logits and without: every divergence, several seeds.

Of the loss alone, from hidden rows and heads, and of whole tiny models. No timing: the numbers are those of the
processor's kernels, so run it with `ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2` too, say.
"""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import geometric_mean
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the checkout, when run as a script

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.peers import Rows
from hf_distill import Distiller
from hf_distill.functional import DIVERGENCES, PROPERTIES
from hf_distill.functional.fused.inputs import Head, TeacherHidden, Terms, fusable
from hf_distill.functional.fused.loss import fused_linear_distillation
from tests.heads import HEADS

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
TEMPERATURE, ALPHA = 3.0, 0.7


def apart(found: Sequence[Tensor], exact: Sequence[Tensor]) -> float:
    """The distance of all gradients together, relative to their norm."""
    difference = torch.stack([(x.double() - y).norm() for x, y in zip(found, exact, strict=True)]).norm()
    return float(difference / torch.stack([y.norm() for y in exact]).norm())


def whole_logits(rows: Rows, divergence: str) -> Tensor:
    """The blend by the plain functions."""
    full = torch.promote_types(rows.student.dtype, torch.float32)
    ours, theirs = (
        F.linear(*side).to(full) for side in ((rows.student, rows.student_head), (rows.teacher, rows.teacher_head))
    )
    properties = PROPERTIES[divergence]
    t = TEMPERATURE if properties.softens else 1.0
    target = {"target": rows.labels} if properties.wants_target else {}
    total = t**properties.temperature_power * DIVERGENCES[divergence](ours / t, theirs / t, **target).sum()
    labels = F.cross_entropy(ours, rows.labels, reduction="sum")
    return ((1 - ALPHA) * labels + ALPHA * total) / len(rows.labels)


def without_logits(rows: Rows, divergence: str, *, chunk: int) -> Tensor:
    """The same, in chunks of so many rows."""
    n, v = len(rows.labels), len(rows.student_head)
    return fused_linear_distillation(
        rows.student,
        Head(rows.student_head),
        teacher=TeacherHidden(rows.teacher, Head(rows.teacher_head)),
        terms=Terms(divergence, temperature=TEMPERATURE, labels_factor=(1 - ALPHA) / n, divergence_factor=ALPHA / n),
        labels=rows.labels,
        budget_bytes=chunk * 2 * v * rows.student.element_size(),
    ).loss


def of_the_loss(options: argparse.Namespace, divergence: str, seed: int) -> dict[str, float]:
    """Errors of the gradients at hidden rows and at the head."""
    rows = Rows.drawn(options.rows, options.columns, options.widths, DTYPES[options.dtype], seed=seed)
    exact = rows.as_double()
    leaves = [(side.student, side.student_head) for side in (rows, exact)]
    right = torch.autograd.grad(whole_logits(exact, divergence), leaves[1])
    found = {
        "whole logits": torch.autograd.grad(whole_logits(rows, divergence), leaves[0]),
        "without": torch.autograd.grad(without_logits(rows, divergence, chunk=options.rows // 5), leaves[0]),
    }
    return {
        f"{leaf}, {way}": apart([gradients[i]], [right[i]])
        for i, leaf in enumerate(("hidden", "head"))
        for way, gradients in found.items()
    }


def of_a_model(options: argparse.Namespace, name: str, divergence: str, seed: int) -> dict[str, float]:
    """Errors of the gradients of all parameters of a tiny model, whose weights 16 bits can hold."""
    head, dtype = HEADS[name], DTYPES[options.dtype]
    models = [head.make(2 * seed + one).to(dtype) for one in (1, 2)]
    batch = {key: x.to(dtype) if x.is_floating_point() else x for key, x in head.batch(8).items()}

    def gradients(dtype: torch.dtype, *, fused: bool) -> list[Tensor]:
        student, teacher = (copy.deepcopy(model).to(dtype) for model in models)
        given = {key: x.to(dtype) if x.is_floating_point() else x for key, x in batch.items()}
        knobs: dict[str, Any] = {"divergence": divergence, "alpha": ALPHA, "temperature": TEMPERATURE}
        distiller = Distiller(student, teacher, fused_loss=fused, **knobs)
        counts = distiller.begin_step([given])
        if dtype == torch.float64:
            counts = replace(counts, denominators={term: x.double() for term, x in counts.denominators.items()})
        distiller(student, given, counts).loss.backward()
        return [torch.zeros_like(p) if p.grad is None else p.grad for p in student.parameters()]

    exact = gradients(torch.float64, fused=False)
    ways = {"whole logits": False, "without": True}
    return {f"all, {way}": apart(gradients(dtype, fused=how), exact) for way, how in ways.items()}


def line(title: str, found: Sequence[dict[str, float]]) -> str:
    """A row of the table: geometric means over seeds, and the ratio of the two ways, with the largest of a seed."""
    cells = []
    leaves = dict.fromkeys(key.split(",")[0] for key in found[0])
    for leaf in leaves:
        plain, ours = ([one[f"{leaf}, {way}"] for one in found] for way in ("whole logits", "without"))
        ratios = [x / y for x, y in zip(ours, plain, strict=True)]
        cells += [f"{geometric_mean(plain):.2e}", f"{geometric_mean(ours):.2e}"]
        cells += [f"{geometric_mean(ratios):.3f}", f"{max(ratios):.2f}"]
    return f"| {title} | {' | '.join(cells)} |"


def heading(leaves: Sequence[str]) -> str:
    """Of a table with these leaves."""
    names = [name for leaf in leaves for name in (f"{leaf}: whole logits", "without", "ratio", "largest")]
    return f"| divergence | {' | '.join(names)} |\n| --- |{' ---: |' * len(names)}"


def main() -> None:
    """Read the command line, print a table of the loss alone and one of models."""
    options = parse()
    torch.set_num_threads(1)
    seeds = range(options.seeds)
    print(f"{options.dtype}, {torch.backends.cpu.get_cpu_capability()}, {options.seeds} seeds\n")
    print(f"Loss alone, n {options.rows}, d {options.widths[0]} and {options.widths[1]}, v {options.columns}\n")
    print(heading(("hidden", "head")))
    for divergence in fusable():
        print(line(divergence, [of_the_loss(options, divergence, seed) for seed in seeds]), flush=True)
    print(f"\nModels: {', '.join(options.heads)}\n\n{heading(('all',))}")
    for divergence in fusable():
        found = [of_a_model(options, name, divergence, seed) for name in options.heads for seed in seeds]
        print(line(divergence, found), flush=True)


def parse() -> argparse.Namespace:
    """The command line."""
    large = [name for name, head in HEADS.items() if head.kind in ("masked_lm", "causal_lm", "seq2seq")]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    parser.add_argument("--seeds", type=int, default=12)
    parser.add_argument("--rows", type=int, default=300, help="n")
    parser.add_argument("--columns", type=int, default=4000, help="v")
    parser.add_argument("--widths", type=int, nargs=2, default=(64, 96), help="d of both sides")
    parser.add_argument("--heads", nargs="+", default=large, choices=large, help="tiny models of tests/heads.py")
    return parser.parse_args()


if __name__ == "__main__":
    main()
