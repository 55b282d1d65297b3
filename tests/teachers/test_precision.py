"""Teachers in half precision: features are cast, autocast applies only to fp32, predictions stay close to fp32."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
import torch

from hf_distill import DistillationArguments, Distiller, ModelTeacher, SettingError
from hf_distill.signals import Needs
from hf_distill.teachers import as_teacher
from tests.heads import HEADS, of_each_kind
from tests.teachers.reading import inputs_of
from tests.trainer.tiny import QUIET, assert_moved, bert, make, weights

LISTENERS = ("whisper_seq2seq", "wav2vec2_ctc_mean", "wav2vec2_audio_class", "vit_image_class")
HALVES = {"float16": torch.float16, "bfloat16": torch.bfloat16}
FEATURES = ("input_features", "input_values", "pixel_values")


def by_hand(name: str, teacher: Any, batch: dict[str, Any], dtype: torch.dtype) -> torch.Tensor:
    """Return the predictions for features cast by hand; a Whisper's decoder starts with 1, followed by the labels."""
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    if name == "whisper_seq2seq":
        shifted = batch["labels"].roll(1, -1)
        shifted[:, 0] = 1
        inputs["decoder_input_ids"] = shifted.masked_fill(shifted == -100, 0)
    inputs = {key: value.to(dtype) if key in FEATURES else value for key, value in inputs.items()}
    with torch.no_grad():
        return teacher(**inputs).logits


@pytest.mark.parametrize("half", HALVES)
@pytest.mark.parametrize("name", LISTENERS)
def test_features_are_cast_for_a_half_precision_teacher(name: str, half: str) -> None:
    head, dtype = HEADS[name], HALVES[half]
    student, teacher, batch = head.make(0), head.make(1).eval().to(dtype), head.batch(4)
    seen = inputs_of(teacher)
    distiller = Distiller(student, teacher, alpha=1.0)
    prepared = distiller.prepare(batch)
    found = distiller.teacher(distiller.task, prepared, Needs(logits=True)).logits
    assert torch.equal(found, by_hand(name, teacher, batch, dtype))
    given = seen[0]
    assert all(value.dtype == dtype for key, value in given.items() if key in FEATURES)
    assert not any(value.is_floating_point() for key, value in given.items() if key.endswith(("_ids", "_mask")))
    assert all(value.dtype == torch.float32 for key, value in batch.items() if key in FEATURES)  # the student's
    distiller(student, batch).loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in student.parameters() if p.grad is not None)


@pytest.mark.parametrize("stored", HALVES)
@pytest.mark.parametrize("name", LISTENERS)
def test_a_teacher_folder_in_half_precision_trains(tmp_path, name: str, stored: str) -> None:
    head = HEADS[name]
    path = str(tmp_path / "teacher")
    head.make(1).to(HALVES[stored]).save_pretrained(path)
    trainer = trained(tmp_path, name, path)
    assert next(trainer.distiller.teacher.model.parameters()).dtype == HALVES[stored]


@pytest.mark.parametrize("mixed", [{}, {"bf16": True}], ids=["full", "bf16"])
@pytest.mark.parametrize("name", LISTENERS)
def test_teacher_dtype_of_an_audio_teacher(tmp_path, name: str, mixed: dict[str, bool]) -> None:
    trainer = trained(tmp_path, name, HEADS[name].make(1), teacher_dtype="bfloat16", **mixed)
    assert next(trainer.distiller.teacher.model.parameters()).dtype == torch.bfloat16


def trained(folder: Any, name: str, teacher: Any, **settings: Any) -> Any:
    """Train one step, and evaluate with the teacher."""
    head = HEADS[name]
    student = head.make(0)
    trainer = make(
        folder, student, teacher, train_dataset=head.examples(4), eval_dataset=head.examples(3),
        data_collator=head.collate, max_steps=1, logging_steps=1, evaluate_with_teacher=True, **settings,
    )  # fmt: skip
    trainer.train()
    assert_moved(weights(student), weights(head.make(0)))
    assert all(torch.isfinite(value).all() for value in weights(student).values() if value.is_floating_point())
    assert trainer.state.log_history[0]["loss/logits"] > 0
    assert trainer.evaluate()["eval_divergence"] > 0
    return trainer


# Distance from full precision.

ROUNDING = 2.0**-8  # bf16 has 8 significant bits: the largest relative change by rounding
GATHERED = 4  # roundings of that size that may accumulate in the logits of a model of one block


