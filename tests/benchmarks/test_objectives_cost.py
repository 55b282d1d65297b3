"""The cost of objectives: correct byte counts, and as few activations of the teacher as possible. No timing."""

from __future__ import annotations

import argparse
import json
import re
import subprocess
from typing import Any

import pytest
import torch

from benchmarks import objectives_cost
from benchmarks.live_tensors import LiveTensors
from benchmarks.objectives_cost import LOGITS, NAIVE_ALL, NAIVE_HIDDEN, NAIVE_LAST, Way
from tests.benchmarks.test_scripts import run

BATCH, LENGTH, WIDTH, HEADS, LAYERS = 4, 8, 32, 2, 4
TINY = {"--student-layers": 2, "--teacher-layers": LAYERS, "--width": WIDTH, "--heads": HEADS, "--batch": BATCH}
TINY |= {"--length": LENGTH, "--rounds": 2}
ARGUMENTS = [str(part) for option in TINY.items() for part in option]
VECTORS = 4 * BATCH * LENGTH * WIDTH  # bytes of one tensor of hidden states, queries, keys or values
MAPS = 4 * BATCH * HEADS * LENGTH**2  # bytes of the attention of one layer


@pytest.fixture
def setting() -> objectives_cost.Setting:
    named = {option[2:].replace("-", "_"): value for option, value in TINY.items()}
    return objectives_cost.make(argparse.Namespace(**named, device="cpu"))


def test_live_tensors_counts_live_memory() -> None:
    given = torch.ones(1000)
    with LiveTensors() as live:
        one = given * 2
        view = one[:500]  # shares its memory
        two = view + 1
        assert live.now == 4000 + 2000
        del one, view, two
        assert live.now == 0
        given.add_(1)  # allocated before: not counted
        three = torch.zeros(100)
    assert (live.now, live.peak) == (400, 6000)
    assert len(three) == 100


def test_live_tensors_counts_tensors_saved_by_autograd() -> None:
    x = torch.ones(1000, requires_grad=True)
    with LiveTensors() as live:
        y = x.exp().exp()  # autograd saves both results, although the first has no name
        assert live.now == 8000
        y.sum().backward()
    assert x.grad is not None and live.now == 8000 and live.peak >= 12_000  # y, the gradient, and an intermediate


@pytest.mark.parametrize(
    ("name", "floor"),
    [
        (LOGITS, 0),
        ("CosineEmbedding", VECTORS),
        ("HiddenMatch, last layer", VECTORS),
        ("HiddenMatch, every layer", 2 * VECTORS),  # two student layers, so two of the teacher's four layers
        ("HiddenMatch, every layer, projected", 2 * VECTORS),
        ("AttentionMatch, scores, last layer", 2 * VECTORS),  # queries and keys
        ("AttentionMatch, probabilities, last layer", 2 * VECTORS),
        ("AttentionMatch, scores, every layer", 4 * VECTORS),
        ("RelationMatch, last layer", 3 * VECTORS),
        ("SimilarityMatch, last layer", VECTORS),
        (NAIVE_HIDDEN, (LAYERS + 1) * VECTORS),
        (NAIVE_LAST, LAYERS * MAPS),
        (NAIVE_ALL, LAYERS * MAPS),
    ],
)
def test_only_matched_layers_of_the_teacher_are_stored(setting: objectives_cost.Setting, name: str, floor: int) -> None:
    way = Way(name, setting)
    way.use()
    assert way.read_of_teacher() == floor


def test_every_way_has_a_floor_above() -> None:
    listed = test_only_matched_layers_of_the_teacher_are_stored.pytestmark[0].args[1]  # type: ignore[attr-defined]  # pytest's mark
    assert tuple(name for name, _ in listed) == objectives_cost.WAYS


def test_the_handwritten_loss_equals_the_librarys(setting: objectives_cost.Setting) -> None:
    """Hidden states of every layer: the mean over attended positions."""
    setting.student.eval()
    way = Way("HiddenMatch, every layer", setting)
    ours = way._distiller(setting.student, setting.batch).loss
    assert torch.allclose(ours, objectives_cost.by_hand(NAIVE_HIDDEN, setting), rtol=1e-6)


def test_the_table_of_costs(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Any) -> None:
    ways = ["HiddenMatch, last layer", "AttentionMatch, scores, every layer", NAIVE_ALL]
    output = tmp_path / "x.json"
    arguments = [*ARGUMENTS, "--one-process", "--output", str(output), "--device", "cpu", "--ways", *ways]
    run("objectives_cost", *arguments, monkeypatch=monkeypatch)
    printed = capsys.readouterr().out
    for name in (LOGITS, *ways):
        row = re.escape(name) + r" \| [\d.]+ \| [\d.]+ \([\d.]+ to [\d.]+\) \| [\d.]+ \| [+-][\d.]+ \| - \|"
        assert re.search(rf"^\| {row}$", printed, re.MULTILINE)
    assert re.search(rf"^\| {LOGITS} \| [\d.]+ \| 1.000 \(1.000 to 1.000\) \| 0.0 \| \+0.0 \| - \|$", printed, re.M)
    found = json.loads(output.read_text())
    assert all(len(seconds) == 2 for seconds in found["seconds"].values())  # the first round is a warm-up
    live = {name: memory["live"] for name, memory in found["memory"].items()}
    assert live[LOGITS] < live["AttentionMatch, scores, every layer"]


def test_each_way_is_measured_in_its_own_process(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[list[str]] = []

    def child(command: list[str], **_: Any) -> Any:
        asked.append(command)
        run("objectives_cost", *command[2:], monkeypatch=monkeypatch)
        return argparse.Namespace(stdout=capsys.readouterr().out)

    monkeypatch.setattr(subprocess, "run", child)
    run("objectives_cost", *ARGUMENTS, "--device", "cpu", "--ways", NAIVE_LAST, monkeypatch=monkeypatch)
    printed = capsys.readouterr().out
    assert [command[-1] for command in asked] == [LOGITS, NAIVE_LAST]
    assert re.search(rf"^\| {re.escape(NAIVE_LAST)} \|.*\| [+-][\d.]+ \| [+-][\d.]+ \|$", printed, re.MULTILINE)
