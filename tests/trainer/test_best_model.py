"""Uses of an evaluation with the teacher: the best checkpoint, curves over a run, data without labels."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from hf_distill import DistillationArguments, Distiller, Seq2SeqDistillationArguments, Seq2SeqDistillationTrainer
from hf_distill.errors import SettingError
from tests.heads import HEADS
from tests.trainer.tiny import QUIET, arguments, bert, examples, make, padded, softened_kl

EACH_STEP = {"eval_strategy": "steps", "eval_steps": 1, "evaluate_with_teacher": True}


@pytest.mark.parametrize("kind", [DistillationArguments, Seq2SeqDistillationArguments])
@pytest.mark.parametrize(
    ("metric", "given", "greater"),
    [
        ("eval_divergence", None, False),
        ("divergence", None, False),
        ("eval_held_out_divergence", None, False),
        ("eval_divergence", True, True),
        ("teacher_agreement", None, True),
        ("eval_accuracy", None, True),
        ("eval_loss", None, False),
        ("eval_accuracy", False, False),
    ],
)
def test_greater_is_better_for_each_metric(tmp_path, kind: Any, metric: str, given: bool | None, greater: bool) -> None:
    args = kind(str(tmp_path), metric_for_best_model=metric, greater_is_better=given, **QUIET)
    assert args.greater_is_better is greater


def test_without_a_metric_transformers_default_applies(tmp_path) -> None:
    assert DistillationArguments(str(tmp_path), **QUIET).greater_is_better is None
    best = {**QUIET, "load_best_model_at_end": True, "eval_strategy": "steps", "save_strategy": "steps"}
    args = DistillationArguments(str(tmp_path), **best)
    assert (args.metric_for_best_model, args.greater_is_better) == ("loss", False)


@pytest.mark.parametrize("course", ["closer", "away"])
def test_the_checkpoint_with_the_lowest_divergence_is_kept(tmp_path, course: str) -> None:
    """One run approaches the teacher with every step; the other climbs away from it."""
    trainer = make(
        tmp_path, bert(), bert(seed=1), eval_dataset=examples(8), max_steps=3, alpha=1.0, save_strategy="steps",
        save_steps=1, per_device_train_batch_size=8, learning_rate=0.02, load_best_model_at_end=True,
        metric_for_best_model="eval_divergence", **EACH_STEP,
    )  # fmt: skip
    if course == "away":
        trainer.optimizer = torch.optim.SGD(trainer.model.parameters(), lr=0.02, maximize=True)
    trainer.train()
    measured = {e["step"]: e["eval_divergence"] for e in trainer.state.log_history if "eval_divergence" in e}
    best = min(measured, key=lambda step: measured[step])
    assert best == (3 if course == "closer" else 1) and len(set(measured.values())) == 3
    assert trainer.state.best_metric == pytest.approx(measured[best])
    assert trainer.state.best_model_checkpoint.endswith(f"checkpoint-{best}")
    assert trainer.evaluate()["eval_divergence"] == pytest.approx(measured[best], rel=1e-5)  # the best is loaded


# Scheduled temperatures.


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_an_unchanged_student_has_a_constant_divergence(tmp_path, schedule: str) -> None:
    student, teacher, data = bert(), bert(seed=1), examples(6)
    trainer = make(
        tmp_path, student, teacher, eval_dataset=data, max_steps=4, learning_rate=0.0, temperature=8.0,
        temperature_schedule=schedule, temperature_end=2.0, **EACH_STEP,
    )  # fmt: skip
    before = trainer.evaluate()["eval_divergence"]
    trainer.train()
    measured = [entry["eval_divergence"] for entry in trainer.state.log_history if "eval_divergence" in entry]
    batch = padded(data)
    batch.pop("labels")
    with torch.no_grad():
        expected = softened_kl(student.eval()(**batch).logits, teacher(**batch).logits, 2.0).mean().item()
    assert len(measured) == 4
    assert [before, *measured] == pytest.approx([expected] * 5, rel=1e-4)


def test_a_new_trainer_measures_the_same_divergence(tmp_path) -> None:
    moving = {"temperature": 8.0, "temperature_schedule": "linear", "temperature_end": 2.0}
    student, data = bert(), examples(6)
    trainer = make(tmp_path, student, bert(seed=1), eval_dataset=data, evaluate_with_teacher=True, **moving)
    trainer.train()
    fresh = make(tmp_path, student, bert(seed=1), eval_dataset=data, evaluate_with_teacher=True, **moving)
    assert fresh.evaluate()["eval_divergence"] == pytest.approx(trainer.evaluate()["eval_divergence"], rel=1e-6)


# Missing labels.


# A T5 without generation cannot run without labels, as with Trainer.
@pytest.mark.parametrize(("name", "generate"), [("t5_seq2seq", True), ("bart_seq2seq", True), ("bart_seq2seq", False)])
def test_prediction_of_a_decoder_without_labels(tmp_path, name: str, generate: bool) -> None:
    """Its decoder inputs are unknown, so only the two teacher metrics are omitted."""
    head = HEADS[name]
    settings = {"predict_with_generate": generate, "generation_max_length": 5, "per_device_eval_batch_size": 2}
    args = arguments(tmp_path, Seq2SeqDistillationArguments, evaluate_with_teacher=True, **settings)
    trainer = Seq2SeqDistillationTrainer(
        model=head.make(0), teacher_model=head.make(1), args=args, data_collator=head.collate
    )
    labelled = trainer.predict(head.examples(3)).metrics
    assert labelled["test_divergence"] > 0
    found = trainer.predict(head.examples(3, labelled=False))
    assert found.predictions is not None
    assert not {"test_divergence", "test_teacher_agreement", "test_loss"} & set(found.metrics)


@pytest.mark.parametrize("name", ["llama_causal_lm", "bert_masked_lm", "bert_tokens", "bert_span", "wav2vec2_ctc_mean"])
def test_prediction_of_other_heads_without_labels(tmp_path, name: str) -> None:
    head = HEADS[name]
    trainer = make(
        tmp_path, head.make(0), head.make(1), data_collator=head.collate, train_dataset=None, evaluate_with_teacher=True
    )
    metrics = trainer.predict(head.examples(3, labelled=False)).metrics
    assert metrics["test_divergence"] > 0 and 0 <= metrics["test_teacher_agreement"] <= 1


def test_evaluating_with_the_missing_teacher_of_a_distiller_raises(tmp_path) -> None:
    student = bert()
    with pytest.raises(SettingError, match=r"evaluate_with_teacher=True needs a teacher: pass teacher_model="):
        make(tmp_path, student, distiller=Distiller(student, alpha=0.0), evaluate_with_teacher=True)