def answer(name: str, teacher: Any, dtype: str | None) -> tuple[torch.Tensor, bool, float]:
    """Return for a teacher in this dtype: its valid rows `[n v]` in float64, whether they are values, the loss."""
    head = HEADS[name]
    distiller = Distiller(head.make(0), as_teacher(copy.deepcopy(teacher), head.kind, dtype=dtype), alpha=1.0)
    batch = distiller.prepare(head.batch(8))
    predictions = distiller.teacher(distiller.task, batch, Needs(logits=True)).predictions()
    rows, kept = distiller.task.select(predictions, batch), distiller.task.kept_rows(batch)
    loss = distiller(head.make(0), head.batch(8)).loss.item()
    return (rows if kept is None else rows[kept]).double(), distiller.task.on_values, loss


def apart(exact: torch.Tensor, rows: torch.Tensor, *, values: bool) -> float:
    """Return, for the row furthest from `exact`, KL(exact ‖ rows) in nats, or the difference of values."""
    if values:
        return (exact - rows).abs().max().item()
    p, log_ratio = exact.softmax(-1), exact.log_softmax(-1) - rows.log_softmax(-1)
    return torch.where(p > 0, p * log_ratio, 0.0).sum(-1).max().item()  # p is 0 at impossible span positions


@pytest.mark.parametrize("name", of_each_kind(7))
def test_bf16_predictions_are_close_to_fp32(name: str) -> None:
    """KL ≤ ½ (4 · 2⁻⁸ · m)², where m is the largest logit.

    q ∝ p · exp(e) for errors e of the logits, so KL(p ‖ q) = log E_p[exp(e)] - E_p[e], and by Hoeffding's lemma
    that is at most (max e - min e)² / 8: ½ r² if no logit is off by more than r.
    """
    teacher = HEADS[name].make(1).eval()
    exact, values, loss = answer(name, teacher, None)
    half, _, loss_of_half = answer(name, teacher, "bfloat16")
    off = GATHERED * ROUNDING * exact[exact.isfinite()].abs().max().item()
    allowed = off if values else off**2 / 2
    assert 0 < apart(exact, half, values=values) <= allowed
    assert loss_of_half != loss
    assert loss_of_half == pytest.approx(loss, rel=GATHERED * ROUNDING * (2 if values else 1))  # values are squared
    for parameter in teacher.parameters():  # the tolerance is narrow enough to exclude three significant bits
        parameter.data = parameter.data.to(torch.float8_e5m2).float()
    assert apart(exact, answer(name, teacher, None)[0], values=values) > allowed


# Autocast.


@pytest.mark.parametrize(
    ("kept_in", "asked", "mixed", "autocast", "predicts_in"),
    [
        (torch.float32, None, True, True, torch.bfloat16),
        (torch.float32, None, False, False, torch.float32),
        (torch.float32, "auto", True, False, torch.float32),
        (torch.float32, "float32", True, False, torch.float32),
        (torch.float16, None, True, False, torch.float16),
        (torch.bfloat16, None, True, False, torch.bfloat16),
        (torch.float32, "float16", True, False, torch.float16),
        (torch.float64, None, True, False, torch.float64),
    ],
)
def test_autocast_applies_only_to_uncast_fp32_teachers(
    tmp_path, kept_in: torch.dtype, asked: str | None, mixed: bool, autocast: bool, predicts_in: torch.dtype
) -> None:
    teacher, found = bert(seed=1).to(kept_in), []
    teacher.register_forward_hook(
        lambda _, __, output: found.append((torch.is_autocast_enabled("cpu"), output.logits.dtype))
    )
    make(tmp_path, bert(), teacher, max_steps=1, bf16=mixed, teacher_dtype=asked).train()
    assert set(found) == {(autocast, predicts_in)}


def test_features_are_unchanged_for_a_teacher_without_float_parameters() -> None:
    """There is no dtype to cast to."""

    class Counting(torch.nn.Module):
        def forward(self, input_values: torch.Tensor) -> dict[str, torch.Tensor]:
            assert input_values.dtype == torch.float32
            return {"logits": input_values[:, :3]}

    head = HEADS["wav2vec2_audio_class"]
    teacher = ModelTeacher(Counting(), label_matching="by_index")
    teacher.model.main_input_name = "input_values"
    assert Distiller(head.make(0), teacher, alpha=1.0)(head.make(0), head.batch(4)).loss > 0


# The argument.


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_dtype_object_is_stored_by_name(tmp_path, dtype: torch.dtype) -> None:
    args = DistillationArguments(str(tmp_path), teacher_dtype=dtype, **QUIET)
    assert args.teacher_dtype == str(dtype).removeprefix("torch.")
    assert json.loads(args.to_json_string())["teacher_dtype"] == args.teacher_dtype


@pytest.mark.parametrize("dtype", ["half", "int8", "torch.float16"])
def test_an_unknown_dtype_raises(tmp_path, dtype: str) -> None:
    with pytest.raises(SettingError, match=f"teacher_dtype='{dtype}': allowed are auto, float32, bfloat16, float16"):
        DistillationArguments(str(tmp_path), teacher_dtype=dtype, **QUIET)
