"""Building the small model: fewer layers, thinner ones, adapters, or another architecture. It trains nothing."""

from hf_distill.students.adapt import AdaptReport, adapt, save_merged
from hf_distill.students.fresh import fresh
from hf_distill.students.inherit import inherit
from hf_distill.students.narrow.narrow import narrow
from hf_distill.students.report import FreshReport, InheritReport, NarrowReport, SizeReport, StackReport, report_of
from hf_distill.students.trimming import TrimmedVocabulary, trim_vocabulary

__all__ = [
    "AdaptReport",
    "FreshReport",
    "InheritReport",
    "NarrowReport",
    "SizeReport",
    "StackReport",
    "TrimmedVocabulary",
    "adapt",
    "fresh",
    "inherit",
    "narrow",
    "report_of",
    "save_merged",
    "trim_vocabulary",
]
