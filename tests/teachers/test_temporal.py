"""Temporal ensembling: targets by Laine and Aila's formula, none for new examples, resume bit for bit."""

from __future__ import annotations

import random
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from hf_distill import DataError, Distiller, SettingError
from hf_distill.augment import Augmentation, AugmentingCollator
from hf_distill.signals import Needs
from hf_distill.teachers import TemporalEnsemble
from tests.heads import HEADS
from tests.trainer.steps import in_double
from tests.trainer.tiny import assert_moved, assert_same_bits, bert, examples, make, padded, softened_kl, weights

T, MOMENTUM = 2.0, 0.6
DROPPED = {"hidden_dropout_prob": 0.3}


def epochs_of(name: str, batches: list[list[int]], *, pad_to: int | None = None) -> None:
    """Train on each batch of example numbers in turn, one SGD step each; check every logits term with the formula."""
    head = HEADS[name]
    data = head.examples(8)
    student = head.make(seed=0, **DROPPED).double().train()
    distiller = Distiller(student, TemporalEnsemble(momentum=MOMENTUM), alpha=1.0, temperature=T)
    optimizer = torch.optim.SGD(student.parameters(), lr=0.05)
    history: dict[int, list[Tensor]] = {}
    for number, chosen in enumerate(batches):
        batch = in_double(head, [data[i] for i in chosen], pad_to=pad_to if number % 2 else None)
        found = distiller(student, batch)
        logits = found.outputs.logits.detach()
        expected, rows = 0.0, 0
        for position, example in enumerate(chosen):
            own = logits[position][None] if logits.dim() == 2 else logits[position][batch["labels"][position] != -100]
            rows += own.shape[0]
            past = history.setdefault(example, [])
            if past:  # Z = Σ_i (1 - m) m^(t - i) z_i, over 1 - m^t
                t = len(past)
                z = sum((1 - MOMENTUM) * MOMENTUM ** (t - 1 - i) * one for i, one in enumerate(past))
                expected += softened_kl(own, (z / (1 - MOMENTUM**t)).log() * T, T).sum().item()
            past.append((own / T).softmax(-1))
        assert found.terms["logits"].item() == pytest.approx(expected / rows, rel=1e-9, abs=1e-12)
        optimizer.zero_grad()
        found.loss.backward()
        if not expected:
            assert not any(p.grad is not None and p.grad.any() for p in student.parameters())
        optimizer.step()
        distiller.end_step(student)
    assert expected > 1e-4


@pytest.mark.parametrize("name", ["bert_single_label", "bert_tokens"])
def test_targets_follow_the_formula(name: str) -> None:
    """In another order and with other padding each time; the mean of a batch also counts new examples."""
    epochs_of(name, [[0, 1, 2, 3], [3, 1, 4, 5], [5, 0, 1, 3], [2, 1, 3, 0]], pad_to=13)


def test_multi_label_and_multiple_choice() -> None:
    for name in ("bert_multi_label", "bert_multiple_choice"):
        head = HEADS[name]
        student = head.make(seed=0, **DROPPED).train()
        teacher = TemporalEnsemble()
        distiller = Distiller(student, teacher, alpha=1.0)
        first, second = (distiller(student, head.batch(4)).terms["logits"].item() for _ in range(2))
        assert first == 0 and second > 1e-5 and teacher.examples == 4


def test_resume_within_the_second_epoch_bit_for_bit(tmp_path) -> None:
    given = {
        "train_dataset": examples(8),
        "max_steps": 6,
        "save_strategy": "steps",
        "save_steps": 3,
        "optim": "adamw_torch",
        "learning_rate": 0.01,
        "logging_steps": 1,
    }
    whole = make(tmp_path / "whole", bert(dropout=0.3), TemporalEnsemble(), **given)
    whole.train()
    logged = [entry["loss/logits"] for entry in whole.state.log_history if "loss" in entry]
    assert logged[:2] == [0, 0] and min(logged[2:]) > 1e-5
    resumed = make(tmp_path / "resumed", bert(seed=5, dropout=0.3), TemporalEnsemble(), **given)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "out" / "checkpoint-3"))
    assert_same_bits(weights(resumed.model), weights(whole.model))
    assert_same_bits(resumed.distiller.teacher.state_dict(), whole.distiller.teacher.state_dict())
    assert_moved(weights(whole.model), weights(bert()))


