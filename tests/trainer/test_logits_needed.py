"""When the fused loss falls back to whole logits, or raises with the reason."""

from __future__ import annotations

import copy
import logging
from typing import Any, cast

import pytest
import torch
import transformers as tf
from transformers import Trainer

from hf_distill import DistillationMixin, DistillationTrainer, Distiller, HiddenMatch, SettingError
from hf_distill import fused_forward as without_logits
from hf_distill.models.output_head import OutputHead
from tests.heads import HEADS, VOCABULARY
from tests.trainer.logit_free import assert_same, both, pair
from tests.trainer.tiny import arguments, bert

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # PEFT's


class Doubled(tf.GPT2LMHeadModel):
    """Changes its logits in a way that its config does not show."""

    def forward(self, *args: Any, **keywords: Any) -> Any:
        outputs = super().forward(*args, **keywords)
        outputs.logits = outputs.logits * 2
        return outputs


class Charged(tf.GPT2LMHeadModel):
    """Adds a penalty to its loss."""

    def forward(self, *args: Any, **keywords: Any) -> Any:
        outputs = super().forward(*args, **keywords)
        if outputs.get("loss") is not None:
            outputs.loss = outputs.loss + 0.1
        return outputs


class Capped(tf.GPT2LMHeadModel):
    """A soft cap that its config does not show, far above its initial logits."""

    def forward(self, *args: Any, **keywords: Any) -> Any:
        outputs = super().forward(*args, **keywords)
        outputs.logits = 30 * torch.tanh(outputs.logits / 30)
        return outputs


NOT_WHAT_THEY_SEEM = [(Doubled, "does more to its logits"), (Charged, "own loss is more than"), (Capped, "does more")]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("kind", "why"), NOT_WHAT_THEY_SEEM)
def test_a_model_that_modifies_logits_or_loss(caplog, monkeypatch, kind: Any, why: str, dtype: torch.dtype) -> None:
    _, teacher, batch = pair("gpt2_causal_lm")
    student = kind(teacher.config).to(dtype).train()
    with pytest.raises(SettingError, match=rf"fused_loss=True: .*{why}.*Pass fused_loss=False"):
        Distiller(student, teacher, fused_loss=True)(student, batch)
    monkeypatch.setattr(without_logits, "LARGE", 10)
    automatic = Distiller(student, teacher, fused_loss=None)
    with caplog.at_level(logging.WARNING):
        found = [automatic(student, batch).loss for _ in range(2)]
    assert len(caplog.records) == 1 and why in caplog.text  # one message
    expected = Distiller(student, teacher)(student, batch).loss
    assert all(torch.equal(one, expected) for one in found)


@pytest.mark.parametrize("autocast", [False, True])
def test_the_balance_loss_of_a_mixture_of_experts_needs_whole_logits(autocast: bool) -> None:
    """In bf16 and in fp32."""
    shape: Any = {"vocab_size": VOCABULARY, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    shape |= {"num_attention_heads": 2, "num_key_value_heads": 2, "num_local_experts": 2, "router_aux_loss_coef": 1e-3}
    ids = torch.tensor([[1, 5, 7, 9]])
    for balanced in (True, False):
        student = tf.MixtralForCausalLM(tf.MixtralConfig(**shape, output_router_logits=balanced)).train()
        teacher = tf.MixtralForCausalLM(tf.MixtralConfig(**shape))
        with torch.autocast("cpu", enabled=autocast):
            if balanced:
                with pytest.raises(SettingError, match=r"adds a loss of its own \(aux_loss\)"):
                    Distiller(student, teacher, fused_loss=True)(student, {"input_ids": ids, "labels": ids})
            else:
                Distiller(student, teacher, fused_loss=True)(student, {"input_ids": ids, "labels": ids})


def test_all_config_names_of_soft_caps() -> None:
    config = tf.RecurrentGemmaConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        lru_width=16,
        logits_soft_cap=0.5,
    )
    student, teacher = (tf.RecurrentGemmaForCausalLM(config).double() for _ in range(2))
    ids = torch.tensor([[1, 5, 7, 9]])
    assert_same(both(student.eval(), teacher, {"input_ids": ids, "labels": ids}))


@pytest.mark.parametrize("kind", [Doubled, Capped])
def test_a_teacher_that_modifies_its_logits_returns_whole_logits(kind: Any) -> None:
    student, teacher, batch = pair("gpt2_causal_lm")
    odd = kind(teacher.config).double()
    odd.load_state_dict(teacher.state_dict())
    assert_same(both(student, odd, batch))


