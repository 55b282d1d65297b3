"""Presets: the loss of each paper, computed from its formula on tiny models; and invalid settings.

The expected values use outputs of transformers (`output_hidden_states`, `output_attentions`), not this library's hooks.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from hf_distill import DistillationArguments, Distiller, SettingError
from hf_distill.presets import PRESETS, Preset, Stage, distilbert, distilhubert, minilm, minilmv2, pkd, tinybert
from tests.heads import HEADS
from tests.trainer.tiny import bert, examples, padded, softened_kl

MADE: dict[str, Any] = {name: (lambda: pkd(2, 4)) if name == "pkd" else make for name, make in PRESETS.items()}


def models(**student: Any) -> tuple[Any, Any]:
    """Return models of two and four layers, in fp64, without dropout; eager, so that transformers returns attention."""
    ours = bert(num_hidden_layers=2, attn_implementation="eager", **student).double().eval()
    return ours, bert(seed=1, num_hidden_layers=4, attn_implementation="eager").double().eval()


def batch() -> dict[str, Any]:
    return padded(examples(4))


def shown(model: Any) -> Any:
    return model(**batch(), output_hidden_states=True, output_attentions=True)


def found(stage: Stage | Preset, student: Any, teacher: Any) -> tuple[float, Distiller]:
    """Return the loss of one step, and its distiller."""
    objectives = stage.objectives if isinstance(stage, Preset) else stage.make_objectives()
    settings = {k: v for k, v in stage.arguments.items() if k in ("alpha", "temperature")}
    distiller = Distiller(student, teacher, objectives=objectives, seed=0, **settings)
    return distiller(student, batch()).loss.item(), distiller


def kept(x: torch.Tensor) -> torch.Tensor:
    """Select the rows of `[b t d]` that are not padding."""
    return x[batch()["attention_mask"].bool()]


def scores(model: Any, layer: int) -> torch.Tensor:
    """Return `[b h t t]`: q·k/√d, from the weights and the layer's input."""
    own = model.bert.encoder.layer[layer].attention.self
    x = shown(model).hidden_states[layer]
    q, k = (part(x).unflatten(-1, (2, 8)).transpose(1, 2) for part in (own.query, own.key))
    return q @ k.transpose(-1, -2) / math.sqrt(8)


def test_distilbert_is_a_seventh_of_the_papers_loss() -> None:
    """5 · T² KL at T = 2, 2 · labels, 1 · (1 − cosine), over 7; the hidden states of every real position."""
    student, teacher = models()
    ours, theirs = shown(student), shown(teacher)
    kl = softened_kl(ours.logits, theirs.logits, 2.0).mean()
    cosine = 1 - F.cosine_similarity(kept(ours.hidden_states[-1]), kept(theirs.hidden_states[-1]), dim=-1)
    labels = F.cross_entropy(ours.logits, batch()["labels"])
    expected = (5 * kl + 2 * labels + cosine.mean()) / 7
    assert found(distilbert(), student, teacher)[0] == pytest.approx(expected.item(), rel=1e-6)


def test_tinybert_matches_hidden_states_and_then_predictions() -> None:
    """Equations 7 to 9 of layers 1 ← 2 and 2 ← 4 (counted from 1), with one matrix for all hidden states."""
    student, teacher = models(hidden_size=16)
    wide = bert(seed=1, num_hidden_layers=4, hidden_size=24, num_attention_heads=2, attn_implementation="eager")
    teacher = wide.double().eval()
    inside, prediction = tinybert().stages
    loss, distiller = found(inside, student, teacher)
    learned = {name.split(".")[0]: p for name, p in distiller.learned.module.named_parameters()}
    assert sorted(learned) == ["embeddings", "hidden"]
    ours, theirs = shown(student), shown(teacher)
    expected = torch.zeros((), dtype=torch.float64)
    for layer, other in ((0, 1), (1, 3)):
        expected += (
            (kept(ours.hidden_states[layer + 1]) @ learned["hidden"].T - kept(theirs.hidden_states[other + 1]))
            .square()
            .mean()
        )
        expected += attention_distance(scores(student, layer), scores_of_width(teacher, other, 12))
    first = kept(ours.hidden_states[0]) @ learned["embeddings"].T - kept(theirs.hidden_states[0])
    expected += first.square().mean()
    assert loss == pytest.approx(expected.item(), rel=1e-6)
    assert dict(inside.arguments) == {"alpha": None, "num_train_epochs": 20, "learning_rate": 5e-5}
    # Equation 10 at t = 1: the soft cross-entropy minus the teacher's own entropy.
    p = theirs.logits.softmax(-1)
    soft = -(p * ours.logits.log_softmax(-1)).sum(-1).mean() + (p * p.log()).sum(-1).mean()
    assert found(prediction, student, teacher)[0] == pytest.approx(soft.item(), rel=1e-6)


