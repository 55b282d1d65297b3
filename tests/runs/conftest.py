"""The uninterrupted run of the tiny chain."""

from __future__ import annotations

from typing import Any

import pytest

from tests.runs.tiny_chain import run


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> dict[str, Any]:
    """Run the chain without interruption; return its folder and result."""
    folder = tmp_path_factory.mktemp("whole")
    return {"folder": folder / "out", "result": run(folder)}
