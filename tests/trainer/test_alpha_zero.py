"""alpha=0 equals `Trainer`: the same weights, bit for bit, after the same steps; the teacher never runs."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments, Trainer, TrainingArguments, set_seed

from hf_distill import (
    DistillationArguments,
    DistillationTrainer,
    Seq2SeqDistillationArguments,
    Seq2SeqDistillationTrainer,
    SettingError,
)
from tests.heads import HEADS
from tests.trainer.steps import NO_LOSS, VARIANTS, VARIED, dropout_of
from tests.trainer.tiny import (
    arguments,
    assert_moved,
    assert_same_bits,
    bert,
    examples,
    never_called,
    padded,
    weights,
)

DROPOUT = 0.3  # makes any additional random draw visible


def after_training(trainer_class: Any, args: Any, **given: Any) -> dict[str, torch.Tensor]:
    student = bert(dropout=DROPOUT)
    start = weights(student)
    given = {"train_dataset": examples(16), "data_collator": padded, **given}
    trainer = trainer_class(model=student, args=args, **given)
    trainer.train()
    assert_moved(weights(student), start)
    return weights(student)


def both(folder: Any, *, teacher: Any = None, settings: dict[str, Any] | None = None, **given: Any) -> None:
    """Train the same student with `Trainer` and `DistillationTrainer`, and compare."""
    shared = {"max_steps": 3, "optim": "adamw_torch", "max_grad_norm": 1.0, **(settings or {})}
    theirs = after_training(Trainer, arguments(folder / "theirs", TrainingArguments, **shared), **given)
    args = arguments(folder / "ours", DistillationArguments, alpha=0.0, **shared)
    ours = after_training(DistillationTrainer, args, teacher_model=teacher, **given)
    assert_same_bits(ours, theirs)


@pytest.mark.parametrize("name", [name for name in HEADS if name not in NO_LOSS])
def test_every_head_trains_as_with_trainer(tmp_path, name: str) -> None:
    head = HEADS[name]
    found = []
    for trainer_class, kind, more in (
        (Trainer, TrainingArguments, {}),
        (DistillationTrainer, DistillationArguments, {"alpha": 0.0}),
    ):
        student = head.make(**dropout_of(head, DROPOUT))
        start = weights(student)
        given = {"teacher_model": never_called(head.make(seed=1))} if more else {}
        trainer = trainer_class(
            model=student,
            args=arguments(tmp_path, kind, max_grad_norm=1.0, **more),
            train_dataset=head.examples(8),
            data_collator=head.collate,
            **given,
        )
        trainer.train()
        assert_moved(weights(student), start)
        found.append(weights(student))
    assert_same_bits(found[1], found[0])


@pytest.mark.parametrize(("name", "variant"), VARIED)
def test_every_labels_loss_trains_as_with_trainer(tmp_path, name: str, variant: str) -> None:
    """Label smoothing for every shape, and custom losses, with one batch per step."""
    head = HEADS[name]
    keywords, settings = VARIANTS[variant]
    # With label smoothing the model gets no labels, so a decoder's inputs must be in the batch.
    data = head.examples(8)
    if head.kind == "seq2seq":
        data = [{**e, "decoder_input_ids": [0, *e["labels"][:-1]]} for e in data]
    fill = {**head.fill, "decoder_input_ids": 0}
    padding = replace(head, fill=fill)
    found = []
    for trainer_class, kind, more in (
        (Trainer, TrainingArguments, {}),
        (DistillationTrainer, DistillationArguments, {"alpha": 0.0}),
    ):
        student = head.make(**dropout_of(head, DROPOUT))
        args = arguments(tmp_path, kind, **settings, **more)
        given = {"train_dataset": data, "data_collator": padding.collate, **keywords}
        trainer_class(model=student, args=args, **given).train()
        found.append(weights(student))
    assert_same_bits(found[1], found[0])


def test_it_equals_trainer_without_a_teacher(tmp_path) -> None:
    both(tmp_path)


def test_it_equals_trainer_and_never_runs_the_teacher(tmp_path) -> None:
    both(tmp_path, teacher=never_called(bert(seed=1)))


def test_it_equals_trainer_and_never_checks_the_teacher(tmp_path) -> None:
    teacher = bert("TokenClassification", seed=1)
    both(tmp_path, teacher=teacher)
    assert teacher.training and all(p.requires_grad for p in teacher.parameters())


def test_label_smoothing_equals_trainer(tmp_path) -> None:
    both(tmp_path, settings={"label_smoothing_factor": 0.2})


def mean_loss(outputs: Any, labels: Any, num_items_in_batch: Any = None) -> torch.Tensor:
    loss = torch.nn.functional.cross_entropy(outputs["logits"], labels, reduction="sum")
    return loss / (len(labels) if num_items_in_batch is None else num_items_in_batch)


def test_compute_loss_func_equals_trainer(tmp_path) -> None:
    both(tmp_path, compute_loss_func=mean_loss)


def test_clipping_decay_and_schedules_equal_trainer(tmp_path) -> None:
    both(tmp_path, settings={"weight_decay": 0.1, "lr_scheduler_type": "linear", "warmup_steps": 1})


def test_a_smaller_last_batch_over_several_epochs_equals_trainer(tmp_path) -> None:
    both(tmp_path, settings={"max_steps": -1, "num_train_epochs": 2}, train_dataset=examples(10))


def test_evaluation_between_steps_equals_trainer(tmp_path) -> None:
    both(tmp_path, settings={"eval_strategy": "steps", "eval_steps": 1}, eval_dataset=examples(5))


def test_an_exact_compute_loss_func_equals_trainer_under_accumulation(tmp_path) -> None:
    """`Trainer` is exact there; sums have another order, so the result is not equal bit for bit."""
    shared = {"max_steps": 1, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}
    given = {"compute_loss_func": mean_loss, "train_dataset": examples(8)}
    theirs = after_training(Trainer, arguments(tmp_path / "theirs", TrainingArguments, **shared), **given)
    args = arguments(tmp_path / "ours", alpha=0.0, **shared)
    ours = after_training(DistillationTrainer, args, **given)
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, rtol=1e-5, atol=1e-6)


def test_model_init_equals_trainer(tmp_path) -> None:
    def fresh() -> Any:
        return bert(dropout=DROPOUT)

    found = []
    for trainer_class, kind, more in (
        (Trainer, TrainingArguments, {}),
        (DistillationTrainer, DistillationArguments, {"alpha": 0.0}),
    ):
        trainer = trainer_class(
            model_init=fresh,
            args=arguments(tmp_path, kind, **more),
            train_dataset=examples(16),
            data_collator=padded,
        )
        trainer.train()
        found.append(weights(trainer.model))
    assert_same_bits(found[1], found[0])


def test_it_equals_seq2seq_trainer(tmp_path) -> None:
    shared = {"max_steps": 3, "optim": "adamw_torch"}
    theirs = after_training(Seq2SeqTrainer, arguments(tmp_path / "theirs", Seq2SeqTrainingArguments, **shared))
    args = arguments(tmp_path / "ours", Seq2SeqDistillationArguments, alpha=0.0, **shared)
    assert_same_bits(after_training(Seq2SeqDistillationTrainer, args), theirs)


def test_positional_arguments_are_those_of_trainer(tmp_path) -> None:
    found = []
    for trainer_class, kind, more in (
        (Trainer, TrainingArguments, {}),
        (DistillationTrainer, DistillationArguments, {"alpha": 0.0}),
    ):
        student = bert(dropout=DROPOUT)
        trainer = trainer_class(student, arguments(tmp_path, kind, **more), padded, examples(16), examples(4))
        trainer.train()
        found.append((weights(student), trainer.evaluate()["eval_loss"]))
    assert_same_bits(found[1][0], found[0][0])
    assert found[1][1] == found[0][1]


def test_plain_training_arguments_need_a_teacher(tmp_path) -> None:
    args = arguments(tmp_path, TrainingArguments)
    with pytest.raises(SettingError, match=r"alpha is 0\.5 but there is no teacher"):
        DistillationTrainer(model=bert(), args=args, train_dataset=examples(), data_collator=padded)
    trainer = DistillationTrainer(
        model=bert(), teacher_model=bert(seed=1), args=args, train_dataset=examples(), data_collator=padded
    )
    assert trainer.distiller.blending.alpha(0.3) == 0.5
    assert trainer.distiller.logits_match.temperature(0.3) == 2.0
    trainer.train()
    assert trainer.state.global_step == 2


def test_construction_draws_the_same_random_numbers_as_trainer(tmp_path) -> None:
    set_seed(7)
    Trainer(model=bert(), args=arguments(tmp_path / "a", TrainingArguments))
    expected = torch.rand(3)
    set_seed(7)
    DistillationTrainer(model=bert(), teacher_model=bert(seed=1), args=arguments(tmp_path / "b"))
    assert torch.equal(torch.rand(3), expected)