def scores_of_width(model: Any, layer: int, head_size: int) -> torch.Tensor:
    own = model.bert.encoder.layer[layer].attention.self
    x = shown(model).hidden_states[layer]
    q, k = (part(x).unflatten(-1, (2, head_size)).transpose(1, 2) for part in (own.query, own.key))
    return q @ k.transpose(-1, -2) / math.sqrt(head_size)


def attention_distance(q: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
    """Return the mean over real queries of the mean over heads and real keys."""
    per_query = [
        (q[b, :, i, :n] - p[b, :, i, :n]).square().mean()
        for b, n in enumerate(batch()["attention_mask"].sum(-1).tolist())
        for i in range(n)
    ]
    return torch.stack(per_query).mean()


@pytest.mark.parametrize(("variant", "teacher_layer"), [("skip", 2), ("last", 3)])
def test_pkd_equals_the_papers_code(variant: str, teacher_layer: int) -> None:
    """Layer 1 of 2 ← 2 (skip) or 3 (last) of 4, counted from 1: `mse_loss` of unit [CLS] vectors times beta."""
    student, teacher = models()
    ours, theirs = shown(student), shown(teacher)
    unit = [F.normalize(x[:, 0], dim=-1) for x in (ours.hidden_states[1], theirs.hidden_states[teacher_layer])]
    kl = softened_kl(ours.logits, theirs.logits, 10.0).mean()
    expected = 0.3 * F.cross_entropy(ours.logits, batch()["labels"]) + 0.7 * kl + 100 * F.mse_loss(*unit)
    preset = pkd(2, 4, variant=variant, beta=100.0, alpha=0.7, width=16)
    assert found(preset, student, teacher)[0] == pytest.approx(expected.item(), rel=1e-6)


def test_pkd_of_base_size_matches_the_papers_layers() -> None:
    layers = {
        v: [link.teacher + 1 for link in pkd(6, 12, variant=v).objectives[0].layers.links] for v in ("skip", "last")
    }
    assert layers == {"skip": [2, 4, 6, 8, 10], "last": [7, 8, 9, 10, 11]}
    assert [link.student + 1 for link in pkd(6, 12).objectives[0].layers.links] == [1, 2, 3, 4, 5]


def test_minilm_matches_attention_and_value_relations() -> None:
    """KL of the last layers' attention, and of softmax(v·v/√d) by attention head, summed."""
    student, teacher = models()
    ours, theirs = shown(student), shown(teacher)
    values = []
    for model, out, layer in ((student, ours, 1), (teacher, theirs, 3)):
        v = model.bert.encoder.layer[layer].attention.self.value(out.hidden_states[layer])
        values.append(v.unflatten(-1, (2, 8)).transpose(1, 2))
    expected = row_kl(ours.attentions[-1], theirs.attentions[-1]) + relation(*values)
    assert found(minilm(), student, teacher)[0] == pytest.approx(expected.item(), rel=1e-6)


def row_kl(q: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
    """Return the mean over real queries and heads of KL(p ‖ q) over real keys; both are normalized over those."""
    lengths = batch()["attention_mask"].sum(-1).tolist()
    rows = [
        F.kl_div(q[b, :, i, :n].log(), p[b, :, i, :n], reduction="none").sum(-1).mean()
        for b, n in enumerate(lengths)
        for i in range(n)
    ]
    return torch.stack(rows).mean()


def relation(ours: torch.Tensor, theirs: torch.Tensor) -> torch.Tensor:
    """Return relations from `[b h t d]`, cut into h relation heads."""
    hidden = ~batch()["attention_mask"].bool()[:, None, None, :]
    made = [
        (x @ x.transpose(-1, -2) / math.sqrt(x.shape[-1])).masked_fill(hidden, -math.inf).softmax(-1)
        for x in (ours, theirs)
    ]
    return row_kl(*made)


def test_minilmv2_matches_relations_of_queries_keys_and_values_of_a_layer() -> None:
    """Four relation heads of widths 4 and 6, from the third layer of a wider teacher."""
    student, _ = models()
    wide = bert(seed=1, num_hidden_layers=4, hidden_size=24, num_attention_heads=3, attn_implementation="eager")
    teacher = wide.double().eval()
    expected = torch.zeros((), dtype=torch.float64)
    for name in ("query", "key", "value"):
        cut = []
        for model, layer in ((student, 1), (teacher, 2)):
            x = getattr(model.bert.encoder.layer[layer].attention.self, name)(shown(model).hidden_states[layer])
            cut.append(x.unflatten(-1, (4, -1)).transpose(1, 2))
        expected += relation(*cut)
    loss, distiller = found(minilmv2(teacher_layer=2, relation_heads=4), student, teacher)
    assert loss == pytest.approx(expected.item(), rel=1e-6)
    assert not distiller.learned


def test_distilhubert_predicts_three_layers_from_the_last_of_a_bare_speech_encoder() -> None:
    """Equation 1, summed over teacher layers 2, 3 and 4 (counted from 1), each through its own matrix."""
    from transformers import HubertModel

    config = HEADS["hubert_ctc_sum"].make(0).config
    config.num_hidden_layers, config.layerdrop = 2, 0.0
    torch.manual_seed(0)
    student = HubertModel(config).double().eval()
    config = student.config.__class__(**{**student.config.to_dict(), "num_hidden_layers": 4})
    teacher = HubertModel(config).double().eval()
    sounds = {"input_values": torch.randn(2, 1600, dtype=torch.float64)}
    sounds["attention_mask"] = torch.ones(2, 1600, dtype=torch.long)
    preset = distilhubert(teacher_layers=(1, 2, 3), cosine_weight=0.5)
    distiller = Distiller(student, teacher, objectives=preset.objectives, seed=0, **preset.arguments)
    loss = distiller(student, sounds).loss
    ours, theirs = (model(**sounds, output_hidden_states=True).hidden_states for model in (student, teacher))
    matrices = dict(distiller.learned.module.named_parameters())
    assert len(matrices) == 3
    expected = torch.zeros((), dtype=torch.float64)
    for matrix, layer in zip(matrices.values(), (1, 2, 3), strict=True):
        guess, true = ours[-1] @ matrix.T, theirs[layer + 1]
        expected += (guess - true).abs().mean() - 0.5 * F.logsigmoid(F.cosine_similarity(guess, true, dim=-1)).mean()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_describes_itself(name: str, tmp_path) -> None:
    preset = MADE[name]()
    assert preset.name == name and "section" in preset.source and preset.differences
    assert all(sentence.endswith(".") for sentence in preset.differences)
    assert str(preset).splitlines()[0] == f"{name}: {preset.source}"
    for stage in preset.stages:
        DistillationArguments(str(tmp_path), report_to="none", use_cpu=True, **stage.arguments)
        first, second = stage.make_objectives(), stage.make_objectives()
        assert all(one is not other for one, other in zip(first, second, strict=True))


def test_a_preset_of_several_stages_has_no_single_list_of_objectives() -> None:
    for what in ("objectives", "arguments"):
        with pytest.raises(
            SettingError, match=rf"tinybert has 2 stages \(intermediate, prediction\), .* own {what}\. Run"
        ):
            getattr(tinybert(), what)
    with pytest.raises(SettingError, match=r"train_in_stages\(tinybert\(\), model="):
        _ = tinybert().objectives


def test_tinyberts_arguments_can_be_overridden() -> None:
    stages = tinybert(intermediate={"num_train_epochs": 1}, prediction={"learning_rate": 1.0}, temperature=2.0).stages
    assert stages[0].arguments["num_train_epochs"] == 1 and stages[0].arguments["learning_rate"] == 5e-5
    assert stages[1].arguments == {"alpha": 1.0, "temperature": 2.0, "num_train_epochs": 3, "learning_rate": 1.0}


@pytest.mark.parametrize(
    ("given", "named", "message"),
    [
        ((6, 12), {"variant": "first"}, "pkd: variant='first': allowed are skip, last"),
        ((1, 12), {}, "pkd: 1 student layers.*at least 2 layers"),
        ((6, 12), {"beta": -1.0}, "beta=-1.0.*at least 0"),
        ((6, 12), {"width": 0}, "width=0.*at least 1"),
        ((12, 6), {}, "12 student layers cannot be taken from 6"),
    ],
)
def test_invalid_settings_of_pkd(given: tuple[int, int], named: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingError, match=message):
        pkd(*given, **named)
