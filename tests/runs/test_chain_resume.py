"""A chain that is interrupted anywhere, even by SIGKILL, and resumed equals an uninterrupted one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from transformers import TrainerCallback

import hf_distill.runs.chain as module
from hf_distill import SettingError
from hf_distill.runs import Chain, Link, record
from tests.distributed.launch import alone
from tests.runs.killed_chain import MOMENTS
from tests.runs.tiny_chain import links, run, student
from tests.trainer.tiny import assert_same_bits, bert


class Killed(RuntimeError):
    """Simulates a machine that fails."""


class KillAt(TrainerCallback):
    def __init__(self, folder: str, step: int) -> None:
        self.folder, self.step = folder, step

    def on_save(self, args: Any, state: Any, control: Any, **keywords: Any) -> None:
        if self.folder in args.output_dir and state.global_step == self.step:
            raise Killed


def assert_same_students(found: Path, expected: Path) -> None:
    for name in ("1-assistant", "2-half", "3-student", "."):
        assert_same_bits(*(load_file(folder / name / "model.safetensors") for folder in (found, expected)))


@pytest.mark.parametrize(("link", "step"), [("1-assistant", 1), ("3-student", 2)])
def test_resumed_is_uninterrupted(whole, tmp_path, link: str, step: int) -> None:
    with pytest.raises(Killed):
        run(tmp_path, callbacks=[KillAt(link, step)])
    result = run(tmp_path, resume_from_checkpoint=True)
    assert_same_students(tmp_path / "out", whole["folder"])
    before, after = "finished before", "trained"
    assert [one.how for one in result.links] == (
        ["resumed", after, after] if link == "1-assistant" else [before, before, "resumed"]
    )
    assert [_kept_metrics(one) for one in result.links] == [_kept_metrics(one) for one in whole["result"].links]
    assert (result.best, result.kept) == (whole["result"].best, whole["result"].kept)
    resumed = next(one for one in result.links if one.how == "resumed")
    assert resumed.seconds is None and "interrupted" in resumed.not_measured["seconds"]


def _kept_metrics(one: Any) -> dict[str, float]:
    return {name: one.metrics[f"eval_{name}"] for name in ("accuracy", "loss")}


@pytest.mark.parametrize(
    "moments",
    [
        pytest.param(["between two links"], id="between"),
        pytest.param(list(MOMENTS), id="anywhere", marks=pytest.mark.slow),  # half a minute
    ],
)
def test_killed_and_resumed(whole, tmp_path, moments: list[str]) -> None:
    """One chain, killed at each of these moments on its way (SIGKILL), in a process that does nothing else."""
    printed = alone(Path(__file__).with_name("killed_chain.py"), str(tmp_path), *moments)
    endings = dict(line.split(": ", 1) for line in printed.splitlines() if line.split(": ")[0] in {*MOMENTS, "never"})
    assert endings == {**dict.fromkeys(moments, "killed"), "never": "0"}
    assert_same_students(tmp_path / "out", whole["folder"])
    rows = [line.strip("| ").split(" | ") for line in (tmp_path / "out" / "report.md").read_text().splitlines()]
    expected = {one.name: f"{one.metrics['eval_accuracy']:.4f}" for one in whole["result"].links}
    assert {row[0]: row[3] for row in rows if len(row) == 5 and row[0] in expected} == expected


def test_finished_links_are_not_trained_again_and_links_may_be_added(whole, tmp_path, monkeypatch) -> None:
    first = run(tmp_path, Chain(links()[:2]))
    more = run(tmp_path, Chain(links()), resume_from_checkpoint=True)
    assert [one.how for one in more.links] == ["finished before", "finished before", "trained"]
    assert [one.seconds for one in more.links[:2]] == [one.seconds for one in first.links]
    assert_same_students(tmp_path / "out", whole["folder"])
    monkeypatch.setattr(module, "_train", None)
    again = run(tmp_path, Chain(links()), resume_from_checkpoint=True)
    assert [one.metrics for one in again.links] == [one.metrics for one in more.links]


def test_a_moved_chain_can_be_resumed(tmp_path) -> None:
    run(tmp_path / "a", Chain(links()[:1], keep="last"))
    (tmp_path / "b").mkdir()
    (tmp_path / "a" / "out").rename(tmp_path / "b" / "out")
    result = run(tmp_path / "b", Chain(links()[:2], keep="last"), resume_from_checkpoint=True)
    assert [one.how for one in result.links] == ["finished before", "trained"]
    assert Path(result.links[0].folder) == tmp_path / "b" / "out" / "1-assistant"


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (
            [Link("helper", lambda: student(2)), *links()[1:]],
            "holds 1-assistant, and the links now are 1-helper",
        ),
        (
            [Link("assistant", lambda: student(2), {"alpha": 0.9})],
            "link 'assistant': stage 'training' has other settings",
        ),
        (
            [Link("assistant", lambda: student(3))],
            "link 'assistant': it has other settings than when it began in .*: parameters was",
        ),
    ],
)
def test_a_changed_link_is_not_resumed(tmp_path, changed: list[Link], message: str) -> None:
    with pytest.raises(Killed):
        run(tmp_path, Chain(links()[:1]), callbacks=[KillAt("1-assistant", 1)])
    with pytest.raises(SettingError, match=message):
        run(tmp_path, Chain(changed), resume_from_checkpoint=True)
    assert record.read(str(tmp_path / "out" / "1-assistant"), record.FINISHED) is None


def test_another_teacher_is_an_error_even_if_the_link_is_finished(tmp_path) -> None:
    teacher = bert(seed=1, num_hidden_layers=3)
    teacher.save_pretrained(tmp_path / "large")
    run(tmp_path, Chain(links()[:1]), settings={"max_steps": 1}, teacher_model=str(tmp_path / "large"))
    with pytest.raises(SettingError, match="teacher was 'large', is 'BertForSeq"):
        run(tmp_path, Chain(links()[:1]), settings={"max_steps": 1}, resume_from_checkpoint=True)


def test_an_earlier_chain_is_not_overwritten(tmp_path) -> None:
    run(tmp_path, Chain(links()[:1]), settings={"max_steps": 1})
    with pytest.raises(SettingError, match=r"holds links of an earlier call: 1-assistant\. Pass resume_from"):
        run(tmp_path, Chain(links()[:1]), settings={"max_steps": 1})
