"""Interrupted trainings: how to continue, incomplete checkpoints are never resumed, changed settings are reported."""

from __future__ import annotations

import errno
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from transformers import PreTrainedModel, TrainerCallback

from hf_distill import Distiller, HiddenMatch, Seq2SeqDistillationArguments, Seq2SeqDistillationTrainer, SettingError
from hf_distill.trainer.interruptions import SETTINGS, STATE, is_whole, last_whole_checkpoint
from hf_distill.trainer.settings import FROM_CHECKPOINT
from tests.heads import HEADS
from tests.trainer.tiny import arguments, assert_same_bits, bert, examples, make, messages_with, weights

SAVES = {
    "save_strategy": "steps",
    "save_steps": 2,
    "max_steps": 6,
    "optim": "adamw_torch",
    "lr_scheduler_type": "linear",
}


def made(folder: Any, *callbacks: Any, student: Any = None, teacher: Any = None, **changed: Any) -> Any:
    given = {"train_dataset": examples(24), "callbacks": list(callbacks), **SAVES, **changed}
    return make(folder, student or bert(), teacher or bert(seed=1), **given)


class Interrupt(TrainerCallback):
    """Raises KeyboardInterrupt after a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **keywords: Any) -> None:
        if state.global_step == self.step:
            raise KeyboardInterrupt


# Ctrl-C.


def interrupted(trainer: Any, **train: Any) -> KeyboardInterrupt:
    with pytest.raises(KeyboardInterrupt) as raised:
        trainer.train(**train)
    return raised.value


def test_the_message_of_an_interruption_tells_how_to_resume(tmp_path, log) -> None:
    error = interrupted(made(tmp_path, Interrupt(5)))
    checkpoint = tmp_path / "out" / "checkpoint-4"
    [message] = messages_with(log, "goes on from")
    assert message == (f"The training has made 5 of 6 steps. resume_from_checkpoint=True goes on from {checkpoint}.")
    assert error.__notes__ == [message]
    resumed = made(tmp_path, student=bert(seed=5))
    resumed.train(resume_from_checkpoint=True)
    whole = made(tmp_path / "whole")
    whole.train()
    assert_same_bits(weights(resumed.model), weights(whole.model))


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ({"save_strategy": "no"}, "save_strategy='no' saves none"),
        ({"save_steps": 4}, "one is saved each 4 steps (save_steps)"),
        ({"save_strategy": "epoch"}, "one is saved at the end of each epoch"),
    ],
    ids=["none", "steps", "epoch"],
)
def test_the_message_explains_a_missing_checkpoint(tmp_path, log, settings: dict[str, Any], why: str) -> None:
    interrupted(made(tmp_path, Interrupt(3), **settings))
    [message] = messages_with(log, "The training has made 3 of 6 steps.")
    assert f"It has saved no checkpoint to go on from: {why}" in message


def test_a_checkpoint_of_an_earlier_run_is_not_suggested(tmp_path, log) -> None:
    """resume_from_checkpoint=True would continue from that checkpoint, which has more steps."""
    made(tmp_path).train()
    interrupted(made(tmp_path, Interrupt(3)))
    [message] = messages_with(log, "goes on from")
    checkpoint = str(tmp_path / "out" / "checkpoint-2")
    assert f"resume_from_checkpoint={checkpoint!r} goes on from {checkpoint}." in message


def test_an_interrupted_resumed_run_suggests_its_own_start(tmp_path, log) -> None:
    made(tmp_path, max_steps=2).train()
    interrupted(made(tmp_path, Interrupt(3)), resume_from_checkpoint=True)
    assert f"goes on from {tmp_path / 'out' / 'checkpoint-2'}." in messages_with(log, "has made 3 of 6 steps")[0]


def test_model_only_checkpoints_cannot_be_resumed(tmp_path, log) -> None:
    interrupted(made(tmp_path, Interrupt(3), save_only_model=True))
    assert messages_with(log, "goes on from")[0].endswith("The optimizer starts from nothing: save_only_model=True.")


# A full disk.


class Full:
    """A fake disk that is full after some files; the current file is truncated."""

    def __init__(self, monkeypatch: Any, kind: str, *, at_step: int, step: Any) -> None:
        self.kind, self.at_step, self.step = kind, at_step, step
        for owner, name in ((PreTrainedModel, "save_pretrained"), (torch, "save")):
            monkeypatch.setattr(owner, name, self.cut_off(getattr(owner, name), name))

    def cut_off(self, original: Any, name: str) -> Any:
        def save(*given: Any, **more: Any) -> Any:
            if self.step() != self.at_step:
                return original(*given, **more)
            if name == "save_pretrained" and self.kind == "weights":
                folder = Path(given[1])
                original(*given, **more)
                weights_file = folder / "model.safetensors"
                weights_file.write_bytes(weights_file.read_bytes()[:100])
                raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
            if name == "save" and Path(str(given[1])).name == self.kind:
                Path(given[1]).write_bytes(b"half")
                raise OSError(errno.ENOSPC, "No space left on device")
            return original(*given, **more)

        return save


@pytest.mark.parametrize("kind", ["weights", "optimizer.pt", "scheduler.pt", "rng_state.pth"])
def test_a_checkpoint_truncated_by_a_full_disk_is_not_resumed(tmp_path, log, monkeypatch, kind: str) -> None:
    with monkeypatch.context() as patched:
        trainer = made(tmp_path)
        Full(patched, kind, at_step=4, step=lambda: trainer.state.global_step)
        with pytest.raises((OSError, SafetensorError), match="No space left"):
            trainer.train()
    cut, whole = tmp_path / "out" / "checkpoint-4", tmp_path / "out" / "checkpoint-2"
    assert cut.is_dir() and not is_whole(cut) and is_whole(whole)
    [message] = messages_with(log, "failed")
    assert message.startswith(f"Saving {cut} failed, and it is not whole: resume_from_checkpoint=True passes it over.")
    assert message.endswith(f"resume_from_checkpoint=True goes on from {whole}.")
    resumed = made(tmp_path, student=bert(seed=5))
    resumed.train(resume_from_checkpoint=True)
    assert len(messages_with(log, f"{cut} was not written to the end")) == 1
    assert f"The run goes on from {whole}" in messages_with(log, "was not written to the end")[0]
    uninterrupted = made(tmp_path / "whole")
    uninterrupted.train()
    assert_same_bits(weights(resumed.model), weights(uninterrupted.model))
    assert is_whole(cut)  # saved again


def test_a_truncated_trainer_state(tmp_path, log) -> None:
    made(tmp_path).train()
    last = tmp_path / "out" / "checkpoint-6"
    (last / STATE).write_text((last / STATE).read_text()[:100])
    assert last_whole_checkpoint(str(tmp_path / "out")) == str(tmp_path / "out" / "checkpoint-4")
    again = made(tmp_path)
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 6 and len(messages_with(log, f"{last} was not written to the end")) == 1


def test_all_truncated_checkpoints_are_named(tmp_path, log) -> None:
    made(tmp_path).train()
    for step in (4, 6):
        (tmp_path / "out" / f"checkpoint-{step}" / STATE).unlink()
    made(tmp_path).train(resume_from_checkpoint=True)
    [message] = messages_with(log, "not written to the end")
    assert "checkpoint-6, " in message and "checkpoint-4 were not written to the end" in message


def test_the_run_raises_if_no_checkpoint_is_complete(tmp_path) -> None:
    made(tmp_path, max_steps=2).train()
    (tmp_path / "out" / "checkpoint-2" / STATE).unlink()
    with pytest.raises(SettingError, match=r"checkpoint-2 was not written .* has no other checkpoint\. Start without"):
        made(tmp_path).train(resume_from_checkpoint=True)
    with pytest.raises(SettingError, match=r"checkpoint-2 is no whole checkpoint: it has no readable trainer_state\.j"):
        made(tmp_path).train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-2"))


def test_trainers_error_if_there_is_no_checkpoint(tmp_path) -> None:
    trainer = made(tmp_path)
    Path(trainer.args.output_dir).mkdir(exist_ok=True)
    with pytest.raises(ValueError, match="No valid checkpoint found"):
        trainer.train(resume_from_checkpoint=True)


def test_an_incomplete_checkpoint_over_an_earlier_one_is_detected(tmp_path, monkeypatch) -> None:
    """The state of an earlier run in the same folder would make it look complete."""
    made(tmp_path).train()
    with monkeypatch.context() as patched:
        trainer = made(tmp_path, student=bert(seed=3))
        Full(patched, "weights", at_step=2, step=lambda: trainer.state.global_step)
        with pytest.raises(SafetensorError):
            trainer.train()
    assert not is_whole(tmp_path / "out" / "checkpoint-2")
    assert last_whole_checkpoint(str(tmp_path / "out")) == str(tmp_path / "out" / "checkpoint-6")


def test_other_folders_are_not_checkpoints(tmp_path) -> None:
    made(tmp_path, max_steps=2).train()
    shutil.copytree(tmp_path / "out" / "checkpoint-2", tmp_path / "out" / "checkpoint-best")
    (tmp_path / "out" / "checkpoint-99").write_text("a file")
    assert last_whole_checkpoint(str(tmp_path / "out")) == str(tmp_path / "out" / "checkpoint-2")


def test_rotation_keeps_save_total_limit_checkpoints(tmp_path) -> None:
    made(tmp_path, save_total_limit=1).train()
    assert [path.name for path in (tmp_path / "out").glob("checkpoint-*")] == ["checkpoint-6"]
    assert is_whole(tmp_path / "out" / "checkpoint-6")


# Settings that differ from the checkpoint's.


def resumed(folder: Any, **changed: Any) -> Any:
    trainer = made(folder, **changed)
    trainer.train(resume_from_checkpoint=str(folder / "out" / "checkpoint-2"))
    return trainer


def test_equal_settings_give_no_warning(tmp_path, log) -> None:
    made(tmp_path, objectives=HiddenMatch("even"), max_steps=2).train()
    log.clear()
    made(tmp_path, objectives=HiddenMatch("even"), max_steps=2).train(resume_from_checkpoint=True)
    assert not messages_with(log, "with other settings")


CHANGES = {
    "alpha": ({"alpha": 0.3}, "alpha was 0.5, is 0.3"),
    "temperature": ({"temperature": 4.0}, "temperature was 2.0, is 4.0"),
    "divergence": ({"divergence": "reverse_kl"}, "divergence was None, is 'reverse_kl'"),
    "schedule": ({"alpha_schedule": "linear", "alpha_end": 1.0}, "alpha_schedule was 'constant', is 'linear'"),
    "objectives": ({"objectives": HiddenMatch(weight=2.0)}, 'objectives.hidden was None, is "HiddenMatch('),
    "learning_rate": ({"learning_rate": 0.7}, "learning_rate was 0.1, is 0.7"),
    "batch": ({"per_device_train_batch_size": 2}, "per_device_train_batch_size was 4, is 2"),
    "seed": ({"seed": 7}, "seed was 42, is 7"),
    "steps": ({"max_steps": 8}, "max_steps was 6, is 8"),
    "teacher": (
        {"teacher": bert(seed=2, num_hidden_layers=2)},
        "teacher was 'BertForSequenceClassification, ",
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_changed_settings_give_a_warning(tmp_path, log, change: str) -> None:
    settings, words = CHANGES[change]
    made(tmp_path).train()
    trainer = resumed(tmp_path, **settings)
    assert trainer.state.global_step == trainer.args.max_steps
    [message] = messages_with(log, "with other settings")
    assert message.startswith(f"The run goes on from {tmp_path / 'out' / 'checkpoint-2'} with other settings: ")
    assert words in message, message
    own = "The optimizer goes on with its own learning_rate, from the checkpoint." in message
    assert own == (change == "learning_rate")


def test_settings_restored_from_the_checkpoint_are_the_stated_ones(tmp_path) -> None:
    """Each of `FROM_CHECKPOINT`: the next step uses the checkpoint's value, not the argument."""
    before = {"learning_rate": 0.1, "weight_decay": 0.2, "adam_beta1": 0.8, "adam_beta2": 0.9, "adam_epsilon": 1e-6}
    now = {"learning_rate": 0.7, "weight_decay": 0.0, "adam_beta1": 0.5, "adam_beta2": 0.6, "adam_epsilon": 1e-3}
    shared = {"lr_scheduler_type": "constant", "objectives": HiddenMatch(), "teacher": bert(seed=1, hidden_size=8)}
    made(tmp_path, **shared, **before, projection_learning_rate=0.01).train()
    trainer = resumed(tmp_path, **shared, **now, projection_learning_rate=0.5)
    *_, learned = groups = trainer.optimizer.param_groups
    assert {group["lr"] for group in groups[:-1]} == {0.1} and learned["lr"] == 0.01
    assert groups[0]["weight_decay"] == 0.2 and groups[0]["betas"] == (0.8, 0.9) and groups[0]["eps"] == 1e-6
    assert set(FROM_CHECKPOINT) == {*before, "projection_learning_rate"}


