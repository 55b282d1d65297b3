"""Teachers of another modality, at sequence level: text for audio or images, audio and images for text."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import soxr
import torch
from transformers import Wav2Vec2FeatureExtractor

from tests.heads import HEADS
from tests.hub.tiny import tokenizer
from tests.teachers.reading import WORDS, inputs_of, of_another_tokenizer
from tests.trainer.tiny import (
    assert_moved,
    bert,
    examples,
    make,
    softened_kl,
    update_difference,
    weights,
)


def with_columns(name: str, **columns: list[Any]) -> list[dict[str, Any]]:
    rows = HEADS[name].examples(8)
    return [{**row, **{key: values[i] for key, values in columns.items()}} for i, row in enumerate(rows)]


@pytest.mark.parametrize("name", ["wav2vec2_audio_class", "vit_image_class"])
@pytest.mark.parametrize("accumulation", [1, 4])
def test_a_text_teacher_of_an_audio_or_image_student(tmp_path, name: str, accumulation: int) -> None:
    head, teacher = HEADS[name], of_another_tokenizer().double()
    student = head.make(seed=0).double()
    theirs, ours = inputs_of(teacher), inputs_of(student)

    def collate(features: Any) -> Any:
        return {k: v.double() if v.is_floating_point() else v for k, v in head.collate(features).items()}

    cut = {"per_device_train_batch_size": 8 // accumulation, "gradient_accumulation_steps": accumulation}
    make(
        tmp_path, student, teacher, train_dataset=with_columns(name, teacher_text=list(WORDS)), data_collator=collate,
        teacher_processing_class=tokenizer(), max_steps=1, alpha=1.0, temperature=3.0,
        train_sampling_strategy="sequential", **cut,
    ).train()  # fmt: skip
    assert len(theirs) == len(ours) == accumulation
    assert all(set(given) <= {"input_ids", "attention_mask", "token_type_ids"} for given in theirs)
    expected = head.make(seed=0).double().train()
    batch = collate(head.examples(8))
    batch.pop("labels")
    read = tokenizer()(list(WORDS), padding=True, return_tensors="pt")
    softened_kl(expected(**batch).logits, teacher(**read).logits.detach(), 3.0).mean().backward()
    with torch.no_grad():
        for parameter in expected.parameters():
            if parameter.grad is not None:
                parameter -= 0.1 * parameter.grad
    assert update_difference(weights(student), weights(expected), weights(head.make(seed=0).double())) < 1e-6


RATE = 16_000


def sounds(rate: int | None) -> list[Any]:
    """Return samples as plain arrays or as cells of a `datasets` audio column."""
    waves = [np.random.default_rng(i).normal(size=60 + 5 * i).astype("float32") for i in range(8)]
    return waves if rate is None else [{"array": wave, "sampling_rate": rate} for wave in waves]


@pytest.mark.parametrize("rate", [None, RATE], ids=["arrays", "cells"])
def test_an_audio_teacher_of_a_text_student(tmp_path, rate: int | None) -> None:
    student, teacher = bert(), HEADS["wav2vec2_audio_class"].make(seed=1)
    extractor = Wav2Vec2FeatureExtractor(sampling_rate=RATE, return_attention_mask=True)
    seen = inputs_of(teacher)
    rows = [{**row, "teacher_audio": sound} for row, sound in zip(examples(), sounds(rate), strict=True)]
    make(
        tmp_path, student, teacher, train_dataset=rows, teacher_processing_class=extractor, max_steps=1,
        per_device_train_batch_size=8, train_sampling_strategy="sequential",
    ).train()  # fmt: skip
    expected = extractor(sounds(None), sampling_rate=RATE, padding=True, return_tensors="pt")
    assert torch.equal(seen[0]["input_values"], expected["input_values"])
    assert torch.equal(seen[0]["attention_mask"], expected["attention_mask"])
    assert_moved(weights(student), weights(bert()))


def test_recordings_are_resampled_for_the_teacher(tmp_path) -> None:
    """Each recording is resampled to the teacher's rate and extracted alone."""
    teacher, student = HEADS["wav2vec2_audio_class"].make(seed=1), bert()
    extractor = Wav2Vec2FeatureExtractor(sampling_rate=RATE)
    seen = inputs_of(teacher)
    rows = [{**row, "teacher_audio": sound} for row, sound in zip(examples(), sounds(8_000), strict=True)]
    make(
        tmp_path, student, teacher, train_dataset=rows, teacher_processing_class=extractor, max_steps=1,
        per_device_train_batch_size=8, train_sampling_strategy="sequential",
    ).train()  # fmt: skip
    for given, wave in zip(seen[0]["input_values"], sounds(None), strict=True):
        expected = extractor(soxr.resample(wave, 8_000, RATE), sampling_rate=RATE, return_tensors="pt").input_values[0]
        assert len(expected) == 2 * len(wave) and not given[len(expected) :].any()
        assert torch.allclose(given[: len(expected)], expected, atol=1e-5)
    assert_moved(weights(student), weights(bert()))


class Pixels:
    """A stand-in for an image processor: brightness from 0..255 to 0..1."""

    def __call__(self, images: list[Any], return_tensors: str) -> dict[str, torch.Tensor]:
        assert return_tensors == "pt"
        return {"pixel_values": torch.stack([torch.as_tensor(image).float() / 255 for image in images])}


def test_an_image_teacher_of_a_text_student(tmp_path) -> None:
    student, teacher = bert(), HEADS["vit_image_class"].make(seed=1)
    seen = inputs_of(teacher)
    pictures = [np.full((3, 8, 8), 20 * i, dtype="uint8") for i in range(8)]
    rows = [{**row, "teacher_image": picture} for row, picture in zip(examples(), pictures, strict=True)]
    make(
        tmp_path, student, teacher, train_dataset=rows, teacher_processing_class=Pixels(), max_steps=1,
        per_device_train_batch_size=8, train_sampling_strategy="sequential",
    ).train()  # fmt: skip
    assert torch.allclose(seen[0]["pixel_values"][3], torch.full((3, 8, 8), 60 / 255))
    assert_moved(weights(student), weights(bert()))
