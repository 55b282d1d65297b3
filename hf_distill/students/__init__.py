"""Building a student: fewer layers, thinner layers, fewer tokens, or another architecture; checks on adapters."""

from hf_distill.students.adapters import AdapterReport, check_adapters, save_merged
from hf_distill.students.fresh import fresh
from hf_distill.students.inherit import inherit
from hf_distill.students.narrow.narrow import narrow
from hf_distill.students.report import (
    FreshReport,
    InheritReport,
    NarrowReport,
    SizeReport,
    StackReport,
    StudentReport,
    report_of,
)
from hf_distill.students.trimming import TrimmedVocabulary, trim_vocabulary

__all__ = [
    "AdapterReport",
    "FreshReport",
    "InheritReport",
    "NarrowReport",
    "SizeReport",
    "StackReport",
    "StudentReport",
    "TrimmedVocabulary",
    "check_adapters",
    "fresh",
    "inherit",
    "narrow",
    "report_of",
    "save_merged",
    "trim_vocabulary",
]
