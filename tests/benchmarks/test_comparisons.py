"""Comparisons with other libraries and of precisions: a figure, or the reason for its absence. No timing."""

from __future__ import annotations

import json
import logging
import math
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import peers, teacher_precision
from benchmarks.own_process import NotMeasured, figure
from tests.benchmarks.test_scripts import run

PNG = b"\x89PNG"
STEP = ["--batch", "2", "--length", "8", "--vocabulary", "50", "--student", "1", "16", "--teacher", "1", "16"]
STEP += ["--blocks", "1", "--steps", "1"]
LOSS = ["--rows", "32", "--vocabularies", "64", "--widths", "8", "16", "--dtypes", "fp32", "--rounds", "1"]


@pytest.fixture
def without_peers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pretend that they are not installed."""
    for package in ("liger_kernel", "torchtune", "trl"):
        monkeypatch.setitem(sys.modules, package, None)


@pytest.fixture
def children(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> list[list[str]]:
    """Run child commands in this process and record them; the child of the naive loss is out of memory."""
    asked: list[list[str]] = []
    real_run = subprocess.run

    def child(command: list[str], **options: Any) -> Any:
        if command[0] != sys.executable:  # matplotlib runs fc-list if its cache has no list of fonts
            return real_run(command, **options)
        asked.append(command)
        if command[-1].startswith("bare") or "naive" in command:
            return subprocess.CompletedProcess(command, 1, "", "Traceback\nMemoryError: no room\nunloaded a library\n")
        said_before = capsys.readouterr().out
        run(Path(command[1]).stem, *command[2:], monkeypatch=monkeypatch)
        output = capsys.readouterr().out
        sys.stdout.write(said_before)
        return subprocess.CompletedProcess(command, 0, output, "")

    monkeypatch.setattr(subprocess, "run", child)
    return asked


def test_the_table_of_loss_and_backward(
    without_peers, children, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    ways = ["ours", "naive", "liger", "torchtune", "TRL (no labels)"]
    files = ["--plot", str(tmp_path / "x.png"), "--output", str(tmp_path / "x.json")]
    run("large_vocabulary", *LOSS, *files, "--ways", *ways, monkeypatch=monkeypatch)
    output = capsys.readouterr().out
    assert output.startswith("\nfp32, n 32, d 8 and 16, v 64, 1 thread(s), wall clock\n")
    number, errors = r"[\d.]+", r"[\d.]+e-0[678]"
    times = rf"{number} \| {number} \| {number}"
    for way in ("floor 256", "floor 512"):
        assert re.search(rf"^\| {way} \| {times} \|  \|  \|  \|$", output, re.MULTILINE)
    assert re.search(rf"^\| ours \| {times} \| -?[\d,]+ \| {errors} \| {errors} \|$", output, re.MULTILINE)
    assert re.search(rf"^\| naive \| {times} \|  \| {errors} \| {errors} \|$", output, re.MULTILINE)
    for way, package in (("liger", "liger-kernel"), ("torchtune", "torchtune"), ("TRL (no labels)", "trl")):
        absent = f'| {way} | absent: {package} is not installed: pip install "hf-distill[peers]" | | | | | |'
        assert f"\n{absent}\n" in output
    assert "\nNo peak memory of naive: MemoryError: no room.\n" in output
    assert output.count("No peak memory") == 1 and len(children) == 2  # none for what is absent
    (found,) = json.loads((tmp_path / "x.json").read_text())
    assert found["no_memory"] == {"naive": "MemoryError: no room"} and set(found["memory"]) == {"ours"}
    assert (tmp_path / "x.png").read_bytes().startswith(PNG) and f"Plot: {tmp_path / 'x.png'}" in output


def test_the_table_of_whole_steps(
    without_peers, children, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    ways = ["bare loop", "TRL GKDTrainer", "DistillationTrainer"]
    files = ["--plot", str(tmp_path / "x.png"), "--output", str(tmp_path / "x.json")]
    run("end_to_end", *STEP, *files, "--ways", *ways, monkeypatch=monkeypatch)
    output = capsys.readouterr().out
    assert re.search(r"^\| bare loop \| [\d.]+ \| 1.00 \|  \| [\d.]+ \|$", output, re.MULTILINE)
    assert re.search(r"^\| DistillationTrainer \| [\d.]+ \| [\d.]+ \| -?[\d,]+ \| [\d.]+ \|$", output, re.MULTILINE)
    assert '\n| TRL GKDTrainer | absent: trl is not installed: pip install "hf-distill[peers]" | | | |\n' in output
    assert "\nNo peak memory of bare loop: MemoryError: no room.\n" in output
    assert [command[-1] for command in children] == ["bare loop", "DistillationTrainer"]
    assert set(json.loads((tmp_path / "x.json").read_text())["memory"]) == {"DistillationTrainer"}
    assert (tmp_path / "x.png").read_bytes().startswith(PNG)


def test_a_library_that_fails_reports_its_error() -> None:
    assert str(peers.Absent.because("pytest", ImportError("needs a GPU\nand more"))) == "pytest: needs a GPU"
    assert str(peers.Absent.because("pytest", RuntimeError())) == "pytest: RuntimeError"


@pytest.mark.parametrize(
    ("code", "why"),
    [
        ("raise MemoryError('no room')", "MemoryError: no room"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", "its process was ended by SIGKILL"),
        ("raise SystemExit(3)", "its process ended with 3 and said nothing"),
        ("print('nothing here')", "its process ended with 'here' in place of a number"),
        ("", "its process ended with 'nothing' in place of a number"),
    ],
)
def test_failed_processes_give_a_reason(code: str, why: str) -> None:
    with pytest.raises(NotMeasured, match=f"^{re.escape(why)}$"):
        figure([sys.executable, "-c", code])


def test_the_figure_is_the_last_printed_number() -> None:
    code = "import os; print('loading', 1, os.environ['SIZE'])"
    assert figure([sys.executable, "-c", code], environment={**os.environ, "SIZE": "2.5"}) == 2.5


# Teachers in lower precision.


@pytest.fixture(autouse=True)
def level() -> Iterator[None]:
    """Restore the log level, which a script changes until it ends, and here it does not end."""
    of_library = logging.getLogger("hf_distill")
    before = of_library.level
    yield
    of_library.setLevel(before)


def test_precisions_of_a_random_teacher(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    tiny = ["--layers", "1", "--width", "32", "--length", "6", "--examples", "20", "--batch", "8", "--rounds", "1"]
    monkeypatch.setenv("HF_DISTILL_DATA", str(tmp_path))
    run("teacher_precision", *tiny, "--output", str(tmp_path / "x.json"), monkeypatch=monkeypatch)
    output = capsys.readouterr().out
    assert output.startswith("Made up, because there is no data set 'sst2' in")
    assert "a BERT of 1 x 32 made from a config, tokens at random: 20 rows in batches of 8, T 2" in output
    assert re.search(r"^\| fp32 \| 0.0e\+00 \| 0.0e\+00 \| 0.00 \| 100.00% \| [\d.]+ \| 1.00 \|$", output, re.MULTILINE)
    for name in ("bf16", "int8_dynamic"):
        assert re.search(rf"^\| {name} \| [\d.]+e-\d+ \| [\d.]+e-\d+ \| [\d.]+ \| [\d.]+% \|", output, re.MULTILINE)
    found = json.loads((tmp_path / "x.json").read_text())
    assert 0 < found["apart"]["bf16"]["kl"] < found["apart"]["int8_dynamic"]["kl"] < 0.01
    assert found["apart"]["bf16"]["roundings"] < 4  # the bound in docs/teachers.md


def test_missing_named_data_are_not_replaced_by_random_data(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="no data set 'sst2' in"):
        run("teacher_precision", "--data-dir", str(tmp_path), monkeypatch=monkeypatch)


def test_distances_by_hand() -> None:
    exact, output = torch.tensor([[2.0, 0.0], [0.0, 1.0]]), torch.tensor([[2.0, 0.0], [1.0, 0.0]])
    found = teacher_precision.compared(exact, output, temperature=0.5)
    # The second row at T = 0.5: logits (0, 2) and (2, 0), so Σ p log(p / q) = (p₂ - p₁) · 2, p₂ = 1 / (1 + e⁻²).
    likelier = 1 / (1 + math.exp(-2))
    kl = (2 * likelier - 1) * 2
    assert found["kl"] == pytest.approx(kl / 2) and found["kl_largest"] == pytest.approx(kl)
    assert found["same"] == 0.5
    assert found["roundings"] == pytest.approx((2 * kl) ** 0.5 * 256 / 4)  # the largest logit divided by T is 4
