"""Learned parameters of objectives in a `Trainer`: optimizer, clipping, new students of a search, a custom loop."""

from __future__ import annotations

from functools import partial
from typing import Any

import optuna
import pytest
import torch
from accelerate import Accelerator

from hf_distill import DistillationArguments, DistillationTrainer, Distiller, HiddenMatch, SettingError
from tests.heads import HEADS
from tests.trainer.steps import in_double
from tests.trainer.test_objectives import LOGGED, losses, student, teacher
from tests.trainer.tiny import (
    PLAIN_STEP,
    arguments,
    assert_moved,
    assert_same_bits,
    examples,
    make,
    padded,
    update_difference,
    weights,
)

optuna.logging.set_verbosity(optuna.logging.ERROR)

# The optimizer.


def projections(trainer: Any) -> list[Any]:
    return list(trainer.distiller.learned.parameters())


def group_of(trainer: Any) -> dict[str, Any]:
    """Return the optimizer's only group of learned parameters."""
    held = [{id(p) for p in group["params"]} for group in trainer.optimizer.param_groups]
    wanted = {id(p) for p in projections(trainer)}
    assert wanted and sum(bool(group & wanted) for group in held) == 1
    [index] = [i for i, group in enumerate(held) if group & wanted]
    assert held[index] == wanted
    return trainer.optimizer.param_groups[index]


@pytest.mark.parametrize(("rate", "expected"), [(None, 0.1), (0.01, 0.01), (0.0, 0.0)])
def test_projections_have_their_own_learning_rate(tmp_path, rate: float | None, expected: float) -> None:
    """They train with the student, at their own rate if one is set; it is halved halfway through the schedule."""
    settings = {"projection_learning_rate": rate, "weight_decay": 0.3, "optim": "adamw_torch"}
    trainer = make(
        tmp_path, student(), teacher(), objectives=HiddenMatch(), **{**settings, "lr_scheduler_type": "linear"}
    )
    start = weights(trainer.distiller.learned.module)
    trainer.train()
    group = group_of(trainer)
    assert (group["initial_lr"], group["weight_decay"]) == (expected, 0.3)
    assert group["lr"] == 0.0  # the schedule has ended
    moved = any(
        not torch.equal(value, start[name]) for name, value in trainer.distiller.learned.module.state_dict().items()
    )
    assert moved == (expected > 0)


def test_an_invalid_learning_rate_raises(tmp_path) -> None:
    with pytest.raises(SettingError, match=r"projection_learning_rate=-0\.1: must be at least 0"):
        DistillationArguments(str(tmp_path), projection_learning_rate=-0.1, report_to="none")


def test_student_and_projections_are_clipped_together(tmp_path) -> None:
    """theta - lr · g · c with c = max_norm / (|g of student and projections| + 1e-6), as torch clips."""
    model, wise = student().double(), teacher().double()
    settings = {**PLAIN_STEP, "learning_rate": 0.5, "max_grad_norm": 0.02, "max_steps": 1}
    trainer = make(
        tmp_path, model, wise, objectives=HiddenMatch(), alpha=None, per_device_train_batch_size=8, **settings, **LOGGED
    )
    before = [p.detach().clone() for p in (*model.parameters(), *projections(trainer))]
    reference = Distiller(student().double(), teacher().double(), alpha=None, objectives=HiddenMatch(), seed=42)
    twin = reference._student.train()
    reference(twin, padded(examples())).loss.backward()
    gradients = [
        torch.zeros_like(p) if p.grad is None else p.grad for p in (*twin.parameters(), *reference.learned.parameters())
    ]
    norm = torch.sqrt(sum((g**2).sum() for g in gradients))
    of_student = torch.sqrt(sum((g**2).sum() for g in gradients[: len(list(twin.parameters()))]))
    trainer.train()
    assert losses(trainer)[0]["grad_norm"] == pytest.approx(norm.item(), rel=1e-9)
    assert norm > 1.001 * of_student > 0.02  # projections contribute, and clipping is active
    after = [*model.parameters(), *projections(trainer)]
    for old, new, gradient in zip(before, after, gradients, strict=True):
        expected = old - 0.5 * gradient * (0.02 / (norm + 1e-6))
        torch.testing.assert_close(new.detach(), expected, rtol=1e-9, atol=1e-12)


def test_a_custom_optimizer_gets_the_projections(tmp_path) -> None:
    model = student()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    trainer = make(tmp_path, model, teacher(), objectives=HiddenMatch(), optimizers=(optimizer, None))
    start = weights(trainer.distiller.learned.module)
    trainer.train()
    assert len(optimizer.param_groups) == 2 and optimizer.param_groups[1]["initial_lr"] == 0.05
    assert_moved(weights(trainer.distiller.learned.module), start)


def test_a_custom_scheduler_without_projections_raises(tmp_path) -> None:
    model = student()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)
    trainer = make(tmp_path, model, teacher(), objectives=HiddenMatch(), optimizers=(optimizer, scheduler))
    with pytest.raises(SettingError, match=r"optimizer and the scheduler that were passed know nothing of them\. Give"):
        trainer.train()


