"""Trainers, teachers, objectives and vocabularies that need whole logits: an error, or an automatic fallback.

Heads and losses that cannot be replaced: `test_logits_needed.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from torch import Tensor

from hf_distill import DistillationTrainer, Distiller, Ensemble, ModelTeacher, Peer, SettingError, UniversalLogitMatch
from hf_distill import fused_forward as without_logits
from tests.heads import HEADS, VOCABULARY
from tests.tiny_tokenizers import tokenizer
from tests.trainer.steps import own_mean
from tests.trainer.tiny import arguments, assert_same_bits, weights

HEAD = HEADS["bart_seq2seq"]
OTHER_WORDS = {f"w{i}": i for i in range(VOCABULARY) if i != 5}


def distiller(fused: bool | None, teacher: Any, **knobs: Any) -> tuple[Distiller, Any]:
    student = HEAD.make(1).train()
    return Distiller(student, teacher, fused_loss=fused, seed=0, **knobs), student


CASES: dict[str, tuple[Callable[[], Any], dict[str, Any], str]] = {
    "peer": (lambda: Peer(HEAD.make(2)), {}, "the teacher learns from the student's logits"),
    "peer among others": (
        lambda: Ensemble([ModelTeacher(HEAD.make(3)), Peer(HEAD.make(2))]),
        {},
        "the teacher learns from the student's logits",
    ),
    "universal logits": (
        lambda: HEAD.make(2),
        {"objectives": UniversalLogitMatch(name="sorted")},
        "sorted need whole logits",
    ),
    "paired columns": (
        lambda: ModelTeacher(HEAD.make(2), processing_class=tokenizer(OTHER_WORDS)),
        {"processing_class": tokenizer(VOCABULARY)},
        "columns of the two vocabularies are paired one by one",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_unsupported_cases_raise_or_fall_back_to_whole_logits(monkeypatch, case: str) -> None:
    """fused_loss=True raises with reason and solution; automatic gives the same bits as whole logits."""
    make, knobs, why = CASES[case]
    batch = HEAD.batch(3)
    never, student = distiller(True, make(), **knobs)
    with pytest.raises(SettingError) as refused:
        never(student, batch)
    assert str(refused.value) == f"fused_loss=True: {why}. Pass fused_loss=False, or None."
    monkeypatch.setattr(without_logits, "LARGE", 10)
    found: list[dict[str, Tensor]] = []
    for fused in (None, False):
        made, student = distiller(fused, make(), **knobs)
        output = made(student, batch)
        output.loss.backward()
        assert output.outputs.logits.shape[-1] == VOCABULARY
        gradients = {name: p.grad for name, p in student.named_parameters() if p.grad is not None}
        found.append({"loss": output.loss, **gradients})
    assert_same_bits(*found)
    automatic, student = distiller(None, HEAD.make(2))
    assert automatic(student, batch).outputs.get("logits") is None  # automatic can be fused


def test_a_custom_loss_receives_whole_logits(tmp_path, monkeypatch) -> None:
    """If labels have no weight, it is not called, and no logits are made."""
    monkeypatch.setattr(without_logits, "LARGE", 10)

    def trained(**settings: Any) -> tuple[dict[str, Tensor], list[bool]]:
        student, made = HEAD.make(1), []
        student.register_forward_hook(lambda *called: made.append(called[-1].logits.shape[-2] > 1))
        trainer = DistillationTrainer(
            model=student,
            teacher_model=HEAD.make(2),
            args=arguments(tmp_path, max_steps=1, **settings),
            train_dataset=HEAD.examples(4),
            data_collator=HEAD.collate,
            compute_loss_func=own_mean,
        )
        trainer.train()
        return weights(student), made

    with pytest.raises(SettingError) as refused:
        trained(fused_loss=True)
    assert str(refused.value) == (
        "fused_loss=True: the labels' term is your own function (compute_loss_func, compute_loss), which "
        "reads logits. Pass fused_loss=False, or None."
    )
    automatic, plain = trained(fused_loss=None), trained(fused_loss=False)
    assert automatic[1] == plain[1] == [True]
    assert_same_bits(automatic[0], plain[0])
    assert not trained(fused_loss=True, alpha=1.0)[1][-1]
