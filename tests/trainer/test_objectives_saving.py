"""Projections are not saved or pushed with the student; only checkpoints have them, in a separate file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, Trainer, TrainingArguments

from hf_distill import HiddenMatch, RelationMatch
from hf_distill.learned import STATE_FILE
from hf_distill.trainer.interruptions import SETTINGS
from hf_distill.trainer.mixin import publishing
from tests.trainer.test_objectives import student, teacher
from tests.trainer.tiny import arguments, assert_same_bits, examples, make, padded, weights

SAVES = {"save_strategy": "steps", "save_steps": 1, "max_steps": 2, "optim": "adamw_torch"}


def files(folder: str | Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in Path(folder).rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> tuple[Any, Any, Path]:
    """Return a trainer with projections after two steps with checkpoints, and a plain `Trainer`'s folder."""
    folder = tmp_path_factory.mktemp("saved")
    ours = make(folder / "ours", student(), teacher(), objectives=HiddenMatch(embeddings=True), **SAVES)
    args = arguments(folder / "theirs", TrainingArguments, **SAVES)
    theirs = Trainer(model=student(), args=args, train_dataset=examples(), data_collator=padded)
    for trainer in (ours, theirs):
        trainer.train()
        trainer.save_model(str(folder / type(trainer).__name__))
    ours.accelerator.save_state(str(folder / "state"))
    return ours, theirs, folder


def test_projections_are_not_in_the_students_state(saved) -> None:
    ours, theirs, _ = saved
    assert set(ours.model.state_dict()) == set(theirs.model.state_dict())
    assert not {id(p) for p in ours.model.parameters()} & {id(p) for p in ours.distiller.learned.parameters()}


def test_a_saved_model_has_no_projections(saved) -> None:
    ours, theirs, folder = saved
    mine = folder / type(ours).__name__
    assert files(mine) == files(folder / type(theirs).__name__)
    assert set(load_file(mine / "model.safetensors")) == set(load_file(folder / "Trainer" / "model.safetensors"))
    again, info = AutoModelForSequenceClassification.from_pretrained(mine, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert_same_bits(weights(again), weights(ours.model))


def test_a_checkpoint_has_two_additional_files(saved) -> None:
    """Learned parameters, and the settings of the run."""
    ours, theirs, _ = saved
    found, expected = files(ours.args.output_dir), files(theirs.args.output_dir)
    more = {f"checkpoint-{step}/{name}" for step in (1, 2) for name in (STATE_FILE, SETTINGS)}
    assert found - expected == more and not expected - found
    checkpoint = Path(ours.args.output_dir) / "checkpoint-2"
    assert set(load_file(checkpoint / "model.safetensors")) == set(ours.model.state_dict())
    learned = weights(ours.distiller.learned.module)
    assert set(learned) == {f"hidden.matrices.{pair}.weight" for pair in ("embeddings", "0_0", "1_2")}
    kept = load_file(checkpoint / STATE_FILE)
    assert set(kept) == set(learned)
    assert_same_bits({name: kept[name] for name in learned}, learned)


def test_objectives_without_parameters_save_no_file(tmp_path) -> None:
    trainer = make(tmp_path, student(), teacher(), objectives=RelationMatch(), **SAVES)
    trainer.train()
    assert not any(STATE_FILE in name for name in files(trainer.args.output_dir))


def test_a_model_only_checkpoint_has_no_projections(tmp_path) -> None:
    trainer = make(tmp_path, student(), teacher(), objectives=HiddenMatch(), **SAVES, save_only_model=True)
    trainer.train()
    assert not any(STATE_FILE in name for name in files(trainer.args.output_dir))


def test_accelerate_does_not_save_projections(saved) -> None:
    ours, _, folder = saved
    held = [set(load_file(path)) for path in (folder / "state").rglob("*.safetensors")]
    assert held == [set(ours.model.state_dict())]


class Uploads:
    """A stand-in for `HfApi` that records uploads."""

    def __init__(self) -> None:
        self.found: list[dict[str, Any]] = []

    def __call__(self) -> Uploads:
        return self

    def upload_folder(self, **keywords: Any) -> None:
        self.found.append(keywords)


def test_a_push_contains_no_projections(tmp_path, monkeypatch) -> None:
    """Even with the file in the output folder; tests/hub covers the contents of a push."""
    uploads = Uploads()
    monkeypatch.setattr(publishing, "HfApi", uploads)
    trainer = make(tmp_path, student(), teacher(), objectives=HiddenMatch(), max_steps=1)
    trainer.train()
    trainer.hub_model_id, trainer.push_in_progress = "someone/student", None
    trainer.distiller.learned.save(trainer.args.output_dir)
    trainer.push_to_hub(finetuned_from="someone/base")
    [upload] = uploads.found
    assert (Path(upload["folder_path"]) / STATE_FILE).is_file()
    assert set(upload["allow_patterns"]) == {"config.json", "model.safetensors", "README.md"}
    assert set(load_file(tmp_path / "out" / "model.safetensors")) == set(trainer.model.state_dict())