def test_a_custom_optimizer_with_projections_and_a_scheduler(tmp_path) -> None:
    model = student()
    distiller = Distiller(model, teacher(), objectives=HiddenMatch())
    optimizer = torch.optim.SGD([*model.parameters(), *distiller.learned.parameters()], lr=0.05)
    scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)
    trainer = make(tmp_path, model, distiller=distiller, optimizers=(optimizer, scheduler))
    start = weights(distiller.learned.module)
    trainer.train()
    assert len(optimizer.param_groups) == 1
    assert_moved(weights(distiller.learned.module), start)
    with pytest.raises(SettingError, match="objectives= and distiller= together: give the objectives to the Distiller"):
        make(tmp_path, student(), distiller=distiller, objectives=HiddenMatch())


def test_a_second_train_continues_the_projections(tmp_path) -> None:
    """The second call of train has a new optimizer, which also contains the projections."""
    trainer = make(tmp_path, student(), teacher(), objectives=HiddenMatch(), max_steps=1)
    trainer.train()
    between = weights(trainer.distiller.learned.module)
    trainer.train()
    assert_moved(weights(trainer.distiller.learned.module), between)


# Search and custom loop.


def test_a_search_binds_the_objectives_to_each_new_student(tmp_path) -> None:
    """The last trial equals a run with its values: its projections are new with its student."""
    seen: list[Any] = []

    def fresh() -> Any:
        seen.append(student())
        return seen[-1]

    trainer = DistillationTrainer(
        model_init=fresh,
        teacher_model=teacher(),
        args=arguments(tmp_path, max_steps=1, eval_strategy="steps", eval_steps=1),
        train_dataset=examples(),
        eval_dataset=examples(4),
        data_collator=padded,
        objectives=[HiddenMatch(embeddings=True)],
    )
    trainer.hyperparameter_search(
        hp_space=lambda trial: {"learning_rate": trial.suggest_float("learning_rate", 0.05, 0.05)},
        compute_objective=lambda metrics: metrics["eval_loss"],
        n_trials=2,
        backend="optuna",
    )
    model = student()
    plain = make(tmp_path, model, teacher(), objectives=[HiddenMatch(embeddings=True)], max_steps=1, learning_rate=0.05)
    plain.train()
    assert len(seen) == 3
    assert_same_bits(weights(seen[-1]), weights(model))
    assert_same_bits(weights(trainer.distiller.learned.module), weights(plain.distiller.learned.module))


def by_hand(name: str, *, micro_batch: int, accumulation: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """Run one clipped step as in the documentation: projections are optimized, synchronized and clipped too."""
    head = HEADS[name]
    model, wise = head.make(0, layers=2).double().train(), head.make(1, layers=3, width=24).double()
    accelerator = Accelerator(gradient_accumulation_steps=accumulation, cpu=True)
    distiller = Distiller(model, wise, alpha=0.5, temperature=3.0, objectives=HiddenMatch(embeddings=True), seed=42)
    optimizer = torch.optim.SGD([*model.parameters(), *distiller.learned.parameters()], lr=0.1)
    rows = head.examples(8)
    batches = [in_double(head, rows[i : i + micro_batch]) for i in range(0, 8, micro_batch)]
    model, optimizer = accelerator.prepare(model, optimizer)
    distiller.to(accelerator)
    counts = distiller.begin_step(batches, accelerator)
    for batch in batches:
        with accelerator.accumulate(model):
            accelerator.backward(distiller(model, batch, counts).loss)
            if accelerator.sync_gradients:
                distiller.learned.synchronize(accelerator)
                accelerator.clip_grad_norm_([*model.parameters(), *distiller.learned.parameters()], 0.05)
            optimizer.step()
            optimizer.zero_grad()
    return weights(accelerator.unwrap_model(model)), weights(distiller.learned.module)


@pytest.mark.parametrize("name", ["bert_tokens", "t5_seq2seq", "wav2vec2_ctc_mean"])
def test_a_custom_loop_equals_the_trainer(tmp_path, name: str) -> None:
    head = HEADS[name]
    whole, learned = by_hand(name, micro_batch=8, accumulation=1)
    cut, cut_learned = by_hand(name, micro_batch=2, accumulation=4)
    model = head.make(0, layers=2).double()
    start = weights(model)
    settings = {**PLAIN_STEP, "learning_rate": 0.1, "max_grad_norm": 0.05, "max_steps": 1, "temperature": 3.0}
    trainer = make(
        tmp_path,
        model,
        head.make(1, layers=3, width=24).double(),
        objectives=HiddenMatch(embeddings=True),
        train_dataset=head.examples(8),
        data_collator=partial(in_double, head),
        **{**settings, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 4},
    )
    own = weights(trainer.distiller.learned.module)
    trainer.train()
    for found, found_learned in ((cut, cut_learned), (weights(model), weights(trainer.distiller.learned.module))):
        assert update_difference(found, whole, start) < 1e-6
        assert update_difference(found_learned, learned, own) < 1e-6
