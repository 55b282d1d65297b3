"""The Distiller in a custom loop with Accelerate: the same update as DistillationTrainer, and as one batch."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader

from hf_distill import Distiller, HiddenMatch, SettingError
from tests.heads import HEADS, Head, of_each_kind
from tests.trainer.steps import NO_LOSS, in_double
from tests.trainer.tiny import arguments, bert, examples, make, padded, update_difference, weights

SETTINGS = {"alpha": 0.5, "temperature": 3.0}


def by_hand(head: Head, *, micro_batch: int, accumulation: int, alpha: float, pad_to: int | None) -> Any:
    """Run one optimizer step as in the documentation, with Accelerate counting the accumulation."""
    student, teacher = head.make(seed=0).double().train(), head.make(seed=1).double()
    accelerator = Accelerator(gradient_accumulation_steps=accumulation, cpu=True)
    distiller = Distiller(student, teacher_model=teacher, alpha=alpha, temperature=3.0)
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
    loader = DataLoader(head.examples(8), micro_batch, collate_fn=partial(in_double, head, pad_to=pad_to))
    student, optimizer, loader = accelerator.prepare(student, optimizer, loader)
    distiller.to(accelerator)
    micro_batches = list(loader)
    counts = distiller.begin_step(micro_batches, accelerator)
    total = 0.0
    for batch in micro_batches:
        with accelerator.accumulate(student):
            output = distiller(student, batch, counts)
            accelerator.backward(output.loss)
            total += output.loss.item() / accumulation
            optimizer.step()
            optimizer.zero_grad()
    return weights(accelerator.unwrap_model(student)), total


@pytest.mark.parametrize("name", of_each_kind(4))
def test_a_custom_loop_equals_the_trainer(tmp_path, name: str) -> None:
    head = HEADS[name]
    alpha = 1.0 if name in NO_LOSS else 0.5
    pad_to = head.longest if head.labels_see_padding else None
    start = weights(head.make(seed=0).double())
    whole, loss = by_hand(head, micro_batch=8, accumulation=1, alpha=alpha, pad_to=pad_to)
    cut, cut_loss = by_hand(head, micro_batch=4, accumulation=2, alpha=alpha, pad_to=pad_to)
    assert update_difference(cut, whole, start) < 1e-6
    student = head.make(seed=0).double()
    trainer = make(
        tmp_path,
        student,
        head.make(seed=1).double(),
        args=arguments(
            tmp_path, alpha=alpha, temperature=3.0, max_steps=1, per_device_train_batch_size=4,
            gradient_accumulation_steps=2, logging_steps=1, train_sampling_strategy="sequential",
        ),
        train_dataset=head.examples(8),
        data_collator=partial(in_double, head, pad_to=pad_to),
    )  # fmt: skip
    trainer.train()
    assert update_difference(weights(student), whole, start) < 1e-6
    assert cut_loss == pytest.approx(loss, rel=1e-5)
    assert trainer.state.log_history[0]["loss"] == pytest.approx(loss, rel=1e-4)


def test_without_accelerate_a_batch_is_a_step() -> None:
    student, teacher = bert().train(), bert(seed=1)
    output = Distiller(student, teacher, **SETTINGS)(student, padded(examples()))
    terms = output.terms
    assert output.loss.item() == pytest.approx(0.5 * (terms["labels"] + terms["logits"]).item(), rel=1e-6)
    assert not any(term.requires_grad for term in terms.values())
    output.loss.backward()
    assert all(parameter.grad is None for parameter in teacher.parameters())
    assert any(parameter.grad is not None for parameter in student.parameters())


def test_accumulation_without_accelerate() -> None:
    """Plain torch accumulation: backward on each part, without a division."""
    data = examples()
    found = []
    for size in (8, 2):
        student, teacher = bert().double(), bert(seed=1).double()
        distiller = Distiller(student, teacher, **SETTINGS)
        batches = [padded(data[i : i + size]) for i in range(0, 8, size)]
        counts = distiller.begin_step(batches)
        for batch in batches:
            distiller(student, batch, counts).loss.backward()
        found.append({n: p.grad.clone() for n, p in student.named_parameters() if p.grad is not None})
    zero = {name: torch.zeros_like(value) for name, value in found[0].items()}
    assert update_difference(found[1], found[0], zero) < 1e-6


def test_a_step_keeps_its_progress() -> None:
    """Weights and needs follow from the progress at which the step began."""
    student = bert()
    distiller = Distiller(student, bert(seed=1), objectives=HiddenMatch(weight=lambda progress: progress))
    batch = padded(examples())
    assert set(distiller(student, batch, distiller.begin_step([batch])).terms) == {"labels", "logits"}
    assert distiller(student, batch, distiller.begin_step([batch], progress=0.5)).terms["hidden"] > 0


def test_a_distiller_of_another_student_raises(tmp_path) -> None:
    """Hooks and decoder inputs belong to its student. A student made by `model_init` can be set."""
    other = Distiller(bert(), bert(seed=1), objectives=HiddenMatch())
    with pytest.raises(SettingError, match=r"made for another student than model=\. .* distiller\.bind\(model\) first"):
        make(tmp_path, bert(), distiller=other)
    with pytest.raises(SettingError, match=r"no block ran\. The model that was called is not the student"):
        other(bert(), padded(examples()))
    trainer = make(tmp_path, None, distiller=other, model_init=lambda: bert())
    assert other.is_bound_to(trainer.model)
    trainer.train()


def test_distiller_settings_are_checked_like_the_arguments() -> None:
    for settings, words in (
        ({"alpha": 2.0}, "must lie in"),
        ({"temperature": 0.0}, "above 0"),
        ({"alpha": "half"}, "must be a number"),
        ({"alpha": lambda progress: 2 * progress}, "must lie in"),
        ({"divergence": "kl"}, "divergence='kl'"),
    ):
        with pytest.raises(SettingError, match=words):
            Distiller(bert(), bert(seed=1), **settings)
    with pytest.raises(SettingError, match="no teacher"):
        Distiller(bert())
