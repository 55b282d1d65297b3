"""Specialists: the solution of equation 5 by other methods, temperatures, label names, and errors."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from hf_distill import Distiller, SettingError, TeacherError
from hf_distill.functional.groups import fit_class_distribution
from hf_distill.teachers.peer import Peer
from hf_distill.teachers.specialists import Specialists, specialist_head
from tests.heads import HEADS
from tests.laws import measuring as m
from tests.teachers.specialized import FOUR, asked, named, specialist, told_by
from tests.trainer.tiny import assert_moved, assert_same_bits, bert, examples, make, padded, weights

SETS = {
    "one": [[0, 1, 2]],
    "apart": [[0, 1], [2, 3], [4]],
    "overlapping": [[0, 1, 2], [1, 2, 3], [0, 3, 5]],
    "nested": [[0, 1, 2, 3, 4], [0, 1], [2, 3]],
}


def drawn(sets: list[list[int]], n: int = 5, v: int = 7, sharpness: float = 2.0) -> tuple[Tensor, Tensor, Tensor, Any]:
    """Return random predictions for classes and dustbins, the sets, and equation 5 as a function of log q `[n v]`."""
    generator = torch.Generator().manual_seed(3)
    generalist = (sharpness * torch.randn(n, v, generator=generator).double()).log_softmax(-1)
    predicted = [(sharpness * torch.randn(n, len(s) + 1, generator=generator).double()).log_softmax(-1) for s in sets]
    summed = generalist.exp()
    for special, log_p in zip(sets, predicted, strict=True):
        summed[:, special] += log_p[:, :-1].exp()
    members = torch.tensor([[c in s for c in range(v)] for s in sets])
    rest = torch.stack([log_p[:, -1] for log_p in predicted], -1)

    def equation_5(log_q: Tensor) -> Tensor:
        total = (generalist.exp() * (generalist - log_q)).sum(-1)
        for special, log_p in zip(sets, predicted, strict=True):
            others = [c for c in range(v) if c not in special]
            seen = torch.cat((log_q[:, special], log_q[:, others].logsumexp(-1, keepdim=True)), -1)
            total = total + (log_p.exp() * (log_p - seen)).sum(-1)
        return total

    return summed.log(), rest, members, equation_5


@pytest.mark.parametrize("name", SETS)
@pytest.mark.parametrize("sharpness", [0.5, 2.0, 5.0])
def test_the_solution_equals_that_of_gradient_descent(name: str, sharpness: float) -> None:
    """On logits as in the paper, with a second-order method until convergence."""
    summed, rest, members, equation_5 = drawn(SETS[name], sharpness=sharpness)
    found = fit_class_distribution(summed, rest, members)
    torch.testing.assert_close(found.exp().sum(-1), torch.ones(len(found)).double(), rtol=1e-10, atol=1e-12)
    z = torch.zeros_like(summed).requires_grad_()
    optimizer = torch.optim.LBFGS(
        [z], max_iter=2000, tolerance_grad=1e-11, tolerance_change=1e-16, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = equation_5(z.log_softmax(-1)).sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    torch.testing.assert_close(found.exp(), z.detach().softmax(-1), rtol=1e-5, atol=1e-8)
    assert bool((equation_5(found) <= equation_5(z.detach().log_softmax(-1)) + 1e-10).all())


@pytest.mark.parametrize("name", SETS)
def test_the_solution_is_a_local_minimum(name: str) -> None:
    summed, rest, members, equation_5 = drawn(SETS[name])
    found = fit_class_distribution(summed, rest, members)
    logits = found.clone().requires_grad_()
    equation_5(logits.log_softmax(-1)).sum().backward()
    assert float(logits.grad.abs().max()) < 1e-9
    for size in (1e-3, 0.1, 3.0):
        moved = (found + size * torch.randn(found.shape).double()).log_softmax(-1)
        assert bool((equation_5(moved) > equation_5(found)).all())


def test_one_specialist_by_hand() -> None:
    """Its classes: the mean of both models. Others: the mean of both dustbin masses, shared as by the generalist.

    With q_C the mass outside, `summed_c / q_c` must be equal for the classes inside, and
    `g_c / q_c + d / q_C` for those outside: q_c = (g_c + p_c) / 2 inside; q_C = (g_C + d) / 2, q_c = g_c q_C / g_C.
    """
    double = torch.float64
    g, p, d = torch.tensor([0.6, 0.1, 0.2, 0.1], dtype=double), torch.tensor([0.1, 0.5], dtype=double), 0.4
    summed = torch.cat((g[:2] + p, g[2:]))[None].log()
    members = torch.tensor([[True, True, False, False]])
    found = fit_class_distribution(summed, torch.tensor([[d]], dtype=double).log(), members).exp()[0]
    expected = torch.tensor([0.35, 0.3, (0.3 + d) / 2 * 2 / 3, (0.3 + d) / 2 / 3], dtype=double)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=0)


def test_contradicting_predictions_and_blocked_classes_stay_finite() -> None:
    """A generalist certain of the special classes, a specialist certain of its dustbin, in fp32 logits."""
    log_g = torch.tensor([[0.0, -200.0, -300.0, -301.0, -torch.inf]]).log_softmax(-1)
    members = torch.tensor([[True, True, False, False, False]])
    found = fit_class_distribution(log_g, torch.tensor([[0.0]]), members)
    # Half of the mass is on class 0, half on the dustbin, which is shared as 1 : 1/e.
    assert found.exp()[0].tolist() == pytest.approx(
        [0.5, 0.0, 0.5 / (1 + math.exp(-1)), 0.5 / (1 + math.e), 0.0], abs=1e-6
    )
    assert found[0, 4] == -torch.inf and math.isfinite(found[0, 1])


# As a teacher.


def test_a_specialist_affects_only_rows_of_its_classes() -> None:
    generalist, one = bert(seed=3, **FOUR).double(), specialist((2, 0))
    predicted, batch = asked(Specialists(generalist, {(2, 0): one}))
    g, p = told_by(generalist, batch), told_by(one, batch)
    active = (g.argmax(-1) == 0) | (g.argmax(-1) == 2)
    assert 0 < active.sum() < len(g)
    torch.testing.assert_close(predicted[~active], g[~active])
    expected = torch.zeros_like(g)
    expected[:, 2], expected[:, 0] = (g[:, 2] + p[:, 0]) / 2, (g[:, 0] + p[:, 1]) / 2
    outside = g[:, [1, 3]]
    expected[:, [1, 3]] = outside / outside.sum(-1, keepdim=True) * (outside.sum(-1, keepdim=True) + p[:, 2:]) / 2
    torch.testing.assert_close(predicted[active], expected[active], rtol=1e-7, atol=1e-10)
    every, _ = asked(Specialists(generalist, {(2, 0): one}, most_probable=4))
    torch.testing.assert_close(every, expected, rtol=1e-7, atol=1e-10)


def test_an_unneeded_specialist_is_not_run() -> None:
    generalist = bert(seed=3, **FOUR).double()
    generalist.classifier.bias.data[1] += 1000
    one = specialist((0, 2))
    one.register_forward_pre_hook(lambda *_: pytest.fail("it was run"))
    predicted, batch = asked(Specialists(generalist, {(0, 2): one}))
    torch.testing.assert_close(predicted, told_by(generalist, batch))


class Agreeing(torch.nn.Module):
    """A specialist that agrees with the generalist on its classes and on all others together."""

    def __init__(self, generalist: Any, classes: tuple[int, ...]) -> None:
        super().__init__()
        self.model, self.classes = generalist, list(classes)
        self.config = bert(num_labels=len(classes) + 1).config

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Any:
        found = self.model(input_ids=input_ids, attention_mask=attention_mask)
        others = [c for c in range(found.logits.shape[-1]) if c not in self.classes]
        rest = found.logits[:, others].logsumexp(-1, keepdim=True)
        return {"logits": torch.cat((found.logits[:, self.classes], rest), -1)}


@pytest.mark.parametrize("temperature", [1.0, 2.0, 20.0])
def test_specialists_that_agree_change_nothing_at_any_temperature(temperature: float) -> None:
    generalist = bert(seed=3, **FOUR).double()
    sets = ((0, 2), (1,), (3, 1, 0))
    agreeing = {one: Agreeing(bert(seed=3, **FOUR).double(), one) for one in sets}
    predicted, batch = asked(Specialists(generalist, agreeing, most_probable=2), temperature)
    torch.testing.assert_close(predicted, told_by(generalist, batch, temperature), rtol=1e-7, atol=1e-10)


def test_the_current_temperature_is_used() -> None:
    generalist, one = bert(seed=3, **FOUR).double(), specialist((2, 0))
    found = {t: asked(Specialists(generalist, {(2, 0): one}, most_probable=4), t)[0] for t in (1.0, 4.0)}
    _, batch = asked(Specialists(generalist, {(2, 0): one}))
    g, p = told_by(generalist, batch), told_by(one, batch)
    # The specialist's dustbin, distributed as by the generalist, softened class by class.
    full = torch.zeros_like(g)
    full[:, 2], full[:, 0] = p[:, 0], p[:, 1]
    full[:, [1, 3]] = p[:, 2:] * g[:, [1, 3]] / g[:, [1, 3]].sum(-1, keepdim=True)
    soft_g, soft_p = (x ** (1 / 4) / (x ** (1 / 4)).sum(-1, keepdim=True) for x in (g, full))
    torch.testing.assert_close(found[4.0][:, [0, 2]], ((soft_g + soft_p) / 2)[:, [0, 2]], rtol=1e-7, atol=1e-10)
    assert float((found[4.0] - found[1.0]).abs().max()) > 0.01


def test_the_bias_corrects_the_dustbin() -> None:
    generalist, one, corrected = bert(seed=3, **FOUR).double(), specialist((2, 0)), specialist((2, 0))
    corrected.classifier.bias.data[2] += 1.5
    by_bias, _ = asked(Specialists(generalist, {(2, 0): one}, dustbin_bias=[1.5]))
    torch.testing.assert_close(by_bias, asked(Specialists(generalist, {(2, 0): corrected}))[0])
    assert float((by_bias - asked(Specialists(generalist, {(2, 0): one}))[0]).abs().max()) > 0.01


def with_columns(model: Any, order: list[int]) -> Any:
    """Return the same model with its labels in another order."""
    names = [model.config.id2label[index] for index in order]
    model.classifier.weight.data = model.classifier.weight.data[order]
    model.classifier.bias.data = model.classifier.bias.data[order]
    return named(model, names)


def test_labels_are_matched_by_name() -> None:
    names = ["cat", "dog", "cow", "owl"]

    def made(generalist_order: list[int], order: list[int], classes: tuple[Any, ...]) -> Tensor:
        student = named(bert(seed=9, **FOUR).double(), names)
        generalist = with_columns(named(bert(seed=3, **FOUR).double(), names), generalist_order)
        own = with_columns(named(specialist(classes), ["cow", "cat", "other"]), order)
        return asked(Specialists(generalist, {classes: own}, most_probable=4), 2.0, student)[0]

    expected = made([0, 1, 2, 3], [0, 1, 2], ("cow", "cat"))
    for generalist_order, order, classes in (
        ([2, 0, 3, 1], [1, 2, 0], ("cow", "cat")),
        ([2, 0, 3, 1], [2, 1, 0], (0, 1)),  # these ids are the generalist's: cow and cat
        ([3, 2, 1, 0], [0, 1, 2], ("cat", "cow")),
    ):
        torch.testing.assert_close(made(generalist_order, order, classes), expected)


@pytest.mark.parametrize("name", ["bert_single_label", "bert_tokens", "vit_image_class", "wav2vec2_audio_class"])
def test_every_kind_of_classifier_can_have_specialists(name: str) -> None:
    """Accumulation changes nothing, equal models have zero loss, and only the student gets a gradient."""
    generalist = HEADS[name].make(4).double()
    own = specialist_head(HEADS[name].make(5).double(), [0, 1])
    count = generalist.config.num_labels
    assert count > 2
    teacher = Specialists(generalist, {tuple(generalist.config.id2label[i] for i in (0, 1)): own}, most_probable=count)
    distiller = m.distiller_of(name, teacher=teacher)
    examples = HEADS[name].examples()
    parts = [m.collated(name, examples[i : i + 2]) for i in range(0, 8, 2)]
    _, gradient = m.step(distiller, m.student_of(name), [m.collated(name, examples)])
    _, of_generalist = m.step(m.distiller_of(name, teacher=generalist), m.student_of(name), parts)
    if HEADS[name].pads:
        assert m.difference(m.step(distiller, m.student_of(name), parts)[1], gradient) < 1e-6
    assert m.difference(of_generalist, gradient) > 1e-3
    assert all(p.grad is None and not p.requires_grad for one in (generalist, own) for p in one.parameters())


def test_training_leaves_the_models_unchanged(tmp_path) -> None:
    models = [bert(seed=1), bert(seed=2, num_labels=3)]
    before = [weights(model) for model in models]
    trainer = make(tmp_path, bert(), Specialists(models[0], {(0, 2): models[1]}))
    trainer.train()
    for model, was in zip(models, before, strict=True):
        assert_same_bits(weights(model), was)
        assert not model.training and not any(p.requires_grad for p in model.parameters())
    assert not [path for path in tmp_path.rglob("*") if path.name.startswith("distill_teacher")]


@pytest.mark.parametrize(
    ("specialists", "settings", "message"),
    [
        ({}, {}, "give {classes: specialist, ...} with at least one"),
        ({"ab": None}, {}, "classes 'ab': give a tuple of different label names or ids"),
        ({(0, 0): None}, {}, "classes (0, 0): give a tuple of different"),
        ({(): None}, {}, "classes (): give a tuple"),
        ({(0, 1): None}, {"dustbin_bias": [1.0, 2.0]}, "2 numbers in dustbin_bias for 1 specialists"),
        ({(0, 1): None}, {"most_probable": 0}, "most_probable=0: must be a whole number of at least 1"),
    ],
)  # fmt: skip
def test_invalid_settings_raise(specialists: Any, settings: Any, message: str) -> None:
    with pytest.raises(SettingError) as refusal:
        Specialists(bert(), specialists, **settings)
    assert message in str(refusal.value)


@pytest.mark.parametrize(
    ("classes", "model", "message"),
    [
        ((0, 5), bert(num_labels=3), "5 in (0, 5) is no label of the generalist. It has ids 0 to 3: LABEL_0"),
        (("cat",), bert(num_labels=2), "'cat' in ('cat',) is no label of the generalist"),
        ((0, 1), bert(num_labels=4), "the specialist of (0, 1) has 4 labels; it must have 3"),
        ((0, 1), named(bert(num_labels=3), ["a", "b", "c"]), "has labels ['a', 'b', 'c']; expected ['LABEL_0', 'LA"),
        ((0, 1, 2, 3), bert(num_labels=5), "are all classes, so there is no rest"),
        ((0, 1), bert("TokenClassification", num_labels=3), "has a token_classification head, the student needs"),
    ],
)  # fmt: skip
def test_invalid_specialists_raise(classes: Any, model: Any, message: str) -> None:
    with pytest.raises(TeacherError) as refusal:
        Distiller(bert(seed=2, **FOUR), Specialists(bert(seed=1, **FOUR), {classes: model}))
    assert message in str(refusal.value)


def test_heads_without_classes_raise() -> None:
    values = bert(num_labels=1)
    with pytest.raises(TeacherError, match="a regression head has no classes to be a specialist of"):
        Distiller(values, Specialists(bert(seed=1, num_labels=1), {(0,): bert(seed=2)}))
    several = HEADS["bert_multi_label"]
    own = specialist_head(several.make(4), [0, 1])
    distiller = Distiller(several.make(1), Specialists(several.make(3), {(0, 1): own}))
    with pytest.raises(TeacherError, match="Multi-label heads have no confusable classes"):
        distiller(several.make(1), several.collate(several.examples(), None))


def test_a_generalist_that_learns_from_batches_gets_them() -> None:
    """A peer as generalist was never trained."""
    student, peer = bert(**FOUR), Peer(bert(seed=1, **FOUR), learning_rate=0.1)
    distiller = Distiller(student, Specialists(peer, {(0, 1): specialist_head(bert(seed=2, **FOUR), [0, 1])}))
    before = weights(peer.model)
    distiller(student, padded(examples(4))).loss.backward()
    distiller.end_step(student)
    assert_moved(weights(peer.model), before)
