"""Law L4: the update does not depend on how a batch is split into micro-batches, for every head."""

from __future__ import annotations

import pytest
import torch

from tests.heads import HEADS
from tests.trainer.steps import VARIED, alphas_of, one_step
from tests.trainer.tiny import (
    arguments,
    assert_same_bits,
    bert,
    examples,
    make,
    padded,
    softened_kl,
    update_difference,
    weights,
)

ONE_OF_A_KIND = set({head.kind: name for name, head in HEADS.items()}.values())
# All heads with all terms; each term alone on one head of each kind, and slow for the others.
CASES = [
    pytest.param(name, alpha, marks=() if alpha == 0.5 or name in ONE_OF_A_KIND else pytest.mark.slow)
    for name in HEADS
    for alpha in alphas_of(name)
]


@pytest.mark.parametrize(("name", "alpha"), CASES)
def test_accumulation_equals_one_batch_of_eight(tmp_path, name: str, alpha: float) -> None:
    head = HEADS[name]
    start = weights(head.make(seed=0).double())
    whole, logged = one_step(tmp_path, head, alpha=alpha, micro_batch=8, accumulation=1)
    cuts = ((4, 2), (2, 4), (1, 8)) if alpha == 0.5 and name in ONE_OF_A_KIND else ((2, 4),)
    for micro_batch, accumulation in cuts:
        cut, cut_logged = one_step(tmp_path, head, alpha=alpha, micro_batch=micro_batch, accumulation=accumulation)
        assert update_difference(cut, whole, start) < 1e-6, (micro_batch, accumulation)
        assert cut_logged == pytest.approx(logged, rel=1e-4)


@pytest.mark.parametrize("name", [name for name, head in HEADS.items() if head.labels_see_padding])
def test_the_teachers_term_does_not_depend_on_padding(tmp_path, name: str) -> None:
    """The batch of eight is padded to its longest example; single examples are not padded."""
    head = HEADS[name]
    start = weights(head.make(seed=0).double())
    whole, _ = one_step(tmp_path, head, alpha=1.0, micro_batch=8, accumulation=1)
    cut, _ = one_step(tmp_path, head, alpha=1.0, micro_batch=1, accumulation=8)
    assert update_difference(cut, whole, start) < 1e-6


@pytest.mark.parametrize(("name", "variant"), VARIED)
def test_accumulation_is_exact_for_every_labels_loss(tmp_path, name: str, variant: str) -> None:
    head = HEADS[name]
    start = weights(head.make(seed=0).double())
    whole, logged = one_step(tmp_path, head, alpha=0.5, micro_batch=8, accumulation=1, variant=variant)
    cut, cut_logged = one_step(tmp_path, head, alpha=0.5, micro_batch=2, accumulation=4, variant=variant)
    assert update_difference(cut, whole, start) < 1e-6
    assert cut_logged == pytest.approx(logged, rel=1e-4)


def test_the_variants_of_the_labels_loss_differ(tmp_path) -> None:
    """Otherwise the test above would be meaningless; the two custom losses are the same loss."""
    head = HEADS["bert_tokens"]
    found = {
        variant: one_step(tmp_path, head, alpha=0.5, micro_batch=8, accumulation=1, variant=variant)[1]["loss/labels"]
        for variant in ("plain", "smoothed", "own_mean", "own_share")
    }
    assert found["own_mean"] == pytest.approx(2 * found["plain"], rel=1e-5)
    assert found["own_share"] == pytest.approx(2 * found["plain"], rel=1e-5)
    assert found["smoothed"] != pytest.approx(found["plain"], rel=1e-3)


