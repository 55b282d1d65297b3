"""Fixtures: a Hub on this machine, and a way to run a program that talks to it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest

from tests.hub.fake_hub import TOKEN, FakeHub

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def hub() -> Iterator[FakeHub]:
    with FakeHub() as running:
        yield running


@pytest.fixture
def run_with_hub(hub: FakeHub, tmp_path: Path) -> Callable[..., str]:
    """Run Python text in a new process whose Hub is the fake one, and return its output."""
    return partial(run_against, hub, tmp_path)


def run_against(hub: FakeHub, folder: Path, program: str, *, token: str = TOKEN) -> str:
    """Run Python text in `folder`, in a new process with `hub` as its Hub.

    A new process, because huggingface_hub reads its endpoint when it is imported.
    """
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "TRANSFORMERS_"))}
    environment = {
        **kept,
        "HF_ENDPOINT": hub.url,
        "HF_TOKEN": token,
        "HF_HOME": str(folder / "cache"),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "NO_PROXY": "127.0.0.1",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
        "CUDA_VISIBLE_DEVICES": "",
    }
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=environment,
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}\n{hub.requests}"
    return done.stdout
