"""Random generators kept as they were, around something that may draw from them."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch


def random_state() -> tuple[Any, ...]:
    """The state of Python's, NumPy's and torch's generators."""
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return random.getstate(), np.random.get_state(), torch.get_rng_state(), cuda


def set_random_state(state: tuple[Any, ...]) -> None:
    """Put the generators back to what `random_state` returned."""
    python, numpy_state, cpu, cuda = state
    random.setstate(python)
    np.random.set_state(numpy_state)
    torch.set_rng_state(cpu)
    if cuda:
        torch.cuda.set_rng_state_all(cuda)


@contextlib.contextmanager
def random_state_kept() -> Iterator[None]:
    """What loads a model may draw random numbers; the training that follows must not see it."""
    state = random_state()
    try:
        yield
    finally:
        set_random_state(state)
