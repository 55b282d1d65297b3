"""Jobs in two processes: the first one gets the results, bars, errors and interruptions of both."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from hf_distill.cli import second_process
from hf_distill.cli.progress import Stages, show_stages
from hf_distill.cli.second_process import Jobs
from hf_distill.errors import DataError
from tests.distributed.launch import ROOT, SERVER


@pytest.fixture(autouse=True)
def quick_start(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fork the second process from one that has imported torch. (A slow test below uses `spawn`.)"""
    monkeypatch.setattr(second_process.multiprocessing, "get_context", lambda kind: SERVER)


def squared(number: int, *, stages: Stages) -> tuple[int, int]:
    with stages.stage(f"squaring {number}", total=2) as advance:
        advance()
        time.sleep(0.05)
        advance()
    return number**2, os.getpid()


def failing(error: BaseException, *, stages: Stages) -> None:
    raise error


def dying(*, stages: Stages) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def interrupted(*, stages: Stages) -> str:
    """Do what Ctrl-C does to every process of a terminal."""
    os.kill(os.getpid(), signal.SIGINT)
    return "goes on"


def sleeping(*, stages: Stages) -> None:
    time.sleep(300)


def run(jobs: Jobs, screen: Any = None) -> dict[Any, Any]:
    with show_stages(Console(file=screen or io.StringIO(), width=80)) as stages:
        stages.at_each_step = jobs.check
        jobs.begin(stages)
        return jobs.finish(stages)


@pytest.mark.parametrize("second", [False, True])
def test_every_job_runs_once_and_shows_its_bar(second: bool) -> None:
    screen = io.StringIO()
    with Jobs(second=second) as jobs:
        for number in range(6):
            jobs.add(number, squared, number)
        found = run(jobs, screen)
        assert (jobs.second_peak_mb is None) is not second
    assert {name: square for name, (square, _) in found.items()} == {number: number**2 for number in range(6)}
    processes = {process for _, process in found.values()}
    assert os.getpid() in processes and len(processes) == (2 if second else 1)
    shown = screen.getvalue()
    assert all(f"squaring {number}" in shown for number in range(6)) and shown.count("2/2") == 6


def many_steps(*, stages: Stages) -> None:
    with stages.stage("many steps", total=1500) as advance:
        for _ in range(1500):
            advance()


def test_progress_that_waits_to_be_shown() -> None:
    """More steps than the depth of Python's stack: a bar that moves checks the second process again."""
    screen = io.StringIO()
    with Jobs(second=True) as jobs:
        jobs.add("many", many_steps)
        with show_stages(Console(file=screen, width=80)) as stages:
            stages.at_each_step = jobs.check
            jobs.begin(stages)
            while not jobs._pipe.poll():
                time.sleep(0.01)
            time.sleep(0.5)
            assert jobs.finish(stages) == {"many": None}
    assert "1500/1500" in screen.getvalue()


def test_an_error_of_the_second_process_is_raised_with_its_traceback() -> None:
    with Jobs(second=True) as jobs:
        jobs.add("bad", failing, DataError("no such text"))
        with pytest.raises(DataError, match="no such text") as raised, show_stages(Console(quiet=True)) as stages:
            stages.at_each_step = jobs.check
            jobs.begin(stages)
            for _ in range(200):  # this process soon stops
                squared(3, stages=stages)
    assert "in the second process:" in str(raised.value.__cause__) and "def failing" not in str(raised.value)
    assert "in failing\n    raise error" in str(raised.value.__cause__)


def test_a_killed_process_gives_an_error_with_its_exit_code() -> None:
    with Jobs(second=True) as jobs:
        jobs.begin(Stages(None))  # type: ignore[arg-type]  # no bar is shown
        jobs.add("dying", dying)
        with pytest.raises(RuntimeError, match=r"has ended with exit code -9; .* Run with --processes 1"):
            while True:
                jobs.check()
                time.sleep(0.01)


def test_only_the_first_process_handles_interrupts() -> None:
    with Jobs(second=True) as jobs:
        jobs.begin(Stages(None))  # type: ignore[arg-type]  # no bar is shown
        jobs.add("job", interrupted)
        while not jobs._results:
            jobs.check()
            time.sleep(0.01)
        assert jobs.finish(Stages(None)) == {"job": "goes on"}  # type: ignore[arg-type]  # the same


def test_leaving_the_context_ends_the_second_process() -> None:
    begin = time.monotonic()
    with pytest.raises(KeyboardInterrupt), Jobs(second=True) as jobs:
        jobs.add("long", sleeping)
        jobs.begin(Stages(None))  # type: ignore[arg-type]  # no bar is shown
        process = jobs._process
        assert process is not None
        time.sleep(0.2)
        raise KeyboardInterrupt
    assert not process.is_alive() and time.monotonic() - begin < 100


@pytest.mark.slow  # two processes that import torch
def test_ctrl_c_in_a_terminal(tmp_path: Path) -> None:
    """In the middle of trainings in both processes: one line, exit code 130, and no folder."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "80", "TTY_COMPATIBLE": "1"}
    command = [sys.executable, "-m", "hf_distill.cli.main", "quickstart", "--processes", "2"]
    with subprocess.Popen(
        [*command, "--output-dir", str(tmp_path / "out")],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as running:
        assert running.stdout is not None and running.stderr is not None
        shown = ""
        while "student alone, seed 0" not in shown or "teacher" not in shown:
            shown += running.stdout.read(1)
            assert running.poll() is None
        os.killpg(running.pid, signal.SIGINT)
        shown += running.stdout.read()
        errors = running.stderr.read()
    assert running.returncode == 130
    assert errors == "hf-distill: stopped; nothing was left behind.\n" and "Traceback" not in shown
    assert not (tmp_path / "out").exists()
