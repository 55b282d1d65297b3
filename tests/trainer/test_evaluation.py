"""Evaluation is `Trainer`'s; only `evaluate_with_teacher` runs the teacher, and its metrics are checked by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments, Trainer, TrainingArguments

from hf_distill import Seq2SeqDistillationArguments, Seq2SeqDistillationTrainer, TeacherCache, TeacherError
from hf_distill.teachers.cache import Dense, TopK
from hf_distill.trainer.evaluation import TeacherPredictions
from tests.heads import HEADS, Head, of_each_kind
from tests.trainer.tiny import arguments, bert, examples, make, never_called, padded, softened_kl

TIMES = ("runtime", "per_second", "preparation_time")


def without_times(metrics: dict[str, float]) -> dict[str, float]:
    return {name: value for name, value in metrics.items() if not name.endswith(TIMES)}


def accuracy(prediction: Any) -> dict[str, float]:
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


def by_hand(student: Any, teacher: Any, data: list[dict[str, Any]], temperature: float) -> tuple[float, float]:
    """Return divergence and agreement over classification examples, one at a time, without padding or batches."""
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
def test_loss_and_metrics_equal_trainers_and_the_teacher_does_not_run(tmp_path, alpha: float) -> None:
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
    given = {"eval_dataset": head.examples(5), "data_collator": head.collate, "train_dataset": None}
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


def with_teacher(folder: Any, student: Any, teacher: Any, **changed: Any) -> Any:
    settings = {"evaluate_with_teacher": True, "temperature": 3.0, "per_device_eval_batch_size": 3}
    return make(folder, student, teacher, **{**settings, **changed})


@pytest.mark.parametrize("labels", [3, None], ids=["labelled", "unlabelled"])
@pytest.mark.parametrize("count", [6, 7], ids=["whole-batches", "a-smaller-last-batch"])
def test_agreement_and_divergence_equal_plain_torch(tmp_path, count: int, labels: int | None) -> None:
    student, teacher, data = bert(), bert(seed=4), examples(count, labels=labels)
    metrics = with_teacher(tmp_path, student, teacher, eval_dataset=data).evaluate()
    divergence, agreement = by_hand(student, teacher, data, 3.0)
    assert metrics["eval_divergence"] == pytest.approx(divergence, rel=1e-4)
    assert metrics["eval_teacher_agreement"] == pytest.approx(agreement)
    assert 0 < agreement < 1  # so the comparison is meaningful
    assert ("eval_loss" in metrics) == (labels is not None)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_teacher_whose_predictions_are_not_finite_is_not_compared(tmp_path, value: float) -> None:
    data, teacher = examples(7), bert(seed=4)
    token = data[4]["input_ids"][0]
    for example in data:
        example["input_ids"] = [one + (one == token) for one in example["input_ids"]]
    data[4]["input_ids"][0] = token
    with torch.no_grad():
        teacher.bert.embeddings.word_embeddings.weight[token] = value
    trainer = with_teacher(tmp_path, bert(), teacher, eval_dataset=data)
    with pytest.raises(TeacherError, match=r"hold NaN or inf for example 4 of the evaluation \(1 such examples in its"):
        trainer.evaluate()


def test_the_loss_is_still_the_tasks(tmp_path) -> None:
    student = bert()
    plain = make(tmp_path, student, bert(seed=4), eval_dataset=examples(7), per_device_eval_batch_size=3).evaluate()
    metrics = with_teacher(tmp_path, student, bert(seed=4), eval_dataset=examples(7)).evaluate()
    assert {name: metrics[name] for name in without_times(plain)} == without_times(plain)


def test_a_dict_of_evaluation_datasets(tmp_path) -> None:
    student, teacher = bert(), bert(seed=4)
    data = {"a": examples(4), "b": examples(7, labels=None)}
    metrics = with_teacher(tmp_path, student, teacher, eval_dataset=data).evaluate()
    for name, rows in data.items():
        divergence, agreement = by_hand(student, teacher, rows, 3.0)
        assert metrics[f"eval_{name}_divergence"] == pytest.approx(divergence, rel=1e-4)
        assert metrics[f"eval_{name}_teacher_agreement"] == pytest.approx(agreement)


def test_predict_with_the_teacher(tmp_path) -> None:
    student, teacher = bert(), bert(seed=4)
    divergence, agreement = by_hand(student, teacher, examples(7), 3.0)
    trainer = with_teacher(tmp_path, student, teacher)
    for prefix, metrics in (
        ("test", trainer.predict(examples(7)).metrics),
        ("held_out", trainer.predict(examples(7), metric_key_prefix="held_out").metrics),
    ):
        assert metrics[f"{prefix}_divergence"] == pytest.approx(divergence, rel=1e-4)
        assert metrics[f"{prefix}_teacher_agreement"] == pytest.approx(agreement)


def test_evaluation_during_training(tmp_path) -> None:
    settings = {"eval_strategy": "steps", "eval_steps": 1, "max_steps": 3, "metric_for_best_model": "teacher_agreement"}
    student, teacher = bert(), bert(seed=4)
    trainer = with_teacher(tmp_path, student, teacher, eval_dataset=examples(5), **settings)
    trainer.train()
    measured = [entry for entry in trainer.state.log_history if "eval_divergence" in entry]
    assert [entry["step"] for entry in measured] == [1, 2, 3]
    divergence, agreement = by_hand(student, teacher, examples(5), 3.0)
    assert measured[-1]["eval_divergence"] == pytest.approx(divergence, rel=1e-4)
    assert measured[-1]["eval_teacher_agreement"] == pytest.approx(agreement)


def test_evaluating_with_the_teacher_changes_no_weight(tmp_path) -> None:
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
def test_every_head_evaluates_with_its_teacher(tmp_path, name: str, alpha: float) -> None:
    """A copy of the teacher has no divergence and full agreement; another student has some divergence."""
    head = HEADS[name]
    given = {"eval_dataset": head.examples(5), "data_collator": head.collate, "train_dataset": None, "alpha": alpha}
    same = with_teacher(tmp_path, head.make(seed=1), head.make(seed=1), **given).evaluate()
    other = with_teacher(tmp_path, head.make(seed=0), head.make(seed=1), **given).evaluate()
    assert same["eval_divergence"] == pytest.approx(0, abs=1e-6)
    assert other["eval_divergence"] > 1e-4
    if head.kind in ("regression", "embedding"):
        assert "eval_teacher_agreement" not in same
    else:
        assert same["eval_teacher_agreement"] == 1.0


def test_metrics_are_means_over_tokens(tmp_path) -> None:
    """Over labelled tokens, not over sequences or batches."""
    head = HEADS["bert_tokens"]
    student, teacher, data = head.make(seed=0), head.make(seed=1), head.examples(5)
    given = {"eval_dataset": data, "data_collator": head.collate, "train_dataset": None}
    metrics = with_teacher(tmp_path, student, teacher, **given).evaluate()
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
    """Return the metrics by hand over the target positions of a T5, whose decoder reads 0 and then the labels."""
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
def test_seq2seq_trainer_with_the_teacher(tmp_path, generate: bool, alpha: float) -> None:
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


def test_a_dataset_with_additional_columns(tmp_path) -> None:
    data = examples(5)
    columns = {name: [example[name] for example in data] for name in data[0]}
    rows = Dataset.from_dict({**columns, "note": ["x"] * 5})
    student, teacher = bert(), bert(seed=4)
    metrics = with_teacher(tmp_path, student, teacher, eval_dataset=rows).evaluate()
    assert metrics["eval_divergence"] == pytest.approx(by_hand(student, teacher, data, 3.0)[0], rel=1e-4)


# The teacher's metrics.


def scored(kind: str) -> Any:
    """Return a metric for a head: the accuracy, or the distance of a value."""

    def score(found: Any) -> dict[str, float]:
        predictions = found.predictions[0] if isinstance(found.predictions, tuple) else found.predictions
        labels = found.label_ids[0] if isinstance(found.label_ids, tuple) else found.label_ids
        if kind == "regression":
            return {"error": float(np.abs(predictions.reshape(labels.shape) - labels).mean())}
        if kind == "several":
            return {"score": float(((predictions > 0) == labels).mean())}
        if kind == "ctc":
            return {"score": float(predictions.max(-1)[:, 0].mean())}  # every recording has a first frame
        known = (labels >= 0) & (labels < predictions.shape[-1])
        at_label = np.take_along_axis(predictions, np.where(known, labels, 0)[..., None], -1)[..., 0]
        return {
            "score": float((predictions.argmax(-1) == labels)[known].mean()),
            "logit": float(at_label[known].mean()),
        }

    return score


@pytest.mark.parametrize("name", [name for name in HEADS if HEADS[name].kind != "embedding"])
def test_the_teachers_metrics_equal_those_in_a_trainer(tmp_path, name: str) -> None:
    """The same function on the same examples, with the teacher as the model of a plain `Trainer`."""
    head = HEADS[name]
    metric = scored("several" if name == "bert_multi_label" else head.kind)
    given = {"eval_dataset": head.examples(7), "data_collator": head.collate, "compute_metrics": metric}
    args = arguments(tmp_path, TrainingArguments, per_device_eval_batch_size=3)
    expected = Trainer(model=head.make(seed=1), args=args, **given).evaluate()
    found = with_teacher(tmp_path, head.make(seed=0), head.make(seed=1), train_dataset=None, **given).evaluate()
    names = {key.removeprefix("eval_") for key in expected if key.endswith(("_score", "_error", "_logit"))}
    assert names and {f"eval_teacher_{metric}" for metric in names} <= set(found)
    for metric in names:
        assert found[f"eval_teacher_{metric}"] == pytest.approx(expected[f"eval_{metric}"], rel=1e-5)
    assert any(found[f"eval_teacher_{metric}"] != found[f"eval_{metric}"] for metric in names)
    assert "eval_teacher_loss" not in found


@pytest.mark.parametrize("accumulates", [None, 1, 2])
def test_teacher_predictions_are_reordered_to_the_students_labels(tmp_path, accumulates: int | None) -> None:
    """The teacher has the same classes in another order; its predictions are matched by name."""
    ours, theirs = ("no", "yes", "maybe"), ("maybe", "no", "yes")
    named = [
        {"label2id": {name: i for i, name in enumerate(names)}, "id2label": dict(enumerate(names))}
        for names in (ours, theirs)
    ]
    student, teacher, data = bert(**named[0]), bert(seed=4, **named[1]), examples(7)
    metrics = with_teacher(
        tmp_path, student, teacher, eval_dataset=data, compute_metrics=accuracy, eval_accumulation_steps=accumulates
    ).evaluate()
    right = []
    for example in data:
        batch = padded([example])
        label = ours[batch.pop("labels").item()]
        with torch.no_grad():
            right.append(theirs[teacher(**batch).logits.argmax().item()] == label)
    assert metrics["eval_teacher_accuracy"] == pytest.approx(np.mean(right))
    assert 0 < np.mean(right) < 1


def test_metric_names_with_prefixes_and_datasets(tmp_path) -> None:
    data = {"a": examples(4), "b": examples(7)}
    trainer = with_teacher(tmp_path, bert(), bert(seed=4), eval_dataset=data, compute_metrics=accuracy)
    alone = {
        name: with_teacher(tmp_path, bert(), bert(seed=4), eval_dataset=rows, compute_metrics=accuracy).evaluate()
        for name, rows in data.items()
    }
    found = trainer.evaluate()
    for name in data:
        assert found[f"eval_{name}_teacher_accuracy"] == alone[name]["eval_teacher_accuracy"]
    assert "held_out_teacher_accuracy" in trainer.predict(examples(4), metric_key_prefix="held_out").metrics
    assert "test_teacher_accuracy" in trainer.predict(examples(4)).metrics

    def prefixed(found: Any) -> dict[str, float]:
        return {f"eval_{name}": value for name, value in accuracy(found).items()}

    trainer = with_teacher(tmp_path, bert(), bert(seed=4), eval_dataset=examples(7), compute_metrics=prefixed)
    assert trainer.evaluate()["eval_teacher_accuracy"] == alone["b"]["eval_teacher_accuracy"]
    assert trainer.compute_metrics is prefixed


def test_compute_metrics_may_modify_the_labels(tmp_path) -> None:
    """Examples of transformers do that: they replace -100 by the padding token."""

    def shifted(found: Any) -> dict[str, float]:
        figure = float(found.label_ids.sum())
        found.label_ids += 100
        return {"sum": figure}

    metrics = with_teacher(tmp_path, bert(), bert(seed=4), eval_dataset=examples(7), compute_metrics=shifted).evaluate()
    assert metrics["eval_teacher_sum"] == metrics["eval_sum"] == sum(e["labels"] for e in examples(7))


def test_preprocess_logits_and_include_inputs(tmp_path) -> None:
    head, seen = HEADS["bert_tokens"], []

    def chosen(logits: Any, labels: Any) -> Any:
        seen.append(logits.shape)
        return logits.argmax(-1)

    def share(found: Any) -> dict[str, float]:
        known = found.label_ids >= 0
        return {
            "score": float((found.predictions == found.label_ids)[known].mean()),
            "inputs": float(found.inputs.sum()),
        }

    given = {"eval_dataset": head.examples(5), "data_collator": head.collate, "train_dataset": None}
    plain = with_teacher(tmp_path, head.make(), head.make(seed=1), compute_metrics=scored("tokens"), **given).evaluate()
    found = with_teacher(
        tmp_path, head.make(), head.make(seed=1), compute_metrics=share, preprocess_logits_for_metrics=chosen,
        include_for_metrics=["inputs"], **given,
    ).evaluate()  # fmt: skip
    assert found["eval_teacher_score"] == pytest.approx(plain["eval_teacher_score"])
    assert found["eval_teacher_inputs"] == found["eval_inputs"] > 0
    assert len(seen) == 4 and seen[0] == seen[1]  # two batches, for the student and for the teacher


def metric_messages(log: Any) -> list[str]:
    messages = [record.getMessage() for record in log.records]
    return [message for message in messages if "eval_" in message or "test_" in message]


def test_a_cached_teachers_metrics_equal_the_live_ones(tmp_path) -> None:
    data = examples(7)
    cache = TeacherCache.build(
        bert(seed=4), data, tmp_path / "cache", data_collator=padded, store=Dense("float32"), progress=False
    )
    live, cached = (
        with_teacher(
            tmp_path, bert(), teacher, train_dataset=data, eval_dataset=data, compute_metrics=accuracy
        ).evaluate()
        for teacher in (bert(seed=4), cache)
    )
    assert cached["eval_teacher_accuracy"] == live["eval_teacher_accuracy"]


def test_a_sparse_cache_has_no_teacher_metrics_with_a_warning(tmp_path, log) -> None:
    head = HEADS["bert_masked_lm"]
    data, store = head.examples(6), TopK(3, temperatures=(2.0,))
    cache = TeacherCache.build(
        head.make(seed=1), data, tmp_path / "cache", data_collator=head.collate, store=store, progress=False
    )
    found = with_teacher(
        tmp_path, head.make(), cache, temperature=2.0, train_dataset=data, eval_dataset=data,
        data_collator=head.collate, compute_metrics=scored("tokens"),
    ).evaluate()  # fmt: skip
    assert "eval_score" in found and "eval_divergence" in found and "eval_teacher_score" not in found
    assert metric_messages(log) == [
        "There is no eval_teacher_<metric>: this teacher lists only the likeliest columns of each row, and a metric "
        "may look at all."
    ]


def test_an_embedding_has_no_teacher_metrics_with_a_warning(tmp_path, log) -> None:
    head = HEADS["bert_embedding"]
    rows = [{**example, "labels": 0} for example in head.examples(4)]
    found = with_teacher(
        tmp_path, head.make(), head.make(seed=1), alpha=1.0, train_dataset=None, eval_dataset=rows,
        label_names=["labels"], data_collator=padded, compute_metrics=lambda found: {"rows": len(found.predictions[0])},
        compute_loss_func=lambda outputs, labels, num_items_in_batch=None: outputs["last_hidden_state"].mean(),
    ).evaluate()  # fmt: skip
    assert found["eval_rows"] == 4 and "eval_divergence" in found and "eval_teacher_rows" not in found
    assert metric_messages(log) == [
        "There is no eval_teacher_<metric>: the outputs of a head for embedding do not follow from what is compared."
    ]


def test_batch_metrics_have_no_teacher_metrics_with_a_warning(tmp_path, log) -> None:
    def score(found: Any, compute_result: bool) -> dict[str, float]:
        return {"rows": float(len(found.predictions))}

    trainer = with_teacher(
        tmp_path, bert(), bert(seed=4), eval_dataset=examples(7), batch_eval_metrics=True, compute_metrics=score
    )
    found = trainer.evaluate()
    assert found["eval_rows"] == 1 and "eval_divergence" in found and "eval_teacher_rows" not in found
    trainer.evaluate()
    assert (
        len(metric_messages(log)) == 1
        and "batch_eval_metrics=True: compute_metrics keeps sums" in metric_messages(log)[0]
    )


def test_generation_has_no_teacher_metrics_with_a_warning(tmp_path, log) -> None:
    """Nor has a prediction without labels, which cannot be compared."""
    head = HEADS["t5_seq2seq"]
    args = arguments(
        tmp_path, Seq2SeqDistillationArguments, predict_with_generate=True, generation_max_length=6,
        evaluate_with_teacher=True,
    )  # fmt: skip
    trainer = Seq2SeqDistillationTrainer(
        model=head.make(), teacher_model=head.make(seed=1), args=args, data_collator=head.collate,
        compute_metrics=lambda p: {"length": p.predictions.shape[1]},
    )  # fmt: skip
    found = trainer.evaluate(head.examples(3))
    assert "eval_length" in found and "eval_divergence" in found and "eval_teacher_length" not in found
    assert metric_messages(log) == [
        "There is no eval_teacher_<metric>: predict_with_generate=True: the metrics are of texts that only the student "
        "generates."
    ]
    log.clear()
    assert not [key for key in trainer.predict(head.examples(3, labelled=False)).metrics if "teacher" in key]
    assert any(
        "there is no test_divergence and nothing else of the teacher" in message for message in metric_messages(log)
    )


def test_an_error_in_the_teachers_metrics_does_not_stop_the_run(tmp_path, log) -> None:
    calls = []

    def once(found: Any) -> dict[str, float]:
        calls.append(found)
        if len(calls) % 2 == 0:
            raise KeyError("logits")
        return accuracy(found)

    trainer = with_teacher(tmp_path, bert(), bert(seed=4), eval_dataset=examples(7), compute_metrics=once)
    assert "eval_teacher_accuracy" not in trainer.evaluate()
    assert metric_messages(log) == [
        "There is no eval_teacher_<metric>: compute_metrics failed on the teacher's predictions: KeyError('logits')."
    ]


def test_without_compute_metrics_no_predictions_are_stored(tmp_path, monkeypatch) -> None:
    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("predictions were collected")

    monkeypatch.setattr(TeacherPredictions, "add", never)
    assert "eval_divergence" in with_teacher(tmp_path, bert(), bert(seed=4), eval_dataset=examples(7)).evaluate()
    trainer = with_teacher(
        tmp_path, bert(), bert(seed=4), eval_dataset=examples(7), compute_metrics=accuracy, prediction_loss_only=True
    )
    assert "eval_divergence" in trainer.evaluate()


def test_the_best_model_can_be_selected_by_the_students_metric(tmp_path) -> None:
    trainer = with_teacher(
        tmp_path, bert(), bert(seed=4), eval_dataset=examples(7), compute_metrics=accuracy, max_steps=2,
        eval_strategy="steps", eval_steps=1, metric_for_best_model="accuracy",
    )  # fmt: skip
    trainer.train()
    logged = [entry for entry in trainer.state.log_history if "eval_accuracy" in entry]
    assert len(logged) == 2 and all("eval_teacher_accuracy" in entry for entry in logged)
    assert trainer.state.best_metric == max(entry["eval_accuracy"] for entry in logged)
