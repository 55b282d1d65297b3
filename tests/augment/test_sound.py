"""SpecAugment and noise: sizes and positions by counting, the ratio by measuring; padding and silence unchanged."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from transformers import BatchFeature

from hf_distill.augment import Noise, SpecAugment
from hf_distill.errors import DataError, SettingError

MARK = -7.0  # marks masked cells: no other cell has this value


def close(count: int, of: int, probability: float) -> bool:
    return abs(count - of * probability) <= 5 * math.sqrt(of * probability * (1 - probability))


def blocks(line: torch.Tensor) -> list[tuple[int, int]]:
    """Return start and width of each run of True."""
    found, start = [], None
    for place, value in enumerate([*line.tolist(), False]):
        if value and start is None:
            start = place
        if not value and start is not None:
            found.append((start, place - start))
            start = None
    return found


def one_block(masked: torch.Tensor) -> tuple[int, int]:
    """Return (first, width) of the only time block in `[mel t]`, which must cover whole columns, or (-1, 0)."""
    columns = (masked == MARK).any(0)
    assert torch.equal(masked == MARK, columns.expand_as(masked))
    found = blocks(columns)
    assert len(found) <= 1
    return found[0] if found else (-1, 0)


def test_widths_and_positions_of_time_blocks() -> None:
    augment = SpecAugment(freq_width=0, num_freq_masks=0, time_width=3, num_time_masks=1, value=MARK)
    rolls, frames = 2000, 6
    seen = Counter(
        one_block(augment({"input_features": torch.zeros(2, frames)})["input_features"]) for _ in range(rolls)
    )
    assert close(seen[-1, 0], rolls, 1 / 4)
    for width in (1, 2, 3):
        places = frames - width + 1
        for first in range(places):
            assert close(seen[first, width], rolls, 1 / 4 / places), (first, width)
    assert sum(seen.values()) == rolls and len(seen) == 1 + 6 + 5 + 4


def test_widths_and_positions_of_frequency_blocks() -> None:
    augment = SpecAugment(freq_width=2, num_freq_masks=1, time_width=0, num_time_masks=0, value=MARK)
    rolls, channels = 2000, 4
    seen = Counter(
        one_block(augment({"input_features": torch.zeros(channels, 3)})["input_features"].T) for _ in range(rolls)
    )
    assert close(seen[-1, 0], rolls, 1 / 3)
    for width in (1, 2):
        places = channels - width + 1
        assert all(close(seen[first, width], rolls, 1 / 3 / places) for first in range(places))
    assert len(seen) == 1 + 4 + 3


def test_time_blocks_are_limited_to_a_share_of_the_unpadded_length() -> None:
    blocks = {"time_width": 100, "max_time_share": 0.5, "num_time_masks": 1}
    augment = SpecAugment(freq_width=0, num_freq_masks=0, value=MARK, **blocks)
    mask = torch.tensor([1] * 8 + [0] * 12)
    widths = Counter()
    for _ in range(300):
        _, width = one_block(augment({"input_features": torch.zeros(2, 20), "attention_mask": mask})["input_features"])
        widths[width] += 1
    assert set(widths) == {0, 1, 2, 3, 4}


def test_the_number_of_blocks_is_the_setting() -> None:
    """Three blocks of exactly one channel or frame cover at most three cells, and often three."""
    augment = SpecAugment(freq_width=1, num_freq_masks=3, time_width=0, num_time_masks=0, value=MARK)
    hit = Counter(
        int((augment({"input_features": torch.zeros(50, 4)})["input_features"] == MARK).any(1).sum())
        for _ in range(400)
    )
    assert set(hit) == {0, 1, 2, 3}
    assert close(hit[0], 400, 1 / 8)
    # three drawn (1/8) and none overlapping: 49/50 · 48/50
    assert close(hit[3], 400, 49 / 50 * 48 / 50 / 8)


def test_the_mask_value_is_the_mean_of_the_recording() -> None:
    features = torch.randn(4, 10, dtype=torch.float64)
    features[:, 6:] = 1000.0  # padding
    mask = [1] * 6 + [0] * 4
    masked = SpecAugment(freq_width=4, num_freq_masks=4, time_width=6, num_time_masks=4)(
        {"input_features": features, "attention_mask": mask}
    )["input_features"]
    changed = masked != features
    assert changed.any() and torch.equal(masked[:, 6:], features[:, 6:])
    mean = sum(features[i, j].item() for i in range(4) for j in range(6)) / 24
    assert masked[changed].tolist() == pytest.approx([mean] * int(changed.sum()))


@pytest.mark.parametrize("time_axis", [-1, -2])
@pytest.mark.parametrize("kind", ["tensor", "array", "list"])
def test_type_and_layout_are_preserved(time_axis: int, kind: str) -> None:
    features = np.random.default_rng(0).standard_normal((5, 9)).astype(np.float32)
    features = features if time_axis == -1 else features.T
    given: Any = {"tensor": torch.tensor(features), "array": features.copy(), "list": features.tolist()}[kind]
    example = {"input_features": given, "attention_mask": [1] * 7 + [0] * 2, "labels": [1, 2]}
    augment = SpecAugment(freq_width=3, time_width=4, time_axis=time_axis, value=MARK)
    torch.manual_seed(3)
    made = augment(example)
    assert type(made["input_features"]) is type(given) and made["labels"] == [1, 2]
    assert getattr(made["input_features"], "dtype", None) == getattr(given, "dtype", None)
    assert np.array_equal(np.asarray(given, dtype=np.float32), features)  # the input is unchanged
    found = np.asarray(made["input_features"], dtype=np.float32)
    found, features = (found, features) if time_axis == -1 else (found.T, features.T)
    assert (found[:, :7] == MARK).any()
    assert found[:, 7:].tobytes() == features[:, 7:].tobytes()


def test_a_batch_is_augmented_like_its_examples() -> None:
    """After collation each row has the same draws as alone, and its padding stays."""
    rows = [torch.randn(5, 9), torch.randn(5, 9), torch.randn(5, 9)]
    masks = [[1] * 9, [1] * 4 + [0] * 5, [0] * 9]
    settings = {"freq_width": 3, "time_width": 4, "value": MARK}
    torch.manual_seed(1)
    alone = [
        SpecAugment(**settings)({"input_features": r, "attention_mask": m}) for r, m in zip(rows, masks, strict=True)
    ]
    torch.manual_seed(1)
    batch = BatchFeature({"input_features": torch.stack(rows), "attention_mask": torch.tensor(masks)})
    made = SpecAugment(**settings, acts_on="batch")(batch)
    assert isinstance(made, BatchFeature)
    assert torch.equal(made["input_features"], torch.stack([one["input_features"] for one in alone]))
    assert torch.equal(batch["input_features"], torch.stack(rows))
    assert torch.equal(made["input_features"][1, :, 4:], rows[1][:, 4:])
    assert torch.equal(made["input_features"][2], rows[2])


def measured_db(clean: torch.Tensor, noisy: torch.Tensor) -> float:
    clean, added = clean.double(), noisy.double() - clean.double()
    return 10 * math.log10(float((clean**2).sum() / (added**2).sum()))


@pytest.mark.parametrize("noises", [None, [np.sin(np.arange(37.0))]])
@pytest.mark.parametrize("snr", [-5.0, 0.0, 20.0])
def test_the_noise_ratio_holds_over_the_unpadded_part(noises, snr: float) -> None:
    waveform = torch.randn(400, dtype=torch.float64)
    waveform[300:] = 0.0
    example = {"input_values": waveform, "attention_mask": [1] * 300 + [0] * 100}
    noisy = Noise(snr_db=(snr, snr), noises=noises)(example)["input_values"]
    assert measured_db(waveform[:300], noisy[:300]) == pytest.approx(snr, abs=1e-6)
    assert torch.equal(noisy[300:], waveform[300:])


def test_the_noise_ratio_is_uniform_in_its_range() -> None:
    waveform, noise = torch.randn(50, dtype=torch.float64), Noise(snr_db=(10.0, 20.0))
    found = [measured_db(waveform, noise({"input_values": waveform})["input_values"]) for _ in range(800)]
    assert 10 <= min(found) < 10.2 and 19.8 < max(found) <= 20
    for low in (10, 12.5, 15, 17.5):
        assert close(sum(low <= one < low + 2.5 for one in found), 800, 1 / 4)


def test_white_noise_is_white() -> None:
    """No correlation between samples: for n samples its standard deviation is 1/√n."""
    waveform = torch.ones(20000, dtype=torch.float64)
    added = Noise(snr_db=(0.0, 0.0))({"input_values": waveform})["input_values"] - waveform
    added = (added - added.mean()) / added.std()
    for lag in (1, 2, 50):
        assert abs(float((added[lag:] * added[:-lag]).mean())) < 5 / math.sqrt(20000)
    assert abs(float((added**4).mean()) - 3) < 5 * math.sqrt(96 / 20000)  # Gaussian kurtosis


def test_noise_recordings_are_cut_at_random_positions() -> None:
    """Each noise is a piece from a random start, repeated; both recordings occur."""
    recordings = [np.array([1.0, 2.0, 4.0]), np.array([1.0, -3.0, 1.0, 5.0, 2.0])]
    waveform, noise = torch.ones(7, dtype=torch.float64), Noise(snr_db=(0.0, 0.0), noises=recordings)
    seen = Counter()
    for _ in range(300):
        added = noise({"input_values": waveform})["input_values"] - waveform
        matches = [
            (which, first)
            for which, recording in enumerate(recordings)
            for first in range(len(recording))
            if np.allclose(*(x / np.linalg.norm(x) for x in (added.numpy(), np.resize(np.roll(recording, -first), 7))))
        ]
        assert len(matches) == 1
        seen[matches[0]] += 1
    for which, recording in enumerate(recordings):
        assert all(close(seen[which, first], 300, 1 / 2 / len(recording)) for first in range(len(recording)))


@pytest.mark.parametrize("example", [{"input_values": torch.zeros(9)}, {"input_values": np.zeros(0, dtype=np.float32)}])
def test_silence_is_unchanged(example) -> None:
    made = Noise()(example)["input_values"]
    assert np.asarray(made).tobytes() == np.asarray(example["input_values"]).tobytes()


def test_a_silent_part_of_a_recording_adds_nothing() -> None:
    noise = Noise(noises=[np.array([0.0] * 20 + [1.0])], snr_db=(0.0, 0.0))
    found = {tuple(noise({"input_values": torch.ones(2)})["input_values"].tolist()) for _ in range(200)}
    assert (1.0, 1.0) in found and len(found) > 1 and all(math.isfinite(x) for one in found for x in one)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SpecAugment(freq_width=-1), r"freq_width=-1, .*\(0 or more\)"),
        (lambda: SpecAugment(max_time_share=1.5), r"max_time_share=1\.5 \(0 to 1\)"),
        (lambda: SpecAugment(time_axis=1), r"time_axis=1 \(-1 or -2\)"),
        (lambda: Noise(snr_db=(20.0, 10.0)), r"snr_db=\(20\.0, 10\.0\).*lower one first"),
        (lambda: Noise(snr_db=(float("nan"), 10.0)), r"snr_db=\(nan, 10\.0\)"),
        (lambda: Noise(noises=[]), r"0 noises"),
        (lambda: Noise(noises=[np.ones(3), np.zeros(3)]), r"2 noises, of which 1 are empty, silent"),
    ],
)
def test_invalid_settings_raise(make, message: str) -> None:
    with pytest.raises(SettingError, match=message):
        make()


@pytest.mark.parametrize(
    ("augment", "shown", "message"),
    [
        (SpecAugment(), {"input_values": [0.0]}, r"no input_features to augment, only \['input_values'\].*column="),
        (SpecAugment(), {"input_features": torch.zeros(8, 20)}, r"shape \[8, 20\].*freq_width=27 needs two axes"),
        (
            SpecAugment(freq_width=2),
            {"input_features": torch.zeros(8, 20), "attention_mask": [1] * 8},
            r"20 steps along time_axis=-1, its attention_mask 8.*time_axis=-2 for",
        ),
        (Noise(), {"input_values": [3, 4]}, r"holds torch\.int64, not fractions. Run the feature extractor"),
        (Noise(acts_on="batch"), {"input_values": torch.ones(2, 4)}, r"no attention_mask.*return_attention_mask=True"),
    ],
)
def test_invalid_examples_raise(augment, shown, message: str) -> None:
    with pytest.raises(DataError, match=message):
        augment(shown)
