"""Which architectures keep packed texts apart: each one that docs/causal_lm.md names, tried with a tiny model.

Errors in training: `tests/trainer/test_padding_free.py`.
"""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from transformers import DataCollatorWithFlattening

from hf_distill import DataError, Distiller

DOCUMENT = Path(__file__).resolve().parents[2] / "docs/causal_lm.md"
TEXTS = [[1, 5, 6, 7, 8], [9, 10, 11], [12, 13, 14, 15, 16, 17]]
# Every config takes the names that it knows. Windows are shorter than the texts.
SIZES: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "word_embed_proj_dim", "attention_hidden_size"), 16),
    **dict.fromkeys(("intermediate_size", "n_inner", "ffn_dim"), 32),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "num_key_value_heads", "n_head", "n_heads", "num_heads"), 2),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_seq_len"), 64),
    **dict.fromkeys(("num_local_experts", "num_experts", "attention_heads"), 2),
    **dict.fromkeys(("hidden_dropout", "attention_dropout", "embd_pdrop", "resid_pdrop", "attn_pdrop"), 0.0),
    **{"vocab_size": 40, "head_dim": 8, "num_experts_per_tok": 1, "lru_width": 16, "rotary_dim": 4, "state_size": 4},
    **{"sliding_window": 4, "window_size": 4, "mamba_dt_rank": 4, "pad_token_id": 0, "bos_token_id": 1},
}
LOCAL_AND_GLOBAL = {"layer_types": ["sliding_attention", "full_attention"]}
# As the document lists them: the name in transformers, and further settings of the config.
APART: dict[str, tuple[str, dict[str, Any]]] = {
    "Llama": ("Llama", {}),
    "Mistral": ("Mistral", {}),
    "Mixtral": ("Mixtral", {}),
    "Qwen2": ("Qwen2", {}),
    "Qwen3": ("Qwen3", {}),
    "Gemma": ("Gemma", {}),
    "Gemma 2": ("Gemma2", LOCAL_AND_GLOBAL),
    "Gemma 3": ("Gemma3Text", LOCAL_AND_GLOBAL),
    "Phi": ("Phi", {}),
    "Phi-3": ("Phi3", {}),
    "GPT-2": ("GPT2", {}),
    "GPT-Neo": ("GPTNeo", {"attention_types": [[["global", "local"], 1]]}),
    "GPT-NeoX": ("GPTNeoX", {}),
    "GPT-J": ("GPTJ", {}),
    "GPT-BigCode": ("GPTBigCode", {}),
    "StableLM": ("StableLm", {}),
    "OLMo": ("Olmo", {}),
    "OLMo 2": ("Olmo2", {}),
    "Cohere": ("Cohere", {}),
    "SmolLM3": ("SmolLM3", {}),
    "Granite": ("Granite", {}),
    "Starcoder2": ("Starcoder2", {}),
    "Persimmon": ("Persimmon", {}),
}
SEEN: dict[str, tuple[str, dict[str, Any]]] = {
    "OPT": ("OPT", {}),
    "BLOOM": ("Bloom", {}),
    "Falcon": ("Falcon", {}),
    "MPT": ("Mpt", {}),
    "XGLM": ("XGLM", {}),
    "BioGPT": ("BioGpt", {}),
    "GPT-OSS": ("GptOss", LOCAL_AND_GLOBAL),
    "Mamba": ("Mamba", {}),
    "RWKV": ("Rwkv", {}),
    "Jamba": ("Jamba", {}),
    "RecurrentGemma": ("RecurrentGemma", {}),
    "LFM2": ("Lfm2", {"layer_types": ["conv", "full_attention"]}),
}
CASES = [
    (name, attention)
    for name, (prefix, _) in {**APART, **SEEN}.items()
    for attention in ("eager", "sdpa")
    if attention == "eager" or hf.MODEL_FOR_CAUSAL_LM_MAPPING[getattr(hf, f"{prefix}Config")]._supports_sdpa
]


def tiny(name: str, attention: str, seed: int = 0) -> Any:
    prefix, more = {**APART, **SEEN}[name]
    config_class = getattr(hf, f"{prefix}Config")
    known = {*inspect.signature(config_class).parameters, *config_class.attribute_map}
    config = config_class(**{**{key: value for key, value in SIZES.items() if key in known}, **more})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = hf.AutoModelForCausalLM.from_config(config, attn_implementation=attention, dtype=torch.float32)
        for parameter in model.parameters():
            parameter.data.add_(0.15 * torch.randn_like(parameter))
    return model.eval()


def test_the_document_lists_the_tested_architectures() -> None:
    text = " ".join(DOCUMENT.read_text(encoding="utf-8").split())
    apart, seen = (re.search(f"{begin}: ([^:]*?)\\.(?: |$)", text) for begin in ("kept texts apart", "These did not"))
    assert apart is not None and apart[1].split(", ") == list(APART)
    assert seen is not None and re.split(", | and ", re.sub(r" \(.*?\)", "", seen[1])) == list(SEEN)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "attention"), CASES)
def test_packed_texts_are_kept_apart_or_rejected(name: str, attention: str) -> None:
    """Compares with the logits of each text alone, and with the library's own check of the model."""
    model = tiny(name, attention)
    batch = DataCollatorWithFlattening(return_tensors="pt")([{"input_ids": text} for text in TEXTS])
    read = inspect.signature(model.forward).parameters
    packed = {key: batch[key] for key in ("input_ids", "position_ids") if key in read}
    with torch.no_grad():
        alone = torch.cat([model(input_ids=torch.tensor([text]), use_cache=False).logits[0] for text in TEXTS])
        together = model(**packed, use_cache=False).logits[0]
    apart = (alone - together).abs().max() / alone.abs().max()
    distiller = Distiller(model, tiny(name, attention, 1))
    if name in APART:
        assert apart < 1e-5
        distiller.begin_step([batch])
    else:
        assert apart > 0.01
        with pytest.raises(DataError, match="lets each see those before it"):
            distiller.begin_step([batch])
