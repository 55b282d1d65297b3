"""Pushing: the student and its processor go to the Hub with a card, and nothing else goes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from tests.hub.fake_hub import FakeHub, Repo
from tests.hub.push_programs import BASE, TEACHER

REPO = "tiny-user/small-student"


@pytest.fixture
def run_push(run_with_hub) -> Callable[..., str]:
    """Run one of `push_programs` by name."""

    def run(name: str, *arguments: str, cache: str = "cache") -> str:
        call = f"from tests.hub.push_programs import {name}; {name}(*{arguments!r})"
        return run_with_hub(call, cache=cache)

    return run


def noted(tmp_path: Path) -> dict:
    return json.loads((tmp_path / "notes.json").read_text())


def assert_no_local_path(repo: Repo, tmp_path: Path) -> None:
    for snapshot in repo.snapshots.values():
        for path, content in snapshot.items():
            for secret in (str(tmp_path), TEACHER, BASE, str(Path.home()) + "/"):
                assert secret.encode() not in content, f"{path} contains {secret}"


def card_of(repo: Repo) -> ModelCard:
    return ModelCard(repo.files()["README.md"].decode())


def test_the_student_its_processor_and_the_card_and_nothing_else(hub, run_push, tmp_path) -> None:
    run_push("plain")
    repo = hub.repos[REPO]
    assert sorted(repo.files()) == sorted([*noted(tmp_path)["files"], "README.md"])
    assert len(repo.commits) == 2  # the creation, and one push
    assert_no_local_path(repo, tmp_path)
    run_push("load_back", REPO, cache="another-cache")


def test_the_card_names_the_run(hub: FakeHub, run_push, tmp_path) -> None:
    run_push("plain")
    card = card_of(hub.repos[REPO])
    accuracy = noted(tmp_path)["accuracy"]
    for said in (
        "# small-student",
        "`BertForSequenceClassification`",
        "a local model",
        "of the parameters",
        "(1 - alpha) * labels + alpha * T² * forward_kl",
        "alpha = 0.75",
        "T = 2.5",
        "`labels`, `logits`",
        f"| `accuracy` | {accuracy:.4g} |",
        "| optimizer steps | 2 |",
        "Nine words",
        f'model="{REPO}"',
    ):
        assert said in card.text, (said, card.text)
    assert card.data.pipeline_tag == "text-classification"
    assert card.data.library_name == "transformers"
    assert card.data.base_model is None
    assert {"hf-distill", "generated_from_trainer"} <= set(card.data.tags)


def test_the_cards_program_runs_against_the_hub(hub: FakeHub, run_push, run_with_hub) -> None:
    run_push("plain")
    program = card_of(hub.repos[REPO]).text.split("```python\n")[1].split("```")[0]
    assert "score" in run_with_hub(program, cache="another-cache")


def test_nothing_is_invented_before_training(hub: FakeHub, run_push, tmp_path) -> None:
    run_push("never_trained")
    repo = hub.repos[REPO]
    assert sorted(repo.files()) == sorted([*noted(tmp_path)["files"], "README.md"])
    assert "Not measured: the run evaluated nothing." in card_of(repo).text
    assert_no_local_path(repo, tmp_path)


def test_pushing_at_every_save(hub: FakeHub, run_push, tmp_path) -> None:
    run_push("during_training", "every_save")
    repo = hub.repos[REPO]
    assert [m for _, m, _ in repo.commits if m.startswith("Training in progress, step")]
    allowed = {*noted(tmp_path)["files"], "README.md"}
    for _, message, added in repo.commits:
        assert set(added) <= allowed, message
    assert set(repo.files()) == allowed
    assert_no_local_path(repo, tmp_path)
    run_push("load_back", REPO, cache="another-cache")


def test_a_checkpoint_goes_only_where_it_was_asked_for(hub: FakeHub, run_push, tmp_path) -> None:
    run_push("during_training", "checkpoint")
    files = set(hub.repos[REPO].files())
    checkpoint = {path for path in files if path.startswith("last-checkpoint/")}
    assert files - checkpoint == {*noted(tmp_path)["files"], "README.md"}
    assert {"last-checkpoint/optimizer.pt", "last-checkpoint/trainer_state.json"} <= checkpoint
    assert not any("teacher" in path for path in checkpoint)
    run_push("load_back", REPO, cache="another-cache")


def test_an_adapter_with_its_base_on_the_hub(hub, run_push, run_with_hub, tmp_path) -> None:
    run_push("adapter", "tiny-user/small-base")
    repo = hub.repos[REPO]
    assert sorted(repo.files()) == sorted([*noted(tmp_path)["files"], "README.md"])
    assert not any(path.startswith("model") for path in repo.files())
    card = card_of(repo)
    assert card.data.library_name == "peft"
    assert card.data.base_model == "tiny-user/small-base"
    assert card.data["base_model_relation"] == "adapter"
    assert_no_local_path(repo, tmp_path)
    program = card.text.split("```python\n")[1].split("```")[0]
    assert "logits" in run_with_hub(program, cache="another-cache")


def test_an_adapter_of_a_local_base_does_not_tell_where_it_is(hub, run_push, tmp_path) -> None:
    run_push("adapter", BASE)
    repo = hub.repos[REPO]
    card = card_of(repo)
    assert card.data.library_name == "peft" and card.data.base_model is None
    assert "adapter of a local model" in card.text
    assert_no_local_path(repo, tmp_path)
