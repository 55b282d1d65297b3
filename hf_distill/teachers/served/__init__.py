"""A teacher behind an HTTP endpoint that tells the likeliest next tokens of a prompt. No generation here."""

from hf_distill.teachers.served.teacher import ServedTeacher

__all__ = ["ServedTeacher"]
