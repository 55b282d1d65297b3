"""RDropTeacher, a second pass with other dropout: half of R-Drop's gradient, and its own random numbers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hf_distill import Distiller, SettingError
from hf_distill.signals import Needs
from hf_distill.teachers import RDropTeacher
from tests.heads import HEADS
from tests.trainer.tiny import assert_moved, assert_same_bits, bert, examples, make, padded, weights

ALIKE, DRAWS = 64, 60  # equal rows of a batch with independent dropout; number of batches


class Dropped(nn.Module):
    """Dropout and a linear layer in float64: rows of `x`, three classes."""

    def __init__(self, rate: float = 0.4) -> None:
        super().__init__()
        self.drop, self.head = nn.Dropout(rate), nn.Linear(5, 3).double()
        weight = torch.randn(3, 5, generator=torch.Generator().manual_seed(1))
        self.head.weight.data.copy_(weight)

    def forward(self, inputs_embeds: Tensor, labels: Any = None) -> dict[str, Tensor]:
        return {"logits": self.head(self.drop(inputs_embeds))}


def test_the_expected_gradient_is_that_of_r_drop() -> None:
    """Compared with both passes with gradient, ½ (KL(1 ‖ 2) + KL(2 ‖ 1)), from the definition; independent draws.

    Each entry of the difference of the two means is divided by its standard error: 18 normal ones all stay below
    4 with a probability of 0.999; and the means are far from 0.
    """
    model = Dropped().train()
    x = torch.randn(1, 5, generator=torch.Generator().manual_seed(2), dtype=torch.float64).expand(ALIKE, 5)
    settings = {"divergence": "jeffreys", "temperature": 1.0, "alpha": 1.0, "task": "classification"}
    distiller = Distiller(model, RDropTeacher(), **settings)
    torch.manual_seed(3)
    ours, theirs = [], []
    for _ in range(DRAWS):
        ours.append(gradient(model, distiller(model, {"inputs_embeds": x}).loss))
        first, second = (model(x)["logits"].log_softmax(-1) for _ in range(2))
        both = 0.5 * ((first.exp() - second.exp()) * (first - second)).sum(-1).mean()
        theirs.append(gradient(model, both))
    one, other = torch.stack(ours), torch.stack(theirs)
    error = ((one.var(0) + other.var(0)) / DRAWS).sqrt()
    assert ((one.mean(0) - other.mean(0)) / error).abs().max() < 4
    assert (other.mean(0) / error).abs().max() > 20


def gradient(model: nn.Module, loss: Tensor) -> Tensor:
    model.zero_grad()
    loss.backward()
    return torch.cat([p.grad.flatten() for p in model.parameters()])


def test_alpha_for_the_papers_weight() -> None:
    """2 · labels + α · D = (2 + α) · ((1 - a) · labels + a · D)."""
    for paper in (0.0, 1.0, 5.0):
        a = RDropTeacher.alpha(paper)
        assert (2 + paper) * (1 - a) == pytest.approx(2) and (2 + paper) * a == pytest.approx(paper)
    with pytest.raises(SettingError, match=r"paper_weight=-1: must be at least 0"):
        RDropTeacher.alpha(-1)


def test_it_has_its_own_random_numbers() -> None:
    student, batch = bert(dropout=0.3).train(), padded(examples(4))
    distiller = Distiller(student, RDropTeacher(seed=1), alpha=1.0)
    state = torch.random.get_rng_state()
    one, other = (distiller.teacher_signals(batch, Needs(logits=True)).predictions() for _ in range(2))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert not torch.equal(one, other) and not one.requires_grad
    again = Distiller(student, RDropTeacher(seed=1)).teacher_signals(batch, Needs(logits=True)).predictions()
    elsewhere = Distiller(student, RDropTeacher(seed=2)).teacher_signals(batch, Needs(logits=True)).predictions()
    assert torch.equal(one, again) and not torch.equal(one, elsewhere)
    assert all(module.training for module in student.modules())


def test_running_statistics_change_only_in_the_students_pass() -> None:
    model = Dropped().train()
    model.drop = nn.Sequential(nn.BatchNorm1d(5).double(), nn.Dropout(0.4))
    distiller = Distiller(model, RDropTeacher(), alpha=1.0, task="classification")
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    distiller.teacher_signals({"inputs_embeds": torch.randn(4, 5, dtype=torch.float64)}, Needs(logits=True))
    assert_same_bits(dict(model.named_buffers()), before)


def test_training_resumes_bit_for_bit(tmp_path) -> None:
    given = {
        "train_dataset": examples(8),
        "max_steps": 4,
        "save_strategy": "steps",
        "save_steps": 2,
        "optim": "adamw_torch",
        "learning_rate": 0.01,
        "divergence": "jeffreys",
        "temperature": 1.0,
        "alpha": RDropTeacher.alpha(5.0),
        "logging_steps": 1,
    }
    whole = make(tmp_path / "whole", bert(dropout=0.3), RDropTeacher(), **given)
    whole.train()
    assert all(entry["loss/logits"] > 1e-4 for entry in whole.state.log_history if "loss" in entry)
    resumed = make(tmp_path / "resumed", bert(seed=5, dropout=0.3), RDropTeacher(), **given)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "out" / "checkpoint-2"))
    assert_same_bits(weights(resumed.model), weights(whole.model))
    assert_moved(weights(whole.model), weights(bert()))
    held = {id(p) for group in whole.optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in whole.model.parameters()}


def test_a_student_without_dropout_raises() -> None:
    with pytest.raises(SettingError, match=r"nothing in the student \(BertForSequenceClassification\) is random"):
        Distiller(bert(), RDropTeacher())
    speech = HEADS["wav2vec2_ctc_mean"]
    for settings in (
        {"attention_dropout": 0.1},
        {"layerdrop": 0.1},
        {"apply_spec_augment": True, "mask_time_prob": 0.1},
    ):
        Distiller(speech.make(0, **settings), RDropTeacher())
