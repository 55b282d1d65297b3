"""Captured queries, keys and values equal the projections of the block's input, computed here by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as hf

from hf_distill import SettingError
from hf_distill.signals import RELATED, ActivationKey
from tests.models.capturing import ALL, model_of, read, reads

# For each architecture: the norm before the projections, if any, and their paths in a block.
PATHS: dict[str, tuple[str | None, tuple[str, ...]]] = {
    "BertModel": (None, ("attention.self.query", "attention.self.key", "attention.self.value")),
    "RobertaForMaskedLM": (None, ("attention.self.query", "attention.self.key", "attention.self.value")),
    "ElectraForMaskedLM": (None, ("attention.self.query", "attention.self.key", "attention.self.value")),
    "DistilBertForMaskedLM": (None, ("attention.q_lin", "attention.k_lin", "attention.v_lin")),
    "DebertaV2ForMaskedLM": (None, tuple(f"attention.self.{one}_proj" for one in ("query", "key", "value"))),
    "MPNetModel": (None, ("attention.attn.q", "attention.attn.k", "attention.attn.v")),
    "ModernBertForMaskedLM": ("attn_norm", ("attn.Wqkv",)),
    "GPT2LMHeadModel": ("ln_1", ("attn.c_attn",)),
    "LlamaForCausalLM": ("input_layernorm", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
    "Qwen3ForCausalLM": ("input_layernorm", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
    "T5EncoderModel": ("layer.0.layer_norm", tuple(f"layer.0.SelfAttention.{one}" for one in "qkv")),
    "BartForConditionalGeneration": (None, ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
    "T5ForConditionalGeneration": ("layer.0.layer_norm", tuple(f"layer.0.SelfAttention.{one}" for one in "qkv")),
    "WhisperForConditionalGeneration": (
        "self_attn_layer_norm", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ),
    "Wav2Vec2ForCTC": ("layer_norm", ("attention.q_proj", "attention.k_proj", "attention.v_proj")),
    "HubertForSequenceClassification_group_norm": (
        None, ("attention.q_proj", "attention.k_proj", "attention.v_proj"),
    ),
}  # fmt: skip


def by_hand(block: Any, stream: torch.Tensor, name: str) -> list[torch.Tensor]:
    norm, paths = PATHS[name]
    if norm is not None:
        stream = block.get_submodule(norm)(stream)
    found = []
    for path in paths:
        module = block.get_submodule(path)
        weight = module.weight if type(module).__name__ == "Conv1D" else module.weight.T  # GPT-2 stores it transposed
        found.append(stream @ weight + (0 if module.bias is None else module.bias))
    return found if len(found) == 3 else list(found[0].chunk(3, -1))


@pytest.mark.parametrize("layer", [0, 2])
@pytest.mark.parametrize("name", PATHS)
def test_queries_keys_and_values_are_projections_of_the_blocks_input(name: str, layer: int) -> None:
    """In an encoder-decoder's decoder: those of the self-attention, not of the cross-attention."""
    model, batch = model_of(name), ALL[name].batch()
    side = "decoder" if len(ALL[name].stacks) == 2 else None
    stream = ActivationKey("hidden", layer - 1, side)
    seen, _ = read(model, [stream, *(ActivationKey(what, layer, side) for what in RELATED)], batch)
    path = ALL[name].stacks["decoder_layers" if side else "layers"]
    block = model.get_submodule(path)[layer]
    with torch.no_grad():
        expected = by_hand(block, convolved(model, seen[stream], batch, name, layer), name)
    for what, value in zip(RELATED, expected, strict=True):
        torch.testing.assert_close(seen[ActivationKey(what, layer, side)], value, atol=1e-5, rtol=1e-5)


def convolved(model: Any, stream: torch.Tensor, batch: Any, name: str, layer: int) -> torch.Tensor:
    """DeBERTa-v2's second block reads the convolved output of the first; later blocks read the stream."""
    assert not (name.startswith("Deberta") and layer == 1)
    return stream


def test_shared_layers_are_distinguished_by_call_order() -> None:
    """ALBERT calls the same module four times; each layer has the queries of its own call."""
    name = "AlbertForMaskedLM"
    model, batch = model_of(name), ALL[name].batch()
    seen, _ = read(model, [*reads("queries"), *reads("hidden", None, range(-1, 4))], batch)
    query = model.albert.encoder.albert_layer_groups[0].albert_layers[0].attention.query
    for layer in range(4):
        with torch.no_grad():
            expected = query(seen[ActivationKey("hidden", layer - 1)])
        torch.testing.assert_close(seen[ActivationKey("queries", layer)], expected)
    assert not torch.equal(seen[ActivationKey("queries", 0)], seen[ActivationKey("queries", 1)])


def test_grouped_keys_are_not_repeated() -> None:
    """Llama with one key group for two heads: half as wide as the queries."""
    seen, _ = read(
        model_of("LlamaForCausalLM"), [ActivationKey(what, 1) for what in RELATED], ALL["LlamaForCausalLM"].batch()
    )
    assert [seen[ActivationKey(what, 1)].shape[-1] for what in RELATED] == [16, 8, 8]


@pytest.mark.parametrize("what", RELATED)
def test_wavlm_projections_passed_to_a_function_raise(what: str) -> None:
    name = "WavLMForCTC"
    with pytest.raises(SettingError, match=rf"{what} of block 1 of the student .* was not called \(WavLM passes"):
        read(model_of(name), [ActivationKey(what, 1)], ALL[name].batch())


def test_the_error_for_unknown_projections_lists_the_modules() -> None:
    """Here the stack is the convolutions of a speech model, which have no attention."""
    name = "Wav2Vec2ForCTC"
    wanted = ActivationKey("queries", 0, None, "wav2vec2.feature_extractor.conv_layers")
    with pytest.raises(SettingError) as raised:
        read(model_of(name), [wanted], ALL[name].batch())
    message = str(raised.value)
    assert "block 0 of the student" in message and "no modules for its queries were found" in message
    assert (
        "Known names: query, q_proj" in message
        and "it has conv, layer_norm" in message
        and "Use HiddenMatch" in message
    )


TINY = {"vocab_size": 40, "bos_token_id": 1, "eos_token_id": 2}
PHI = {**TINY, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 16}
WORDS = {"input_ids": torch.tensor([[1, 2, 3]])}


@pytest.mark.parametrize("what", RELATED)
def test_a_fused_projection_with_unequal_parts_raises(what: str) -> None:
    """Phi-3 with one key group: 24 + 6 + 6 is divisible by three, but the parts are not thirds."""
    model = hf.Phi3ForCausalLM(hf.Phi3Config(**PHI, num_key_value_heads=1, pad_token_id=0))
    with pytest.raises(SettingError, match="from 24 to 36 features is not three equal parts"):
        read(model, [ActivationKey(what, 1)], WORDS)
    equal = hf.Phi3ForCausalLM(hf.Phi3Config(**PHI, num_key_value_heads=4, pad_token_id=0))
    assert read(equal, [ActivationKey(what, 1)], WORDS)[0][ActivationKey(what, 1)].shape[-1] == 24


def test_a_fused_projection_with_interleaved_parts_raises() -> None:
    """CodeGen interleaves partitions of queries, values and keys."""
    config = hf.CodeGenConfig(**TINY, n_embd=16, n_layer=1, n_head=4, rotary_dim=2, n_positions=20)
    with pytest.raises(SettingError, match=r"\(CodeGenBlock\): no modules for its keys were found.* Use HiddenMatch"):
        read(hf.CodeGenForCausalLM(config), [ActivationKey("keys", 0)], WORDS)
