"""Comparing trained students with their teacher: quality, size, speed, agreement, and a report."""

from hf_distill.compare.latency import Latency, measure_latency
from hf_distill.compare.machine import Machine, parameter_count, size_mb, this_machine
from hf_distill.compare.plot import plot_accuracy_against_latency
from hf_distill.compare.quality import Spread, predicted_labels, share_equal, spread_of
from hf_distill.compare.report import ModelResult, Report
from hf_distill.compare.table import markdown_table, read_report, terminal_table, write_report

__all__ = [
    "Latency",
    "Machine",
    "ModelResult",
    "Report",
    "Spread",
    "markdown_table",
    "measure_latency",
    "parameter_count",
    "plot_accuracy_against_latency",
    "predicted_labels",
    "read_report",
    "share_equal",
    "size_mb",
    "spread_of",
    "terminal_table",
    "this_machine",
    "write_report",
]
