"""Pushing: the student and its processor go to the Hub with a card, and nothing else goes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from tests.hub.conftest import run_against
from tests.hub.fake_hub import USER, FakeHub, Repo
from tests.hub.push_programs import BASE, TEACHER


@dataclass
class Place:
    """A Hub, and a working folder where programs run that talk to it."""

    hub: FakeHub
    folder: Path

    def run(self, program: str, *, cache: str = "cache") -> str:
        return run_against(self.hub, self.folder, program, cache=cache)

    def repo(self, name: str) -> Repo:
        return self.hub.repos[f"{USER}/{name}"]

    def card(self, name: str) -> ModelCard:
        return ModelCard(self.repo(name).files()["README.md"].decode())

    def run_card(self, name: str) -> str:
        """Run the program on the card, with nothing in the cache."""
        text = self.card(name).text.split("```python\n")[1].split("```")[0]
        return self.run(text, cache="another-cache")

    def saved(self, name: str) -> set[str]:
        """What saving the student and its processor writes, and the card."""
        folder = self.folder / "as-saved" / name
        files = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}
        assert files
        return files | {"README.md"}

    def assert_weights_are_the_students(self, name: str, file: str = "model.safetensors") -> None:
        saved = (self.folder / "as-saved" / name / file).read_bytes()
        assert self.repo(name).files()[file] == saved

    def assert_no_local_path(self, name: str) -> None:
        for snapshot in self.repo(name).snapshots.values():
            for path, content in snapshot.items():
                for secret in (str(self.folder), TEACHER, BASE, str(Path.home()) + "/"):
                    assert secret.encode() not in content, f"{path} contains {secret}"


def place_after(program: str, folder: Path) -> Iterator[Place]:
    with FakeHub() as hub:
        place = Place(hub, folder)
        place.run(f"from tests.hub.push_programs import {program}; {program}()")
        yield place


@pytest.fixture(scope="module")
def by_hand(tmp_path_factory) -> Iterator[Place]:
    yield from place_after("by_hand", tmp_path_factory.mktemp("by_hand"))


@pytest.fixture(scope="module")
def while_training(tmp_path_factory) -> Iterator[Place]:
    yield from place_after("while_training", tmp_path_factory.mktemp("while_training"))


@pytest.fixture(scope="module")
def adapters(tmp_path_factory) -> Iterator[Place]:
    yield from place_after("adapters", tmp_path_factory.mktemp("adapters"))


def test_the_student_its_processor_and_the_card_and_nothing_else(by_hand: Place) -> None:
    repo = by_hand.repo("trained")
    assert set(repo.files()) == by_hand.saved("trained")
    assert len(repo.commits) == 2  # the creation, and one push
    by_hand.assert_no_local_path("trained")


def test_the_pushed_student_is_the_trained_one(by_hand: Place) -> None:
    by_hand.assert_weights_are_the_students("trained")
    program = f"from tests.hub.push_programs import load_back; load_back('{USER}/trained')"
    by_hand.run(program, cache="another-cache")


def test_the_card_names_the_run(by_hand: Place) -> None:
    card = by_hand.card("trained")
    accuracy = json.loads((by_hand.folder / "metrics.json").read_text())["eval_accuracy"]
    for said in (
        "# trained",
        "`BertForSequenceClassification`",
        "a local model",
        "of the parameters",
        "(1 - alpha) * labels + alpha * T² * forward_kl",
        "alpha = 0.75",
        "T = 2.5",
        "`labels` (the model's own loss on the labels), `logits` (",
        f"| `accuracy` | {accuracy:.4g} |",
        "| optimizer steps | 2 |",
        "Nine words",
        f'model="{USER}/trained"',
    ):
        assert said in card.text, (said, card.text)
    assert card.data.pipeline_tag == "text-classification"
    assert card.data.library_name == "transformers"
    assert card.data.base_model is None
    assert {"hf-distill", "generated_from_trainer", "theirs"} <= set(card.data.tags)
    assert card.data.license == "mit"


def test_the_cards_program_runs_against_the_hub(by_hand: Place) -> None:
    assert "score" in by_hand.run_card("trained")


def test_nothing_is_invented_before_training(by_hand: Place) -> None:
    assert set(by_hand.repo("untrained").files()) == by_hand.saved("untrained")
    assert "Not measured: the run evaluated nothing." in by_hand.card("untrained").text
    by_hand.assert_no_local_path("untrained")


def test_pushing_at_every_save(while_training: Place) -> None:
    repo = while_training.repo("every-save")
    allowed = while_training.saved("every-save")
    assert [m for _, m, _ in repo.commits if m.startswith("Training in progress, step")]
    for _, message, added in repo.commits:
        assert set(added) <= allowed, message
    assert set(repo.files()) == allowed
    while_training.assert_no_local_path("every-save")
    while_training.assert_weights_are_the_students("every-save")


def test_a_checkpoint_goes_only_where_it_was_asked_for(while_training: Place) -> None:
    files = set(while_training.repo("with-checkpoint").files())
    checkpoint = {path for path in files if path.startswith("last-checkpoint/")}
    assert files - checkpoint == while_training.saved("with-checkpoint")
    assert {"last-checkpoint/optimizer.pt", "last-checkpoint/trainer_state.json"} <= checkpoint
    assert not any("teacher" in path for path in checkpoint)
    # Resuming does not read it, and it holds args.hub_token in plain text.
    assert "last-checkpoint/training_args.bin" not in checkpoint
    while_training.assert_weights_are_the_students("with-checkpoint")


def test_an_adapter_with_its_base_on_the_hub(adapters: Place) -> None:
    assert set(adapters.repo("adapter").files()) == adapters.saved("adapter")
    adapters.assert_weights_are_the_students("adapter", "adapter_model.safetensors")
    adapters.assert_no_local_path("adapter")
    card = adapters.card("adapter")
    assert card.data.library_name == "peft"
    assert card.data.base_model == "tiny-user/small-base"
    assert card.data["base_model_relation"] == "adapter"
    assert "theirs" in card.data.tags and card.data.license == "mit"
    assert "logits" in adapters.run_card("adapter")


def test_an_adapter_of_a_local_base_does_not_tell_where_it_is(adapters: Place) -> None:
    card = adapters.card("local-adapter")
    assert card.data.library_name == "peft" and card.data.base_model is None
    assert "adapter of a local model" in card.text
    adapters.assert_no_local_path("local-adapter")
