"""A report as text: the terminal's table, the same table in Markdown, and report.md around it."""

from __future__ import annotations

import json
from collections.abc import Callable

from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.measure import Measurement
from rich.table import Table

from hf_distill.compare.report import ModelResult, Report

UNKNOWN = "-"
# Headings that are wider than their column.
_NARROW = {"parameters": "params", "p50 ms": "p50\nms", "p95 ms": "p95\nms", "speed-up": "speed"}


def _with_spread(mean: float | None, spread: float | None) -> str:
    if mean is None:
        return UNKNOWN
    return f"{mean:.3f}" if spread is None else f"{mean:.3f} ± {spread:.3f}"


def _number(pattern: str, value: float | None) -> str:
    return UNKNOWN if value is None else pattern.format(value)


# Heading -> the text of one result's cell.
_COLUMNS: dict[str, Callable[[ModelResult], str]] = {
    "model": lambda r: r.name,
    "accuracy": lambda r: _with_spread(r.accuracy_share_mean, r.accuracy_share_spread),
    "parameters": lambda r: _number("{:,}", r.parameters),
    "MB": lambda r: _number("{:.2f}", r.size_mb),
    "p50 ms": lambda r: _number("{:.2f}", r.latency_ms_p50),
    "p95 ms": lambda r: _number("{:.2f}", r.latency_ms_p95),
    "speed-up": lambda r: _number("{:.1f} ×", r.speed_up_times),
    "agreement": lambda r: _with_spread(r.agreement_share_mean, r.agreement_share_spread),
}


def _rows(report: Report) -> list[list[str]]:
    return [[cell(result) for cell in _COLUMNS.values()] for result in report.results]


def terminal_table(report: Report) -> RenderableType:
    """The comparison for a terminal, to be printed by rich: a line a model, or where that is too wide a line a number.

    A line a model fits 80 columns if no model's name is longer than 23 letters.
    """
    return _TerminalTable(report)


class _TerminalTable:
    def __init__(self, report: Report) -> None:
        self._report = report

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        table = self._of_models()
        wide = Measurement.get(console, options.update(width=10_000), table).maximum
        yield table if wide <= options.max_width else self._of_numbers()

    def _of_models(self) -> Table:
        table = self._table()
        for heading in _COLUMNS:
            left = heading in ("model", "accuracy", "agreement")  # some of whose numbers have a spread after them
            narrow = _NARROW.get(heading, heading)
            table.add_column(narrow, justify="left" if left else "right", no_wrap=True)
        for row in _rows(self._report):
            table.add_row(*row)
        return table

    def _of_numbers(self) -> Table:
        table = self._table(show_header=False)
        table.add_column()
        table.add_column()
        for name, *cells in _rows(self._report):
            table.add_row(name)
            for heading, cell in zip(list(_COLUMNS)[1:], cells, strict=True):
                table.add_row(f"  {heading}", cell)
        return table

    def _table(self, *, show_header: bool = True) -> Table:
        return Table(
            title=self._report.title,
            title_justify="left",
            box=None,
            padding=(0, 1, 0, 0),
            pad_edge=False,
            show_header=show_header,
        )


def markdown_table(report: Report) -> str:
    """The comparison as a Markdown table, one line a model."""
    marks = [":--" if heading == "model" else "--:" for heading in _COLUMNS]
    lines = [list(_COLUMNS), marks, *_rows(report)]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def report_markdown(report: Report) -> str:
    """The whole of report.md: the table, its notes, the missing numbers, settings and machine."""
    parts = [f"# {report.title}\n", markdown_table(report), _reading_help(report)]
    if report.notes:
        parts.append("".join(f"- {note}\n" for note in report.notes))
    reasons = "".join(
        f"- {result.name}, `{name}`: {reason}\n"
        for result in report.results
        for name, reason in result.not_measured.items()
    )
    if reasons:
        parts.append("## Not measured\n\n" + reasons)
    if report.settings:
        parts.append("## Settings\n\n" + _two_columns("setting", report.settings))
    parts.append("## Machine\n\n" + _two_columns("fact", vars(report.machine)))
    return "\n".join(parts)


def _reading_help(report: Report) -> str:
    runs = max((len(result.accuracy_share_runs) for result in report.results), default=0)
    return (
        f"Accuracy and agreement with the teacher are shares of the test examples: the mean ± the "
        f"sample standard deviation over seeds (up to {runs}). MB is 10^6 bytes of weights as "
        "stored. Latency is one forward call at batch size 1; the speed-up is the teacher's p50 "
        "divided by the model's.\n"
    )


def _two_columns(heading: str, values: dict[str, object]) -> str:
    lines = [f"| {heading} | value |\n| :-- | :-- |\n"]
    for name, value in values.items():
        text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        lines.append(f"| `{name}` | {text} |\n")
    return "".join(lines)
