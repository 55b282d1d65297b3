"""Augmentations of sound: noise on waveforms, and SpecAugment on log-mel features."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, TypeAlias

import numpy as np
import torch
from torch import Tensor

from hf_distill._types import Batch
from hf_distill.augment.augmentation import ActsOn, like
from hf_distill.errors import DataError, SettingError

Change: TypeAlias = Callable[[Tensor, Tensor], Tensor]
"""Takes a sound `[* t]` (time last) and the positions `[m]` along t that are not padding; returns a new sound."""


def changed_sound(inputs: Batch, column: str, change: Change, *, time_axis: int, whole_batch: bool) -> Batch:
    """Return an example or a batch with a changed column; a sound of padding alone stays as it is.

    Raises:
        DataError: if the column is missing or does not hold floats, the mask does not fit, or a batch has no mask.
    """
    if not isinstance(inputs, Mapping) or column not in inputs:
        present = sorted(inputs) if isinstance(inputs, Mapping) else type(inputs).__name__
        raise DataError(
            f"there is no {column} to augment, only {present}. Name the column with column=; or, if the collator makes "
            'it, augment after collation: acts_on="batch".'
        )
    sounds, mask = inputs[column], inputs.get("attention_mask")
    sounds = sounds if isinstance(sounds, Tensor) else torch.as_tensor(np.asarray(sounds))
    if not sounds.is_floating_point():
        raise DataError(f"{column} holds {sounds.dtype}, not fractions. Run the feature extractor before augmenting.")
    mask = None if mask is None else torch.as_tensor(np.asarray(mask)).bool()
    if whole_batch and mask is None and len(sounds) > 1:
        raise DataError(
            f"the batch has {column} but no attention_mask to mark the padding. Pass return_attention_mask=True to the "
            'feature extractor, or augment before collation: acts_on="example".'
        )
    if not whole_batch:
        return {**inputs, column: like(inputs[column], _changed(sounds, mask, change, time_axis, column))}
    rows = [
        _changed(sound, None if mask is None else mask[i], change, time_axis, column) for i, sound in enumerate(sounds)
    ]
    batch: Any = copy.copy(inputs)  # of the same class
    batch[column] = like(inputs[column], torch.stack(rows))
    return batch


def _changed(sound: Tensor, mask: Tensor | None, change: Change, time_axis: int, column: str) -> Tensor:
    timed = sound.movedim(time_axis, -1)
    if mask is not None and mask.shape != timed.shape[-1:]:
        raise DataError(
            f"{column} has {timed.shape[-1]} steps along time_axis={time_axis}, its attention_mask {mask.numel()}. Set "
            "time_axis=-1 for [mel t] (Whisper), time_axis=-2 for [t mel] (AST, Speech2Text, Wav2Vec2-BERT)."
        )
    places = torch.arange(timed.shape[-1]) if mask is None else mask.nonzero().squeeze(-1)
    return sound if len(places) == 0 else change(timed, places).movedim(-1, time_axis)


class Noise:
    """Adds noise to a waveform, at a random signal-to-noise ratio for each example.

    The ratio is that of the mean squares over the samples without padding: 10 · log10(signal / noise) is exactly the
    drawn number of decibels. Padding and silent signals are not changed. A normalised waveform is not normalised again.

    Args:
        snr_db: lowest and highest ratio in decibels; it is drawn uniformly.
        noises: recordings `[s]` at the waveform's sampling rate, of which a random one is used from a random place, and
            repeated if it is shorter; or None for white (Gaussian) noise.
        column: name of the waveform's column.
        acts_on: "example" (before collation), or "batch" if the collator makes the waveform's column.

    Raises:
        SettingError: if snr_db is not a range, or a recording is empty, silent, or has several axes.
        DataError: when called, if a column or a mask does not fit.

    >>> waveform = torch.ones(1000)
    >>> noise = Noise(snr_db=(20.0, 20.0))({"input_values": waveform})["input_values"] - waveform
    >>> round(noise.square().mean().item(), 4)
    0.01
    """

    moves_positions = False

    def __init__(
        self,
        *,
        snr_db: tuple[float, float] = (5.0, 30.0),
        noises: Sequence[Tensor | np.ndarray | Sequence[float]] | None = None,
        column: str = "input_values",
        acts_on: ActsOn = "example",
    ) -> None:
        if len(snr_db) != 2 or not -np.inf < snr_db[0] <= snr_db[1] < np.inf:
            raise SettingError(f"Noise: snr_db={snr_db}. It is two numbers of decibels, the lower one first.")
        self.snr_db = snr_db
        self.noises = None if noises is None else [torch.as_tensor(np.asarray(noise)).float() for noise in noises]
        if self.noises is not None:
            usable = [noise.dim() == 1 and bool(noise.square().mean() > 0) for noise in self.noises]
            if not usable or not all(usable):
                raise SettingError(
                    f"Noise: {len(usable)} noises, of which {usable.count(False)} are empty, silent or have several "
                    "axes. Each is a waveform [s] of one channel."
                )
        self.column = column
        self.acts_on = acts_on

    def __repr__(self) -> str:
        noises = "white" if self.noises is None else f"{len(self.noises)} recordings"
        return f"Noise({noises}, snr_db={self.snr_db}, acts_on={self.acts_on!r})"

    def __call__(self, inputs: Batch) -> Batch:
        return changed_sound(inputs, self.column, self._add, time_axis=-1, whole_batch=self.acts_on == "batch")

    def _add(self, waveform: Tensor, samples: Tensor) -> Tensor:
        low, high = self.snr_db
        decibels = low + (high - low) * float(torch.rand(()))
        signal = waveform[..., samples].double()
        noise = self._noise(signal)
        power, of_noise = signal.square().mean(), noise.square().mean()
        if power == 0 or of_noise == 0:  # silence: no ratio to reach
            return waveform
        noisy = waveform.clone()
        noisy[..., samples] = (signal + noise * (power / of_noise / 10 ** (decibels / 10)).sqrt()).to(waveform.dtype)
        return noisy

    def _noise(self, signal: Tensor) -> Tensor:
        if self.noises is None:
            return torch.randn(signal.shape).double()
        recording = self.noises[int(torch.randint(len(self.noises), ()))]
        first = int(torch.randint(len(recording), ()))
        places = torch.arange(first, first + signal.shape[-1]) % len(recording)
        return recording[places].double().expand_as(signal)


class SpecAugment:
    """Masks blocks of channels and blocks of frames of log-mel features.

    A block's width is uniform in 0 … its largest width, and its place is uniform among those where it fits. Padding is
    neither changed nor counted. Without an `attention_mask` all frames count as sound, so Whisper's feature extractor,
    which pads to 30 seconds, must return the mask.

    Park et al. 2019, SpecAugment, section 2 (F, mF, T, p and mT in its table 1); the defaults are its policy
    LibriSpeech double. The paper's features have mean 0 and are masked with 0; here they are masked with their mean,
    which is the same. Time warping is left out: by section 5 it has the least influence and the highest cost of the
    three, and it moves frames, so that a teacher could not read the clean sound.

    Args:
        freq_width: largest number of channels in a block.
        num_freq_masks: number of blocks of channels.
        time_width: largest number of frames in a block.
        max_time_share: largest share of all frames in a block.
        num_time_masks: number of blocks of frames.
        value: value of the masked blocks, or None for the mean.
        time_axis: -1 for [mel t] (Whisper), -2 for [t mel] (AST, Speech2Text, Wav2Vec2-BERT).
        column: name of the features' column ("input_features"; "input_values" for AST).
        acts_on: "example" (before collation), or "batch" if the collator makes the features.

    Raises:
        SettingError: if a number is out of range.
        DataError: when called, if freq_width exceeds the number of channels, or a column or a mask does not fit.

    >>> augment = SpecAugment(freq_width=0, time_width=9, max_time_share=0.5, num_time_masks=1, value=0.0)
    >>> masked = augment({"input_features": torch.ones(2, 4)})
    >>> masked["input_features"].shape, bool(masked["input_features"].sum() >= 4.0)
    (torch.Size([2, 4]), True)
    """

    paper: ClassVar[str | None] = "park2019specaugment"
    moves_positions = False

    def __init__(
        self,
        *,
        freq_width: int = 27,
        num_freq_masks: int = 2,
        time_width: int = 100,
        max_time_share: float = 1.0,
        num_time_masks: int = 2,
        value: float | None = None,
        time_axis: int = -1,
        column: str = "input_features",
        acts_on: ActsOn = "example",
    ) -> None:
        counts = {
            **{"freq_width": freq_width, "num_freq_masks": num_freq_masks},
            **{"time_width": time_width, "num_time_masks": num_time_masks},
        }
        if min(counts.values()) < 0 or not 0 <= max_time_share <= 1 or time_axis not in (-1, -2):
            given = ", ".join(f"{name}={value}" for name, value in counts.items())
            raise SettingError(
                f"SpecAugment: {given} (0 or more), max_time_share={max_time_share} (0 to 1), time_axis={time_axis} "
                "(-1 or -2)."
            )
        self.freq_width, self.num_freq_masks = freq_width, num_freq_masks
        self.time_width, self.num_time_masks, self.max_time_share = time_width, num_time_masks, max_time_share
        self.value = value
        self.time_axis = time_axis
        self.column = column
        self.acts_on = acts_on

    def __repr__(self) -> str:
        return (
            f"SpecAugment(freq_width={self.freq_width}, num_freq_masks={self.num_freq_masks}, "
            f"time_width={self.time_width}, max_time_share={self.max_time_share:g}, "
            f"num_time_masks={self.num_time_masks}, acts_on={self.acts_on!r})"
        )

    def __call__(self, inputs: Batch) -> Batch:
        whole_batch = self.acts_on == "batch"
        return changed_sound(inputs, self.column, self._mask, time_axis=self.time_axis, whole_batch=whole_batch)

    def _mask(self, features: Tensor, frames: Tensor) -> Tensor:
        if features.dim() != 2 or features.shape[0] < self.freq_width:
            raise DataError(
                f"{self.column} of one example has shape {list(features.shape)}, channels first: SpecAugment with "
                f"freq_width={self.freq_width} needs two axes and as many channels. Set freq_width=, time_axis= or "
                "column=."
            )
        masked, channels = features.clone(), features.shape[0]
        value = features[:, frames].mean() if self.value is None else self.value
        for _ in range(self.num_freq_masks):
            masked[_block(self.freq_width, channels)[:, None], frames] = value
        for _ in range(self.num_time_masks):
            masked[:, frames[_block(min(self.time_width, int(self.max_time_share * len(frames))), len(frames))]] = value
        return masked


def _block(widest: int, size: int) -> Tensor:
    """Return `[w]` consecutive positions out of `size`, with w uniform in 0 … `widest`."""
    width = int(torch.randint(widest + 1, ()))
    first = int(torch.randint(size - width + 1, ()))
    return torch.arange(first, first + width)