@pytest.mark.parametrize("accumulation", [1, 2, 8])
def test_the_update_equals_plain_torch(tmp_path, accumulation: int) -> None:
    data = examples()
    expected, teacher = bert().double(), bert(seed=1).double().eval()
    batch = padded(data)
    labels = batch.pop("labels")
    logits, theirs = expected(**batch).logits, teacher(**batch).logits.detach()
    own = torch.nn.functional.cross_entropy(logits, labels)
    (0.25 * own + 0.75 * softened_kl(logits, theirs, 3.0).mean()).backward()
    start = weights(expected)
    with torch.no_grad():
        for parameter in expected.parameters():
            if parameter.grad is not None:
                parameter -= 0.1 * parameter.grad
    student = bert().double()
    make(
        tmp_path,
        student,
        teacher,
        train_dataset=data,
        alpha=0.75,
        temperature=3.0,
        max_steps=1,
        per_device_train_batch_size=8 // accumulation,
        gradient_accumulation_steps=accumulation,
    ).train()
    assert update_difference(weights(student), weights(expected), start) < 1e-6


def trained(folder, **changed) -> dict[str, torch.Tensor]:
    student = bert().double()
    settings = {"max_steps": -1, "num_train_epochs": 2, "train_sampling_strategy": "sequential", **changed}
    make(folder, student, bert(seed=1).double(), train_dataset=examples(11), **settings).train()
    return weights(student)


def test_a_smaller_last_step_of_an_epoch(tmp_path) -> None:
    """Eleven examples: a step of eight, then a step of three, for two epochs."""
    whole = trained(tmp_path, per_device_train_batch_size=8)
    cut = trained(tmp_path, per_device_train_batch_size=2, gradient_accumulation_steps=4)
    assert update_difference(cut, whole, weights(bert().double())) < 1e-6


def test_the_same_micro_batches_give_the_same_bits(tmp_path) -> None:
    first = trained(tmp_path, per_device_train_batch_size=2, gradient_accumulation_steps=4)
    again = trained(tmp_path, per_device_train_batch_size=2, gradient_accumulation_steps=4)
    assert_same_bits(again, first)


def test_accumulation_in_single_precision(tmp_path) -> None:
    """As in practice. Weights are rounded to 6e-8 of their size: 1e-6 or more of a small update, hence 1e-5."""
    found = []
    for micro_batch, accumulation in ((8, 1), (2, 4)):
        student = bert()
        make(
            tmp_path,
            student,
            bert(seed=1),
            max_steps=1,
            per_device_train_batch_size=micro_batch,
            gradient_accumulation_steps=accumulation,
        ).train()
        found.append(weights(student))
    assert update_difference(found[1], found[0], weights(bert())) < 1e-5


def test_accumulation_with_label_smoothing_and_unlabelled_examples(tmp_path) -> None:
    """The mean over a micro-batch without labels is NaN, which must not spread to the step."""
    data = [{**example, "labels": example["labels"] if i % 4 == 0 else -100} for i, example in enumerate(examples())]
    found = []
    for micro_batch, accumulation in ((8, 1), (2, 4), (1, 8)):
        student = bert().double()
        make(
            tmp_path,
            student,
            bert(seed=1).double(),
            train_dataset=data,
            label_smoothing_factor=0.1,
            max_steps=1,
            per_device_train_batch_size=micro_batch,
            gradient_accumulation_steps=accumulation,
        ).train()
        found.append(weights(student))
    for cut in found[1:]:
        assert update_difference(cut, found[0], weights(bert().double())) < 1e-6


def test_accumulation_set_by_accelerator_config(tmp_path) -> None:
    """`accelerator_config` can also set the number of steps; the update is the same."""
    given = {"max_steps": 1, "per_device_train_batch_size": 2}
    student, other = bert().double(), bert().double()
    args = arguments(tmp_path, accelerator_config={"gradient_accumulation_kwargs": {"num_steps": 4}}, **given)
    make(tmp_path, student, bert(seed=1).double(), args=args).train()
    make(tmp_path, other, bert(seed=1).double(), gradient_accumulation_steps=4, **given).train()
    assert_same_bits(weights(student), weights(other))
