"""Evaluation is `Trainer`'s; only `evaluate_with_teacher` runs the teacher, and its two figures are checked by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments, Trainer, TrainingArguments

from hf_distill import Seq2SeqDistillationArguments, Seq2SeqDistillationTrainer
from tests.heads import HEADS, Head, of_each_kind
from tests.trainer.tiny import arguments, bert, examples, make, never_called, padded, softened_kl

TIMES = ("runtime", "per_second", "preparation_time")


def without_times(metrics: dict[str, float]) -> dict[str, float]:
    return {name: value for name, value in metrics.items() if not name.endswith(TIMES)}


def accuracy(prediction: Any) -> dict[str, float]:
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


def by_hand(student: Any, teacher: Any, data: list[dict[str, Any]], temperature: float) -> tuple[float, float]:
    """Divergence and agreement over sequence classification examples, one at a time: no padding, no batches."""
    found = []
    for example in data:
        batch = padded([example])
        batch.pop("labels", None)
        with torch.no_grad():
            ours, theirs = student.eval()(**batch).logits, teacher.eval()(**batch).logits
        agrees = (ours.argmax(-1) == theirs.argmax(-1)).double()
        found.append((softened_kl(ours, theirs, temperature).item(), agrees.item()))
    divergence, agreement = np.mean(found, axis=0)
    return float(divergence), float(agreement)


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_loss_and_metrics_are_those_of_trainer_and_the_teacher_is_not_run(tmp_path, alpha: float) -> None:
    given = {"eval_dataset": examples(7), "data_collator": padded, "compute_metrics": accuracy}
    settings = {"per_device_eval_batch_size": 3}
    student = bert(dropout=0.3)
    theirs = Trainer(model=student, args=arguments(tmp_path, TrainingArguments, **settings), **given)
    expected = without_times(theirs.evaluate())
    ours = make(tmp_path, student, never_called(bert(seed=4)), alpha=alpha, **settings, **given)
    assert without_times(ours.evaluate()) == expected
    assert set(expected) >= {"eval_loss", "eval_accuracy"}


@pytest.mark.parametrize("name", of_each_kind(1))
def test_every_head_evaluates_as_with_trainer(tmp_path, name: str) -> None:
    head = HEADS[name]
    student = head.make(seed=0)
    given = {"eval_dataset": head.examples(5), "data_collator": head.collate}
    settings = {"per_device_eval_batch_size": 2}
    theirs = Trainer(model=student, args=arguments(tmp_path, TrainingArguments, **settings), **given).predict(
        given["eval_dataset"]
    )
    teacher = never_called(head.make(seed=1))
    ours = make(tmp_path, student, teacher, alpha=1.0, **settings, **given).predict(given["eval_dataset"])
    assert without_times(ours.metrics) == without_times(theirs.metrics)
    for found, expected in zip(flat(ours.predictions), flat(theirs.predictions), strict=True):
        np.testing.assert_array_equal(found, expected)


def flat(predictions: Any) -> list[Any]:
    if isinstance(predictions, tuple):
        return [x for part in predictions for x in flat(part)]
    return [predictions]


def asked(folder: Any, student: Any, teacher: Any, **changed: Any) -> Any:
    settings = {"evaluate_with_teacher": True, "temperature": 3.0, "per_device_eval_batch_size": 3}
    return make(folder, student, teacher, **{**settings, **changed})


@pytest.mark.parametrize("labels", [3, None], ids=["labelled", "unlabelled"])
@pytest.mark.parametrize("count", [6, 7], ids=["whole-batches", "a-smaller-last-batch"])
def test_agreement_and_divergence_are_those_of_plain_torch(tmp_path, count: int, labels: int | None) -> None:
    student, teacher, data = bert(), bert(seed=4), examples(count, labels=labels)
    metrics = asked(tmp_path, student, teacher, eval_dataset=data).evaluate()
    divergence, agreement = by_hand(student, teacher, data, 3.0)
    assert metrics["eval_divergence"] == pytest.approx(divergence, rel=1e-4)
    assert metrics["eval_teacher_agreement"] == pytest.approx(agreement)
    assert 0 < agreement < 1  # so that the comparison says something
    assert ("eval_loss" in metrics) == (labels is not None)


def test_the_loss_stays_that_of_the_task(tmp_path) -> None:
    student = bert()
    plain = make(tmp_path, student, bert(seed=4), eval_dataset=examples(7), per_device_eval_batch_size=3).evaluate()
    metrics = asked(tmp_path, student, bert(seed=4), eval_dataset=examples(7)).evaluate()
    assert {name: metrics[name] for name in without_times(plain)} == without_times(plain)


def test_a_dict_of_datasets(tmp_path) -> None:
    student, teacher = bert(), bert(seed=4)
    data = {"a": examples(4), "b": examples(7, labels=None)}
    metrics = asked(tmp_path, student, teacher, eval_dataset=data).evaluate()
    for name, rows in data.items():
        divergence, agreement = by_hand(student, teacher, rows, 3.0)
        assert metrics[f"eval_{name}_divergence"] == pytest.approx(divergence, rel=1e-4)
        assert metrics[f"eval_{name}_teacher_agreement"] == pytest.approx(agreement)


def test_predict(tmp_path) -> None:
    student, teacher = bert(), bert(seed=4)
    divergence, agreement = by_hand(student, teacher, examples(7), 3.0)
    trainer = asked(tmp_path, student, teacher)
    for prefix, metrics in (
        ("test", trainer.predict(examples(7)).metrics),
        ("held_out", trainer.predict(examples(7), metric_key_prefix="held_out").metrics),
    ):
        assert metrics[f"{prefix}_divergence"] == pytest.approx(divergence, rel=1e-4)
        assert metrics[f"{prefix}_teacher_agreement"] == pytest.approx(agreement)


def test_between_the_steps_of_a_training(tmp_path) -> None:
    settings = {"eval_strategy": "steps", "eval_steps": 1, "max_steps": 3, "metric_for_best_model": "teacher_agreement"}
    student, teacher = bert(), bert(seed=4)
    trainer = asked(tmp_path, student, teacher, eval_dataset=examples(5), **settings)
    trainer.train()
    measured = [entry for entry in trainer.state.log_history if "eval_divergence" in entry]
    assert [entry["step"] for entry in measured] == [1, 2, 3]
    divergence, agreement = by_hand(student, teacher, examples(5), 3.0)
    assert measured[-1]["eval_divergence"] == pytest.approx(divergence, rel=1e-4)
    assert measured[-1]["eval_teacher_agreement"] == pytest.approx(agreement)


def test_asking_the_teacher_changes_no_weight(tmp_path) -> None:
    found = []
    for ask in (False, True):
        student = bert(dropout=0.3)
        settings = {"eval_strategy": "steps", "eval_steps": 1, "evaluate_with_teacher": ask}
        make(tmp_path, student, bert(seed=4, dropout=0.3), eval_dataset=examples(5), **settings).train()
        found.append(student.state_dict())
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


ASKING = [(name, alpha) for name in HEADS for alpha in ((0.5,) if HEADS[name].label_names else (1.0,))]
ASKING += [("t5_seq2seq", 0.0), ("bart_seq2seq", 0.0), ("bert_span", 0.0), ("t5_seq2seq", 1.0), ("bert_span", 1.0)]


@pytest.mark.parametrize(("name", "alpha"), ASKING)
def test_every_head_asks_its_teacher(tmp_path, name: str, alpha: float) -> None:
    """A student that is a copy of its teacher: no divergence, full agreement; another one: some."""
    head = HEADS[name]
    given = {"eval_dataset": head.examples(5), "data_collator": head.collate, "train_dataset": None, "alpha": alpha}
    same = asked(tmp_path, head.make(seed=1), head.make(seed=1), **given).evaluate()
    other = asked(tmp_path, head.make(seed=0), head.make(seed=1), **given).evaluate()
    assert same["eval_divergence"] == pytest.approx(0, abs=1e-6)
    assert other["eval_divergence"] > 1e-4
    if head.kind in ("regression", "embedding"):
        assert "eval_teacher_agreement" not in same
    else:
        assert same["eval_teacher_agreement"] == 1.0


def test_tokens_count_each_by_itself(tmp_path) -> None:
    """The mean is over tokens with a label, not over sequences or batches."""
    head = HEADS["bert_tokens"]
    student, teacher, data = head.make(seed=0), head.make(seed=1), head.examples(5)
    metrics = asked(tmp_path, student, teacher, eval_dataset=data, data_collator=head.collate).evaluate()
    divergences, agrees = [], []
    for example in data:
        kept = torch.tensor(example["labels"]) != -100
        ids = torch.tensor([example["input_ids"]])
        with torch.no_grad():
            ours, theirs = student(input_ids=ids).logits[0][kept], teacher(input_ids=ids).logits[0][kept]
        divergences.append(softened_kl(ours, theirs, 3.0))
        agrees.append((ours.argmax(-1) == theirs.argmax(-1)).double())
    assert metrics["eval_divergence"] == pytest.approx(torch.cat(divergences).mean().item(), rel=1e-4)
    assert metrics["eval_teacher_agreement"] == pytest.approx(torch.cat(agrees).mean().item())


def teacher_forced(head: Head, student: Any, teacher: Any, data: list[dict[str, Any]]) -> tuple[float, float]:
    """By hand over the target positions of a T5, whose decoder starts with token 0 and then reads the labels."""
    divergences, agrees = [], []
    for example in data:
        labels = example["labels"]
        inputs = {
            "input_ids": torch.tensor([example["input_ids"]]),
            "decoder_input_ids": torch.tensor([[0, *labels[:-1]]]),
        }
        with torch.no_grad():
            ours, theirs = student.eval()(**inputs).logits[0], teacher.eval()(**inputs).logits[0]
        divergences.append(softened_kl(ours, theirs, 3.0))
        agrees.append((ours.argmax(-1) == theirs.argmax(-1)).double())
    return torch.cat(divergences).mean().item(), torch.cat(agrees).mean().item()


@pytest.mark.parametrize("alpha", [0.0, 0.5])
@pytest.mark.parametrize("generate", [False, True], ids=["teacher-forced", "predict-with-generate"])
def test_a_seq2seq_trainer(tmp_path, generate: bool, alpha: float) -> None:
    head = HEADS["t5_seq2seq"]
    student, teacher, data = head.make(seed=0), head.make(seed=1), head.examples(5)
    shared = {"predict_with_generate": generate, "generation_max_length": 6, "per_device_eval_batch_size": 2}
    asking = {"evaluate_with_teacher": True, "temperature": 3.0, "alpha": alpha}
    args = arguments(tmp_path, Seq2SeqDistillationArguments, **shared, **asking)
    trainer = Seq2SeqDistillationTrainer(
        model=student, teacher_model=teacher, args=args, train_dataset=data, data_collator=head.collate
    )
    trainer.train()
    output = trainer.predict(data)
    divergence, agreement = teacher_forced(head, student, teacher, data)
    assert output.metrics["test_divergence"] == pytest.approx(divergence, rel=1e-4)
    assert output.metrics["test_teacher_agreement"] == pytest.approx(agreement)
    assert "test_loss" in output.metrics
    plain = Seq2SeqTrainer(
        model=student, args=arguments(tmp_path, Seq2SeqTrainingArguments, **shared), data_collator=head.collate
    ).predict(data)
    assert without_times(plain.metrics).items() <= without_times(output.metrics).items()
    for found, expected in zip(flat(output.predictions), flat(plain.predictions), strict=True):
        np.testing.assert_array_equal(found, expected)


def test_a_dataset_of_datasets_with_more_columns_than_are_needed(tmp_path) -> None:
    data = examples(5)
    columns = {name: [example[name] for example in data] for name in data[0]}
    rows = Dataset.from_dict({**columns, "note": ["x"] * 5})
    student, teacher = bert(), bert(seed=4)
    metrics = asked(tmp_path, student, teacher, eval_dataset=rows).evaluate()
    assert metrics["eval_divergence"] == pytest.approx(by_hand(student, teacher, data, 3.0)[0], rel=1e-4)
