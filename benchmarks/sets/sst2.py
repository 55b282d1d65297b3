"""SST-2: a fine-tuned MiniLM as the teacher, its first and last layers as the student, phrases as the transfer set."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
from transformers import AutoModelForSequenceClassification, AutoTokenizer, DataCollatorWithPadding, set_seed

from benchmarks.places import read_json_lines
from benchmarks.protocol import Case, Settings, from_first_and_last_layer

LENGTH = 48


def accuracy(classes: np.ndarray, labels: np.ndarray) -> float:
    """Share of right classes."""
    return float((classes == labels).mean())


def load(folder: Path, encoder: Path, *, teacher_steps: int = 400, student_steps: int = 240) -> Case:
    """The case; training rows whose text is also in dev or test (case and punctuation aside) are left out."""
    tokenizer = AutoTokenizer.from_pretrained(encoder)
    splits = {name: read_json_lines(folder / f"{name}.jsonl") for name in ("dev", "test")}
    held_out = {_plain(row["text"]) for rows in splits.values() for row in rows}
    phrases = read_json_lines(folder / "train_phrases.jsonl.gz")
    splits["phrases"] = [row for row in phrases if _plain(row["text"]) not in held_out]

    def features(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        found = tokenizer([row["text"] for row in rows], truncation=True, max_length=LENGTH, padding=False)
        ids = found["input_ids"]
        return [{"input_ids": i, "labels": row["label"]} for i, row in zip(ids, rows, strict=True)]

    ready = {name: features(rows) for name, rows in splits.items()}

    def make_teacher(seed: int) -> Any:
        set_seed(seed)
        return AutoModelForSequenceClassification.from_pretrained(encoder, num_labels=2)

    return Case(
        name="SST-2",
        metric="accuracy",
        teacher_data=ready["phrases"],
        transfer=ready["phrases"],
        dev=ready["dev"],
        test=ready["test"],
        collator=DataCollatorWithPadding(tokenizer),
        make_teacher=make_teacher,
        make_student=lambda teacher, seed: from_first_and_last_layer(teacher),
        score=accuracy,
        teacher_settings=(Settings(1e-4),),
        alone=(Settings(3e-4), Settings(1e-4)),
        distilled=(Settings(3e-4, 0.9, 2.0), Settings(1e-4, 0.9, 2.0)),
        teacher_steps=teacher_steps,
        student_steps=student_steps,
        notes=(
            f"{len(phrases) - len(splits['phrases'])} phrases left out: their text is in dev or test.",
            "Seeds change the order of the data and dropout; the student's initial weights are the teacher's.",
        ),
    )


def _plain(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", " ", text.lower()).strip()
