"""The numbers of the quickstart, full and fast. Chosen on the validation paragraphs alone."""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Settings:
    """What one run of the quickstart does. Both students get the same steps and batch size."""

    packages: int = 16
    vocabulary_size: int = 4000
    max_tokens: int = 40
    labelled_share: float = 0.1
    """Of the training paragraphs, those whose labels the students may see."""
    runs: int = 3
    """Seeds. Each changes the student's first weights, the data order, and which labels are seen."""
    batch_size: int = 32
    teacher_layers: int = 2
    teacher_width: int = 128
    teacher_steps: int = 800
    teacher_learning_rate: float = 1e-3
    student_layers: int = 1
    student_width: int = 64
    student_steps: int = 800
    student_learning_rate: float = 3e-3
    warmup_share: float = 0.1
    weight_decay: float = 0.01
    temperature: float = 2.0
    alpha: float = 0.9
    latency_calls: int = 200
    fast: bool = False


FULL = Settings()
FAST = replace(FULL, runs=2, teacher_steps=250, student_steps=250, latency_calls=60, fast=True)
