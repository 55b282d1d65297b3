"""A student that stays in evaluation mode during training is distilled; an evaluation never is."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification

from hf_distill import DistillationTrainer
from tests.trainer.tiny import arguments, assert_same_bits, bert, examples, make, padded, update_difference, weights


class StaysInEvaluation(BertForSequenceClassification):
    """As in fine-tuning without dropout, or with frozen batch norms."""

    def train(self, mode: bool = True) -> Any:
        return super().train(False)


def frozen(dropout: float = 0.3) -> Any:
    config = BertConfig.from_dict({**bert(dropout=dropout).config.to_dict()})
    model = StaysInEvaluation(config)
    model.load_state_dict(bert().state_dict())
    return model.eval()


def one_step(folder: Any, student: Any, **changed: Any) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
    settings = {"max_steps": 1, "logging_steps": 1, "alpha": 0.75, "per_device_train_batch_size": 8, **changed}
    trainer = make(folder, student.double(), bert(seed=1).double(), **settings)
    trainer.train()
    logged = {name: value for name, value in trainer.state.log_history[0].items() if name.startswith("loss")}
    return weights(student), logged


@pytest.mark.parametrize("cut", [(8, 1), (2, 4)], ids=str)
@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_it_trains_like_a_student_without_dropout(tmp_path, alpha: float, cut: tuple[int, int]) -> None:
    given = {"alpha": alpha, "per_device_train_batch_size": cut[0], "gradient_accumulation_steps": cut[1]}
    found, logged = one_step(tmp_path, frozen(), **given)
    expected, expected_logs = one_step(tmp_path, bert(dropout=0.0), **given)
    assert update_difference(found, expected, weights(bert().double())) < 1e-9
    assert logged == pytest.approx(expected_logs)
    assert ("loss/logits" in logged) == (alpha > 0) and ("loss/labels" in logged) == (alpha < 1)


def test_evaluation_gives_the_plain_task_loss(tmp_path) -> None:
    """Before, during and after a training."""
    student = frozen()
    settings = {"eval_dataset": examples(6), "eval_strategy": "steps", "eval_steps": 1, "learning_rate": 0.0}
    trainer = make(tmp_path, student, bert(seed=1), alpha=1.0, max_steps=2, **settings)
    batch = padded(examples(6))
    with torch.no_grad():
        expected = bert().eval()(**batch).loss.item()
    measured = [trainer.evaluate()["eval_loss"]]
    trainer.train()
    measured += [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    measured.append(trainer.evaluate()["eval_loss"])
    assert len(measured) >= 4
    assert measured == pytest.approx([expected] * len(measured), rel=1e-5)


def test_a_failed_step_does_not_leave_the_trainer_in_a_step(tmp_path) -> None:
    class Fails(DistillationTrainer):
        def training_step(self, *positional: Any, **keywords: Any) -> Any:
            self.model.register_forward_pre_hook(stumble)
            return super().training_step(*positional, **keywords)

    def stumble(*_: Any) -> None:
        raise RuntimeError("stumbled")

    trainer = Fails(
        model=bert(), teacher_model=bert(seed=1), args=arguments(tmp_path), train_dataset=examples(),
        eval_dataset=examples(6), data_collator=padded,
    )  # fmt: skip
    with pytest.raises(RuntimeError, match="stumbled"):
        trainer.train()
    trainer.model._forward_pre_hooks.clear()
    with torch.no_grad():
        expected = bert().eval()(**padded(examples(6))).loss.item()
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-5)


def test_compute_loss_in_evaluation_mode_is_the_task_loss(tmp_path) -> None:
    trainer = make(tmp_path, bert().eval(), bert(seed=1), alpha=1.0)
    loss = trainer.compute_loss(trainer.model, padded(examples(6)))
    with torch.no_grad():
        expected = bert().eval()(**padded(examples(6))).loss
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)


def test_the_teacher_is_unchanged(tmp_path) -> None:
    teacher = bert(seed=1, dropout=0.3)
    before = weights(teacher)
    make(tmp_path, frozen(), teacher).train()
    assert_same_bits(weights(teacher), before)
    assert not teacher.training
