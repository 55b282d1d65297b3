"""ExitMatch: values by hand in float64, padding, accumulation, training without a teacher, resume, and its card."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from hf_distill import DataError, Distiller, SettingError
from hf_distill.objectives import ExitMatch
from tests.heads import HEADS
from tests.laws import measuring as m
from tests.trainer.tiny import assert_moved, assert_same_bits, bert, examples, make, weights

ALPHA, T, LAMBDA = 0.4, 2.0, 0.1
NAMES = ("bert_single_label", "bert_tokens", "bert_multi_label", "vit_image_class")


def exits(**changed: Any) -> ExitMatch:
    return ExitMatch(**{"layers": [0, -2], "alpha": ALPHA, "temperature": T, "feature_weight": LAMBDA, **changed})


def distiller_of(name: str, *, blend: float | None = 0.0, **changed: Any) -> tuple[Any, Distiller]:
    """Return a student of three blocks in float64, with exits after the first two, and its distiller."""
    student = HEADS[name].make(1, layers=3).double().train()
    return student, Distiller(student, alpha=blend, objectives=exits(**changed), seed=3)


@torch.no_grad()
def by_hand(name: str, student: Any, heads: Any, batch: dict[str, Tensor]) -> float:
    """Return the formula's mean over rows of the sum over exits, from the hidden states that transformers returns."""
    found = student(**{k: x for k, x in batch.items() if k != "labels"}, output_hidden_states=True)
    states, labels, total = found.hidden_states[1:], batch["labels"], 0.0
    kept = labels != -100 if name == "bert_tokens" else None
    mask = batch.get("attention_mask", torch.ones(states[0].shape[:2]))[..., None]
    rows = [x[kept] if kept is not None else (x * mask).sum(1) / mask.sum(1) for x in states]
    last = found.logits if kept is None else found.logits[kept]
    for layer in (0, 1):
        features = rows[layer] @ heads[str(layer)].features.weight.T + heads[str(layer)].features.bias
        exit_logits = features.tanh() @ heads[str(layer)].classifier.weight.T + heads[str(layer)].classifier.bias
        if name == "bert_multi_label":  # each label is a Bernoulli with logits (z, 0)
            p, q, y = (last / T).sigmoid(), (exit_logits / T).sigmoid(), exit_logits.sigmoid()
            kl = p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()
            of_labels = -(labels * y.log() + (1 - labels) * (1 - y).log())
        else:
            p, q = (last / T).softmax(-1), (exit_logits / T).softmax(-1)
            kl, chosen = p * (p / q).log(), labels if kept is None else labels[kept]
            of_labels = -exit_logits.log_softmax(-1).gather(1, chosen[:, None])
        total += ALPHA * T**2 * kl.sum() + (1 - ALPHA) * of_labels.sum()
        total += LAMBDA * (features - rows[2]).square().sum()
    return float(total) / (last.numel() if name == "bert_multi_label" else last.shape[0])


@pytest.mark.parametrize("name", NAMES)
def test_value_matches_the_formula(name: str) -> None:
    student, distiller = distiller_of(name)
    batch = m.collated(name, HEADS[name].examples(6))
    found = distiller(student, batch)
    heads = distiller.objectives["exits"].learned
    assert found.terms["exits"].item() == pytest.approx(by_hand(name, student, heads, batch), rel=1e-6)
    assert found.loss.item() == pytest.approx((found.terms["labels"] + found.terms["exits"]).item(), rel=1e-12)


def test_the_last_prediction_teaches_without_gradient() -> None:
    student, distiller = distiller_of("bert_single_label", blend=None)
    m.step(distiller, student, [m.collated("bert_single_label", HEADS["bert_single_label"].examples(4))])
    gradients = {key: p.grad for key, p in student.named_parameters()}
    above = [key for key in gradients if "layer.2." in key or "pooler" in key or "classifier" in key]
    assert above and not any(gradients[key] is not None and gradients[key].any() for key in above)
    assert gradients["bert.encoder.layer.1.output.dense.weight"].norm() > 1e-4
    assert all(p.grad.norm() > 0 for p in distiller.learned.parameters())


@pytest.mark.parametrize("name", ["bert_single_label", "bert_tokens"])
def test_padding_and_accumulation_change_nothing(name: str) -> None:
    student, distiller = distiller_of(name)
    data = HEADS[name].examples(8)
    expected, gradient = m.step(distiller, student, [m.collated(name, data)])
    padded = m.step(distiller, student, [m.collated(name, data, 15)])
    parts = m.step(distiller, student, [m.collated(name, data[i : i + 2]) for i in range(0, 8, 2)])
    for loss, found in (padded, parts):
        assert loss == pytest.approx(expected, rel=1e-6) and m.difference(found, gradient) < 1e-6


def test_exits_with_ignored_and_unlabelled_rows() -> None:
    student, distiller = distiller_of("bert_tokens")
    batch = m.collated("bert_tokens", HEADS["bert_tokens"].examples(4))
    silent = {**batch, "labels": torch.full_like(batch["labels"], -100)}
    loss, gradient = m.step(distiller, student, [silent])
    assert loss == 0 and not gradient.any()
    student, distiller = distiller_of("bert_single_label", blend=None)
    batch = m.collated("bert_single_label", HEADS["bert_single_label"].examples(4))
    unknown = {**batch, "labels": torch.full_like(batch["labels"], -100)}
    of_last_alone, _ = m.step(distiller, student, [unknown])
    certain = Distiller(student, alpha=None, objectives=exits(alpha=1.0), seed=3)
    without, _ = m.step(certain, student, [{k: x for k, x in batch.items() if k != "labels"}])
    assert 0 < of_last_alone < m.step(distiller, student, [batch])[0]
    assert without > 0
    with pytest.raises(DataError, match="alpha < 1 weighs labels, but there is no labels"):
        m.step(distiller, student, [{k: x for k, x in batch.items() if k != "labels"}])


