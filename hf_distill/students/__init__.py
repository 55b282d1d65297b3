"""Building the small model. So far: from chosen layers of its teacher. It trains nothing."""

from hf_distill.students.inherit import inherit
from hf_distill.students.report import InheritReport, StackReport

__all__ = ["InheritReport", "StackReport", "inherit"]
