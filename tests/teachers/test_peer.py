"""Mutual learning: equal to two handwritten optimizers in float64; saving, resume, errors."""

from __future__ import annotations

import copy
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate.utils import DistributedType
from torch import Tensor
from torch.nn import functional as F

from hf_distill import Distiller, Ensemble, HiddenMatch, SettingError, TeacherError
from hf_distill.schedules import linear
from hf_distill.signals import ActivationKey, Needs
from hf_distill.teachers import Peer
from tests.heads import HEADS
from tests.trainer.steps import in_double
from tests.trainer.tiny import assert_moved, assert_same_bits, bert, examples, make, padded, softened_kl, weights

ALPHA, T = 0.3, 2.0
RATE, PEERS_RATE = 0.2, 0.1
MOMENTUM = partial(torch.optim.SGD, momentum=0.9)


def rows_of(head: Any, model: Any, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Return logits and labels of the rows that count."""
    logits = model(**{name: x for name, x in batch.items() if name != "labels"}).logits
    labels = batch["labels"].flatten()
    return logits.flatten(0, -2)[labels != -100], labels[labels != -100]


def by_hand(head: Any, student: Any, peer: Any, steps: list[list[dict[str, Tensor]]], max_norm: float) -> None:
    """Train both on each other's logits from before the step; means are over all rows of a step's micro-batches."""
    ours = torch.optim.SGD(student.parameters(), lr=RATE)
    theirs = torch.optim.SGD(peer.parameters(), lr=PEERS_RATE, momentum=0.9)
    for number, micro_batches in enumerate(steps):
        theirs.param_groups[0]["lr"] = PEERS_RATE * (1 - number / len(steps))
        count = sum((batch["labels"] != -100).sum() for batch in micro_batches)
        for batch in micro_batches:
            (q, labels), (p, _) = rows_of(head, student, batch), rows_of(head, peer, batch)
            for own, other in ((q, p), (p, q)):
                of_labels = F.cross_entropy(own, labels, reduction="sum")
                loss = (1 - ALPHA) * of_labels + ALPHA * softened_kl(own, other.detach(), T).sum()
                (loss / count).backward()
        torch.nn.utils.clip_grad_norm_(peer.parameters(), max_norm)
        for optimizer in (ours, theirs):
            optimizer.step()
            optimizer.zero_grad()


@pytest.mark.parametrize(("name", "cut"), [("bert_single_label", (8, 1)), ("bert_tokens", (2, 4))])
def test_training_equals_two_optimizers_by_hand(tmp_path, name: str, cut: tuple[int, int]) -> None:
    head, (size, accumulated) = HEADS[name], cut
    data = head.examples(24)
    student, other = head.make(seed=0).double(), head.make(seed=1, layers=2).double()
    expected = copy.deepcopy(student), copy.deepcopy(other)
    batches = [in_double(head, data[i : i + size]) for i in range(0, 24, size)]
    by_hand(head, *expected, [batches[i : i + accumulated] for i in range(0, len(batches), accumulated)], 0.5)
    peer = Peer(other, optimizer=MOMENTUM, learning_rate=linear(PEERS_RATE, 0.0), max_grad_norm=0.5)
    trainer = make(
        tmp_path,
        student,
        peer,
        train_dataset=data,
        data_collator=partial(in_double, head),
        max_steps=3,
        learning_rate=RATE,
        alpha=ALPHA,
        temperature=T,
        per_device_train_batch_size=size,
        gradient_accumulation_steps=accumulated,
        train_sampling_strategy="sequential",
    )
    trainer.train()
    for found, wanted, start in zip((student, other), expected, (head.make(0), head.make(1, layers=2)), strict=True):
        assert_moved(weights(found), weights(start.double()))
        for key, value in weights(wanted).items():
            # A micro-batch's share of the labels is an fp32 number.
            torch.testing.assert_close(weights(found)[key], value, rtol=1e-7, atol=1e-8)


def test_resume_restores_the_peers_optimizer_bit_for_bit(tmp_path) -> None:
    given = {
        "train_dataset": examples(8),
        "max_steps": 4,
        "save_strategy": "steps",
        "save_steps": 2,
        "optim": "adamw_torch",
        "learning_rate": 0.01,
    }

    def peer(seed: int) -> Peer:
        return Peer(bert(seed=seed, dropout=0.2), learning_rate=linear(0.05, 0.0))

    whole = make(tmp_path / "whole", bert(dropout=0.3), peer(1), **given)
    whole.train()
    resumed = make(tmp_path / "resumed", bert(seed=5, dropout=0.3), peer(6), **given)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "out" / "checkpoint-2"))
    assert_same_bits(weights(resumed.model), weights(whole.model))
    found, expected = (dict(sorted(one.distiller.teacher.state_dict().items())) for one in (resumed, whole))
    assert_same_bits(found, expected)
    assert any(name.startswith("optimizer.0.exp_avg") for name in whole.distiller.teacher.state_dict())
    assert_moved(weights(whole.distiller.teacher.model), weights(bert(seed=1)))
    held = {id(p) for group in whole.optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in whole.model.parameters()}
    other = make(tmp_path / "other", bert(), Peer(bert(num_hidden_layers=2)), **given)
    with pytest.raises(SettingError, match="the saved peer is another model than this one"):
        other.train(resume_from_checkpoint=str(tmp_path / "whole" / "out" / "checkpoint-2"))


def test_while_alpha_is_0_the_peer_learns_from_labels_alone() -> None:
    student, other = bert(), bert(seed=1)
    expected, batch = copy.deepcopy(other), padded(examples(4))
    peer = Peer(other, optimizer=torch.optim.SGD, learning_rate=0.1, max_grad_norm=0)
    distiller = Distiller(student, peer, alpha=lambda progress: progress)
    distiller(student, batch).loss.backward()
    distiller.end_step(student)
    expected.train()(**batch).loss.backward()
    for found, one in zip(other.parameters(), expected.parameters(), strict=True):
        step = torch.zeros_like(one) if one.grad is None else one.grad
        torch.testing.assert_close(found, one - 0.1 * step)


def test_an_evaluation_does_not_change_the_peer(tmp_path) -> None:
    peer = Peer(bert(seed=1, dropout=0.5).train())
    trainer = make(tmp_path, bert(), peer, eval_dataset=examples(4), evaluate_with_teacher=True)
    before = weights(peer.model)
    one, other = trainer.evaluate(), trainer.evaluate()
    assert one["eval_divergence"] == other["eval_divergence"] > 0
    assert all(module.training for module in peer.model.modules())
    assert_same_bits(weights(peer.model), before)
    assert all(p.grad is None and p.requires_grad for p in peer.model.parameters())


def test_every_peer_of_an_ensemble_learns(tmp_path) -> None:
    peers = [Peer(bert(seed=seed), learning_rate=0.1) for seed in (1, 2)]
    trainer = make(tmp_path, bert(), Ensemble(peers), max_steps=1)
    trainer.train()
    for seed, peer in zip((1, 2), peers, strict=True):
        assert_moved(weights(peer.model), weights(bert(seed=seed)))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"learning_rate": -1.0}, r"learning_rate=-1\.0: must be at least 0"),
        ({"learning_rate": "fast"}, "learning_rate='fast': must be a number"),
        ({"model": "folder"}, "model is a str. Load it"),
    ],
)
def test_invalid_settings_raise(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingError, match=message):
        Peer(**{"model": bert(), **settings})


def test_invalid_combinations_raise() -> None:
    names = {"label2id": {"a": 2, "b": 0, "c": 1}, "id2label": {2: "a", 0: "b", 1: "c"}}
    turned = {"label2id": {"a": 0, "b": 1, "c": 2}, "id2label": {0: "a", 1: "b", 2: "c"}}
    with pytest.raises(TeacherError, match="its labels or tokens have other ids than the student's"):
        Distiller(bert(**names), Peer(bert(**turned)))
    with pytest.raises(SettingError, match="nothing compares predictions"):
        Distiller(bert(), Peer(bert(seed=1)), alpha=None, objectives=HiddenMatch("last"))
    with pytest.raises(SettingError, match="Peer is compared by its predictions alone"):
        Peer(bert(seed=1)).check(Needs(activations=frozenset({ActivationKey("hidden", 0)})))
    peer = Peer(bert(seed=1))
    with pytest.raises(SettingError, match="Peer with fp16"):
        peer.to(SimpleNamespace(distributed_type=DistributedType.NO, mixed_precision="fp16"))
    with pytest.raises(SettingError, match="Peer with FSDP: it is trained whole"):
        peer.to(SimpleNamespace(distributed_type=DistributedType.FSDP))
    student = bert()
    distiller = Distiller(student, peer)
    distiller(student, padded(examples(2)))
    distiller.end_step(student)
    Distiller(student, peer)  # another stage of the same student is allowed
    with pytest.raises(SettingError, match="it has learned beside another student"):
        Distiller(bert(seed=3), peer)
    heads = [HEADS[name].make(0) for name in ("wav2vec2_ctc_mean", "hubert_ctc_sum")]
    with pytest.raises(TeacherError, match="the student's ctc_loss_reduction is not the peer's"):
        Distiller(heads[0], Peer(heads[1]))