@pytest.mark.parametrize(
    "changed",
    [
        {"layers": [0]},
        {"alpha": 0.9},
        {"temperature": 5.0},
        {"feature_weight": 0.0},
        {"pooling": "first"},
        {"pooling": "last"},
        {"weight": 2.0},
    ],
    ids=str,
)
def test_every_setting_changes_the_loss(changed: dict[str, Any]) -> None:
    batch = m.collated("bert_single_label", HEADS["bert_single_label"].examples(4))
    student, distiller = distiller_of("bert_single_label")
    other, changed_distiller = distiller_of("bert_single_label", **changed)
    before, after = distiller(student, batch), changed_distiller(other, batch)
    assert abs(after.loss - before.loss) > 1e-3
    if "weight" in changed:
        assert (after.loss - before.loss).item() == pytest.approx(before.terms["exits"].item())


def test_training_without_a_teacher_resumes_bit_for_bit(tmp_path) -> None:
    given = {
        "train_dataset": examples(8),
        "objectives": ExitMatch([0], feature_weight=0.03),
        "alpha": 0.0,
        "max_steps": 4,
        "save_strategy": "steps",
        "save_steps": 2,
        "optim": "adamw_torch",
        "learning_rate": 0.01,
        "logging_steps": 1,
    }
    student = partial(bert, num_hidden_layers=2, dropout=0.2)
    whole = make(tmp_path / "whole", student(), **given)
    start = weights(whole.distiller.learned.module)
    whole.train()
    assert all(entry["loss/exits"] > 0 for entry in whole.state.log_history if "loss" in entry)
    resumed = make(tmp_path / "resumed", student(seed=5), **given)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "out" / "checkpoint-2"))
    assert_same_bits(weights(resumed.model), weights(whole.model))
    assert_same_bits(weights(resumed.distiller.learned.module), weights(whole.distiller.learned.module))
    assert_moved(weights(whole.distiller.learned.module), start)
    whole.save_model(str(tmp_path / "student"))
    assert set(weights(type(whole.model).from_pretrained(tmp_path / "student"))) == set(
        weights(bert(num_hidden_layers=2))
    )
    whole.create_model_card()
    card = (tmp_path / "whole" / "out" / "README.md").read_text(encoding="utf-8")
    assert "without a teacher" in card and "loss = labels + 1 * exits" in card
    assert "ExitMatch(exits 0, alpha=0.3, temperature=3, feature_weight=0.03" in card and "Be Your Own Teacher" in card
    assert "Hinton" not in card


def test_predictions_of_each_exit(tmp_path) -> None:
    """Exits can be used for early exit, and measured."""
    student, distiller = distiller_of("bert_tokens")
    batch = m.collated("bert_tokens", HEADS["bert_tokens"].examples(4))
    with torch.no_grad(), distiller.capture() as inside:
        outputs = student(**batch)
    signals = distiller.student_signals(outputs, batch, activations=inside)
    exit_logits = distiller.objectives["exits"].predictions(signals, distiller.task, batch)
    rows = int((batch["labels"] != -100).sum())
    assert {layer: tuple(x.shape) for layer, x in exit_logits.items()} == {0: (rows, 3), 1: (rows, 3)}
    distiller.learned.save(tmp_path)
    assert (tmp_path / "distill_state.safetensors").is_file()


def test_exits_train_together_with_a_teacher() -> None:
    student = HEADS["bert_single_label"].make(1, layers=3).double()
    distiller = Distiller(student, HEADS["bert_single_label"].make(2).double(), objectives=exits())
    found = distiller(student, m.collated("bert_single_label", HEADS["bert_single_label"].examples(4)))
    assert set(found.terms) == {"labels", "logits", "exits"}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"layers": []}, r"layers=\[\]: give a list of blocks"),
        ({"layers": "even"}, r"layers='even': give a list"),
        ({"layers": [2]}, r"layers=\[2\] of a student with 3 blocks: each must be one of 0 … 1, once"),
        ({"layers": [-1]}, "The last block is the teacher"),
        ({"layers": [1, -2]}, "once"),
        ({"alpha": 1.5}, r"alpha=1\.5: must lie in \[0, 1\]"),
        ({"temperature": 0.0}, "temperature=0: must be above 0"),
        ({"feature_weight": -1.0}, r"feature_weight=-1\.0: must be at least 0"),
        ({"pooling": "max"}, "pooling='max': allowed are mean, first, last"),
    ],
)
def test_invalid_settings_are_rejected(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingError, match=message):
        Distiller(HEADS["bert_single_label"].make(1, layers=3), alpha=0.0, objectives=exits(**settings))


def test_unsupported_heads_are_rejected() -> None:
    with pytest.raises(SettingError, match="token_classification, not causal_lm"):
        Distiller(HEADS["llama_causal_lm"].make(1, layers=3), alpha=0.0, objectives=exits())
