"""Stages: folders, results, the training of each stage, and interrupted runs."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BertForSequenceClassification, TrainerCallback

import hf_distill.runs.stages as module
from hf_distill import HiddenMatch
from hf_distill.presets import Preset, Stage
from hf_distill.students import inherit
from tests.heads import HEADS
from tests.lora import with_lora
from tests.runs.tiny_stages import run, stages, student, teacher
from tests.tiny_tokenizers import tokenizer
from tests.trainer.tiny import assert_moved, assert_same_bits, weights


class Killed(RuntimeError):
    """Simulates a machine that fails."""


class KillAt(TrainerCallback):
    """Stops the training of one stage at the end of a step, after its checkpoint was written."""

    def __init__(self, folder: str, step: int) -> None:
        self.folder, self.step = folder, step

    def on_save(self, args: Any, state: Any, control: Any, **keywords: Any) -> None:
        if args.output_dir.endswith(self.folder) and state.global_step == self.step:
            raise Killed


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> dict[str, Any]:
    """The uninterrupted run."""
    folder, model = tmp_path_factory.mktemp("whole"), student()
    start = weights(model)
    result = run(folder, model)
    return {"folder": folder / "out", "result": result, "model": model, "start": start}


def test_each_stage_has_its_folder_and_the_last_student_is_in_the_output_folder(whole, capsys) -> None:
    folder, result = whole["folder"], whole["result"]
    assert sorted(path.name for path in folder.iterdir() if path.is_dir()) == ["1-inside", "2-logits"]
    assert [stage.name for stage in result.stages] == ["inside", "logits"]
    assert [Path(stage.folder).name for stage in result.stages] == ["1-inside", "2-logits"]
    assert [stage.output.global_step for stage in result.stages] == [3, 3]
    assert [stage.how for stage in result.stages] == ["trained", "trained"]
    assert result.trainer.model is whole["model"]
    for saved in (folder, folder / "2-logits" / "student"):
        assert_same_bits(weights(BertForSequenceClassification.from_pretrained(saved)), weights(whole["model"]))
    assert (folder / "README.md").read_text().startswith("---") and (folder / "1-inside" / "README.md").is_file()
    assert not list(folder.rglob("*.partial"))


def test_each_stage_has_its_own_objectives_arguments_and_optimizer(whole) -> None:
    inside, logits = whole["result"].stages
    logged = [[entry for entry in stage.log_history if "loss" in entry] for stage in (inside, logits)]
    assert {name for entry in logged[0] for name in entry if name.startswith("loss/")} == {"loss/hidden"}
    assert {name for entry in logged[1] for name in entry if name.startswith("loss/")} == {"loss/logits"}
    # Linear decay from the stage's own rate, in each stage.
    assert [[round(entry["learning_rate"], 6) for entry in one] for one in logged] == [
        [0.01, 0.006667, 0.003333],
        [0.02, 0.013333, 0.006667],
    ]
    assert [entry["step"] for entry in logged[1]] == [1, 2, 3]


def test_the_first_stage_does_not_change_the_head_and_the_second_starts_from_its_student(whole) -> None:
    after = weights(BertForSequenceClassification.from_pretrained(whole["folder"] / "1-inside" / "student"))
    start, end = whole["start"], weights(whole["model"])
    head = [name for name in start if name.startswith(("classifier", "bert.pooler"))]
    assert len(head) == 4
    assert_same_bits({name: after[name] for name in head}, {name: start[name] for name in head})
    body = [name for name in start if name not in head]
    assert_moved({name: after[name] for name in body}, {name: start[name] for name in body})
    assert_moved(end, after)
    # Adam's steps are at most about the learning rate: the second began at the first's end, not at the start.
    steps = sum((0.02, 0.013334, 0.006667))
    assert all(float((end[name] - after[name]).abs().max()) < 1.1 * steps for name in body)


@pytest.mark.parametrize(("stage", "step"), [("1-inside", 2), ("1-inside", 3), ("2-logits", 1), ("2-logits", 2)])
def test_resumed_is_uninterrupted(whole, tmp_path, stage: str, step: int) -> None:
    with pytest.raises(Killed):
        run(tmp_path, student(), callbacks=[KillAt(stage, step)])
    model = student(seed=7)  # its weights do not matter: they are read
    result = run(tmp_path, model, resume_from_checkpoint=True)
    assert_same_bits(weights(model), weights(whole["model"]))
    first = "resumed" if stage == "1-inside" else "finished before"
    assert [one.how for one in result.stages] == [first, "trained" if stage == "1-inside" else "resumed"]
    expected = [one.log_history[:3] for one in whole["result"].stages]
    assert [[e["loss"] for e in one.log_history[:3]] for one in result.stages] == [
        [e["loss"] for e in one] for one in expected
    ]


@pytest.mark.parametrize("settings", [{"save_strategy": "no"}, {"save_only_model": True}])
def test_interruption_without_a_usable_checkpoint(whole, tmp_path, settings: dict[str, Any]) -> None:
    """The stage starts again from the previous student."""

    class KillInSecond(KillAt):
        def on_step_end(self, args: Any, state: Any, control: Any, **keywords: Any) -> None:
            self.on_save(args, state, control)

    with pytest.raises(Killed):
        run(tmp_path, student(), settings=settings, callbacks=[KillInSecond("2-logits", 2)])
    model = student(seed=7)
    result = run(tmp_path, model, settings=settings, resume_from_checkpoint=True)
    assert [one.how for one in result.stages] == ["finished before", "trained"]
    assert_same_bits(weights(model), weights(whole["model"]))


def test_resuming_between_stages_and_after_the_last(whole, tmp_path, monkeypatch) -> None:
    one = run(tmp_path, student(), stages()[:1])
    assert [stage.name for stage in one.stages] == ["inside"]
    model = student(seed=7)
    both = run(tmp_path, model, resume_from_checkpoint=True)
    assert [stage.how for stage in both.stages] == ["finished before", "trained"]
    assert_same_bits(weights(model), weights(whole["model"]))

    monkeypatch.setattr(module, "_run", None)  # nothing is trained
    again = student(seed=8)
    done = run(tmp_path, again, resume_from_checkpoint=True)
    assert [stage.how for stage in done.stages] == ["finished before"] * 2
    assert [s.output for s in done.stages] == [s.output for s in both.stages]
    assert [s.log_history for s in done.stages] == [s.log_history for s in both.stages]
    assert_same_bits(weights(again), weights(whole["model"]))
    assert done.trainer.model is again


def test_an_incomplete_checkpoint_is_not_used(whole, tmp_path) -> None:
    with pytest.raises(Killed):
        run(tmp_path, student(), callbacks=[KillAt("2-logits", 2)])
    (tmp_path / "out" / "2-logits" / "checkpoint-2" / "trainer_state.json").write_text('{"global_st')
    (tmp_path / "out" / "2-logits" / "checkpoint-final").mkdir()
    model = student(seed=7)
    result = run(tmp_path, model, resume_from_checkpoint=True)
    assert result.stages[1].how == "resumed"
    assert_same_bits(weights(model), weights(whole["model"]))


def test_resuming_without_a_record_starts_from_the_beginning(whole, tmp_path) -> None:
    model = student()
    result = run(tmp_path, model, resume_from_checkpoint=True)
    assert [one.how for one in result.stages] == ["trained", "trained"]
    assert_same_bits(weights(model), weights(whole["model"]))


def test_the_summary_is_printed(tmp_path, capsys) -> None:
    result = run(tmp_path, student(), [Stage("only", arguments={"alpha": 1.0, "max_steps": 1})])
    assert capsys.readouterr().out.endswith(f"{result}\n")
    assert str(result).splitlines()[1].split() == [
        *("only", "1", f"{result.stages[0].output.training_loss:.4f}"),
        *(str(tmp_path / "out" / "1-only"), "(trained)"),
    ]


def test_a_teacher_in_a_folder_is_loaded_once(whole, tmp_path, monkeypatch) -> None:
    teacher().save_pretrained(tmp_path / "teacher")
    loads, load = [], module.load_teacher
    monkeypatch.setattr(module, "load_teacher", lambda *given, **named: loads.append(given) or load(*given, **named))
    model = student()
    run(tmp_path, model, teacher_model=str(tmp_path / "teacher"))
    assert [given[0] for given in loads] == [str(tmp_path / "teacher")]
    assert_same_bits(weights(model), weights(whole["model"]))


def test_a_stage_has_its_own_keywords(tmp_path) -> None:
    seen: dict[str, set[int]] = {}

    def collate(name: str) -> Any:
        from tests.trainer.tiny import padded

        def collator(rows: Any) -> Any:
            seen.setdefault(name, set()).add(len(rows))
            return padded(rows)

        return collator

    short = {"max_steps": 1, "alpha": 1.0}
    listed = [Stage(name, (), short, {"data_collator": collate(name)}) for name in ("one", "two")]
    run(tmp_path, student(), listed)
    assert seen == {"one": {4}, "two": {4}}


def test_two_runs_share_no_learned_parameters() -> None:
    match = HiddenMatch("even")
    stage = Stage("inside", (match,))
    first, second = stage.make_objectives()[0], stage.make_objectives()[0]
    assert first is not second and first is not match
    made = Stage("inside", lambda: [HiddenMatch("even")])
    assert made.make_objectives()[0] is not made.make_objectives()[0]


def test_the_next_stage_starts_from_the_best_student(tmp_path) -> None:
    """The metric is highest after the first step."""
    marks = iter([0.9, 0.1, 0.2])
    from tests.trainer.tiny import examples

    chosen = {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 1, "metric_for_best_model": "m"}
    listed = [Stage("one", (), {"alpha": 1.0, **chosen}), Stage("two", (), {"alpha": 1.0, "learning_rate": 0.0})]
    model = student()
    run(
        tmp_path, model, listed, eval_dataset=examples(4), compute_metrics=lambda _: {"m": next(marks)},
    )  # fmt: skip
    best = weights(BertForSequenceClassification.from_pretrained(tmp_path / "out" / "1-one" / "checkpoint-1"))
    assert_same_bits(weights(model), best)


def test_every_stage_uses_mixed_precision(tmp_path) -> None:
    """Accelerate does not prepare a model twice, so the second stage would run in fp32."""
    model, kinds = student(), []
    model.bert.pooler.dense.register_forward_hook(lambda _, __, output: kinds.append(output.dtype))
    run(tmp_path, model, settings={"max_steps": 1, "bf16": True, "save_strategy": "no"})
    assert kinds == [torch.bfloat16] * 2


def test_the_record_of_a_stage(whole) -> None:
    begun = json.loads((whole["folder"] / "1-inside" / "begun.json").read_text())
    assert begun["name"] == "inside" and begun["arguments"]["alpha"] is None
    assert begun["objectives"] == [
        "2 × hidden: HiddenMatch(layers 'even', distance='mean_squared', projection='auto', embeddings=False)"
    ]
    ended = json.loads((whole["folder"] / "1-inside" / "finished.json").read_text())
    assert ended["global_step"] == 3


def test_a_preset_can_be_run(tmp_path) -> None:
    preset = Preset("mine", "nobody", tuple(stages(max_steps=1)))
    result = run(tmp_path, student(), preset, settings={"max_steps": 1})
    assert [one.output.global_step for one in result.stages] == [1, 1]


def test_the_student_has_no_projection_and_no_gradient(whole) -> None:
    assert [name for name in weights(whole["model"]) if "matri" in name or "learned" in name] == []
    assert not list((whole["folder"]).glob("*/distill_state*"))
    assert (whole["folder"] / "1-inside" / "checkpoint-3" / "distill_state.safetensors").is_file()
    assert all(p.grad is None or not torch.any(p.grad) for p in whole["model"].parameters())


def _adapted(seed: int) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return with_lora(student(), "query", "value", rank=2)


def _vit(seed: int) -> Any:
    return HEADS["vit_image_class"].make(seed)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # PEFT's
@pytest.mark.parametrize("kind", ["adapted", "vit"])
def test_adapters_and_renamed_tensors_are_resumed(tmp_path, kind: str) -> None:
    """A folder that holds only an adapter, or tensors under other names than the model's."""
    made, given = _adapted, {}
    listed = stages()
    if kind == "vit":
        head = HEADS["vit_image_class"]
        made, given = _vit, {"train_dataset": head.examples(8), "data_collator": head.collate, "teacher_model": _vit(1)}
        listed = [Stage("labels", (), {"alpha": 0.0}), Stage("logits", (), {"alpha": 1.0})]
    else:
        pytest.importorskip("peft", reason="an optional extra")
    whole, first, second = made(0), made(0), made(7)
    start = weights(whole)
    run(tmp_path / "whole", whole, listed, **given)
    run(tmp_path / "parts", first, listed[:1], **given)
    run(tmp_path / "parts", second, listed, resume_from_checkpoint=True, **given)
    assert_same_bits(weights(second), weights(whole))
    assert_moved(weights(whole), start)
    assert_moved(weights(whole), weights(first))


def test_the_unknown_tokenizer_of_a_teacher_gives_one_warning(tmp_path, caplog) -> None:
    """One for all stages, and none for a student that was built from the teacher."""
    with caplog.at_level(logging.WARNING, "hf_distill.teachers.model"):
        run(tmp_path / "first", student(), processing_class=tokenizer(23))
        assert sum("was not compared" in record.getMessage() for record in caplog.records) == 1
        caplog.clear()
        origin = teacher()
        run(tmp_path / "second", inherit(origin, layers=2), teacher_model=origin, processing_class=tokenizer(23))
    assert not caplog.records
