"""Objectives on activations in a `Trainer`: logs, weights, and values of alpha."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as tf
from transformers import Trainer, TrainingArguments

from hf_distill import (
    AttentionMatch,
    CosineEmbedding,
    HiddenMatch,
    RelationMatch,
    SettingError,
    TeacherError,
)
from hf_distill.schedules import linear
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

LOGGED = {"logging_steps": 1}


def student() -> Any:
    return bert(num_hidden_layers=2)


def teacher(**changed: Any) -> Any:
    return bert(seed=1, num_hidden_layers=3, hidden_size=24, **changed)


def losses(trainer: Any) -> list[dict[str, float]]:
    return [entry for entry in trainer.state.log_history if "loss" in entry]


# Logs and weights.


def test_each_term_is_logged_before_its_weight(tmp_path) -> None:
    objectives = [HiddenMatch(weight=2.0), CosineEmbedding(weight=3.0), RelationMatch(weight=0.5)]
    trainer = make(tmp_path, student(), teacher(), objectives=objectives, alpha=0.25, **LOGGED)
    trainer.train()
    for entry in losses(trainer):
        terms = {name.removeprefix("loss/"): value for name, value in entry.items() if name.startswith("loss/")}
        assert set(terms) == {"labels", "logits", "hidden", "cosine", "relations"}
        weighted = 0.75 * terms["labels"] + 0.25 * terms["logits"]
        weighted += 2 * terms["hidden"] + 3 * terms["cosine"] + 0.5 * terms["relations"]
        assert entry["loss"] == pytest.approx(weighted, rel=1e-5)
        assert not any(name.startswith("weight/") for name in entry)  # they are constant


def test_a_schedule_moves_the_loss_and_is_logged(tmp_path) -> None:
    objectives = [HiddenMatch(weight=linear(4.0, 0.0)), CosineEmbedding()]
    trainer = make(tmp_path, student(), teacher(), objectives=objectives, alpha=None, max_steps=4, **LOGGED)
    trainer.train()
    assert [entry["weight/hidden"] for entry in losses(trainer)] == [4.0, 3.0, 2.0, 1.0]
    for entry in losses(trainer):
        expected = entry["weight/hidden"] * entry["loss/hidden"] + entry["loss/cosine"]
        assert entry["loss"] == pytest.approx(expected, rel=1e-5)
        assert "weight/cosine" not in entry


def test_objectives_passed_by_name(tmp_path) -> None:
    """Two of a kind, named by the keys of the dict."""
    objectives = {"lower": HiddenMatch([(0, 0)]), "upper": HiddenMatch([(1, 2)], weight=linear(1.0, 0.5))}
    trainer = make(tmp_path, student(), teacher(), objectives=objectives, **LOGGED)
    trainer.train()
    assert {"loss/lower", "loss/upper", "weight/upper"} <= set(losses(trainer)[0])
    assert set(trainer.distiller.learned.module) == {"lower", "upper"}
    named = make(tmp_path, student(), teacher(), objectives=[HiddenMatch([(0, 0)], name="lower"), CosineEmbedding()])
    assert list(named.distiller.objectives) == ["logits", "lower", "cosine"]


# alpha.


def test_alpha_none_ignores_labels_and_head(tmp_path) -> None:
    """The same weights with labels, other labels, or none, and the student's head is unchanged."""
    others = [{**row, "labels": 2 - row["labels"]} for row in examples()]
    found = []
    for rows in (examples(), others, examples(labels=None)):
        model = student()
        trainer = make(tmp_path, model, teacher(), objectives=HiddenMatch(), alpha=None, train_dataset=rows, **LOGGED)
        trainer.train()
        assert set(name for name in losses(trainer)[0] if name.startswith("loss")) == {"loss", "loss/hidden"}
        found.append(weights(model))
    assert_same_bits(found[1], found[0])
    assert_same_bits(found[2], found[0])
    start = weights(student())
    assert_moved(found[0], start)
    assert torch.equal(found[0]["classifier.weight"], start["classifier.weight"])


def test_alpha_none_accepts_a_teacher_with_another_head(tmp_path) -> None:
    """A bare encoder, or a head with other labels."""
    config = teacher().config
    torch.manual_seed(0)
    for other in (tf.BertModel(config), tf.BertForMaskedLM(config), teacher(num_labels=7)):
        model = student()
        trainer = make(tmp_path, model, other, objectives=[CosineEmbedding(), RelationMatch()], alpha=None)
        trainer.train()
        assert_moved(weights(model), weights(student()))
        with pytest.raises(TeacherError):
            make(tmp_path, student(), other, objectives=[CosineEmbedding()], alpha=0.5)


def test_alpha_zero_with_objectives_runs_the_teacher(tmp_path) -> None:
    trainer = make(tmp_path, student(), teacher(), objectives=HiddenMatch(), alpha=0.0, **LOGGED)
    trainer.train()
    assert {"loss/labels", "loss/hidden"} <= set(losses(trainer)[0]) and "loss/logits" not in losses(trainer)[0]
    with pytest.raises(SettingError, match=r"hidden .* but there is no teacher"):
        make(tmp_path, student(), None, objectives=HiddenMatch(), alpha=0.0)


@pytest.mark.parametrize("objectives", [None, []])
def test_alpha_zero_without_objectives_equals_trainer(tmp_path, objectives: Any) -> None:
    ours, theirs = student(), student()
    settings = {"max_grad_norm": 0.1, "optim": "adamw_torch", "weight_decay": 0.1}
    make(tmp_path, ours, teacher(), objectives=objectives, alpha=0.0, **settings).train()
    args = arguments(tmp_path, TrainingArguments, **settings)
    Trainer(model=theirs, args=args, train_dataset=examples(), data_collator=padded).train()
    assert_same_bits(weights(ours), weights(theirs))
    assert_moved(weights(ours), weights(student()))


def test_an_objective_at_weight_zero_changes_nothing(tmp_path) -> None:
    found = []
    for objectives in (None, [RelationMatch(weight=0.0), AttentionMatch(weight=lambda progress: 0.0)]):
        model = student()
        make(tmp_path, model, teacher(), objectives=objectives, alpha=0.5).train()
        found.append(weights(model))
    assert_same_bits(found[1], found[0])


def test_evaluation_uses_labels_alone(tmp_path) -> None:
    trainer = make(tmp_path, student(), teacher(), objectives=HiddenMatch(weight=5.0), eval_dataset=examples(4))
    plain = Trainer(
        model=student(), args=arguments(tmp_path, TrainingArguments), eval_dataset=examples(4), data_collator=padded
    )
    assert trainer.evaluate()["eval_loss"] == plain.evaluate()["eval_loss"]
    with pytest.raises(SettingError, match="evaluate_with_teacher=True compares predictions, and alpha=None has none"):
        make(tmp_path, student(), teacher(), objectives=HiddenMatch(), alpha=None, evaluate_with_teacher=True)