def test_a_passed_distiller_is_compared_by_its_settings(tmp_path, log) -> None:
    def by(alpha: float) -> dict[str, Any]:
        student = bert()
        return {"student": student, "distiller": Distiller(student, bert(seed=1), alpha=alpha, temperature=3.0)}

    def run(checkpoint: Any = None, **given: Any) -> None:
        trainer = make(tmp_path, given.pop("student"), train_dataset=examples(24), **SAVES, **given)
        trainer.train(resume_from_checkpoint=checkpoint)

    run(**by(0.25))
    settings = json.loads((tmp_path / "out" / "checkpoint-2" / SETTINGS).read_text())
    assert settings["alpha"] == 0.25 and settings["temperature"] == 3.0 and settings["divergence"] == "forward_kl"
    run(str(tmp_path / "out" / "checkpoint-2"), **by(0.75))
    assert "alpha was 0.25, is 0.75" in messages_with(log, "with other settings")[0]
    assert "temperature" not in messages_with(log, "with other settings")[0]


def test_a_checkpoint_of_plain_trainer_can_be_resumed(tmp_path, log) -> None:
    made(tmp_path).train()
    (tmp_path / "out" / "checkpoint-2" / SETTINGS).unlink()
    resumed(tmp_path, alpha=0.3)
    assert not messages_with(log, "with other settings")


