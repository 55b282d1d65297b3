"""How far off the gradient is where less is kept of a teacher, against all columns; and a plot against bytes. No time.

The gradient is that of the forward KL in the student's logits. Rows are random: a flat and a peaked teacher, and for
each a student at its start and one near the teacher. Normalising the k largest anew is no store of this library: it is
computed here from the formula.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hf_distill.errors import require
from hf_distill.functional import forward_kl
from hf_distill.functional.sparse import sampled_forward_kl, student_outcomes, teacher_outcomes
from hf_distill.teachers import Hybrid, Sampled, TopK

FLAT, PEAKED = "flat teacher", "peaked teacher"
AT_START, NEAR = "student at its start", "student near it"
DRAWS = 8
ANEW = "top {k} normalised anew"


def cases(vocabulary: int, rows: int) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Name, student's and teacher's rows `[rows vocabulary]`."""
    for name, scale in ((FLAT, 1.0), (PEAKED, 4.0)):
        generator = torch.Generator().manual_seed(0)
        teacher = scale * torch.randn(rows, vocabulary, generator=generator)
        noise = torch.randn(rows, vocabulary, generator=generator)
        yield f"{name}, {AT_START}", 0.1 * noise, teacher
        yield f"{name}, {NEAR}", teacher + 0.5 * noise, teacher


def bytes_of(store: Any, vocabulary: int) -> int:
    """A token."""
    return sum(field.bytes for field in store.fields(vocabulary).values())


def gradients(store: Any, student: Tensor, teacher: Tensor) -> list[Tensor]:
    """What is kept teaches: one gradient, or one a seed where it is drawn."""
    seeds = range(DRAWS) if hasattr(store, "seed") else (None,)
    return [
        _gradient(store if seed is None else dataclasses.replace(store, seed=seed), student, teacher) for seed in seeds
    ]


def _gradient(store: Any, student: Tensor, teacher: Tensor) -> Tensor:
    keys = np.stack([np.arange(len(teacher)), np.zeros(len(teacher))], 1).astype(np.uint64)
    kept = store.encode(teacher, keys, np.ones(len(teacher), dtype=np.int64))
    told = store.sparse_rows({name: store.decode(name, values) for name, values in kept.items()}, 1.0)
    rows = student.clone().requires_grad_()
    if told.weights is None:
        loss = forward_kl(student_outcomes(rows, told.ids), teacher_outcomes(told.log_probabilities, told.log_tail))
    else:
        loss = sampled_forward_kl(rows, told.ids, told.log_probabilities, told.weights)
    return torch.autograd.grad(loss.sum(), rows)[0]


def of_normalised_anew(k: int, student: Tensor, teacher: Tensor) -> Tensor:
    """softmax(student) - p, where p is the k largest of the teacher, of sum 1."""
    kept, ids = teacher.topk(k, -1)
    return student.softmax(-1).scatter_add(-1, ids, -kept.softmax(-1))


def errors(found: list[Tensor], whole: Tensor) -> tuple[float, float]:
    """‖gradient - whole‖ / ‖whole‖ of one draw (root of the mean square over draws), and of the mean over all draws."""
    each = torch.stack([((one - whole).norm() / whole.norm()) ** 2 for one in found]).mean().sqrt().item()
    return each, ((torch.stack(found).mean(0) - whole).norm() / whole.norm()).item()


def gradient_errors(vocabulary: int, rows: int = 64) -> dict[str, dict[str, float]]:
    """By case, and by what is kept."""
    found: dict[str, dict[str, float]] = {}
    for name, student, teacher in cases(vocabulary, rows):
        whole = student.softmax(-1) - teacher.softmax(-1)
        ways = found[name] = {}
        ways[ANEW.format(k=64)] = errors([of_normalised_anew(64, student, teacher)], whole)[0]
        ways["top 64 and the rest as one"] = errors(gradients(TopK(64), student, teacher), whole)[0]
        for label, store in (
            ("32 samples", Sampled(32)),
            ("hybrid, 32 and 32 samples", Hybrid(32, 32)),
        ):
            one, many = errors(gradients(store, student, teacher), whole)
            ways[f"{label}: one draw"], ways[f"{label}: mean of {DRAWS}"] = one, many
    return found


