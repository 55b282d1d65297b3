"""For every test: no network, one thread, a fixed seed, and no state of Accelerate from earlier tests."""

from __future__ import annotations

import os

# Before anything imports torch or huggingface_hub, which read these once.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["OMP_NUM_THREADS"] = "1"
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")  # set this variable to run on an accelerator
os.environ["MPLBACKEND"] = "Agg"

import gc
import random
from collections.abc import Iterator

import numpy as np
import pytest


def pytest_sessionstart(session: pytest.Session) -> None:
    """Import what almost every test needs, except in xdist's controller process, which runs no tests."""
    if session.config.getoption("numprocesses", None):
        return
    import datasets
    import torch
    from transformers import BertForSequenceClassification, Trainer
    from transformers.utils import logging

    from tests.cheap import make_trainings_cheap

    assert all((datasets, BertForSequenceClassification, Trainer))
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    make_trainings_cheap()


@pytest.fixture(autouse=True)
def _fixed_seed() -> None:
    import torch

    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(scope="module", autouse=True)
def _cheap_garbage_collection() -> None:
    """Exempt objects that exist before a test file from garbage collection; they stay alive anyway."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _no_accelerator_left_over() -> Iterator[None]:
    """Reset the singletons that hold mixed precision and the data position of an interrupted training."""
    yield
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
