"""WNUT-17: entities in noisy text; a fine-tuned MiniLM tagger teaches one made of its first and last layers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from seqeval.metrics import f1_score
from transformers import AutoModelForTokenClassification, AutoTokenizer, DataCollatorForTokenClassification, set_seed

from benchmarks.places import read_json_lines
from benchmarks.protocol import IGNORED, Case, Settings, from_first_and_last_layer

LENGTH = 64


def load(folder: Path, encoder: Path, *, teacher_steps: int = 320, student_steps: int = 200) -> Case:
    """The case: teacher and students learn from the same labelled sentences; one label a word, on its first piece."""
    tokenizer = AutoTokenizer.from_pretrained(encoder)
    names = json.loads((folder / "labels.json").read_text(encoding="utf-8"))
    splits = {name: read_json_lines(folder / f"{name}.jsonl") for name in ("train", "dev", "test")}

    def features(row: dict[str, Any], *, length: int) -> dict[str, Any]:
        found = tokenizer(row["tokens"], is_split_into_words=True, truncation=True, max_length=length)
        words = found.word_ids()
        first = [word is not None and word not in words[:place] for place, word in enumerate(words)]
        labels = [row["tag_ids"][word] if new else IGNORED for word, new in zip(words, first, strict=True)]
        return {"input_ids": found["input_ids"], "labels": labels}

    def entity_f1(classes: np.ndarray, labels: np.ndarray) -> float:
        kept = [row != IGNORED for row in labels]
        truth = [[names[i] for i in row[k]] for row, k in zip(labels, kept, strict=True)]
        found = [[names[i] for i in row[k]] for row, k in zip(classes, kept, strict=True)]
        return float(f1_score(truth, found, zero_division=0))

    def make_teacher(seed: int) -> Any:
        set_seed(seed)
        labels = {"id2label": dict(enumerate(names)), "label2id": {name: i for i, name in enumerate(names)}}
        return AutoModelForTokenClassification.from_pretrained(encoder, num_labels=len(names), **labels)

    train = [features(row, length=LENGTH) for row in splits["train"]]
    # Nothing is cut off where it is scored: 512 is what the encoder can read.
    dev, test = ([features(row, length=512) for row in splits[name]] for name in ("dev", "test"))
    return Case(
        name="WNUT-17",
        metric="entity F1",
        teacher_data=train,
        transfer=train,
        dev=dev,
        test=test,
        collator=DataCollatorForTokenClassification(tokenizer),
        make_teacher=make_teacher,
        make_student=lambda teacher, seed: from_first_and_last_layer(teacher),
        score=entity_f1,
        teacher_settings=(Settings(3e-4),),
        alone=(Settings(3e-4), Settings(1e-3)),
        distilled=(Settings(3e-4, 0.9, 2.0), Settings(1e-3, 0.9, 2.0)),
        teacher_steps=teacher_steps,
        student_steps=student_steps,
        batch_size=16,
        notes=("Seeds change the order of the data and dropout; the student's initial weights are the teacher's.",),
    )
