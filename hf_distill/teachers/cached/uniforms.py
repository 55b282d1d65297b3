"""Numbers to draw with that follow from an example's content: the same in any batch, order, process or second attempt.

Axes: b examples, p positions of all of them one after the other.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from hf_distill.errors import SettingError

_BITS = 53  # of a float64
SEEDS = 1 << 64


def uniforms(keys: np.ndarray, counts: np.ndarray, width: int, *, seed: int) -> Tensor:
    """`[p width]` in [0, 1), float64: a generator an example, whose key is the example's and whose place is the seed's.

    The raw words of Philox (Salmon et al. 2011) are fixed by its definition, so no version of numpy changes them.

    Args:
        keys: `[b 2]` of the examples. counts: `[b]` positions of each. seed: from 0 to 2^64 - 1.

    >>> one = uniforms(np.array([[7, 1], [9, 2]], dtype=np.uint64), np.array([1, 2]), 2, seed=0)
    >>> alone = uniforms(np.array([[9, 2]], dtype=np.uint64), np.array([2]), 2, seed=0)
    >>> bool((one[1:] == alone).all())
    True
    """
    words = [np.empty(0, dtype=np.uint64)]
    for key, count in zip(keys, counts.tolist(), strict=True):
        start = np.array([0, 0, 0, seed], dtype=np.uint64)
        words.append(np.random.Philox(counter=start, key=key.astype(np.uint64)).random_raw(count * width))
    whole = np.concatenate(words) >> np.uint64(64 - _BITS)
    return torch.from_numpy(whole.astype(np.float64) * 2.0**-_BITS).view(-1, width)


def refuse_seed(seed: int, of: str) -> None:
    """Raises:
    SettingError: below 0, or of more than 64 bits.
    """
    if not 0 <= seed < SEEDS:
        raise SettingError(f"{of}(seed={seed}): a seed is from 0 to 2^64 - 1.")
