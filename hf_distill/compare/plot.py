"""A plot of accuracy against latency: a point for each model, error bars over seeds, and a legend with the numbers."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hf_distill._utils import write_whole
from hf_distill.compare.report import ModelResult, Report
from hf_distill.errors import DataError, require

# Okabe and Ito's colours, which most colour-blind readers can distinguish.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_MARKERS = "osD^vP"


def plot_accuracy_against_latency(report: Report, path: str | os.PathLike[str]) -> None:
    """Plot the models of a report. No backend, style or current figure of matplotlib changes.

    A model without accuracy or latency is left out, and named in the legend.

    Args:
        report: the report.
        path: the image file; its suffix determines the format.

    Raises:
        MissingExtraError: if matplotlib is not installed.
        DataError: if no model has both numbers.
    """
    backend = require("matplotlib.backends.backend_agg", extra="report")
    figures = require("matplotlib.figure", extra="report")
    shown = [r for r in report.results if r.accuracy_share_mean is not None and r.latency_ms_p50 is not None]
    if not shown:
        raise DataError("no result has both an accuracy and a latency: there is nothing to plot.")
    figure = figures.Figure(figsize=(7, 4.8), dpi=144, layout="constrained")
    backend.FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for place, result in enumerate(shown):
        _draw_point(axes, result, place)
    axes.set_xlabel("latency at batch size 1, ms (p50; faint line up to p95)")
    axes.set_ylabel("accuracy on the test examples")
    axes.set_title(report.title, loc="left", fontsize="medium")
    axes.margins(x=0.2)
    axes.set_xlim(left=0)
    axes.set_ylim(*_accuracies(shown))
    axes.grid(alpha=0.3)
    absent = [r.name for r in report.results if r not in shown]
    if absent:
        axes.plot([], [], linestyle="none", label="not measured: " + ", ".join(absent))
    # A legend, as names next to the points would overlap.
    figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize="small")
    target = Path(path)
    write_whole(target, lambda beside: figure.savefig(beside, format=target.suffix.lstrip(".")))


def _accuracies(shown: Sequence[ModelResult]) -> tuple[float, float]:
    """Return the ends of the axis, between 0 and 1, so that it holds all models with their error bars."""
    ends = [
        mean + sign * (r.accuracy_share_spread or 0.0)
        for r in shown
        if (mean := r.accuracy_share_mean) is not None
        for sign in (-1, 1)
    ]
    margin = max(0.02, 0.1 * (max(ends) - min(ends)))
    return max(0.0, min(ends) - margin), min(1.0, max(ends) + margin)


def _draw_point(axes: Any, result: ModelResult, place: int) -> None:
    p50, p95 = result.latency_ms_p50, result.latency_ms_p95
    colour = _COLOURS[place % len(_COLOURS)]
    if p95 is not None:
        axes.hlines(result.accuracy_share_mean, p50, p95, color=colour, alpha=0.35, linewidth=1)
    spread = result.accuracy_share_spread
    accuracy = f"{result.accuracy_share_mean:.3f}" + ("" if spread is None else f" ± {spread:.3f}")
    axes.errorbar(
        p50,
        result.accuracy_share_mean,
        yerr=spread,
        fmt=_MARKERS[place % len(_MARKERS)],
        color=colour,
        fillstyle="none",  # markers of equal models overlap
        capsize=4,
        label=f"{result.name}: {accuracy}",
    )
