"""Building the small model: fewer layers of its teacher, thinner ones, or another architecture. It trains nothing."""

from hf_distill.students.fresh import fresh
from hf_distill.students.inherit import inherit
from hf_distill.students.narrow import narrow
from hf_distill.students.report import FreshReport, InheritReport, NarrowReport, SizeReport, StackReport
from hf_distill.students.trimming import TrimmedVocabulary, trim_vocabulary

__all__ = [
    "FreshReport",
    "InheritReport",
    "NarrowReport",
    "SizeReport",
    "StackReport",
    "TrimmedVocabulary",
    "fresh",
    "inherit",
    "narrow",
    "trim_vocabulary",
]