def test_the_head_of_a_sharded_teacher_is_always_tried(monkeypatch) -> None:
    """FSDP2 leaves its root gathered after the first forward."""
    student, teacher, batch = pair("gpt2_causal_lm")
    odd = Doubled(teacher.config).double()
    expected = Distiller(student, odd)(student, batch).loss
    sharded = iter([True])
    monkeypatch.setattr(OutputHead, "is_sharded", lambda self: next(sharded, False))
    distiller = Distiller(student, odd, fused_loss=True)
    for _ in range(3):
        torch.testing.assert_close(distiller(student, batch).loss, expected, rtol=1e-5, atol=0.0)  # own loss in fp32


def test_the_automatic_fused_loss_has_a_threshold(monkeypatch) -> None:
    student, teacher, batch = pair("gpt2_causal_lm")
    for columns, made in ((VOCABULARY + 1, True), (VOCABULARY, False)):
        monkeypatch.setattr(without_logits, "LARGE", columns)
        found = Distiller(student, teacher, fused_loss=None)(student, batch)
        assert (found.outputs.get("logits") is not None) == made
    without_teacher = Distiller(student, alpha=0.0, fused_loss=None)
    assert without_teacher(student, batch).outputs.logits is not None  # alpha=0 equals Trainer


@pytest.mark.parametrize(
    ("knobs", "why"),
    [
        ({"divergence": lambda q, p: (q - p).square().sum(-1)}, "is your own function"),
        ({"divergence": "dist"}, "compares rows with each other"),
        ({"alpha": None, "objectives": HiddenMatch([(0, 0)])}, "compared in no term"),
    ],
)
def test_unsupported_settings_raise_with_the_reason(knobs: dict[str, Any], why: str) -> None:
    student, teacher, batch = pair("llama_causal_lm")
    with pytest.raises(SettingError, match=f"fused_loss=True: .*{why}"):
        Distiller(student, teacher, fused_loss=True, **knobs)(student, batch)


def test_heads_without_a_vocabulary_and_invalid_values_raise() -> None:
    distiller = Distiller(bert(), bert(seed=1), fused_loss=True)
    batch = {"input_ids": torch.tensor([[1, 2]]), "labels": torch.tensor([0])}
    with pytest.raises(SettingError, match="a classification head has no vocabulary"):
        distiller(bert(), batch)
    with pytest.raises(SettingError, match="fused_loss='no': allowed are None, True and False"):
        Distiller(bert(), bert(seed=1), fused_loss=cast(Any, "no"))


def test_an_adapter_on_the_head_needs_whole_logits() -> None:
    import peft

    student = copy.deepcopy(pair("llama_causal_lm")[0])
    adapted = peft.get_peft_model(student, peft.LoraConfig(r=2, target_modules=["lm_head"]))
    refusal = OutputHead(adapted).refusal
    assert refusal is not None and "not a plain nn.Linear (an adapter on it, or quantised" in refusal


class Halved(Trainer):
    """A trainer with its own loss."""

    def compute_loss(self, *args: Any, **keywords: Any) -> Any:
        loss, outputs = super().compute_loss(*args, **{**keywords, "return_outputs": True})
        return loss / 2, outputs


class HalvedDistillation(DistillationMixin, Halved):
    """The same with a teacher."""


def test_a_trainers_own_loss_receives_logits(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(without_logits, "LARGE", 10)
    head = HEADS["gpt2_causal_lm"]

    def trained(kind: Any, **settings: Any) -> dict[str, float]:
        args = arguments(tmp_path, max_steps=1, logging_steps=1, **settings)
        given = {"train_dataset": head.examples(4), "data_collator": head.collate}
        trainer = kind(model=head.make(1), teacher_model=head.make(2), args=args, **given)
        trainer.train()
        return trainer.state.log_history[0]

    own, plain = trained(HalvedDistillation), trained(DistillationTrainer)
    assert own["loss/labels"] == pytest.approx(plain["loss/labels"] / 2, rel=1e-5)
    assert own["loss/logits"] == pytest.approx(plain["loss/logits"], rel=1e-5)
    with pytest.raises(SettingError, match="term is your own function"):
        trained(HalvedDistillation, fused_loss=True)
    trained(HalvedDistillation, fused_loss=True, alpha=1.0)  # without labels its own loss is not used
