"""Predictions by name, accuracy and agreement, against small cases done by hand."""

import statistics
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from hf_distill.compare import predicted_labels, share_equal, spread_of
from hf_distill.errors import DataError, SettingError


class Echo(nn.Module):
    """Gives its input back as logits."""

    def __init__(self, id2label):
        super().__init__()
        self.config = SimpleNamespace(id2label=id2label)
        self.modes = []

    def forward(self, x):
        self.modes.append((self.training, torch.is_inference_mode_enabled()))
        return SimpleNamespace(logits=x)


def test_the_order_of_the_labels_does_not_matter():
    logits = torch.tensor([[2.0, 1.0, 0.0], [0.0, 3.0, 1.0], [0.0, 0.0, 4.0]])
    order = [2, 0, 1]
    student = Echo({0: "a", 1: "b", 2: "c"})
    teacher = Echo({place: "abc"[index] for place, index in enumerate(order)})
    ours = predicted_labels(student, [{"x": logits[:2], "labels": None}, {"x": logits[2:]}])
    theirs = predicted_labels(teacher, [{"x": logits[:, order]}])
    assert ours == theirs == ["a", "b", "c"]


def test_prediction_keeps_the_mode_and_makes_no_gradient():
    model = Echo({0: "a", 1: "b"})
    predicted_labels(model, [{"x": torch.zeros(1, 2)}])
    assert model.modes == [(False, True)] and model.training


def test_token_heads_are_rejected():
    with pytest.raises(SettingError, match=r"logits of shape \(2, 3, 2\)"):
        predicted_labels(Echo({0: "a", 1: "b"}), [{"x": torch.zeros(2, 3, 2)}])


def test_shares_by_hand():
    assert share_equal(list("aabb"), list("abbb")) == 0.75
    assert share_equal(["a"], ["b"]) == 0.0


@pytest.mark.parametrize(("first", "second"), [([], []), (["a"], ["a", "b"])])
def test_mismatched_lists_are_rejected(first, second):
    with pytest.raises(DataError, match="same length, at least 1"):
        share_equal(first, second)


def test_spread_is_the_sample_standard_deviation():
    spread = spread_of([0.7, 0.72, 0.71])
    assert spread.mean == pytest.approx(0.71)
    assert spread.spread == pytest.approx(statistics.stdev([0.7, 0.72, 0.71]))
    assert spread.runs == 3


def test_one_run_has_no_spread():
    assert spread_of([0.7]).spread is None
    with pytest.raises(DataError, match="at least one run"):
        spread_of([])
