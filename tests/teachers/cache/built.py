"""Caches of tiny teachers, and the contents of their folders."""

from __future__ import annotations

import random
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch

from hf_distill import Distiller
from hf_distill.teachers.cache import BuildOptions, CachedTeacher, Dense, TeacherCache
from tests.heads import HEADS, Example, Head
from tests.laws import measuring as m

EXAMPLES = 20


OPTIONS = {field.name for field in fields(BuildOptions)}


def build(folder: Path, head: Head, teacher: Any, examples: list[Example], **changed: Any) -> TeacherCache:
    """Build a cache with shards of six, batches of three, and full precision."""
    settings = {
        "student": head.make(1),
        "data_collator": head.collate,
        "batch_size": 3,
        "shard_examples": 6,
        "store": Dense("float32"),
        "progress": False,
    }
    settings |= changed
    options = BuildOptions(**{name: settings.pop(name) for name in OPTIONS & settings.keys()})
    return TeacherCache.build(teacher, examples, folder, **settings, options=options)


def made(folder: Path, name: str, **changed: Any) -> tuple[Head, Any, list[Example], CachedTeacher]:
    """Return a head, a teacher, twenty examples, and the teacher's cache of them."""
    head = HEADS[name]
    teacher, examples = head.make(2), head.examples(EXAMPLES)
    return head, teacher, examples, CachedTeacher(build(folder, head, teacher, examples, **changed))


def shuffled(examples: list[Example], count: int, seed: int = 0) -> list[Example]:
    """Return some of the examples in another order."""
    return random.Random(seed).sample(examples, count)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def left_padded(examples: list[Example]) -> dict[str, torch.Tensor]:
    """Return a batch of causal examples, padded on the left."""
    longest = max(len(one["input_ids"]) for one in examples)
    rows: dict[str, list[list[int]]] = {"input_ids": [], "labels": [], "attention_mask": []}
    for one in examples:
        missing = longest - len(one["input_ids"])
        rows["input_ids"].append([0] * missing + one["input_ids"])
        rows["labels"].append([-100] * missing + one["labels"])
        rows["attention_mask"].append([0] * missing + [1] * len(one["input_ids"]))
    return {name: torch.tensor(values) for name, values in rows.items()}


def gradient(distiller: Distiller, student: Any, batch: dict) -> tuple[float, torch.Tensor]:
    """Return the loss of one forward, and the student's gradient as one vector."""
    student.zero_grad(set_to_none=True)
    loss = distiller(student, batch).loss
    loss.backward()
    return loss.item(), m.gradient_of(student)
