"""The trial of the output head in the first step: what it must not disturb or miss."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers as tf
from torch import Tensor, nn

from hf_distill import Distiller, HiddenMatch, RelationMatch, SettingError
from hf_distill.functional.fused.inputs import Head, TeacherLogits, Terms
from hf_distill.functional.fused.loss import fused_linear_distillation
from tests.heads import HEADS, VOCABULARY
from tests.trainer.logit_free import assert_same, both, pair

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # PEFT's


class Uneven(tf.GPT2LMHeadModel):
    """Scales each column by a different factor, and raises on demand."""

    interrupted = False

    def forward(self, *args: Any, **keywords: Any) -> Any:
        if Uneven.interrupted:
            Uneven.interrupted = False
            raise KeyboardInterrupt
        outputs = super().forward(*args, **keywords)
        outputs.logits = outputs.logits * torch.linspace(0.5, 1.5, VOCABULARY)
        return outputs


@pytest.mark.parametrize("whose", ["student", "teacher"])
def test_an_interrupted_trial_is_repeated(whose: str) -> None:
    plain, teacher, batch = pair("gpt2_causal_lm")
    odd = Uneven(teacher.config).double().train()
    models = (odd, teacher) if whose == "student" else (plain, odd)
    expected = Distiller(*models)(models[0], batch).loss
    distiller = Distiller(*models, fused_loss=True)
    Uneven.interrupted = True
    with pytest.raises(KeyboardInterrupt):
        distiller(models[0], batch)
    if whose == "student":
        with pytest.raises(SettingError, match="does more to its logits"):
            distiller(odd, batch)
    else:
        torch.testing.assert_close(distiller(plain, batch).loss, expected, rtol=1e-5, atol=0.0)


def test_labels_that_get_weight_later_are_tried_then() -> None:
    shape: Any = {"vocab_size": VOCABULARY, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    shape |= {"num_attention_heads": 2, "num_key_value_heads": 2, "num_local_experts": 2}
    student = tf.MixtralForCausalLM(tf.MixtralConfig(**shape, output_router_logits=True)).train()
    distiller = Distiller(student, copy.deepcopy(student), alpha=1.0, fused_loss=True)
    ids = torch.tensor([[1, 5, 7, 9]])
    distiller(student, {"input_ids": ids, "labels": ids})
    distiller.set_blend(alpha=0.5)
    with pytest.raises(SettingError, match="adds a loss of its own"):
        distiller(student, {"input_ids": ids, "labels": ids})


@pytest.mark.parametrize(
    "objective", [RelationMatch(), HiddenMatch([(0, 0)], embeddings=True)], ids=["relation", "hidden"]
)
def test_captured_activations_are_not_those_of_the_trial(objective: Any) -> None:
    assert_same(both(*pair("bert_masked_lm"), objectives=objective))


@pytest.mark.parametrize(
    ("name", "seeds"),
    [
        ("bart_seq2seq", range(24, 30)),
        *(pytest.param(name, range(30), marks=pytest.mark.slow) for name in ("bart_seq2seq", "t5_seq2seq")),
    ],
)
def test_a_loss_summed_in_bf16_is_accepted(name: str, seeds: range) -> None:
    """In one or two of thirty models, bf16 rounding changes the loss by more than one percent."""
    head = HEADS[name]
    teacher, batch = head.make(2).bfloat16(), head.batch(2)
    for seed in seeds:
        student = head.make(2 * seed + 1).bfloat16()
        output = Distiller(student, teacher, fused_loss=True)(student, batch)
        assert output.outputs.get("logits") is None


def test_prompt_tuning_adds_positions() -> None:
    import peft

    plain, teacher, batch = pair("llama_causal_lm")
    settings = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    student = peft.get_peft_model(copy.deepcopy(plain), settings)
    with pytest.raises(SettingError, match=r"is given positions of its own \(PEFT prompt tuning\)"):
        Distiller(student, teacher, fused_loss=True)(student, batch)
    prefix = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    student = peft.get_peft_model(copy.deepcopy(plain), prefix).double()
    assert_same(both(student, teacher, batch))


class Seeing(tf.LlamaForCausalLM):
    """Attends to image patches in addition to its tokens, whichever example they belong to."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.see = nn.Linear(2, config.hidden_size)

    def forward(self, input_ids: Tensor, patches: Tensor | None = None, **keywords: Any) -> Any:  # type: ignore[override]  # fewer arguments do here
        assert patches is not None and int((input_ids == 4).sum()) == len(patches)
        embedded = self.get_input_embeddings()(input_ids)
        seen = torch.zeros_like(embedded)
        seen[input_ids == 4] = self.see(patches).to(embedded)
        return super().forward(inputs_embeds=embedded + seen, **keywords)


