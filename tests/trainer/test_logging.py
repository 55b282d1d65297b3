"""The log: the loss, its terms, which add up to it, and scheduled values."""

from __future__ import annotations

import math
from itertools import count
from typing import Any

import pytest
import torch
from transformers import Trainer, TrainingArguments

from tests.trainer.tiny import arguments, bert, examples, make, padded, softened_kl

STILL = {"learning_rate": 0.0, "logging_steps": 1, "per_device_train_batch_size": 8}  # weights do not change


def by_hand(temperature: float) -> tuple[float, float]:
    """Return the labels' term and the teacher's term over the eight examples, in plain torch."""
    batch = padded(examples())
    labels = batch.pop("labels")
    student, teacher = bert().eval(), bert(seed=1).eval()
    with torch.no_grad():
        ours, theirs = student(**batch).logits, teacher(**batch).logits
    own = torch.nn.functional.cross_entropy(ours.double(), labels)
    return own.item(), softened_kl(ours, theirs, temperature).mean().item()


def logs_of(trainer: Any) -> list[dict[str, float]]:
    trainer.train()
    return [entry for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("accumulation", [1, 4])
def test_terms_equal_plain_torch_and_add_up(tmp_path, accumulation: int) -> None:
    cut = {"per_device_train_batch_size": 8 // accumulation, "gradient_accumulation_steps": accumulation}
    trainer = make(tmp_path, bert(), bert(seed=1), alpha=0.3, temperature=4.0, **{**STILL, **cut})
    labels, logits = by_hand(4.0)
    entries = logs_of(trainer)
    assert len(entries) == 2
    for entry in entries:
        assert entry["loss/labels"] == pytest.approx(labels, rel=1e-4)
        assert entry["loss/logits"] == pytest.approx(logits, rel=1e-4)
        assert entry["loss"] == pytest.approx(0.7 * labels + 0.3 * logits, rel=1e-4)


def test_terms_add_up_over_several_steps(tmp_path) -> None:
    settings = {"max_steps": 6, "logging_steps": 3, "gradient_accumulation_steps": 2, "learning_rate": 0.1}
    trainer = make(tmp_path, bert(), bert(seed=1), alpha=0.25, train_dataset=examples(24), **settings)
    entries = logs_of(trainer)
    assert len(entries) == 2
    for entry in entries:
        expected = 0.75 * entry["loss/labels"] + 0.25 * entry["loss/logits"]
        assert entry["loss"] == pytest.approx(expected, rel=1e-4)


def test_terms_that_are_not_computed_are_not_logged(tmp_path) -> None:
    for alpha, absent in ((0.0, "loss/logits"), (1.0, "loss/labels")):
        entry = logs_of(make(tmp_path, bert(), bert(seed=1), alpha=alpha, **STILL))[0]
        present = {"loss/logits", "loss/labels"} - {absent}
        assert absent not in entry
        assert entry[present.pop()] == pytest.approx(entry["loss"], rel=1e-4)


def test_processes_communicate_only_when_logging(tmp_path, monkeypatch) -> None:
    trainer = make(
        tmp_path, bert(), bert(seed=1), train_dataset=examples(32), max_steps=6, logging_steps=3,
        gradient_accumulation_steps=2,
    )  # fmt: skip
    calls: list[tuple[str, int]] = []
    for name in ("reduce", "gather", "gather_for_metrics"):
        original = getattr(trainer.accelerator, name)

        def counted(*given: Any, _name: str = name, _original: Any = original, **more: Any) -> Any:
            calls.append((_name, trainer.state.global_step))
            return _original(*given, **more)

        monkeypatch.setattr(trainer.accelerator, name, counted)
    logs_of(trainer)
    assert [call for call in calls if call[0] == "reduce"] == [("reduce", 3), ("reduce", 6)]
    assert all(step in (3, 6) for _, step in calls), calls


def test_only_scheduled_values_are_logged(tmp_path) -> None:
    settings = {**STILL, "max_steps": 4, "alpha": 0.2, "alpha_schedule": "linear", "alpha_end": 1.0}
    entries = logs_of(make(tmp_path, bert(), bert(seed=1), train_dataset=examples(8), **settings))
    assert all("alpha" in entry and "temperature" not in entry for entry in entries)
    still = logs_of(make(tmp_path, bert(), bert(seed=1), **STILL))
    assert all("alpha" not in entry and "temperature" not in entry for entry in still)


def test_logged_schedule_values_are_those_of_the_steps(tmp_path) -> None:
    """Step k of n has progress k / n."""
    settings = {
        **STILL, "max_steps": 4, "alpha": 0.2, "alpha_schedule": "linear", "alpha_end": 1.0,
        "temperature": 4.0, "temperature_schedule": "linear", "temperature_end": 1.0,
    }  # fmt: skip
    entries = logs_of(make(tmp_path, bert(), bert(seed=1), **settings))
    assert len(entries) == 4
    for step, entry in enumerate(entries):
        alpha, temperature = 0.2 + 0.8 * step / 4, 4.0 - 3.0 * step / 4
        labels, logits = by_hand(temperature)
        assert entry["loss/logits"] == pytest.approx(logits, rel=1e-4)
        assert entry["loss"] == pytest.approx((1 - alpha) * labels + alpha * logits, rel=1e-4)
        assert entry["temperature"] == pytest.approx(temperature)
        assert entry["alpha"] == pytest.approx(alpha)


def test_alpha_scheduled_from_0_to_1(tmp_path) -> None:
    """cosine: the first step uses labels alone, without running the teacher."""
    teacher, ran = bert(seed=1), []
    settings = {**STILL, "max_steps": 3, "alpha": 0.0, "alpha_schedule": "cosine", "alpha_end": 1.0}
    trainer = make(tmp_path, bert(), teacher, **settings)
    teacher.register_forward_pre_hook(lambda *_: ran.append(trainer.state.global_step))
    first, *rest = logs_of(trainer)
    assert ran == [1, 2]
    assert first["loss"] == pytest.approx(by_hand(2.0)[0], rel=1e-4)
    assert all(entry["loss/logits"] == pytest.approx(by_hand(2.0)[1], rel=1e-4) for entry in rest)


def failing_at(step: int) -> Any:
    """Return a mean loss that is NaN in one step, with a finite gradient."""
    steps = count(1)

    def loss(outputs: Any, labels: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        mean = torch.nn.functional.cross_entropy(outputs["logits"], labels)
        return mean + (torch.nan if next(steps) == step else 0.0)

    return loss


@pytest.mark.parametrize("filters", [True, False])
@pytest.mark.parametrize("step", [1, 2, 7])
def test_logging_nan_inf_filter_applies_to_terms(tmp_path, filters: bool, step: int) -> None:
    """Ten steps, logged every five, as `Trainer` logs them; one bad step does not remove the values of its window."""
    settings = {"max_steps": 10, "logging_steps": 5, "logging_nan_inf_filter": filters, "train_dataset": examples(40)}
    found = logs_of(make(tmp_path, bert(), alpha=0.0, compute_loss_func=failing_at(step), **settings))
    given = {"train_dataset": settings.pop("train_dataset"), "data_collator": padded}
    theirs = Trainer(
        model=bert(),
        args=arguments(tmp_path, TrainingArguments, **settings),
        compute_loss_func=failing_at(step),
        **given,
    )
    expected = logs_of(theirs)
    assert [entry["loss"] for entry in found] == pytest.approx([e["loss"] for e in expected], nan_ok=True)
    for entry in found:  # without the filter Trainer's loss stays NaN, but terms do not
        if math.isfinite(entry["loss"]):
            assert entry["loss/labels"] == pytest.approx(entry["loss"], rel=1e-5)
    assert [math.isfinite(entry["loss/labels"]) for entry in found] == [filters or step > 5, filters or step < 6]


def test_filtered_terms_still_add_up(tmp_path) -> None:
    """If fp16's scaler decides about the step, a NaN loss does not raise: all its terms are omitted."""
    settings = {"max_steps": 10, "logging_steps": 5, "train_dataset": examples(40), "alpha": 0.25}
    trainer = make(tmp_path, bert(), bert(seed=1), compute_loss_func=failing_at(2), **settings)
    trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=1.0)
    for entry in logs_of(trainer):
        assert math.isfinite(entry["loss"])
        assert entry["loss"] == pytest.approx(0.75 * entry["loss/labels"] + 0.25 * entry["loss/logits"], rel=1e-4)
