"""Law L9: the teacher is never trained, never in training mode, and never saved."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import Trainer, TrainerCallback, TrainingArguments

from hf_distill.trainer.interruptions import SETTINGS
from tests.heads import HEADS, of_each_kind
from tests.trainer.tiny import (
    arguments,
    assert_moved,
    assert_same_bits,
    bert,
    examples,
    make,
    padded,
    weights,
)

SAVES = {"save_strategy": "steps", "save_steps": 1, "max_steps": 2, "optim": "adamw_torch"}


def with_dropout(seed: int = 1) -> Any:
    """Return a teacher with dropout, wider than the student, so its tensors are recognized by shape."""
    return bert(seed=seed, dropout=0.5, hidden_size=24)


class TrainsTheTeacher(TrainerCallback):
    """A callback that sets the teacher to training mode and unfreezes it between steps."""

    def __init__(self, teacher: Any) -> None:
        self.teacher = teacher

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self.teacher.train().requires_grad_(True)

    on_substep_end = on_step_begin


def modes_seen(model: Any) -> list[bool]:
    """Return a list that collects the modes of all submodules at every forward."""
    seen: list[bool] = []
    for module in model.modules():
        module.register_forward_pre_hook(lambda m, _: seen.append(m.training))
    return seen


def test_the_teacher_is_in_evaluation_mode_in_every_step(tmp_path) -> None:
    teacher, student = with_dropout(), bert()
    seen = modes_seen(teacher)
    make(tmp_path, student, teacher, callbacks=[TrainsTheTeacher(teacher)], gradient_accumulation_steps=2).train()
    assert seen and not any(seen)
    assert_same_bits(weights(teacher), weights(with_dropout()))
    assert all(parameter.grad is None for parameter in teacher.parameters())
    assert_moved(weights(student), weights(bert()))


def test_the_teachers_dropout_has_no_effect(tmp_path) -> None:
    found = []
    for rate in (0.5, 0.0):
        student, teacher = bert(), bert(seed=1, dropout=rate).train()
        make(tmp_path, student, teacher, alpha=1.0).train()
        found.append(weights(student))
    assert_same_bits(found[0], found[1])


@pytest.mark.parametrize("name", of_each_kind(3))
def test_the_teacher_is_bitwise_unchanged_by_training(tmp_path, name: str) -> None:
    head = HEADS[name]
    student, teacher = head.make(seed=0), head.make(seed=1)
    before = weights(teacher)
    alpha = 0.5 if head.label_names else 1.0
    make(tmp_path, student, teacher, alpha=alpha, train_dataset=head.examples(8), data_collator=head.collate).train()
    assert_same_bits(weights(teacher), before)
    assert_moved(weights(student), weights(head.make(seed=0)))
    for parameter in teacher.parameters():
        assert not parameter.requires_grad and parameter.grad is None


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Any:
    """Return a trainer after two steps with checkpoints, and a plain `Trainer` with the same."""
    folder = tmp_path_factory.mktemp("saved")
    ours = make(folder / "ours", bert(), with_dropout(), **SAVES)
    args = arguments(folder / "theirs", TrainingArguments, **SAVES)
    theirs = Trainer(model=bert(), args=args, train_dataset=examples(), data_collator=padded)
    for trainer in (ours, theirs):
        trainer.train()
        trainer.save_model(str(folder / type(trainer).__name__))
    ours.accelerator.save_state(str(folder / "state"))
    return ours, theirs, folder


def teacher_ids(trainer: Any) -> set[int]:
    return {id(p) for p in trainer.distiller.teacher.model.parameters()}


def test_the_teacher_is_in_no_optimizer(saved) -> None:
    trainer = saved[0]
    optimized = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
    assert optimized == {id(p) for p in trainer.model.parameters()}
    assert not optimized & teacher_ids(trainer)


def test_the_teacher_is_not_in_the_accelerator_or_the_student(saved) -> None:
    trainer = saved[0]
    known = [p for model in trainer.accelerator._models for p in model.parameters()]
    assert known and not {id(p) for p in known} & teacher_ids(trainer)
    assert not {id(p) for p in trainer.model.parameters()} & teacher_ids(trainer)


def files(folder: str | Path) -> dict[str, Path]:
    return {str(path.relative_to(folder)): path for path in sorted(Path(folder).rglob("*")) if path.is_file()}


def test_checkpoints_have_trainers_files_and_the_settings(saved) -> None:
    ours, theirs, _ = saved
    found, expected = files(ours.args.output_dir), files(theirs.args.output_dir)
    settings = {f"checkpoint-{step}/{SETTINGS}" for step in (1, 2)}
    assert set(found) == set(expected) | settings and any("checkpoint-2" in name for name in expected)
    for name, path in found.items():  # training_args.bin has more settings, and the log more values
        allowed = 4096 + (0 if name in settings else expected[name].stat().st_size)
        assert path.stat().st_size < allowed, name


def test_checkpoints_contain_no_teacher_tensors(saved) -> None:
    ours = saved[0]
    shapes = {tuple(p.shape) for p in ours.model.parameters()}
    checkpoint = Path(ours.args.output_dir) / "checkpoint-2"
    kept = load_file(checkpoint / "model.safetensors")
    assert set(kept) == set(ours.model.state_dict())
    state = torch.load(checkpoint / "optimizer.pt")["state"]
    assert len(state) == len(list(ours.model.parameters()))
    tensors = [value for entry in state.values() for value in entry.values() if torch.is_tensor(value)]
    assert {tuple(x.shape) for x in tensors if x.dim()} <= shapes


def test_the_saved_model_is_the_student(saved) -> None:
    ours, theirs, folder = saved
    found, expected = files(folder / type(ours).__name__), files(folder / type(theirs).__name__)
    assert set(found) == set(expected)
    kept = load_file(found["model.safetensors"])
    assert_same_bits({name: kept[name] for name in ours.model.state_dict()}, ours.model.state_dict())


def test_accelerates_saved_state_has_no_teacher(saved) -> None:
    ours, _, folder = saved
    held = [load_file(path) for name, path in files(folder / "state").items() if name.endswith(".safetensors")]
    assert [set(tensors) for tensors in held] == [set(ours.model.state_dict())]
