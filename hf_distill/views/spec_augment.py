"""SpecAugment: blocks of time and of frequency masked in log-mel features. Time warping is left out."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hf_distill.errors import DataError, SettingError
from hf_distill.views.seam import ActsOn
from hf_distill.views.sound import changed_sound


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
        F: greatest number of channels of a block. mF: number of such blocks.
        T: greatest number of frames of a block. p: greatest share of all frames of a block. mT: number of such blocks.
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
