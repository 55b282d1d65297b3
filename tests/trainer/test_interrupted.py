"""An interrupted training says how to go on; half a checkpoint is never resumed from; other settings are told."""

from __future__ import annotations

import errno
import json
import logging
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
from tests.trainer.tiny import arguments, assert_same_bits, bert, examples, make, weights

SAVES = {
    "save_strategy": "steps",
    "save_steps": 2,
    "max_steps": 6,
    "optim": "adamw_torch",
    "lr_scheduler_type": "linear",
}


@pytest.fixture
def log(caplog: Any) -> Any:
    caplog.set_level(logging.WARNING, logger="hf_distill")
    return caplog


def said(log: Any, words: str) -> list[str]:
    return [record.getMessage() for record in log.records if words in record.getMessage()]


def made(folder: Any, *callbacks: Any, student: Any = None, teacher: Any = None, **changed: Any) -> Any:
    given = {"train_dataset": examples(24), "callbacks": list(callbacks), **SAVES, **changed}
    return make(folder, student or bert(), teacher or bert(seed=1), **given)


class Interrupt(TrainerCallback):
    """Ctrl-C after a step."""

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


def test_it_says_how_to_go_on_and_that_is_so(tmp_path, log) -> None:
    error = interrupted(made(tmp_path, Interrupt(5)))
    checkpoint = tmp_path / "out" / "checkpoint-4"
    [message] = said(log, "goes on from")
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
def test_where_there_is_none_it_says_why(tmp_path, log, settings: dict[str, Any], why: str) -> None:
    interrupted(made(tmp_path, Interrupt(3), **settings))
    [message] = said(log, "The training has made 3 of 6 steps.")
    assert f"It has saved no checkpoint to go on from: {why}" in message


def test_a_checkpoint_of_an_earlier_run_is_not_taken_for_this_ones(tmp_path, log) -> None:
    """resume_from_checkpoint=True would go on from that one, which has more steps."""
    made(tmp_path).train()
    interrupted(made(tmp_path, Interrupt(3)))
    [message] = said(log, "goes on from")
    checkpoint = str(tmp_path / "out" / "checkpoint-2")
    assert f"resume_from_checkpoint={checkpoint!r} goes on from {checkpoint}." in message


def test_a_resumed_run_goes_on_from_where_it_began(tmp_path, log) -> None:
    made(tmp_path, max_steps=2).train()
    interrupted(made(tmp_path, Interrupt(3)), resume_from_checkpoint=True)
    assert f"goes on from {tmp_path / 'out' / 'checkpoint-2'}." in said(log, "has made 3 of 6 steps")[0]


def test_checkpoints_of_the_model_alone(tmp_path, log) -> None:
    interrupted(made(tmp_path, Interrupt(3), save_only_model=True))
    assert said(log, "goes on from")[0].endswith("The optimizer starts from nothing: save_only_model=True.")


# A full disk.


class Full:
    """A disk that has no space left after so many files: what is being written is cut off."""

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
def test_a_checkpoint_that_a_full_disk_cut_off_is_never_resumed_from(tmp_path, log, monkeypatch, kind: str) -> None:
    with monkeypatch.context() as patched:
        trainer = made(tmp_path)
        Full(patched, kind, at_step=4, step=lambda: trainer.state.global_step)
        with pytest.raises((OSError, SafetensorError), match="No space left"):
            trainer.train()
    cut, whole = tmp_path / "out" / "checkpoint-4", tmp_path / "out" / "checkpoint-2"
    assert cut.is_dir() and not is_whole(cut) and is_whole(whole)
    [message] = said(log, "failed")
    assert message.startswith(f"Saving {cut} failed, and it is not whole: resume_from_checkpoint=True passes it over.")
    assert message.endswith(f"resume_from_checkpoint=True goes on from {whole}.")
    resumed = made(tmp_path, student=bert(seed=5))
    resumed.train(resume_from_checkpoint=True)
    assert len(said(log, f"{cut} was not written to the end")) == 1
    assert f"The run goes on from {whole}" in said(log, "was not written to the end")[0]
    uninterrupted = made(tmp_path / "whole")
    uninterrupted.train()
    assert_same_bits(weights(resumed.model), weights(uninterrupted.model))
    assert is_whole(cut)  # it was saved again


def test_a_state_that_is_cut_off_itself(tmp_path, log) -> None:
    made(tmp_path).train()
    last = tmp_path / "out" / "checkpoint-6"
    (last / STATE).write_text((last / STATE).read_text()[:100])
    assert last_whole_checkpoint(str(tmp_path / "out")) == str(tmp_path / "out" / "checkpoint-4")
    again = made(tmp_path)
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 6 and len(said(log, f"{last} was not written to the end")) == 1


def test_several_that_are_cut_off_are_all_named(tmp_path, log) -> None:
    made(tmp_path).train()
    for step in (4, 6):
        (tmp_path / "out" / f"checkpoint-{step}" / STATE).unlink()
    made(tmp_path).train(resume_from_checkpoint=True)
    [message] = said(log, "not written to the end")
    assert "checkpoint-6, " in message and "checkpoint-4 were not written to the end" in message


def test_where_none_is_whole_the_run_says_so_and_does_not_begin(tmp_path) -> None:
    made(tmp_path, max_steps=2).train()
    (tmp_path / "out" / "checkpoint-2" / STATE).unlink()
    with pytest.raises(SettingError, match=r"checkpoint-2 was not written .* has no other checkpoint\. Start without"):
        made(tmp_path).train(resume_from_checkpoint=True)
    with pytest.raises(SettingError, match=r"checkpoint-2 is no whole checkpoint: it has no readable trainer_state\.j"):
        made(tmp_path).train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-2"))


