"""Making specialists: confusable classes, balanced examples, and a head initialized from the generalist's."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from hf_distill import DataError, Distiller, MissingExtraError, SettingError
from hf_distill.teachers.specialists import Specialists, confusable_classes, specialist_head, specialist_set
from tests.teachers.specialized import FOUR, named
from tests.trainer.tiny import assert_same_bits, bert, weights


def test_classes_that_are_predicted_together_form_a_set() -> None:
    """Eight classes in pairs and a triple: each prediction is certain of its set but not within it."""
    sets = ((0, 5), (1, 2, 7), (3, 6))
    generator = torch.Generator().manual_seed(0)
    which = torch.randint(0, 3, (600,), generator=generator)
    logits = torch.randn(600, 8, generator=generator)
    for row, one in enumerate(which.tolist()):
        logits[row, list(sets[one])] += 6
    logits[:, 4] -= 20  # a class that is never predicted is alone and left out
    assert confusable_classes(logits.numpy(), clusters=4) == sets
    assert confusable_classes(logits, clusters=4, temperature=1.5, seed=3) == sets


def test_half_the_examples_are_special_and_the_bias_restores_the_odds() -> None:
    labels = [i % 10 for i in range(200)] + [-100] * 5
    made = specialist_set(labels, [7, 2])
    assert len(made.indices) == len(set(made.indices)) == 80
    assert sorted(set(made.labels)) == [0, 1, 2] and made.labels.count(2) == 40
    for index, label in zip(made.indices, made.labels, strict=True):
        assert {7: 0, 2: 1}.get(labels[index], 2) == label and labels[index] >= 0
    # 1 in 5 of all examples is special, 1 in 2 of these: dustbin odds of 4 and 1.
    assert made.dustbin_bias == pytest.approx(math.log(4))
    assert list(made.indices) != sorted(made.indices)
    assert specialist_set(labels, [7, 2]) == made != specialist_set(labels, [7, 2], seed=1)


def test_other_examples_are_oversampled_if_most_are_special() -> None:
    made = specialist_set([0, 0, 0, 0, 0, 0, 1, 2, 2], [0])
    assert made.labels.count(0) == made.labels.count(1) == 3
    assert made.dustbin_bias == pytest.approx(math.log(3 / 6))


def test_the_head_is_initialized_from_the_generalists() -> None:
    generalist = named(bert(seed=3, **FOUR), ["cat", "dog", "cow", "owl"])
    before = weights(generalist)
    made = specialist_head(generalist.requires_grad_(False), [2, 0])
    assert made.config.id2label == {0: "cow", 1: "cat", 2: "dustbin"} and made.config.num_labels == made.num_labels == 3
    torch.testing.assert_close(made.classifier.weight[:2], before["classifier.weight"][[2, 0]])
    torch.testing.assert_close(made.classifier.bias[2], before["classifier.bias"][[1, 3]].mean())
    assert made.classifier.weight.requires_grad
    assert_same_bits(weights(generalist), before)
    batch = {"input_ids": torch.tensor([[1, 2]]), "labels": torch.tensor([2])}
    assert bool(made(**batch).loss.isfinite()) and made(**batch).logits.shape == (1, 3)
    Distiller(
        named(bert(seed=9, **FOUR), ["owl", "cow", "dog", "cat"]), Specialists(generalist, {("cow", "cat"): made})
    )


def test_invalid_specialists_raise(monkeypatch) -> None:
    with pytest.raises(DataError, match=r"there is no example of class 3 in 3 labels"):
        specialist_set([0, 1, 2], [1, 3])
    with pytest.raises(DataError, match=r"there is no example outside of \(0, 1\)"):
        specialist_set([0, 1, -100], [0, 1])
    for wrong in (torch.zeros(3), torch.full((4, 3), torch.nan), torch.zeros(1, 3)):
        with pytest.raises(DataError, match=r"give finite logits \[n v\] of at least two examples"):
            confusable_classes(wrong, clusters=2)
    with pytest.raises(SettingError, match="clusters=3 of 3 classes"):
        confusable_classes(torch.zeros(4, 3), clusters=3)
    with pytest.raises(SettingError, match="temperature=0: must be above 0"):
        confusable_classes(torch.zeros(4, 3), clusters=2, temperature=0)
    with pytest.raises(SettingError, match=r"classes \[0, 1, 2\]: give some, not all, of the ids 0 to 2"):
        specialist_head(bert(), [0, 1, 2])
    with pytest.raises(
        SettingError, match="2 linear layers of BertForSequenceClassification have 16 columns, so which"
    ):
        # The head has the width of the layers, as does at least the pooler.
        specialist_head(_without_others(bert(num_labels=16)), [0, 1])
    monkeypatch.setitem(__import__("sys").modules, "sklearn.cluster", None)
    with pytest.raises(MissingExtraError, match=r"hf-distill\[metrics\]"):
        confusable_classes(torch.randn(4, 3), clusters=2)


def _without_others(model: Any) -> Any:
    model.bert.encoder = torch.nn.Identity()
    return model
