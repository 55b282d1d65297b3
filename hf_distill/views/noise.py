"""Noise added to a waveform at a signal-to-noise ratio: white noise, or recorded noises that are given."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hf_distill.errors import SettingError
from hf_distill.views.seam import ActsOn
from hf_distill.views.sound import changed_sound


class Noise:
    """A waveform with noise, at a signal-to-noise ratio drawn for each example.

    The ratio is that of the mean squares over the samples that are no padding: 10 · log10(signal / noise) is the drawn
    number of decibels exactly. Padding is not touched; a silent signal has no such ratio, and stays as it is. A
    normalised waveform is not normalised again.

    Args:
        snr_db: lowest and highest ratio in decibels; drawn uniformly between them.
        noises: recordings `[s]` at the waveform's sampling rate, one of which is drawn, from a place that is drawn,
            over and over where it is shorter; None: white (Gaussian) noise.
        column: where the waveform is. acts_on: "example", before collation; "batch", where the collator is what makes
            the waveform's column.

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
