"""Capturing under gradient checkpointing: equal gradients, or an error where the graph is hidden."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers.pytorch_utils import Conv1D

from hf_distill import (
    AttentionMatch,
    CosineEmbedding,
    Distiller,
    HiddenMatch,
    RelationMatch,
    SettingError,
    SimilarityMatch,
)
from hf_distill.models.capture import ActivationCapture
from tests.heads import HEADS
from tests.laws import measuring as m

pytestmark = pytest.mark.filterwarnings("ignore:`gradient_checkpointing_.*` is deprecated:FutureWarning")  # and not yet
NAMES = ("bert_tokens", "gpt2_causal_lm", "t5_seq2seq", "wav2vec2_ctc_mean", "vit_image_class")
OBJECTIVES: dict[str, Callable[[], Any]] = {
    "hidden": lambda: HiddenMatch(embeddings=True),
    "cosine": CosineEmbedding,
    "attention": AttentionMatch,
    "relations": RelationMatch,
    "similarity": SimilarityMatch,
}
INSIDE_A_BLOCK = ("attention", "relations")  # reentrant checkpointing computes these without a graph


@pytest.fixture(params=NAMES)
def models(request) -> tuple[str, Any, Any]:
    head = HEADS[request.param]
    return request.param, head.make(1, layers=2).double().train(), head.make(2, layers=3, width=24).double()


def measured(models: tuple[str, Any, Any], objective: str, **checkpointing: Any) -> tuple[float, torch.Tensor]:
    name, student, teacher = models
    if checkpointing:
        student.gradient_checkpointing_enable(gradient_checkpointing_kwargs=checkpointing)
    try:
        distiller = Distiller(student, teacher, alpha=None, objectives=OBJECTIVES[objective](), seed=0)
        return m.step(distiller, student, [m.collated(name, HEADS[name].examples(4))])
    finally:
        student.gradient_checkpointing_disable()


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True:UserWarning")  # torch, in the teacher
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradients_equal_those_without_checkpointing(models, reentrant: bool) -> None:
    for objective in OBJECTIVES:
        if reentrant and objective in INSIDE_A_BLOCK:
            continue
        loss, gradient = measured(models, objective)
        found_loss, found = measured(models, objective, use_reentrant=reentrant)
        assert found_loss == pytest.approx(loss, rel=1e-12), objective
        assert gradient.norm() > 1e-4 and m.difference(found, gradient) < 1e-12, objective


def test_checkpointed_blocks_run_twice(models) -> None:
    """The test above is only meaningful if the backward recomputes each block."""
    name, student, _ = models
    runs: list[object] = []
    block = ActivationCapture(student, "student").blocks().modules[0]
    leaf = next(module for module in block.modules() if isinstance(module, (torch.nn.Linear, Conv1D)))
    leaf.register_forward_hook(lambda *_: runs.append(1))
    measured(models, "hidden")
    assert len(runs) == 1
    for reentrant in (False, True):
        runs.clear()
        measured(models, "hidden", use_reentrant=reentrant)
        assert len(runs) == 2, name


@pytest.mark.parametrize("objective", INSIDE_A_BLOCK)
def test_activations_inside_reentrant_blocks_raise(models, objective: str) -> None:
    with pytest.raises(SettingError) as raised:
        measured(models, objective, use_reentrant=True)
    message = str(raised.value)
    assert "of the student has no gradient: gradient checkpointing with use_reentrant=True hides it" in message
    assert 'gradient_checkpointing_kwargs={"use_reentrant": False}' in message
