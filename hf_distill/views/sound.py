"""What augmentations of sound share: the frames or samples of an example that are not padding. They change no sound."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hf_distill.errors import DataError
from hf_distill.views.seam import like


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
