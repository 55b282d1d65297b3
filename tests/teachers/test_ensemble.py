"""Ensembles: the means by their formulas, weights for each row, and errors."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from hf_distill import Distiller, HiddenMatch, SettingError, TeacherError
from hf_distill.signals import ActivationKey, Needs
from hf_distill.teachers import Ensemble, MovingAverage
from tests.heads import HEADS
from tests.laws import measuring as m
from tests.trainer.tiny import assert_same_bits, bert, make, weights

SINGLE = [name for name, head in HEADS.items() if head.kind not in ("regression", "embedding")]


def teachers_of(name: str, count: int = 3) -> list[Any]:
    return [HEADS[name].make(seed).double() for seed in range(10, 10 + count)]


def predictions(
    name: str, teachers: list[Any], temperature: float = 2.0, **settings: Any
) -> tuple[Tensor, list[Tensor], Any]:
    """Return the predictions of the ensemble and of each member, on the rows that the task selects."""
    student = m.student_of(name)
    distiller = Distiller(student, Ensemble(teachers, **settings), alpha=1.0, temperature=temperature)
    batch = distiller.prepare(m.collated(name, HEADS[name].examples()))
    task, ensemble = distiller.task, distiller.teacher
    needs = Needs(logits=True, temperature=temperature)
    together = task.select(ensemble(task, batch, needs).predictions(), batch)
    alone = [task.select(one(task, batch, needs).predictions(), batch) for one in ensemble.teachers]
    return together, alone, (task, batch)


@pytest.mark.parametrize("name", SINGLE)
def test_probabilities_are_averaged_at_the_temperature(name: str) -> None:
    for temperature in (1.0, 4.0):
        together, alone, _ = predictions(name, teachers_of(name), temperature)
        expected = sum((one / temperature).softmax(-1) for one in alone) / 3
        torch.testing.assert_close((together / temperature).softmax(-1), expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", SINGLE)
def test_averaged_logits_give_the_geometric_mean(name: str) -> None:
    together, alone, _ = predictions(name, teachers_of(name), mean="logits", weights=[1, 2, 5])
    product = sum(w * one.log_softmax(-1).nan_to_num(neginf=-1e30) for w, one in zip((1, 2, 5), alone, strict=True))
    torch.testing.assert_close(together.softmax(-1), (product / 8).softmax(-1), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", ["bert_regression", "bert_embedding"])
def test_values_are_averaged(name: str) -> None:
    together, alone, _ = predictions(name, teachers_of(name), weights=[1, 1, 2])
    torch.testing.assert_close(together, (alone[0] + alone[1] + 2 * alone[2]) / 4, rtol=1e-12, atol=1e-12)
    with pytest.raises(SettingError, match="weights='best' need probabilities; this task predicts values"):
        predictions(name, teachers_of(name), weights="best")


def test_row_weights_by_hand() -> None:
    """Two teachers, one row of two classes, T = 1: p1 = (3/4, 1/4), p2 = (1/2, 1/2); the label is class 1."""
    name = "bert_single_label"
    logits = [torch.tensor([[math.log(3.0), 0.0]]).double(), torch.zeros(1, 2).double()]
    log_p = torch.stack(logits).log_softmax(-1)
    batch = {"input_ids": torch.tensor([[1]]), "labels": torch.tensor([1])}

    def weights_of(kind: str, labels: int = 1) -> list[float]:
        ensemble = Ensemble([bert(), bert()], weights=kind)
        found = ensemble._log_weights(log_p, m.task_of(name), {**batch, "labels": torch.tensor([labels])})
        return found.exp().flatten().tolist()

    assert weights_of("confidence") == pytest.approx([0.6, 0.4])  # 3/4 : 1/2
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))  # the other is log 2
    of_first = math.exp(-entropy) / (math.exp(-entropy) + 0.5)
    assert weights_of("entropy") == pytest.approx([of_first, 1 - of_first])
    assert weights_of("labels") == pytest.approx([1 / 3, 2 / 3])  # 1/4 : 1/2
    assert weights_of("labels", -100) == pytest.approx([0.5, 0.5])
    assert weights_of("best") == pytest.approx([0.0, 1.0])
    assert weights_of("best", -100) == pytest.approx([1.0, 0.0])  # without a label, the more confident teacher


@pytest.mark.parametrize("name", ["bert_tokens", "llama_causal_lm", "bert_span", "t5_seq2seq", "bert_masked_lm"])
def test_the_best_teacher_is_selected_by_the_labels(name: str) -> None:
    """For shifted rows and for two rows per example too."""
    together, alone, (task, batch) = predictions(name, teachers_of(name), temperature=1.0, weights="best")
    target = task.targets(batch)
    of_label = torch.stack([one.log_softmax(-1).gather(-1, target.clamp(min=0)[:, None])[:, 0] for one in alone])
    best = of_label.argmax(0)
    known = (target >= 0) & task.keep(batch)
    assert known.sum() > 3 and len(set(best[known].tolist())) > 1
    for row in known.nonzero().flatten().tolist():
        torch.testing.assert_close(together[row].softmax(-1), alone[best[row]][row].softmax(-1))


def test_an_ensemble_of_equal_teachers_equals_one_teacher() -> None:
    name = "bert_tokens"
    teacher, batch = m.teacher_of(name), m.collated(name, HEADS[name].examples())
    expected, gradient = m.step(m.distiller_of(name), m.student_of(name), [batch])
    for weights_ in (None, "confidence", "entropy", "labels", "best", [3, 1]):
        for mean in ("probabilities", "logits"):
            twins = Ensemble([copy.deepcopy(teacher), copy.deepcopy(teacher)], mean=mean, weights=weights_)
            loss, found = m.step(m.distiller_of(name, teacher=twins), m.student_of(name), [batch])
            assert loss == pytest.approx(expected, rel=1e-12)
            assert m.difference(found, gradient) < 1e-10


@pytest.mark.parametrize("settings", [{}, {"weights": "labels"}, {"mean": "logits"}])
def test_accumulation_changes_nothing(settings: dict) -> None:
    name = "bert_tokens"
    distiller = m.distiller_of(name, teacher=Ensemble(teachers_of(name), **settings))
    examples = HEADS[name].examples()
    _, gradient = m.step(distiller, m.student_of(name), [m.collated(name, examples)])
    parts = [m.collated(name, examples[i : i + 2]) for i in range(0, 8, 2)]
    assert m.difference(m.step(distiller, m.student_of(name), parts)[1], gradient) < 1e-6


def test_training_leaves_the_members_unchanged(tmp_path) -> None:
    teachers = [bert(seed=1), bert(seed=2)]
    before = [weights(teacher) for teacher in teachers]
    trainer = make(tmp_path, bert(), Ensemble(teachers))
    trainer.train()
    for teacher, was in zip(teachers, before, strict=True):
        assert_same_bits(weights(teacher), was)
        assert not teacher.training and not any(p.requires_grad for p in teacher.parameters())
    trainer.create_model_card()
    assert (tmp_path / "out" / "README.md").read_text().count("a local model") >= 2


def test_the_trainer_sets_up_each_member(tmp_path) -> None:
    teachers = [bert(seed=1), bert(seed=2)]
    make(tmp_path, bert(), Ensemble(teachers), teacher_dtype="bfloat16", label_matching="by_index").train()
    assert {p.dtype for teacher in teachers for p in teacher.parameters()} == {torch.bfloat16}
    with pytest.raises(
        SettingError, match="This teacher is a MovingAverage already: give it its dtype where it is made"
    ):
        make(tmp_path, bert(), MovingAverage(), teacher_dtype="bfloat16")


def test_a_column_blocked_in_another_member_is_open_in_the_best() -> None:
    ensemble = Ensemble([bert(), bert()], mean="logits", weights="best")
    logits = [torch.tensor([[3.0, 0.0, 1.0]]), torch.tensor([[0.0, 0.0, -torch.inf]])]
    batch = {"input_ids": torch.tensor([[1]]), "labels": torch.tensor([0])}
    assert ensemble._average(torch.stack(logits), m.task_of("bert_single_label"), batch, 1.0).tolist() == [
        [3.0, 0.0, 1.0]
    ]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mean": "median"}, "mean='median': allowed are probabilities, logits"),
        ({"weights": "loudest"}, "weights='loudest': allowed are confidence, entropy, labels, best, or numbers"),
        ({"weights": [1.0]}, "give one number above 0 for each of 2 teachers"),
        ({"weights": [1.0, 0.0]}, "give one number above 0 for each of 2 teachers"),
    ],
)
def test_invalid_settings_raise(settings: dict, message: str) -> None:
    with pytest.raises(SettingError, match=message):
        Ensemble([bert(), bert()], **settings)


def test_an_ensemble_requires_two_teachers() -> None:
    for one in (bert(), [bert()], "a/path"):
        with pytest.raises(SettingError, match="at least two teachers, as a list"):
            Ensemble(one)


def test_members_with_incompatible_predictions_raise() -> None:
    student = bert()
    names = {"id2label": {0: "LABEL_0", 1: "LABEL_1", 2: "other"}, "label2id": {"LABEL_0": 0, "LABEL_1": 1, "other": 2}}
    odd = bert(seed=1)
    odd.config.id2label, odd.config.label2id = names["id2label"], names["label2id"]
    with pytest.raises(TeacherError):
        Distiller(student, Ensemble([bert(seed=2), odd]))


def test_unsupported_needs_of_a_member_raise_before_the_first_step() -> None:
    ensemble, student = Ensemble([bert(seed=1), bert(seed=2)]), bert()
    with pytest.raises(TeacherError, match="HiddenMatch needs the activations of the teacher"):
        Distiller(student, ensemble, objectives=HiddenMatch())
    with pytest.raises(SettingError, match="an Ensemble has no activations"):
        ensemble.check(Needs(activations=frozenset({ActivationKey("hidden", 0)})))
    asked: list[Needs] = []
    ensemble.teachers[1].check = asked.append
    Distiller(student, ensemble, alpha=1.0, temperature=3.0)
    assert asked and {one.temperature for one in asked} == {3.0}