def test_inputs_that_are_not_per_example() -> None:
    config = pair("llama_causal_lm")[0].config
    student, teacher = (Seeing(config).double() for _ in range(2))
    ids = torch.tensor([[1, 4, 4, 9], [1, 4, 8, 9]])  # three patches for two examples
    batch = {"input_ids": ids, "labels": ids, "patches": torch.rand(3, 2).double()}
    assert_same(both(student, teacher, batch, task="causal_lm"))


def test_a_config_with_a_string_as_scale() -> None:
    config = tf.MptConfig(d_model=16, n_heads=2, n_layers=1, vocab_size=VOCABULARY, logit_scale="inv_sqrt_d_model")
    student, teacher = (tf.MptForCausalLM(config).double() for _ in range(2))
    ids = torch.tensor([[1, 5, 7, 9]])
    assert_same(both(student, teacher, {"input_ids": ids, "labels": ids}))


@pytest.mark.parametrize("dtypes", [(torch.float64, torch.float32), (torch.float32, torch.float64)])
def test_models_in_different_full_precisions(dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    student, teacher, batch = pair("gpt2_causal_lm")
    models = [copy.deepcopy(model).to(dtype) for model, dtype in zip((student, teacher), dtypes, strict=True)]
    assert_same(both(*models, batch), rtol=1e-4, atol=1e-6)


# The fused loss alone.


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jensen_shannon", "total_variation"])
def test_nan_in_a_row_without_weight_does_not_hide_a_blocked_column(divergence: str) -> None:
    """L3: −inf in the second row, with and without NaN in the first."""
    hidden, weight, logits = torch.randn(3, 4).double(), torch.randn(7, 4).double(), torch.randn(3, 7).double()
    logits[1, 2] = -torch.inf
    found = []
    for first in (0.0, torch.nan):
        taught, rows = logits.clone(), hidden.clone().requires_grad_()
        taught[0, 0] = first
        one = fused_linear_distillation(
            rows,
            Head(weight),
            teacher=TeacherLogits(taught),
            terms=Terms(divergence),
            row_weights=torch.tensor([0.0, 1.0, 1.0]).double(),
        )
        one.loss.backward()
        assert one.divergence_rows is not None and rows.grad is not None
        found.append((one.divergence_rows[1:], rows.grad))
    for value, expected in zip(found[1], found[0], strict=True):
        torch.testing.assert_close(value, expected)
    assert found[0][1].isfinite().all()


@pytest.mark.parametrize("divergence", ["forward_kl", "decoupled", "mean_squared_error", "hard"])
def test_the_fused_loss_in_inference_mode(divergence: str) -> None:
    hidden, weight, labels = torch.randn(3, 4), torch.randn(7, 4), torch.tensor([1, 0, 5])
    given: Any = {"teacher": TeacherLogits(torch.randn(3, 7)), "terms": Terms(divergence), "labels": labels}
    expected = fused_linear_distillation(hidden.clone().requires_grad_(), Head(weight), **given).loss
    with torch.inference_mode():
        found = fused_linear_distillation(hidden, Head(weight), **given).loss
    torch.testing.assert_close(found, expected.detach())