def test_settings_contain_no_path(tmp_path) -> None:
    teacher = bert(seed=1)
    teacher.save_pretrained(tmp_path / "teacher")
    make(tmp_path, bert(), str(tmp_path / "teacher"), train_dataset=examples(24), **SAVES).train()
    assert str(tmp_path) not in (tmp_path / "out" / "checkpoint-2" / SETTINGS).read_text()


def test_interruptions_of_seq2seq_trainer(tmp_path, log) -> None:
    head = HEADS["t5_seq2seq"]

    def trainer(*callbacks: Any, **changed: Any) -> Any:
        args = arguments(tmp_path, Seq2SeqDistillationArguments, **{**SAVES, **changed})
        return Seq2SeqDistillationTrainer(
            model=head.make(), teacher_model=head.make(seed=1), args=args, train_dataset=head.examples(24),
            data_collator=head.collate, callbacks=list(callbacks),
        )  # fmt: skip

    interrupted(trainer(Interrupt(5)))
    (tmp_path / "out" / "checkpoint-4" / STATE).unlink()
    again = trainer(alpha=0.9)
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 6
    assert len(messages_with(log, "checkpoint-4 was not written to the end")) == 1
    assert "alpha was 0.5, is 0.9" in messages_with(log, "with other settings")[0]
