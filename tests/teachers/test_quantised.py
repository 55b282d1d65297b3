"""Dynamic int8: quantised layers, an unchanged original, and the agreement by its definition."""

from __future__ import annotations

import logging
import re
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from hf_distill import Distiller, SettingError
from hf_distill.teachers import quantised as module
from hf_distill.teachers.quantised import Agreement, QuantisedTeacher, is_dynamic, quantise_dynamically
from tests.heads import HEADS
from tests.trainer.tiny import assert_same_bits, bert, weights

NAMES = ["bert_single_label", "bert_tokens", "llama_causal_lm", "t5_seq2seq", "bert_regression", "bert_span"]


def distiller_of(name: str, teacher: Any) -> tuple[Distiller, Any]:
    distiller = Distiller(HEADS[name].make(1), teacher, temperature=2.0, alpha=0.5)
    return distiller, distiller.prepare(HEADS[name].batch())


@pytest.mark.parametrize("name", NAMES)
def test_a_quantised_teacher_is_close_to_the_original(name: str) -> None:
    """With 255 steps each layer adds an error of about half a step, so a few percent of the logits' spread."""
    full = HEADS[name].make(2)
    before = weights(full)
    teacher = quantise_dynamically(full)
    distiller, batch = distiller_of(name, teacher)
    predictions = distiller.teacher_signals(batch).predictions()
    live = distiller_of(name, full)[0].teacher_signals(batch).predictions()
    finite = live > -torch.inf
    error = (predictions - live)[finite].square().mean().sqrt() / live[finite].std()
    assert 1e-3 < error < 0.06
    assert is_dynamic(teacher.model) and not is_dynamic(full)
    assert_same_bits(weights(full), before)


def test_head_and_embeddings_are_not_quantised() -> None:
    teacher = quantise_dynamically(HEADS["llama_causal_lm"].make(2))
    kinds = {name: type(part).__module__ for name, part in teacher.model.named_modules()}
    assert type(teacher.model.lm_head) is nn.Linear
    assert kinds["model.layers.0.self_attn.q_proj"].startswith("torch.ao.nn.quantized.dynamic")
    assert kinds["model.layers.0.mlp.down_proj"].startswith("torch.ao.nn.quantized.dynamic")
    assert isinstance(teacher.model.model.embed_tokens, nn.Embedding)


@pytest.mark.parametrize("name", NAMES)
def test_agreement_follows_its_definition(name: str, caplog: pytest.LogCaptureFixture) -> None:
    teacher = quantise_dynamically(full := HEADS[name].make(2))
    distiller, batch = distiller_of(name, teacher)
    with caplog.at_level(logging.WARNING):
        ours = distiller.teacher_signals(batch).predictions()
        distiller.teacher_signals(batch)
    task, found = distiller.task, teacher.agreement
    live, _ = distiller_of(name, full)
    keep = task.kept_rows(batch)
    q, p = (task.select(x, batch) for x in (ours, live.teacher_signals(batch).predictions()))
    q, p = (q, p) if keep is None else (q[keep], p[keep])
    assert found is not None and found.rows == len(q)
    if task.on_values:
        assert found.kl is None and found.difference == pytest.approx((q - p).abs().mean().item())
    else:
        q, p = q.double().softmax(-1), p.double().softmax(-1)
        kl = torch.where(p > 0, p * (p / q).log(), 0.0).sum(-1).mean().item()
        assert found.kl == pytest.approx(kl, rel=1e-2, abs=1e-6) and found.kl > 0
        assert found.same_choice == pytest.approx((q.argmax(-1) == p.argmax(-1)).double().mean().item())
    assert caplog.text.count("against its full precision") == 1 and str(found) in caplog.text


def test_the_agreement_as_text() -> None:
    assert str(Agreement(8, kl=0.01234, same_choice=0.875)) == (
        "KL 0.0123 nats a row, the same choice in 87.5%, over 8 rows"
    )
    assert str(Agreement(3, difference=0.5)) == "mean absolute difference 0.5 over 3 rows"


def not_there() -> nn.Module:
    raise OSError("no such folder")


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ({"full": None}, "its full precision is not known"),
        ({"full": bert, "full_bytes": 10**15}, r"its 1000000.0 GB do not fit into [\d.]+ GB of free memory"),
        ({"full": not_there}, r"it cannot be loaded \(OSError\)"),
    ],
)
def test_unavailable_agreement_has_a_reason(
    settings: dict[str, Any], why: str, caplog: pytest.LogCaptureFixture
) -> None:
    teacher = QuantisedTeacher(bert(seed=2), how="four bits", **settings)
    distiller = Distiller(bert(), teacher)
    batch = {"input_ids": torch.tensor([[1, 2]]), "labels": torch.tensor([0])}
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            distiller.teacher_signals(batch)
    assert teacher.agreement is None
    assert re.search(why, teacher.not_measured or "")
    assert caplog.text.count("not compared with its full precision") == (0 if settings["full"] is None else 1)


def test_the_random_state_does_not_change() -> None:
    teacher = quantise_dynamically(bert(seed=2))
    distiller, made = Distiller(bert(), teacher), teacher._full
    teacher._full = lambda: (torch.rand(3), made())[1]  # type: ignore[misc]  # `made` is one here
    state = torch.get_rng_state()
    distiller.teacher_signals({"input_ids": torch.tensor([[1, 2]]), "labels": torch.tensor([0])})
    assert teacher.agreement is not None and torch.equal(torch.get_rng_state(), state)
    assert teacher._full is None  # its memory has been freed


def test_only_the_main_process_measures_agreement() -> None:
    teacher = quantise_dynamically(bert(seed=2))
    distiller = Distiller(bert(), teacher)
    teacher._accelerator = SimpleNamespace(is_main_process=False)
    distiller.teacher_signals({"input_ids": torch.tensor([[1, 2]]), "labels": torch.tensor([0])})
    assert teacher.agreement is None and teacher.not_measured == "it is measured on the main process"


def test_models_that_cannot_be_quantised_raise() -> None:
    with pytest.raises(SettingError, match=r"the body of GPT2LMHeadModel has no torch\.nn\.Linear"):
        quantise_dynamically(HEADS["gpt2_causal_lm"].make())
    with pytest.raises(SettingError, match="starts from float32 weights, and these are bfloat16"):
        quantise_dynamically(bert().bfloat16())


def test_dynamic_int8_requires_a_cpu() -> None:
    teacher = quantise_dynamically(bert())
    with pytest.raises(SettingError, match="needs a CPU, and this training is on cuda"):
        teacher.to(SimpleNamespace(device=torch.device("cuda")))


def test_a_torch_without_quantisation_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module.torch.ao, "quantization", SimpleNamespace())
    with pytest.raises(SettingError, match=r"has no dynamic int8 here"):
        quantise_dynamically(bert())
