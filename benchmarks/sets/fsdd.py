"""FSDD: which digit is spoken; a small Wav2Vec2-style classifier from scratch teaches a smaller one."""

from __future__ import annotations

import io
import wave
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as parquet
import torch
from transformers import Wav2Vec2Config, Wav2Vec2FeatureExtractor, Wav2Vec2ForSequenceClassification, set_seed

from benchmarks.protocol import Case, Settings
from benchmarks.sets.sst2 import accuracy

RATE = 8000
SHARED = {
    "conv_kernel": (16, 8, 4), "conv_stride": (8, 4, 4), "num_feat_extract_layers": 3,  # 62.5 frames a second
    "conv_bias": True, "feat_extract_norm": "layer", "do_stable_layer_norm": True, "num_attention_heads": 4,
    "num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 4, "hidden_dropout": 0.1, "activation_dropout": 0.0,
    "attention_dropout": 0.1, "feat_proj_dropout": 0.0, "final_dropout": 0.0, "layerdrop": 0.0,
    "apply_spec_augment": False, "bos_token_id": None, "eos_token_id": None, "num_labels": 10,
}  # fmt: skip
TEACHER = {
    "conv_dim": (48, 64, 64), "hidden_size": 96, "num_hidden_layers": 2, "intermediate_size": 192,
    "classifier_proj_size": 96,
}  # fmt: skip
STUDENT = {
    "conv_dim": (16, 16, 16), "hidden_size": 32, "num_hidden_layers": 1, "intermediate_size": 64,
    "classifier_proj_size": 32,
}  # fmt: skip


def load(folder: Path, *, teacher_steps: int = 1500, student_steps: int = 600) -> Case:
    """The case. No dev split is published: recordings 5 to 9 of each speaker and digit are dev, 10 to 49 train."""
    extractor = Wav2Vec2FeatureExtractor(sampling_rate=RATE, do_normalize=True, return_attention_mask=True)
    rows = read_recordings(folder / "train.parquet")
    train = [features for index, features in rows if index >= 10]
    dev = [features for index, features in rows if index < 10]
    test = [features for _, features in read_recordings(folder / "test.parquet")]

    def collate(examples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        sounds = [example["input_values"] for example in examples]
        batch = extractor(sounds, sampling_rate=RATE, padding=True, return_tensors="pt")
        return {**batch, "labels": torch.tensor([example["labels"] for example in examples])}

    def make(settings: dict[str, Any], seed: int) -> Any:
        set_seed(seed)
        return Wav2Vec2ForSequenceClassification(Wav2Vec2Config(**SHARED, **settings))

    return Case(
        name="FSDD",
        metric="accuracy",
        teacher_data=train,
        transfer=train,
        dev=dev,
        test=test,
        collator=collate,
        make_teacher=lambda seed: make(TEACHER, seed),
        make_student=lambda teacher, seed: make(STUDENT, seed),
        score=accuracy,
        teacher_settings=(Settings(1e-3),),
        alone=(Settings(3e-3), Settings(6e-3)),
        distilled=(Settings(3e-3, 0.9, 2.0), Settings(6e-3, 0.9, 2.0)),
        teacher_steps=teacher_steps,
        student_steps=student_steps,
        lengths_of="input_values",
        processing_class=extractor,
        notes=(
            "Both students of a seed start from the same random weights.",
            "Train, dev and test have the same six speakers.",
        ),
    )


def read_recordings(path: Path) -> list[tuple[int, dict[str, Any]]]:
    """Index of the recording, and its samples in [-1, 1] with its digit."""
    found = []
    for row in parquet.read_table(path, columns=["audio", "label", "index"]).to_pylist():
        with wave.open(io.BytesIO(row["audio"]["bytes"])) as sound:
            samples = np.frombuffer(sound.readframes(sound.getnframes()), dtype="<i2").astype(np.float32) / 32768
        found.append((row["index"], {"input_values": samples, "labels": row["label"]}))
    return found
