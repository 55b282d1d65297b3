"""Tables for the terminal and for Markdown, and the files of a report: report.json and report.md."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path

from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.measure import Measurement
from rich.table import Table

from hf_distill._utils import write_text_whole
from hf_distill.compare.report import ModelResult, Report
from hf_distill.errors import DataError

UNKNOWN = "-"
JSON_NAME, MARKDOWN_NAME = "report.json", "report.md"
# Headings that are wider than their column.
_NARROW = {"parameters": "params", "p50 ms": "p50\nms", "p95 ms": "p95\nms", "speed-up": "speed"}


def markdown_rows(headings: Sequence[str], rows: Sequence[Sequence[str]], *, left: Collection[str]) -> str:
    """Return a Markdown table.

    Args:
        headings: the heading of each column.
        rows: the cells of each row.
        left: the headings of columns that are aligned to the left; the others are aligned to the right.
    """
    lines = [headings, [":--" if heading in left else "--:" for heading in headings], *rows]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def rich_table(
    title: str, headings: Sequence[str], rows: Sequence[Sequence[str]], *, left: Collection[str], gap: int = 2
) -> Table:
    """Return a table for the terminal.

    Args:
        title: the line above it.
        headings: the heading of each column; without headings the columns are aligned to the left.
        rows: the cells of each row.
        left: the headings of columns that are aligned to the left; the others are aligned to the right.
        gap: spaces between columns.
    """
    table = Table(title=title, title_justify="left", box=None, padding=(0, gap, 0, 0), pad_edge=False)
    table.show_header = bool(headings)
    for heading in headings:
        table.add_column(heading, justify="left" if heading in left else "right")
    for row in rows:
        table.add_row(*row)
    return table


def _with_spread(mean: float | None, spread: float | None) -> str:
    return _number("{:.3f}", mean) + ("" if mean is None or spread is None else f" ± {spread:.3f}")


def _number(pattern: str, value: float | None) -> str:
    return UNKNOWN if value is None else pattern.format(value)


# Heading -> the text of a result's cell.
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
    """Return the comparison for a terminal: a line for each model, or for each number if that is too wide.

    A line for each model fits 80 columns if no model's name is longer than 23 letters.
    """
    return _TerminalTable(report)


class _TerminalTable:
    def __init__(self, report: Report) -> None:
        self._report = report

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        title, headings, rows = self._report.title, list(_COLUMNS), _rows(self._report)
        left = ("model", "accuracy", "agreement")  # some numbers in the last two have a spread after them
        table = rich_table(title, [_NARROW.get(name, name) for name in headings], rows, left=left, gap=1)
        if Measurement.get(console, options.update(width=10_000), table).maximum > options.max_width:
            lines: list[list[str]] = []
            for name, *cells in rows:
                lines += [[name], *([f"  {heading}", cell] for heading, cell in zip(headings[1:], cells, strict=True))]
            table = rich_table(title, [], lines, left=(), gap=1)
        yield table


def markdown_table(report: Report) -> str:
    """Return the comparison as a Markdown table: a row for each model, students before the teacher."""
    return markdown_rows(list(_COLUMNS), _rows(report), left=("model",))


def report_markdown(report: Report) -> str:
    """Return the whole report.md: the table, its notes, the missing numbers, settings and machine."""
    runs = max((len(result.accuracy_share_runs) for result in report.results), default=0)
    explanation = (
        f"Accuracy and agreement with the teacher are shares of the test examples: the mean ± the sample standard "
        f"deviation over seeds (up to {runs}). MB is 10^6 bytes of weights as stored. Latency is one forward call at "
        "batch size 1; the speed-up is the teacher's p50 divided by the model's.\n"
    )
    parts = [f"# {report.title}\n", markdown_table(report), explanation]
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


def _two_columns(heading: str, values: Mapping[str, object]) -> str:
    rows = [
        [f"`{name}`", value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)]
        for name, value in values.items()
    ]
    return markdown_rows([heading, "value"], rows, left=(heading, "value"))


def write_report(report: Report, folder: str | os.PathLike[str]) -> None:
    """Write report.json and report.md into `folder`, each whole or not at all."""
    write_text_whole(Path(folder, JSON_NAME), report.to_json())
    write_text_whole(Path(folder, MARKDOWN_NAME), report_markdown(report))


def read_report(folder: str | os.PathLike[str]) -> Report:
    """Return the report in `folder`.

    Raises:
        DataError: if there is none, or the file is not a report.
    """
    path = Path(folder, JSON_NAME)
    if not path.is_file():
        raise DataError(f"no {JSON_NAME} in {folder}. Give the folder that a comparison wrote.")
    return Report.from_json(path.read_text(encoding="utf-8"))