def curves(vocabulary: int, rows: int = 32) -> dict[str, dict[str, list[tuple[int, float]]]]:
    """By case and way: bytes a token, and the error."""
    found: dict[str, dict[str, list[tuple[int, float]]]] = {}
    for name, student, teacher in cases(vocabulary, rows):
        whole = student.softmax(-1) - teacher.softmax(-1)
        lines: dict[str, list[tuple[int, float]]] = {}
        for k in (8, 16, 32, 64, 128, 256, 512):
            listed = TopK(k, temperatures=(1.0,))
            size = bytes_of(listed, vocabulary)
            anew = errors([of_normalised_anew(k, student, teacher)], whole)[0]
            lines.setdefault("top k, normalised anew (not offered)", []).append((size, anew))
            rest = errors(gradients(listed, student, teacher), whole)[0]
            lines.setdefault("top k, the rest as one", []).append((size, rest))
            for label, store in (("sampled", Sampled(2 * k)), ("hybrid", Hybrid(k // 2, k))):
                one, many = errors(gradients(store, student, teacher), whole)
                size = bytes_of(store, vocabulary)
                lines.setdefault(f"{label}, one draw", []).append((size, one))
                lines.setdefault(f"{label}, mean of {DRAWS}", []).append((size, many))
        found[name] = lines
    return found


def plot(vocabulary: int, path: Path) -> None:
    """Error against bytes a token, a panel a case.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    figures = require("matplotlib.figure", extra="report")
    backend = require("matplotlib.backends.backend_agg", extra="report")
    figure = figures.Figure(figsize=(9, 6.4), dpi=90, layout="constrained")
    axes = figure.subplots(2, 2, sharex=True, sharey="col")
    styles = {
        "top k, normalised anew (not offered)": {"color": "0.6", "marker": "x"},
        "top k, the rest as one": {"color": "tab:blue", "marker": "o"},
        "sampled, one draw": {"color": "tab:orange", "marker": "s"},
        f"sampled, mean of {DRAWS}": {"color": "tab:orange", "marker": "s", "linestyle": "--", "markerfacecolor": "w"},
        "hybrid, one draw": {"color": "tab:green", "marker": "^"},
        f"hybrid, mean of {DRAWS}": {"color": "tab:green", "marker": "^", "linestyle": "--", "markerfacecolor": "w"},
    }
    found = curves(vocabulary)
    for place, (case, lines) in enumerate(found.items()):
        axis = axes[place % 2, place // 2]  # a column a teacher
        for label, points in lines.items():
            axis.loglog(*zip(*points, strict=True), label=label, markersize=4, linewidth=1.2, **styles[label])
        axis.set_title(case, fontsize=10)
        axis.grid(alpha=0.3)
        axis.set_xticks([32, 64, 128, 256, 512, 1024, 2048], ["32", "64", "128", "256", "512", "1k", "2k"], minor=False)
        axis.minorticks_off()
        axis.yaxis.set_major_formatter(lambda share, _: f"{share:.0%}" if share >= 0.01 else f"{share:.1%}")
    for axis in axes[1]:
        axis.set_xlabel(f"bytes a token (all {vocabulary:,} columns in float16: {2 * vocabulary:,})", fontsize=9)
    for axis in axes[:, 0]:
        axis.set_ylabel("error of the gradient", fontsize=9)
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, fontsize=9)
    canvas = backend.FigureCanvasAgg(figure)
    canvas.draw()
    image = require("PIL.Image", extra="report").fromarray(np.asarray(canvas.buffer_rgba())[..., :3].copy())
    image.quantize(48).save(path, format="PNG", optimize=True)
