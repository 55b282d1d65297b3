"""Cheap garbage collection and no state of Accelerate from the test before, for tests that train."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest
from accelerate.state import AcceleratorState


@pytest.fixture(autouse=True)
def clean_slate() -> Iterator[None]:
    """The scripts freeze what is alive; what they leave behind is thawed again."""
    yield
    gc.unfreeze()
    AcceleratorState._reset_state(reset_partial_state=True)
