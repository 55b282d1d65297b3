"""Recordings in the forms that datasets use: formats, rates, channels, errors that name the example, features."""

from __future__ import annotations

import io
import logging
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
import transformers as hf
from datasets import Audio, Dataset
from torch.utils.data import DataLoader

from hf_distill.data.audio import AudioFeatures, read_audio, read_recording
from hf_distill.errors import DataError, MissingExtraError
from hf_distill.trainer.collators import TeacherInputsCollator

RATE = 16_000


def tone(rate: int, seconds: float = 0.25, hertz: float = 440.0) -> np.ndarray:
    return (0.5 * np.sin(2 * np.pi * hertz * np.arange(int(seconds * rate)) / rate)).astype("float32")


def file_of(samples: np.ndarray, rate: int, kind: str = "WAV") -> bytes:
    """Args: samples: `[n]` or `[n c]`."""
    buffer = io.BytesIO()
    soundfile.write(buffer, samples, rate, format=kind)
    return buffer.getvalue()


class Decoder:
    """A stand-in for torchcodec's decoder, which returns all samples `[c n]`."""

    def __init__(self, channels: np.ndarray, rate: int) -> None:
        self.data, self.sample_rate = torch.as_tensor(channels), rate

    def get_all_samples(self) -> Decoder:
        return self


def cells(tmp_path: Path) -> dict[str, Any]:
    """Return the same tone as every kind of cell."""
    sound = tone(RATE)
    path = tmp_path / "tone.wav"
    path.write_bytes(file_of(sound, RATE))
    column = Dataset.from_dict({"audio": [{"bytes": file_of(sound, RATE), "path": "gone.wav"}, {"path": str(path)}]})
    of_bytes, of_path = column.cast_column("audio", Audio(decode=False))["audio"][:2]
    return {
        "array": sound,
        "list": sound.tolist(),
        "tensor": torch.tensor(sound),
        "float64": sound.astype("float64"),
        "int16": (sound * 2**15).round().astype("int16"),
        "int32": (sound.astype("float64") * 2**31).round().astype("int32"),
        "uint8": (sound * 128 + 128).round().astype("uint8"),
        "array and rate": {"array": sound, "sampling_rate": RATE, "path": None},
        "list and rate": {"array": sound.tolist(), "sampling_rate": RATE},
        "bytes of a dataset": of_bytes,
        "path of a dataset": of_path,
        "bytes": file_of(sound, RATE),
        "string": str(path),
        "path": path,
        "decoder": Decoder(sound[None], RATE),
        "one channel in front": sound[None],
        "one channel behind": sound[:, None],
    }


def test_every_kind_of_cell_gives_the_same_samples(tmp_path) -> None:
    for name, cell in cells(tmp_path).items():
        found = read_audio(cell, RATE)
        assert found.shape == (4000,) and found.dtype == np.float32, name
        assert np.abs(found - tone(RATE)).max() < (0.006 if name == "uint8" else 1e-4), name


@pytest.mark.parametrize("kind", ["WAV", "FLAC", "OGG", "MP3"])
def test_audio_file_formats(kind: str) -> None:
    found = read_recording(file_of(tone(RATE, seconds=1), RATE, kind))
    assert found.sampling_rate == RATE and found.channels == 1
    spectrum = np.abs(np.fft.rfft(found.samples[4000:12000]))  # lossy formats delay the start
    assert spectrum.argmax() * RATE / 8000 == 440
    assert abs(np.abs(found.samples[4000:12000]).max() - 0.5) < 0.02


@pytest.mark.parametrize("rate", [8_000, 22_050, 44_100, 48_000])
def test_recordings_are_resampled_to_the_requested_rate(rate: int) -> None:
    for cell in ({"array": tone(rate, 1.0), "sampling_rate": rate}, file_of(tone(rate, 1.0), rate)):
        found = read_audio(cell, RATE)
        assert abs(len(found) - RATE) <= 1 and found.dtype == np.float32
        assert np.abs(found[1000:15000] - tone(RATE, 1.0)[1000:15000]).max() < 1e-3


@pytest.mark.parametrize("as_file", [True, False])
def test_channels_are_averaged(as_file: bool) -> None:
    left, right = tone(RATE), tone(RATE, hertz=880)
    expected = (left.astype("float64") + right) / 2
    both = np.stack([left, right])
    for cell in [file_of(both.T, RATE)] if as_file else [both, both.T, both.tolist(), Decoder(both, RATE)]:
        found = read_recording(cell)
        assert found.channels == 2
        assert np.abs(found.samples - expected).max() < 1e-4


