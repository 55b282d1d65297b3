"""A teacher behind an HTTP endpoint that scores prompts; it generates nothing."""

from hf_distill.teachers.served.teacher import ServedTeacher

__all__ = ["ServedTeacher"]
