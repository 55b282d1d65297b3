"""What every test of the trainer gets: cheap garbage collection, and nothing of Accelerate from the test before."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import datasets
import pytest
import transformers
from accelerate.state import AcceleratorState, GradientState
from transformers import BertForSequenceClassification, Trainer

# Accelerate collects garbage at the start of every training: a second each with all of transformers loaded. What is
# imported by now stays anyway, so the collector need not look at it.
KEPT = (datasets, transformers, BertForSequenceClassification, Trainer)


@pytest.fixture(scope="session", autouse=True)
def cheap_garbage_collection() -> Iterator[None]:
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(autouse=True)
def no_accelerator_left_over() -> Iterator[None]:
    """Mixed precision, and where in its data an interrupted training was, are kept in singletons."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
