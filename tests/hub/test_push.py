"""Pushing uploads the student, its processor and a card, and nothing else."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard

from tests.hub.conftest import run_against
from tests.hub.fake_hub import USER, FakeHub, Repo
from tests.hub.push_programs import BASE, TEACHER


@dataclass
class Place:
    """A Hub, and a working folder where programs run that talk to it."""

    hub: FakeHub
    folder: Path
    used: dict[str, Any] = field(default_factory=dict)

    def repo(self, name: str) -> Repo:
        return self.hub.repos[f"{USER}/{name}"]

    def card(self, name: str) -> ModelCard:
        return ModelCard(self.repo(name).files()["README.md"].decode())

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


@pytest.fixture(scope="module")
def pushed(tmp_path_factory) -> Iterator[Place]:
    """The Hub after all pushes, and after two students were used."""
    with FakeHub() as hub:
        place = Place(hub, tmp_path_factory.mktemp("pushed"))
        program = f"from tests.hub.push_programs import main; main('{USER}', ('trained', 'adapter'))"
        place.used = json.loads(run_against(hub, place.folder, program).splitlines()[-1])
        yield place


@pytest.fixture(scope="module")
def used(pushed: Place) -> dict[str, Any]:
    """The outputs of the pushed students in another process with an empty cache; see `use`."""
    return pushed.used


def test_only_the_student_its_processor_and_the_card_are_pushed(pushed: Place) -> None:
    repo = pushed.repo("trained")
    assert set(repo.files()) == pushed.saved("trained")
    assert len(repo.commits) == 2  # the creation, and one push
    pushed.assert_no_local_path("trained")


def test_the_pushed_student_is_the_trained_student(pushed: Place, used: dict[str, Any]) -> None:
    pushed.assert_weights_are_the_students("trained")
    torch.testing.assert_close(torch.tensor(used["logits"]), torch.load(pushed.folder / "logits.pt"))


def test_the_card_describes_the_run(pushed: Place) -> None:
    card = pushed.card("trained")
    accuracy = json.loads((pushed.folder / "metrics.json").read_text())["eval_accuracy"]
    for part in (
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
        assert part in card.text, (part, card.text)
    assert card.data.pipeline_tag == "text-classification"
    assert card.data.library_name == "transformers"
    assert card.data.base_model is None
    assert {"hf-distill", "generated_from_trainer", "theirs"} <= set(card.data.tags)
    assert card.data.license == "mit"


def test_the_cards_program_runs_against_the_hub(used: dict[str, Any]) -> None:
    assert "score" in used["cards"]["trained"]


def test_a_push_before_training_invents_nothing(pushed: Place) -> None:
    assert set(pushed.repo("untrained").files()) == pushed.saved("untrained")
    assert "Not measured: there was no evaluation." in pushed.card("untrained").text
    pushed.assert_no_local_path("untrained")


def test_pushing_at_every_save(pushed: Place) -> None:
    repo = pushed.repo("every-save")
    allowed = pushed.saved("every-save")
    assert [m for _, m, _ in repo.commits if m.startswith("Training in progress, step")]
    for _, message, added in repo.commits:
        assert set(added) <= allowed, message
    assert set(repo.files()) == allowed
    pushed.assert_no_local_path("every-save")
    pushed.assert_weights_are_the_students("every-save")


def test_a_checkpoint_is_pushed_only_if_requested(pushed: Place) -> None:
    files = set(pushed.repo("with-checkpoint").files())
    checkpoint = {path for path in files if path.startswith("last-checkpoint/")}
    assert files - checkpoint == pushed.saved("with-checkpoint")
    assert {"last-checkpoint/optimizer.pt", "last-checkpoint/trainer_state.json"} <= checkpoint
    assert not any("teacher" in path for path in checkpoint)
    # Resuming does not read it, and it holds args.hub_token in plain text.
    assert "last-checkpoint/training_args.bin" not in checkpoint
    pushed.assert_weights_are_the_students("with-checkpoint")


def test_an_adapter_with_its_base_on_the_hub(pushed: Place, used: dict[str, Any]) -> None:
    assert set(pushed.repo("adapter").files()) == pushed.saved("adapter")
    pushed.assert_weights_are_the_students("adapter", "adapter_model.safetensors")
    pushed.assert_no_local_path("adapter")
    card = pushed.card("adapter")
    assert card.data.library_name == "peft"
    assert card.data.base_model == "tiny-user/small-base"
    assert card.data["base_model_relation"] == "adapter"
    assert "theirs" in card.data.tags and card.data.license == "mit"
    assert "logits" in used["cards"]["adapter"]


def test_the_card_of_an_adapter_hides_a_local_base(pushed: Place) -> None:
    card = pushed.card("local-adapter")
    assert card.data.library_name == "peft" and card.data.base_model is None
    assert "adapter of a local model" in card.text
    pushed.assert_no_local_path("local-adapter")


def test_the_checkpoint_of_an_adapter_hides_a_local_base_on_the_hub_alone(pushed: Place) -> None:
    pushed.assert_no_local_path("adapter-checkpoint")
    files = pushed.repo("adapter-checkpoint").files()
    (kept,) = pushed.folder.glob("adapter-checkpoint/checkpoint-2")
    names = {path.name for path in kept.iterdir()} - {"training_args.bin", "README.md"}
    assert {path.removeprefix("last-checkpoint/") for path in files if path.startswith("last-")} == names
    for name in names:
        here, there = (kept / name).read_bytes(), files[f"last-checkpoint/{name}"]
        if name == "adapter_config.json":
            assert {**json.loads(here), "base_model_name_or_path": None} == json.loads(there)
            assert BASE.encode() in here
        else:
            assert here == there
