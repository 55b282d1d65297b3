"""`teacher_audio` with every kind of feature extractor: each pads as its model requires, Whisper to all frames."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import transformers as hf

from hf_distill.teachers.fingerprints import describe_processor
from hf_distill.trainer.collators import TeacherInputsCollator
from tests.heads import FRAMES, HEADS, MEL
from tests.teachers.reading import inputs_of
from tests.trainer.tiny import assert_moved, bert, examples, make, padded, weights

RATE = 16_000
WAVES = [np.random.default_rng(i).normal(size=5_000 + 500 * i).astype("float32") for i in range(8)]


def whisper(bins: int = MEL) -> Any:
    """Return an extractor for one second: 20 frames of 800 samples, the input of the tiny Whisper of `tests.heads`."""
    return hf.WhisperFeatureExtractor(feature_size=bins, chunk_length=1, hop_length=RATE // FRAMES)


EXTRACTORS = {
    "whisper": whisper,
    "wav2vec2": lambda: hf.Wav2Vec2FeatureExtractor(return_attention_mask=True),
    "seamless": lambda: hf.SeamlessM4TFeatureExtractor(feature_size=MEL, num_mel_bins=MEL),
    "ast": lambda: hf.ASTFeatureExtractor(num_mel_bins=MEL, max_length=24),
}


@pytest.mark.parametrize("name", EXTRACTORS)
def test_teacher_inputs_equal_the_extractors_output(name: str) -> None:
    extractor = EXTRACTORS[name]()
    rows = [{**row, "teacher_audio": wave} for row, wave in zip(examples(), WAVES, strict=True)]
    found = TeacherInputsCollator(padded, extractor)(rows)
    assert set(padded(examples())) < set(found)
    to_the_longest = {"padding": True} if name in ("wav2vec2", "seamless") else {}
    expected = extractor(WAVES, sampling_rate=RATE, return_tensors="pt", **to_the_longest)
    made = {key: value for key, value in found.items() if key.startswith("teacher_")}
    assert sorted(made) == sorted(f"teacher_{key}" for key in expected)
    for key, value in expected.items():
        assert torch.equal(made[f"teacher_{key}"], torch.as_tensor(value)), key


def test_whisper_inputs_are_padded_to_all_frames() -> None:
    rows = [{**row, "teacher_audio": wave} for row, wave in zip(examples(), WAVES, strict=True)]
    assert TeacherInputsCollator(padded, whisper())(rows)["teacher_input_features"].shape == (8, MEL, FRAMES)


@pytest.mark.parametrize("wrapped", [False, True], ids=["extractor", "processor"])
def test_a_whisper_teacher_with_other_mel_bins(tmp_path, wrapped: bool) -> None:
    """This setup requires `teacher_audio`."""
    head = HEADS["whisper_seq2seq"]
    extractor = whisper(2 * MEL)
    student, teacher = head.make(0), head.make(1, num_mel_bins=2 * MEL)
    seen = inputs_of(teacher)

    class Processor:
        feature_extractor = extractor

    rows = [{**row, "teacher_audio": wave} for row, wave in zip(head.examples(8), WAVES, strict=True)]
    trainer = make(
        tmp_path, student, teacher, teacher_processing_class=Processor() if wrapped else extractor, max_steps=1,
        train_dataset=rows, data_collator=head.collate, per_device_train_batch_size=8, logging_steps=1,
        train_sampling_strategy="sequential",
    )  # fmt: skip
    trainer.train()
    expected = extractor(WAVES, sampling_rate=RATE, return_tensors="pt")["input_features"]
    assert expected.shape == (8, 2 * MEL, FRAMES)
    assert torch.equal(seen[0]["input_features"], torch.as_tensor(expected))
    assert trainer.state.log_history[0]["loss/logits"] > 0
    assert_moved(weights(student), weights(head.make(0)))


def test_a_whisper_teacher_with_another_head_raises(tmp_path) -> None:
    with pytest.raises(ValueError, match="WhisperForConditionalGeneration"):
        make(tmp_path, bert(), HEADS["whisper_seq2seq"].make(1), teacher_processing_class=whisper())


def test_another_extractor_has_another_fingerprint() -> None:
    """Also one that is not in a processor; its settings were left out of the fingerprint."""
    one, other = (describe_processor(hf.WhisperFeatureExtractor(feature_size=bins)) for bins in (8, 12))
    assert one is not None and other is not None and one["extractor"] != other["extractor"]
