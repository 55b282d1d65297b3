"""The comparison of teachers: equal initializations and batches, no run repeated, gains against the right row."""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import kinds_training, teacher_kinds
from benchmarks.sets import sst2_kinds
from tests.benchmarks.test_scripts import run


@pytest.fixture
def teachers() -> Any:
    return sst2_kinds.tiny(argparse.Namespace(seeds=[0, 1])).teachers


@pytest.mark.parametrize(("layers", "taken"), [(2, (0, 5)), (4, (0, 2, 3, 5))])
def test_initialization_copies_these_layers(teachers: Any, layers: int, taken: tuple[int, ...]) -> None:
    student = kinds_training.start(teachers[0], layers)
    assert len(student.bert.encoder.layer) == layers
    for ours, theirs in zip(student.bert.encoder.layer, taken, strict=True):
        assert torch.equal(ours.output.dense.weight, teachers[0].bert.encoder.layer[theirs].output.dense.weight)
    assert torch.equal(student.classifier.weight, teachers[0].classifier.weight)


def test_an_ensemble_averages_softened_probabilities(teachers: Any) -> None:
    batch = {"input_ids": torch.tensor([[1, 2, 3]])}
    with torch.no_grad():
        output = [[float(x) for x in teacher(**batch).logits[0]] for teacher in teachers]
        found = teacher_kinds.Together(teachers)(**batch).logits.exp()[0]
    # Two classes at T = 2: the second has 1 / (1 + e^((a - b) / 2)).
    expected = statistics.mean(1 / (1 + torch.tensor((a - b) / 2).exp().item()) for a, b in output)
    assert found.tolist() == pytest.approx([1 - expected, expected], abs=1e-6)


def test_runs_have_equal_steps_and_none_is_repeated(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    arguments = [
        "--smoke",
        "--work-dir",
        str(tmp_path),
        "--kinds",
        "three teachers",
        "generations",
        "--seeds",
        "0",
        "1",
    ]
    arguments += ["--steps", "1", "--batch", "4", "--learning-rates", "1e-3", "--alphas", "0.9"]
    run("teacher_kinds", *arguments, monkeypatch=monkeypatch)
    output = capsys.readouterr().out
    runs = [json.loads(line) for line in (tmp_path / "runs.jsonl").read_text().splitlines()]
    assert [(one["kind"], one["seed"]) for one in runs] == [
        (kind, seed) for seed in (0, 1) for kind in ("labels alone", "one teacher", "three teachers", "generations")
    ]
    assert all(len(one["dev"]) == len(kinds_training.KINDS[one["kind"]]) for one in runs)
    rows = ("labels alone", "one teacher", "three teachers", "second generation", "third generation")
    for row in rows:
        assert f"\n| {row} | " in output
    run("teacher_kinds", *arguments, monkeypatch=monkeypatch)
    assert len((tmp_path / "runs.jsonl").read_text().splitlines()) == len(runs)
    assert capsys.readouterr().out.split("\n\n")[1:] == output.split("\n\n")[1:]  # the same tables


def test_gains_compare_each_seed_with_the_baseline_row() -> None:
    test = {
        "labels alone": [0.5, 0.6],
        "one teacher": [0.7, 0.7],
        "own average": [0.6, 0.5],
        "three teachers": [0.8, 0.6],
    }
    found: dict[str, Any] = {"rows": {row: {"test": values} for row, values in test.items()}}
    assert teacher_kinds.gains(found, "own average", "test") == pytest.approx([0.1, -0.1])
    assert teacher_kinds.gains(found, "one teacher", "test") == pytest.approx([0.2, 0.1])
    assert teacher_kinds.gains(found, "three teachers", "test") == pytest.approx([0.1, -0.1])


def test_the_selected_setting_is_best_on_dev_for_the_last_student() -> None:
    tried: list[Any] = [{"dev": [0.9, 0.5]}, {"dev": [0.1, 0.7]}, {"dev": [0.2, 0.7]}]
    assert teacher_kinds.best(tried) is tried[1]
