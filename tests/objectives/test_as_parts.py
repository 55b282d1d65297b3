"""Objectives as terms of the loss: invalid lists, weights and alphas are rejected; each has a one-line repr."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

from hf_distill import AttentionMatch, Distiller, HiddenMatch, RelationMatch, SimilarityMatch
from hf_distill.objectives import LogitsMatch
from hf_distill.presets import distilbert, pkd, tinybert
from hf_distill.signals import Signals
from tests.heads import HEADS
from tests.objectives.by_hand import refused

HEAD = HEADS["bert_tokens"]


@pytest.mark.parametrize(
    ("objectives", "words"),
    [
        ([HiddenMatch(), HiddenMatch()], ("two terms are called 'hidden'", "HiddenMatch(..., name=...)")),
        ([HiddenMatch(name="labels")], ("labels",)),
        ([HiddenMatch(name="logits")], ("logits",)),
        ([LogitsMatch()], ("the logits' term is there already. Say divergence=, temperature=, alpha=",)),
        ({"a": LogitsMatch()}, ("the logits' term is there already",)),
        ([HiddenMatch], ("is no objective", "HiddenMatch, CosineEmbedding, AttentionMatch")),
        ("hidden", ("'hidden' is no objective", "Did you mean 'HiddenMatch'?")),
        (["AttentonMatch"], ("'AttentonMatch' is no objective", "Did you mean 'AttentionMatch'?")),
        (HEAD.make(1), ("a BertForTokenClassification is no objective",)),
        (distilbert(), ("'distilbert' is a preset", ".objectives", ".arguments", "**preset.arguments")),
        ([pkd(2, 4)], ("'pkd' is a preset", ".objectives")),
        (tinybert(), ("'tinybert' is a preset", "train_in_stages(preset")),
        ([None], ("None is no objective",)),
    ],
)
def test_invalid_lists_of_objectives_are_rejected(objectives: Any, words: tuple[str, ...]) -> None:
    refused(lambda: Distiller(HEAD.make(1), HEAD.make(2), objectives=objectives), *words)


@pytest.mark.parametrize("objectives", [None, [], {}])
def test_alpha_none_requires_objectives(objectives: Any) -> None:
    refused(
        lambda: Distiller(HEAD.make(1), HEAD.make(2), alpha=None, objectives=objectives),
        "alpha=None is a loss of the objectives alone, and there are none. Pass objectives=",
    )


@pytest.mark.parametrize("alpha", [0.0, 0.5, None])
def test_objectives_need_a_teacher(alpha: float | None) -> None:
    """Even where alpha alone does not need one."""
    refused(
        lambda: Distiller(HEAD.make(1), None, alpha=alpha, objectives=HiddenMatch()),
        "there is no teacher",
        "Pass teacher_model=",
        "hidden" if alpha != 0.5 else "alpha is 0.5",
    )


def test_a_step_whose_terms_all_weigh_zero_is_rejected() -> None:
    distiller = Distiller(
        HEAD.make(1), HEAD.make(2), alpha=None, objectives=HiddenMatch(weight=lambda progress: progress)
    )
    refused(
        lambda: distiller.begin_step([HEAD.batch(2)], progress=0.0),
        "at 0% of the training every term weighs 0, so there is no loss",
    )
    assert set(distiller.begin_step([HEAD.batch(2)], progress=0.5).denominators) == {"hidden"}


def test_repr_is_one_line_and_shows_the_layer_map_once_bound() -> None:
    """Logs and model cards print it."""
    objective = HiddenMatch("skip", distance="cosine")
    assert repr(objective).startswith("HiddenMatch(layers 'skip', distance='cosine'")
    distiller = Distiller(HEAD.make(1, layers=2), HEAD.make(2, layers=4), objectives=objective)
    bound = repr(distiller.objectives["hidden"])
    assert re.match(r"HiddenMatch\(layers 2 of 4 layers: 0←1 1←3, distance='cosine'", bound)
    assert objective.layer_map is None  # the user's object is unchanged and can be passed to another distiller


@pytest.mark.parametrize("objective", [HiddenMatch, AttentionMatch, RelationMatch, SimilarityMatch])
def test_objectives_ignore_an_outer_autocast(objective: Any) -> None:
    """Autocast would round the products of scores, relations, similarities and projections to bf16."""
    student, teacher, batch = HEAD.make(1), HEAD.make(2, width=24), HEAD.batch(4)
    distiller = Distiller(student, teacher, alpha=None, objectives=objective(name="one"), seed=0)
    with distiller.capture() as inside:
        student(**batch)
    theirs = distiller.teacher_signals(batch, distiller.blending.needs(0.0)[1])
    given = (Signals(None, activations=inside), theirs, distiller.task, batch)
    expected = distiller.objectives["one"](*given).value
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(distiller.objectives["one"](*given).value, expected)