def test_a_bare_array_has_no_rate() -> None:
    assert read_recording(tone(8_000)).sampling_rate is None
    assert np.array_equal(read_audio(tone(8_000), RATE), tone(8_000))


@pytest.mark.parametrize(
    ("cell", "message"),
    [
        ({"array": [], "sampling_rate": RATE}, "holds no samples"),
        (np.zeros((2, 0)), "holds no samples"),
        (file_of(np.zeros(0, dtype="float32"), RATE), "holds no samples"),
        ([0.0, float("nan"), float("inf")], "NaN or infinity in 2 of 3 samples"),
        (b"RIFF", "cannot be decoded: .*WAV, FLAC, OGG and MP3"),
        ({"bytes": b"no sound", "path": None}, "cannot be decoded"),
        ("gone.wav", "there is no file 'gone.wav'"),
        ({"bytes": None, "path": "gone.wav"}, "there is no file 'gone.wav'"),
        ({"bytes": None, "path": None}, r"is a dict with \['bytes', 'path'\], which is no recording"),
        ({"array": [0.1]}, r"is a dict with \['array'\], which is no recording"),
        ({"array": [0.1], "sampling_rate": None}, "one of which is None"),
        (3.5, "is a float, which is no recording"),
        (None, "is a NoneType, which is no recording"),
        (np.zeros((80, 3000)), r"shape \[80, 3000\], and no recording has 80 channels.*teacher_input_features"),
        (np.zeros((2, 3, 4)), r"shape \[2, 3, 4\]"),
        ([[0.1, 0.2], [0.3]], "channels have different lengths"),
        (["a", "b"], "Give numbers"),
        ([0, 300, -20_000], "whole numbers up to 20000 as int64"),
        ({"array": [0.1], "sampling_rate": 48_000}, "less than one at 16000 Hz"),
    ],
)
def test_invalid_cells_raise(cell: Any, message: str) -> None:
    with pytest.raises(DataError, match=rf"^example 3: .*{message}|^example 3 .*{message}"):
        read_audio(cell, RATE, name="example 3")


@pytest.mark.parametrize(("module", "cell"), [("soundfile", b"RIFF"), ("soxr", {"array": [0.1], "sampling_rate": 8})])
def test_a_missing_dependency_raises_with_the_extra(monkeypatch, module: str, cell: Any) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(MissingExtraError, match=rf'{module} is not installed.*"hf-distill\[audio\]"'):
        read_audio(cell, RATE)


def test_arrays_at_the_right_rate_need_no_extra(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "soundfile", None)
    monkeypatch.setitem(sys.modules, "soxr", None)
    assert len(read_audio({"array": tone(RATE), "sampling_rate": RATE}, RATE)) == 4000


# Features of several recordings.

EXTRACTORS = {
    "whisper": lambda: hf.WhisperFeatureExtractor(feature_size=8, chunk_length=1, hop_length=800),
    "wav2vec2": lambda: hf.Wav2Vec2FeatureExtractor(),  # no attention mask, as wav2vec2-base has it
    "wav2vec2, with a mask": lambda: hf.Wav2Vec2FeatureExtractor(return_attention_mask=True),
    "seamless": lambda: hf.SeamlessM4TFeatureExtractor(feature_size=20, num_mel_bins=20),
    "ast": lambda: hf.ASTFeatureExtractor(num_mel_bins=20, max_length=100),
    "speech to text": lambda: hf.Speech2TextFeatureExtractor(feature_size=20, num_mel_bins=20),
}


@pytest.mark.parametrize("name", EXTRACTORS)
def test_features_do_not_depend_on_other_recordings(name: str) -> None:
    draw = np.random.default_rng(0)
    short, long = (draw.normal(size=n).astype("float32") for n in (4_000, 16_000))
    extractor = EXTRACTORS[name]()
    expected = dict(extractor([short], sampling_rate=RATE, return_tensors="pt"))
    for beside in ([short], [short, long], [short, short]):
        found = AudioFeatures(extractor)(beside)
        assert set(found) == set(expected)
        for key, value in expected.items():
            ours = found[key][0][tuple(map(slice, value.shape[1:]))]
            assert torch.allclose(ours.double(), torch.as_tensor(value)[0].double(), atol=1e-5), (key, len(beside))
            if "mask" in key:
                assert int(found[key][0].sum()) == int(torch.as_tensor(value).sum())


