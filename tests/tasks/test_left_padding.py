"""Prompts of different lengths in a batch: models that attend to padding raise, others generate as for each alone."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
import transformers as hf
from accelerate import Accelerator
from datasets import Dataset
from peft import LoraConfig, PrefixTuningConfig, PromptTuningConfig, get_peft_model

from hf_distill import DataError, generate_completions
from hf_distill.augment import OnPolicy
from hf_distill.models import generation as left_padding
from hf_distill.models.generation import generate_causal, generation_settings

RAGGED = [[5, 6, 7, 8, 9, 10], [12], [13, 14, 15]]
SIZES: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "attention_hidden_size"), 16),
    **dict.fromkeys(("intermediate_size", "decoder_ffn_dim"), 32),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "decoder_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "decoder_attention_heads", "mamba_dt_rank", "state_size"), 2),
    **dict.fromkeys(("max_position_embeddings", "n_positions"), 64),
    **{"vocab_size": 40, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
}
ADAPTERS: dict[str, Any] = {
    "PromptTuning": PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    "PrefixTuning": PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    "Lora": LoraConfig(target_modules=["q_proj"]),
}
pytestmark = [  # warnings of PEFT
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Position ids are not supported:UserWarning"),
]
READ = "Bart", "TrOCR", "PromptTuning"
MASKED = "Llama", "GPT2", "Mamba", "Bloom", "PrefixTuning", "Lora"
TOLD = "does not leave out the padding before a prompt.* prompts of one length a batch, or one at a time"


def make(name: str) -> Any:
    """Return a perturbed model, so that texts differ between prompts; virtual tokens are as large as others."""
    prefix = "Llama" if name in ADAPTERS else name
    config_class = getattr(hf, f"{prefix}Config")
    known = {*inspect.signature(config_class).parameters, *config_class.attribute_map}
    decoder = {"is_decoder": True, "is_encoder_decoder": False} if prefix in ("Bart", "TrOCR") else {}
    config = config_class(**{key: value for key, value in SIZES.items() if key in known}, **decoder)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = getattr(hf, f"{prefix}LMHeadModel" if prefix == "GPT2" else f"{prefix}ForCausalLM")(config)
        model = get_peft_model(model, ADAPTERS[name]) if name in ADAPTERS else model
        for parameter in model.parameters():
            parameter.data.add_(
                (1.0 if name in ADAPTERS and parameter.requires_grad else 0.15) * torch.randn_like(parameter)
            )
    return model.eval()


def settings_of(model: Any) -> Any:
    return generation_settings(model, max_new_tokens=4, do_sample=False, sampling_temperature=1.0)


@pytest.mark.parametrize("name", READ)
def test_models_that_attend_to_padding_reject_ragged_prompts(name: str) -> None:
    model = make(name)
    settings = settings_of(model)
    with pytest.raises(DataError, match=TOLD):
        generate_causal(model, RAGGED, settings)
    alone = [generate_causal(model, [prompt], settings)[0] for prompt in RAGGED]
    of_one_length = [[5, 6], [7, 8], [12, 9]]
    together = generate_causal(model, of_one_length, settings)
    assert together == [generate_causal(model, [prompt], settings)[0] for prompt in of_one_length]
    assert len({*map(tuple, alone)}) > 1


def test_a_model_that_is_wrong_on_batches_rejects_several_prompts() -> None:
    """RWKV is wrong with a cache and more than one row, and attends to padding with or without a cache."""
    model = make("Rwkv")
    settings = settings_of(model)
    of_one_length = [[5, 6], [7, 8], [12, 9]]
    for prompts, others in ((of_one_length, {}), (RAGGED, {}), (of_one_length[:1], {"num_beams": 2})):
        settings.update(**{"num_beams": 1, **others})
        with pytest.raises(DataError, match=r"for several prompts at once than for each alone\. Give it one at"):
            generate_causal(model, prompts, settings)
    settings.update(use_cache=False, num_beams=1)
    alone = [generate_causal(model, [prompt], settings)[0] for prompt in of_one_length]
    assert generate_causal(model, of_one_length, settings) == alone
    with pytest.raises(DataError, match=TOLD):
        generate_causal(model, RAGGED, settings)


@pytest.mark.parametrize("name", MASKED)
def test_other_models_generate_as_without_padding(name: str) -> None:
    """The trial runs once, and leaves the random state and the settings unchanged."""
    model = make(name)
    settings, own, state = settings_of(model), model.generation_config, torch.get_rng_state()
    together = generate_causal(model, RAGGED, settings)
    assert together == [generate_causal(model, [prompt], settings)[0] for prompt in RAGGED]
    ran: list[Any] = []
    model.register_forward_pre_hook(lambda *_: ran.append(1))
    assert generate_causal(model, RAGGED, settings) == together
    assert len(ran) <= settings.max_new_tokens
    assert model.generation_config is own and torch.equal(torch.get_rng_state(), state)


def test_rounding_is_not_mistaken_for_attention_to_padding(monkeypatch) -> None:
    """In 16 bits, from the weights or from Accelerate: logits move by a fifth of their spread."""
    asked = left_padding._steps

    def rounded(*given: Any, padding: int = 0, **others: Any) -> Any:
        return [(x + 0.2 * x.std() * (padding > 0), token) for x, token in asked(*given, padding=padding, **others)]

    monkeypatch.setattr(left_padding, "_steps", rounded)
    with pytest.raises(DataError, match=TOLD):
        generate_causal(make("Llama"), RAGGED, settings_of(make("Llama")))
    wrapped = Accelerator(cpu=True, mixed_precision="bf16").prepare_model(make("Llama"))
    for model in (make("Llama").bfloat16(), wrapped):
        generate_causal(model, RAGGED, settings_of(model))


def test_completions_and_on_policy_reject_ragged_prompts(tmp_path) -> None:
    teacher = make("Bart")
    prompts = Dataset.from_dict({"input_ids": RAGGED})
    with pytest.raises(DataError, match=TOLD):
        generate_completions(teacher, prompts, tmp_path / "ragged", max_new_tokens=4)
    assert len(generate_completions(teacher, prompts, tmp_path / "one", max_new_tokens=4, batch_size=1)) == 3
    ids = torch.tensor([[5, 6, 7], [8, 9, 0]])
    with pytest.raises(DataError, match=TOLD):
        OnPolicy(student_share=1.0, max_new_tokens=4)(
            {"input_ids": ids, "attention_mask": (ids != 0).long()}, teacher, step=0
        )
