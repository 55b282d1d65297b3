"""DistillationMixin over any `Trainer` subclass keeps the subclass's loss, keywords and methods."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import Trainer

from hf_distill import DistillationMixin, Distiller, Seq2SeqDistillationTrainer
from tests.trainer.tiny import (
    PLAIN_STEP,
    arguments,
    bert,
    examples,
    make,
    padded,
    softened_kl,
    update_difference,
    weights,
)

CLASS_WEIGHTS = (1.0, 3.0, 0.5)


class Weighted(Trainer):
    """A custom trainer: class weights in the loss, a new keyword, and an overridden method."""

    def __init__(self, *positional: Any, class_weights: Any, **keywords: Any) -> None:
        super().__init__(*positional, **keywords)
        self.class_weights = torch.tensor(class_weights)
        self.samplers = 0

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        labels = inputs.pop("labels")
        outputs = model(**inputs)
        each = torch.nn.functional.cross_entropy(outputs.logits, labels, reduction="none")
        loss = (self.class_weights.to(each)[labels] * each).mean()
        return (loss, outputs) if return_outputs else loss

    def _get_train_sampler(self, *given: Any) -> Any:
        self.samplers += 1
        return super()._get_train_sampler(*given)


class Mine(DistillationMixin, Weighted):
    """The class that a user writes."""


def mine(folder: Any, student: Any, teacher: Any, **settings: Any) -> Mine:
    return Mine(
        model=student,
        teacher_model=teacher,
        class_weights=CLASS_WEIGHTS,
        args=arguments(folder, **settings),
        train_dataset=examples(),
        eval_dataset=examples(5),
        data_collator=padded,
    )


@pytest.mark.parametrize("accumulation", [1, 4])
def test_the_labels_term_is_the_subclasss_loss(tmp_path, accumulation: int) -> None:
    student, teacher = bert().double(), bert(seed=1).double()
    start, expected = weights(student), bert().double()
    cut = {"per_device_train_batch_size": 8 // accumulation, "gradient_accumulation_steps": accumulation}
    trainer = mine(tmp_path, student, teacher, alpha=0.25, temperature=3.0, max_steps=1, **cut)
    trainer.train()
    assert trainer.samplers == 1
    batch = padded(examples())
    labels = batch.pop("labels")
    logits, theirs = expected(**batch).logits, teacher(**batch).logits
    each = -logits.log_softmax(-1).gather(1, labels[:, None])[:, 0]
    own = (torch.tensor(CLASS_WEIGHTS).double()[labels] * each).mean()
    (0.75 * own + 0.25 * softened_kl(logits, theirs, 3.0).mean()).backward()
    with torch.no_grad():
        for parameter in expected.parameters():
            if parameter.grad is not None:
                parameter -= 0.1 * parameter.grad
    assert update_difference(weights(student), weights(expected), start) < 1e-6


def test_evaluation_uses_the_subclasss_loss(tmp_path) -> None:
    student = bert()
    plain = Weighted(
        model=student,
        class_weights=CLASS_WEIGHTS,
        args=arguments(tmp_path),
        eval_dataset=examples(5),
        data_collator=padded,
    )
    assert mine(tmp_path, student, bert(seed=1)).evaluate()["eval_loss"] == plain.evaluate()["eval_loss"]


def test_alpha_zero_equals_the_subclass(tmp_path) -> None:
    found = []
    for ours in (False, True):
        student = bert(dropout=0.3)
        given = {"class_weights": CLASS_WEIGHTS, "train_dataset": examples(), "data_collator": padded}
        trainer_class, kind = (Mine, {"alpha": 0.0}) if ours else (Weighted, {})
        trainer_class(model=student, args=arguments(tmp_path, **kind), **given).train()
        found.append(weights(student))
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_a_missing_keyword_of_the_subclass_raises(tmp_path) -> None:
    with pytest.raises(TypeError, match="class_weights"):
        Mine(model=bert(), teacher_model=bert(seed=1), args=arguments(tmp_path), train_dataset=examples())


def test_the_seq2seq_trainer_uses_the_mixin() -> None:
    assert DistillationMixin in Seq2SeqDistillationTrainer.__mro__


def test_a_passed_distiller_has_full_control(tmp_path) -> None:
    """A callable divergence and a custom schedule, which arguments cannot express; `args` are not used."""

    def gap(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
        return (student.softmax(-1) - teacher.softmax(-1)).square().sum(-1)

    student, teacher = bert(), bert(seed=1)
    own = Distiller(student, teacher, alpha=lambda progress: 1.0 - progress, temperature=1.0, divergence=gap)
    trainer = make(
        tmp_path, student, distiller=own, alpha=0.123, max_steps=2, logging_steps=1,
        **{**PLAIN_STEP, "learning_rate": 0.0, "per_device_train_batch_size": 8},
    )  # fmt: skip
    trainer.train()
    batch = padded(examples())
    batch.pop("labels")
    with torch.no_grad():
        apart = student.eval()(**batch).logits.softmax(-1) - teacher(**batch).logits.softmax(-1)
    first, second = (entry for entry in trainer.state.log_history if "loss" in entry)
    expected = apart.square().sum(-1).mean().item()
    assert first["loss/logits"] == pytest.approx(expected, rel=1e-4)
    assert first["loss"] == pytest.approx(expected, rel=1e-4)
    assert second["loss"] == pytest.approx(0.5 * second["loss/labels"] + 0.5 * expected, rel=1e-4)