def test_normalization_excludes_padding() -> None:
    """Wav2Vec2's extractor normalizes over the padding by default: the scale would be 2.00 here."""
    draw = np.random.RandomState(0)
    rows = [{"teacher_audio": {"array": draw.randn(n), "sampling_rate": RATE}} for n in (4_000, 16_000)]
    collator = TeacherInputsCollator(lambda rows: {}, hf.Wav2Vec2FeatureExtractor())
    for batch in (rows[:1], rows):
        first = collator.teacher_batch(batch)["input_values"][0]
        assert abs(float(first[:4_000].std()) - 1) < 1e-3
        assert not first[4_000:].any()


def test_padding_follows_the_extractors_padding_side() -> None:
    found = AudioFeatures(hf.Wav2Vec2FeatureExtractor(padding_side="left"))([tone(RATE), tone(RATE, 0.5)])
    assert not found["input_values"][0, :4_000].any() and found["input_values"][0, 4_000:].any()


def test_the_extractor_of_a_processor_is_used() -> None:
    class Processor:
        feature_extractor = hf.Wav2Vec2FeatureExtractor()

    assert AudioFeatures(Processor())([tone(RATE)])["input_values"].shape == (1, 4_000)
    with pytest.raises(DataError, match="teacher_audio: a CharTokenizer has no sampling_rate"):
        AudioFeatures(CharTokenizer(), "teacher_audio")


class CharTokenizer:
    """A tokenizer without audio input."""


def test_errors_name_the_example_and_its_file(tmp_path) -> None:
    path = tmp_path / "broken.flac"
    path.write_bytes(b"nothing")
    features = AudioFeatures(hf.Wav2Vec2FeatureExtractor(), "teacher_audio")
    with pytest.raises(DataError, match=r"^teacher_audio: example 1 of the batch \(.*broken\.flac\) cannot be decoded"):
        features([tone(RATE), str(path)])
    with pytest.raises(DataError, match=r"^teacher_audio: example 0 of the batch holds no samples"):
        features([{"array": np.zeros(0), "sampling_rate": RATE}])


def test_conversions_are_logged_once(caplog) -> None:
    caplog.set_level(logging.INFO, "hf_distill.data.audio")
    features = AudioFeatures(hf.Wav2Vec2FeatureExtractor(), "teacher_audio")
    stereo = {"array": np.stack([tone(8_000)] * 2), "sampling_rate": 8_000}
    for _ in range(2):
        features([tone(RATE), stereo, tone(RATE)])
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == 2
    assert messages[0].startswith("teacher_audio: 1 of 3 recordings of this batch have several channels (up to 2)")
    assert messages[1].startswith("teacher_audio: recordings at 8000 Hz are resampled to the model's 16000 Hz")


@pytest.mark.parametrize(
    ("extractor", "window"),
    [
        (hf.WhisperFeatureExtractor(feature_size=8, chunk_length=1), "1 s"),
        (hf.ASTFeatureExtractor(num_mel_bins=20, max_length=99), "1.005 s"),
    ],
)
def test_truncation_gives_one_warning(caplog, extractor: Any, window: str) -> None:
    caplog.set_level(logging.INFO, "hf_distill.data.audio")
    features = AudioFeatures(extractor)
    features([tone(RATE, 1.0)] * 2)
    assert not caplog.records
    for _ in range(2):
        features([tone(RATE, 0.5), tone(RATE, 3.0), tone(RATE, 2.0)])
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert f"2 of 3 recordings of this batch are longer than the {window}" in record.getMessage()
    assert "(the longest has 3.0 s)" in record.getMessage()


def test_an_extractor_without_a_window_does_not_truncate(caplog) -> None:
    found = AudioFeatures(hf.Wav2Vec2FeatureExtractor())([tone(RATE, 3.0), tone(RATE, 40.0)])
    assert found["input_values"].shape == (2, 40 * RATE) and not caplog.records


def test_workers_share_the_record_of_logged_messages() -> None:
    collator = TeacherInputsCollator(lambda rows: {}, hf.Wav2Vec2FeatureExtractor())
    rows = [{"teacher_audio": np.stack([tone(RATE)] * 2)} for _ in range(4)]
    assert collator._audio is not None and not collator._audio._reported.any()
    batches = list(DataLoader(rows, batch_size=2, collate_fn=collator, num_workers=1))
    assert [batch["teacher_input_values"].shape for batch in batches] == [(2, 4_000)] * 2
    assert collator._audio._reported.tolist() == [True, False, False]
