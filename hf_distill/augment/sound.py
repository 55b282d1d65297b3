"""What augmentations of sound share: the frames or samples of an example that are not padding. They change no sound."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hf_distill.augment.augmentation import ActsOn, like
from hf_distill.errors import DataError, SettingError


def changed_sound(
    shown: Any, column: str, change: Callable[[Tensor, Tensor], Tensor], *, time_axis: int, whole_batch: bool
) -> Any:
    """An example, or a batch of them, with a column changed; a sound that is all padding stays as it is.

    `change` takes one sound `[* t]` (time last) and the places `[m]` along t that are no padding; it gives a new sound.

    Raises:
        DataError: the column is missing or holds no fractions; the mask does not go with it; a batch without a mask.
    """
    if not isinstance(shown, Mapping) or column not in shown:
        has = sorted(shown) if isinstance(shown, Mapping) else type(shown).__name__
        raise DataError(
            f"there is no {column} to augment, only {has}. Name the column with column=; or, where the collator makes "
            'it, augment after collation: acts_on="batch".'
        )
    sounds, mask = _as_tensor(shown[column], column), shown.get("attention_mask")
    mask = None if mask is None else torch.as_tensor(np.asarray(mask)).bool()
    if whole_batch and mask is None and len(sounds) > 1:
        raise DataError(
            f"the batch has {column} but no attention_mask, so padding cannot be told from sound. Let the feature "
            'extractor return_attention_mask=True, or augment before collation: acts_on="example".'
        )
    if not whole_batch:
        return {**shown, column: like(shown[column], _changed(sounds, mask, change, time_axis, column))}
    rows = [
        _changed(sound, None if mask is None else mask[i], change, time_axis, column) for i, sound in enumerate(sounds)
    ]
    batch: Any = copy.copy(shown)
    batch[column] = like(shown[column], torch.stack(rows))
    return batch


def _changed(
    sound: Tensor, mask: Tensor | None, change: Callable[[Tensor, Tensor], Tensor], time_axis: int, column: str
) -> Tensor:
    timed = sound.movedim(time_axis, -1)
    if mask is not None and mask.shape != timed.shape[-1:]:
        raise DataError(
            f"{column} has {timed.shape[-1]} steps along time_axis={time_axis}, its attention_mask {mask.numel()}. Set "
            "time_axis=-1 for [mel t] (Whisper), time_axis=-2 for [t mel] (AST, Speech2Text, Wav2Vec2-BERT)."
        )
    places = torch.arange(timed.shape[-1]) if mask is None else mask.nonzero().squeeze(-1)
    return sound if len(places) == 0 else change(timed, places).movedim(-1, time_axis)


def _as_tensor(value: Any, column: str) -> Tensor:
    sounds = value if isinstance(value, Tensor) else torch.as_tensor(np.asarray(value))
    if not sounds.is_floating_point():
        raise DataError(f"{column} holds {sounds.dtype}, not fractions. Run the feature extractor before augmenting.")
    return sounds


class Noise:
    """A waveform with noise, at a signal-to-noise ratio drawn for each example.

    The ratio is that of the mean squares over the samples that are no padding: 10 · log10(signal / noise) is the drawn
    number of decibels exactly. Padding is not touched; a silent signal has no such ratio, and stays as it is. A
    normalised waveform is not normalised again.

    Args:
        snr_db: lowest and highest ratio in decibels; drawn uniformly between them.
        noises: recordings `[s]` at the waveform's sampling rate, one of which is drawn, from a place that is drawn,
            over and over where it is shorter; None: white (Gaussian) noise.
        column: where the waveform is.
        acts_on: "example", before collation; "batch", where the collator is what makes the waveform's column.

    Raises:
        SettingError: no range of numbers, or a recording that is empty, silent, or has several axes.
        DataError: (when called) a column or a mask that does not fit.

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
        noises: Sequence[Any] | None = None,
        column: str = "input_values",
        acts_on: ActsOn = "example",
    ) -> None:
        if len(snr_db) != 2 or not -np.inf < snr_db[0] <= snr_db[1] < np.inf:
            raise SettingError(f"Noise: snr_db={snr_db}. It is two numbers of decibels, the lower one first.")
        self.snr_db = snr_db
        self.noises = None if noises is None else [torch.as_tensor(np.asarray(one)).float() for one in noises]
        if self.noises is not None:
            usable = [one.dim() == 1 and bool(one.square().mean() > 0) for one in self.noises]
            if not usable or not all(usable):
                raise SettingError(
                    f"Noise: {len(usable)} noises, of which {usable.count(False)} are empty, silent or have several "
                    "axes. Each is a waveform [s] of one channel."
                )
        self.column = column
        self.acts_on = acts_on

    def __call__(self, shown: Any) -> Any:
        return changed_sound(shown, self.column, self._add, time_axis=-1, whole_batch=self.acts_on == "batch")

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
    """Log-mel features with `mF` blocks of up to `F` channels and `mT` blocks of up to `T` frames masked.

    A block's width is uniform in 0 … F (or T), and then its place among those where it fits. A time block is never
    longer than `p` of the frames. Padding is never touched, nor counted. Where an example has no `attention_mask` all
    of its frames count as sound: let Whisper's feature extractor return the mask, for it pads to 30 seconds.

    Park et al. 2019, SpecAugment, section 2, with the names of its table 1; the defaults are its policy LibriSpeech
    double. There features have mean 0 and are masked with 0; here with the mean of the example's features, which is
    the same thing. Time warping is left out: by section 5 it is the least influential and the most expensive of the
    three, and it moves frames, so that a teacher could not be shown the clean sound.

    Args:
        F: greatest number of channels of a block.
        mF: number of such blocks.
        T: greatest number of frames of a block.
        p: greatest share of all frames of a block.
        mT: number of such blocks.
        value: what is written into the blocks; None: the mean.
        time_axis: -1 for [mel t] (Whisper), -2 for [t mel] (AST, Speech2Text, Wav2Vec2-BERT).
        column: where the features are ("input_features"; AST's are in "input_values").
        acts_on: "example", before collation; "batch", where the collator is what makes the features.

    Raises:
        SettingError: a number out of range.
        DataError: (when called) F above the number of channels, or a column or a mask that does not fit.

    >>> masked = SpecAugment(F=0, T=9, p=0.5, mT=1, value=0.0)({"input_features": torch.ones(2, 4)})
    >>> masked["input_features"].shape, bool(masked["input_features"].sum() >= 4.0)
    (torch.Size([2, 4]), True)
    """

    moves_positions = False

    def __init__(
        self,
        *,
        F: int = 27,
        mF: int = 2,
        T: int = 100,
        p: float = 1.0,
        mT: int = 2,
        value: float | None = None,
        time_axis: int = -1,
        column: str = "input_features",
        acts_on: ActsOn = "example",
    ) -> None:
        if min(F, mF, T, mT) < 0 or not 0 <= p <= 1 or time_axis not in (-1, -2):
            raise SettingError(
                f"SpecAugment: F={F}, mF={mF}, T={T}, mT={mT} (0 or more), p={p} (0 to 1), time_axis={time_axis} "
                "(-1 or -2)."
            )
        self.F, self.mF, self.T, self.p, self.mT = F, mF, T, p, mT
        self.value = value
        self.time_axis = time_axis
        self.column = column
        self.acts_on = acts_on

    def __call__(self, shown: Any) -> Any:
        whole_batch = self.acts_on == "batch"
        return changed_sound(shown, self.column, self._mask, time_axis=self.time_axis, whole_batch=whole_batch)

    def _mask(self, features: Tensor, frames: Tensor) -> Tensor:
        if features.dim() != 2 or features.shape[0] < self.F:
            raise DataError(
                f"{self.column} of one example has shape {list(features.shape)}, channels first: SpecAugment with "
                f"F={self.F} needs two axes and as many channels. Set F=, time_axis= or column=."
            )
        masked, channels = features.clone(), features.shape[0]
        value = features[:, frames].mean() if self.value is None else self.value
        for _ in range(self.mF):
            masked[_block(self.F, channels)[:, None], frames] = value
        for _ in range(self.mT):
            masked[:, frames[_block(min(self.T, int(self.p * len(frames))), len(frames))]] = value
        return masked


def _block(widest: int, size: int) -> Tensor:
    """`[w]` consecutive places out of `size`, w uniform in 0 … `widest`."""
    width = int(torch.randint(widest + 1, ()))
    first = int(torch.randint(size - width + 1, ()))
    return torch.arange(first, first + width)
