"""The library's warnings, for tests that check them."""

from __future__ import annotations

import logging
from typing import Any

import pytest


@pytest.fixture
def log(caplog: Any) -> Any:
    """Capture the library's warnings."""
    caplog.set_level(logging.WARNING, logger="hf_distill")
    return caplog
