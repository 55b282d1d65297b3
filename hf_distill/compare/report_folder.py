"""The files of a report: report.json and report.md."""

from __future__ import annotations

import os
from pathlib import Path

from hf_distill._utils import write_text_whole
from hf_distill.compare.report import Report
from hf_distill.compare.table import report_markdown
from hf_distill.errors import DataError

JSON_NAME, MARKDOWN_NAME = "report.json", "report.md"


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
