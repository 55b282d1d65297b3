"""Texts that a teacher generates, as a dataset to train on: sequence-level distillation."""

from hf_distill.teachers.completions.generate import generate_completions

__all__ = ["generate_completions"]