def test_targets_are_distributions_at_the_stored_temperature() -> None:
    """The same words with other labelled tokens are another example."""
    head = HEADS["bert_tokens"]
    student, batch = head.make(seed=0).double().eval(), in_double(head, head.examples(4))
    distiller = Distiller(student, TemporalEnsemble(), alpha=1.0, temperature=T)
    for _ in range(2):
        distiller(student, batch)
    fewer = {**batch, "labels": batch["labels"].clone()}
    fewer["labels"][0, (fewer["labels"][0] != -100).nonzero()[0]] = -100
    sparse = distiller.teacher_signals(fewer, Needs(logits=True)).sparse
    known = (fewer["labels"] != -100) & (torch.arange(4) > 0)[:, None]
    assert torch.equal(sparse.log_tail == -torch.inf, known) and torch.equal((sparse.ids >= 0).all(-1), known)
    assert sparse.temperature == T and not sparse.log_tail[~known].any()
    torch.testing.assert_close(sparse.log_probabilities[known].exp().sum(-1), torch.ones(int(known.sum())).double())
    resumed = TemporalEnsemble()
    other = Distiller(student, resumed, alpha=0.0, temperature=3.0)
    resumed.load_state_dict(distiller.teacher.state_dict())
    with pytest.raises(SettingError, match=r"temperature=3: TemporalEnsemble's targets were softened with 2"):
        other(student, batch)
    with pytest.raises(SettingError, match=r"the checkpoint's teacher \(passes, \.\.\.\) is no TemporalEnsemble"):
        resumed.load_state_dict({"passes": torch.tensor(1)})


def test_examples_are_identified_by_an_id_column(tmp_path) -> None:
    """For inputs that change every time; the student does not receive the column."""

    def changing(features: list[dict[str, Any]], calls: list[int]) -> dict[str, Tensor]:
        calls.append(1)
        batch = padded(features)
        batch["input_ids"][:, 0] = 1 + len(calls)
        return batch

    data = [{**one, "number": 7 * i} for i, one in enumerate(examples(8))]
    teacher = TemporalEnsemble(key="number")
    given = {"train_dataset": data, "data_collator": partial(changing, calls=[]), "max_steps": 4, "logging_steps": 1}
    trainer = make(tmp_path, bert(dropout=0.3), teacher, **given)
    trainer.train()
    logged = [entry["loss/logits"] for entry in trainer.state.log_history if "loss" in entry]
    assert logged[:2] == [0, 0] and min(logged[2:]) > 1e-5 and teacher.examples == 8
    with pytest.raises(DataError, match=r"key='number'\): the batch has no such column, only \['atten"):
        trainer.distiller(bert(), padded(examples(2)))


def test_augmented_examples_are_identified_by_the_clean_one(tmp_path) -> None:
    def changed(example: dict[str, Any]) -> dict[str, Any]:
        return {**example, "input_ids": [random.randrange(1, 23) for _ in example["input_ids"]]}

    collator = AugmentingCollator(padded, Augmentation(changed, moves_positions=False), student_only=True)
    teacher = TemporalEnsemble()
    trainer = make(tmp_path, bert(), teacher, data_collator=collator, max_steps=4, logging_steps=1)
    trainer.train()
    logged = [entry["loss/logits"] for entry in trainer.state.log_history if "loss" in entry]
    assert logged[:2] == [0, 0] and min(logged[2:]) > 1e-5 and teacher.examples == 8


def test_predictions_of_other_processes_are_stored_too(monkeypatch) -> None:
    """Two processes work on different halves of the data: each stores all predictions."""
    head = HEADS["bert_single_label"]
    teachers = [TemporalEnsemble(), TemporalEnsemble()]
    student = head.make(seed=0).eval()
    sent: list[Any] = []
    monkeypatch.setattr("hf_distill.teachers.temporal.gather_object", lambda mine: sent.extend(mine) or sent)
    for number, teacher in enumerate(teachers):
        distiller = Distiller(student, teacher, alpha=1.0)
        teacher.to(type("Two", (), {"num_processes": 2}))
        distiller(student, head.collate(head.examples(8)[4 * number : 4 * number + 4]))
    assert teachers[0].examples == 4 and teachers[1].examples == 8


@pytest.mark.parametrize("momentum", [1.0, -0.1, "0.6", True])
def test_an_invalid_momentum_raises(momentum: Any) -> None:
    with pytest.raises(SettingError, match=r"momentum=.*must lie in \[0, 1\)"):
        TemporalEnsemble(momentum=momentum)


def test_unsupported_needs_raise() -> None:
    llama = HEADS["llama_causal_lm"].make(seed=0)
    with pytest.raises(SettingError, match="needs a head for classes, not for causal_lm"):
        Distiller(llama, TemporalEnsemble())
    student, batch = bert(dropout=0.1), padded(examples(4))
    moving = {"temperature": lambda progress: 2.0 - progress, "alpha": lambda progress: float(progress > 0.9)}
    distiller = Distiller(student, TemporalEnsemble(), **moving)
    distiller(student, batch)
    with pytest.raises(SettingError, match=r"temperature=1\.5: TemporalEnsemble's targets were softened with 2"):
        distiller(student, batch, distiller.begin_step([batch], progress=0.5))
    with torch.no_grad(), pytest.raises(DataError, match="4 of 4 examples were never trained on"):
        distiller.teacher_signals(padded(examples(8)[4:]), Needs(logits=True))
    with pytest.raises(SettingError, match=r"divergence='mean_squared_error' needs every column"):
        Distiller(student, TemporalEnsemble(), divergence="mean_squared_error")(student, batch)