def test_where_there_is_none_at_all_trainer_says_so(tmp_path) -> None:
    trainer = made(tmp_path)
    Path(trainer.args.output_dir).mkdir(exist_ok=True)
    with pytest.raises(ValueError, match="No valid checkpoint found"):
        trainer.train(resume_from_checkpoint=True)


def test_half_of_a_checkpoint_over_an_earlier_one_is_not_whole(tmp_path, monkeypatch) -> None:
    """The state of an earlier run in the same folder would make it look so."""
    made(tmp_path).train()
    with monkeypatch.context() as patched:
        trainer = made(tmp_path, student=bert(seed=3))
        Full(patched, "weights", at_step=2, step=lambda: trainer.state.global_step)
        with pytest.raises(SafetensorError):
            trainer.train()
    assert not is_whole(tmp_path / "out" / "checkpoint-2")
    assert last_whole_checkpoint(str(tmp_path / "out")) == str(tmp_path / "out" / "checkpoint-6")


def test_other_folders_are_no_checkpoints(tmp_path) -> None:
    made(tmp_path, max_steps=2).train()
    shutil.copytree(tmp_path / "out" / "checkpoint-2", tmp_path / "out" / "checkpoint-best")
    (tmp_path / "out" / "checkpoint-99").write_text("a file")
    assert last_whole_checkpoint(str(tmp_path / "out")) == str(tmp_path / "out" / "checkpoint-2")


def test_rotation_keeps_as_many_as_are_asked_for(tmp_path) -> None:
    made(tmp_path, save_total_limit=1).train()
    assert [path.name for path in (tmp_path / "out").glob("checkpoint-*")] == ["checkpoint-6"]
    assert is_whole(tmp_path / "out" / "checkpoint-6")


# Settings that are not those of the checkpoint.


def resumed(folder: Any, **changed: Any) -> Any:
    trainer = made(folder, **changed)
    trainer.train(resume_from_checkpoint=str(folder / "out" / "checkpoint-2"))
    return trainer


def test_the_same_settings_are_not_told(tmp_path, log) -> None:
    made(tmp_path, objectives=HiddenMatch("even"), max_steps=2).train()
    log.clear()
    made(tmp_path, objectives=HiddenMatch("even"), max_steps=2).train(resume_from_checkpoint=True)
    assert not said(log, "with other settings")


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
def test_what_differs_is_told_and_not_refused(tmp_path, log, change: str) -> None:
    settings, words = CHANGES[change]
    made(tmp_path).train()
    trainer = resumed(tmp_path, **settings)
    assert trainer.state.global_step == trainer.args.max_steps
    [message] = said(log, "with other settings")
    assert message.startswith(f"The run goes on from {tmp_path / 'out' / 'checkpoint-2'} with other settings: ")
    assert words in message, message
    own = "The optimizer goes on with its own learning_rate, from the checkpoint." in message
    assert own == (change == "learning_rate")


def test_what_the_optimizer_keeps_is_what_it_is_said_to_keep(tmp_path) -> None:
    """Each of `FROM_CHECKPOINT`: the next step is made with the checkpoint's value, whatever is passed now."""
    before = {"learning_rate": 0.1, "weight_decay": 0.2, "adam_beta1": 0.8, "adam_beta2": 0.9, "adam_epsilon": 1e-6}
    now = {"learning_rate": 0.7, "weight_decay": 0.0, "adam_beta1": 0.5, "adam_beta2": 0.6, "adam_epsilon": 1e-3}
    shared = {"lr_scheduler_type": "constant", "objectives": HiddenMatch(), "teacher": bert(seed=1, hidden_size=8)}
    made(tmp_path, **shared, **before, projection_learning_rate=0.01).train()
    trainer = resumed(tmp_path, **shared, **now, projection_learning_rate=0.5)
    *_, learned = groups = trainer.optimizer.param_groups
    assert {group["lr"] for group in groups[:-1]} == {0.1} and learned["lr"] == 0.01
    assert groups[0]["weight_decay"] == 0.2 and groups[0]["betas"] == (0.8, 0.9) and groups[0]["eps"] == 1e-6
    assert set(FROM_CHECKPOINT) == {*before, "projection_learning_rate"}


def test_a_distiller_of_the_users_own_is_compared_by_what_it_does(tmp_path, log) -> None:
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
    assert "alpha was 0.25, is 0.75" in said(log, "with other settings")[0]
    assert "temperature" not in said(log, "with other settings")[0]


def test_a_checkpoint_of_trainers_own_is_resumed_as_ever(tmp_path, log) -> None:
    made(tmp_path).train()
    (tmp_path / "out" / "checkpoint-2" / SETTINGS).unlink()
    resumed(tmp_path, alpha=0.3)
    assert not said(log, "with other settings")


def test_no_path_is_written_down(tmp_path) -> None:
    teacher = bert(seed=1)
    teacher.save_pretrained(tmp_path / "teacher")
    make(tmp_path, bert(), str(tmp_path / "teacher"), train_dataset=examples(24), **SAVES).train()
    assert str(tmp_path) not in (tmp_path / "out" / "checkpoint-2" / SETTINGS).read_text()


def test_the_generating_trainer(tmp_path, log) -> None:
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
    assert len(said(log, "checkpoint-4 was not written to the end")) == 1
    assert "alpha was 0.5, is 0.9" in said(log, "with other settings")[0]
