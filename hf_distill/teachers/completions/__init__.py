"""Texts that a teacher writes, as a dataset to train on: sequence-level distillation."""

from hf_distill.teachers.completions.generate import generate_completions

__all__ = ["generate_completions"]
