"""The ablation of initializations: copied layers, equal batches for all runs, no run repeated. No accuracy."""

from __future__ import annotations

import argparse
import json
import random
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import init_ablation
from benchmarks.sets import sst2_ablation
from benchmarks.sets.sst2_ablation import Data, with_own_tokens
from hf_distill import ModelTeacher
from tests.benchmarks.test_scripts import run


@pytest.fixture
def data() -> Data:
    return sst2_ablation.made_up(argparse.Namespace())


@pytest.mark.parametrize(
    ("start", "layers"), [("first three", (0, 1, 2)), ("evenly spaced", (0, 3, 5)), ("first and last", (0, 1, 5))]
)
def test_initialization_copies_these_layers_and_the_head(data: Data, start: str, layers: tuple[int, ...]) -> None:
    student = init_ablation.make_student(data.teacher, start, 0)
    for ours, theirs in enumerate(layers):
        copied = student.bert.encoder.layer[ours].state_dict()
        for name, value in data.teacher.bert.encoder.layer[theirs].state_dict().items():
            assert torch.equal(copied[name], value)
    assert torch.equal(student.classifier.weight, data.teacher.classifier.weight)


def test_a_random_initialization_depends_on_its_seed(data: Data) -> None:
    one, again, other = (init_ablation.make_student(data.teacher, "random", seed) for seed in (0, 0, 1))
    assert len(one.bert.encoder.layer) == 3
    assert torch.equal(one.classifier.weight, again.classifier.weight)
    assert not torch.equal(one.classifier.weight, other.classifier.weight)


def test_trimming_tokens_does_not_change_outputs() -> None:
    before = sst2_ablation.made_up(argparse.Namespace())
    weight = torch.cat([torch.zeros(5, 16), before.teacher.get_input_embeddings().weight.detach()[1:]])
    before.teacher.set_input_embeddings(torch.nn.Embedding.from_pretrained(weight))  # id + 4; 1 to 4 are unused
    moved: list[Any] = [
        [{**row, "input_ids": [i + 4 for i in row["input_ids"]]} for row in rows]
        for rows in (before.train, before.held_out, before.dev)
    ]
    with torch.no_grad():
        expected = [before.teacher(torch.tensor([row["input_ids"]])).logits for row in moved[2]]
        after = with_own_tokens(Data(*moved, before.teacher, before.collator))
        found = [after.teacher(torch.tensor([row["input_ids"]])).logits for row in after.dev]
    assert after.teacher.config.vocab_size == len(after.teacher.get_input_embeddings().weight) <= 30
    torch.testing.assert_close(torch.cat(found), torch.cat(expected))


def test_runs_with_a_seed_share_batches_and_teacher_outputs(data: Data) -> None:
    asked: list[torch.Tensor] = []
    shared = init_ablation.SharedTeacher(data.teacher)
    plain = ModelTeacher(data.teacher)
    settings = {"loss": "labels + logits + hidden", "steps": 2, "batch": 4, "learning_rate": 1e-3}
    for start in ("evenly spaced", "random"):
        student = init_ablation.train(data, {**settings, "start": start}, shared, seed=0)
        alone = init_ablation.train(data, {**settings, "start": start}, plain, seed=0)
        assert all(torch.equal(a, b) for a, b in zip(student.parameters(), alone.parameters(), strict=True))
        asked.append(torch.tensor(shared.asked))
    assert [int(count) for count in asked] == [2, 2]  # once per step, only for the first initialization
    init_ablation.train(data, {**settings, "start": "random"}, shared, seed=1)
    assert shared.asked == 4  # another seed has another order


def test_every_run_is_reported_and_none_repeated(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    kept = tmp_path / "runs.jsonl"
    settings = ["--smoke", "--steps", "1", "--batch", "4", "--learning-rates", "0.001", "0.01", "--runs", str(kept)]
    run("init_ablation", *settings, "--seeds", "0", monkeypatch=monkeypatch)
    output = capsys.readouterr().out
    rows = [json.loads(line) for line in kept.read_text().splitlines()]
    assert len(rows) == 4 * 2 + 4 * 4  # two learning rates each, one with labels alone; four more losses
    assert {(row["start"], row["loss"]) for row in rows} == {
        (start, loss) for start in init_ablation.STARTS for loss in init_ablation.LOSSES
    }
    tables = output[output.index("| dev accuracy") :].split("\n\n")
    accuracies = {(row["start"], row["loss"]): row["dev"] for row in rows if row["loss"] != init_ablation.LABELS}
    for line in tables[0].splitlines()[2:]:
        start, _, *cells = (cell.strip() for cell in line.strip("|").split("|"))
        for loss, cell in list(zip(init_ablation.LOSSES, cells, strict=True))[1:]:
            assert cell == f"{accuracies[start, loss]:.4f}"
    assert len(tables[0].splitlines()) == 2 + 4
    shuffled = kept.read_text().splitlines()
    random.Random(0).shuffle(shuffled)
    kept.write_text("\n".join(shuffled[:-3]) + "\n")  # as if the script had been stopped
    run("init_ablation", *settings, "--seeds", "0", monkeypatch=monkeypatch)
    again = capsys.readouterr().out
    assert len(re.findall(r" in \d+ s$", again, re.MULTILINE)) == 3 and len(kept.read_text().splitlines()) == len(rows)
    assert again[again.index("| dev accuracy") :].split("\n\n")[:2] == tables[:2]


def test_phrases_are_found_in_sentences_by_their_tokens() -> None:
    sentence, inside, other = ({"input_ids": [101, *ids, 102]} for ids in ([5, 12, 7], [12, 7], [2, 7]))
    joined = sst2_ablation.as_text(sentence)
    assert sst2_ablation.as_text(inside) in joined
    assert sst2_ablation.as_text(other) not in joined  # 2 is not part of 12


def test_gains_compare_the_same_initialization_and_seed() -> None:
    figures = {("random", "labels"): (0.5, 0.6), ("random", "labels + logits"): (0.5, 0.5)}
    figures |= {("first three", "labels"): (0.7, 0.8), ("first three", "labels + logits"): (0.9, 0.9)}
    runs = [
        {"start": start, "loss": loss, "dev": dev, "seconds": 1.0}
        for (start, loss), devs in figures.items()
        for dev in devs
    ]
    losses = ["labels", "labels + logits"]
    found = {"starts": ["random", "first three"], "losses": losses, "runs": runs, "steps": 1, "batch": 1}
    found |= {"rates": {}, "held_out": {}, "before": {"random": 0.5, "first three": 0.25}, "teacher_dev": 1.0}
    output = init_ablation.markdown(found)
    assert "| first three | 0.2500 | 0.7500 ± 0.0707 | 0.9000 ± 0.0000 |" in output
    assert "| random | -0.0500 ± 0.0707 |" in output  # 0 and -0.1
    assert "| first three | +0.1500 ± 0.0707 |" in output  # 0.2 and 0.1
    # 0.2, 0.2 with labels, 0.4, 0.4 with logits; standard deviation 0.2 / √3
    assert "first three, minus random with the same loss and seed: +0.3000 ± 0.1155, better in 4 of 4" in output
    assert "labels + logits, minus labels alone, starts from the teacher: +0.1500 ± 0.0707, better in 2 of 2" in output
