"""Teachers with four heads for the tests of `narrow`, and where their units lie, written by hand. No assertions."""

from __future__ import annotations

import re
from typing import Any

import torch

from tests.students.models import MODELS

HEADS = (
    "num_attention_heads", "n_heads", "n_head", "num_heads", "encoder_attention_heads", "decoder_attention_heads"
)  # fmt: skip
HIDDEN, NEURONS, TOKENS, N_HEADS = 16, 32, 40, 4
# Architectures whose config can set a head's size: heads and hidden can be cut separately.
FREE = ("Llama", "Qwen2", "Qwen3", "T5", "AST", "ViT", "Dinov2", "Beit")
# Why hidden and heads, or the neurons, cannot be cut in these architectures.
ERRORS = {
    "Marian": {"hidden": r"embed_positions.weight is computed from the config, not saved"},
    "WavLM": {"hidden": r"gru_rel_pos_const has an axis of heads, but .* no attention that uses it"},
    "Longformer": {"hidden": r"the first batch of data does not use .*key_global.weight"},
    "Dinov2": {"intermediate": r"config.intermediate_size: .* has no tensor that grows with it"},
}
# The matrices that read the heads, those that write them, and those that read the neurons.
READS_HEADS = re.compile(
    r"(layer\.\d+\.attention\.output\.dense|attention\.out_lin|albert_layers\.\d+\.attention\.dense|attn\.o|attn\.Wo|"
    r"attn\.c_proj|o_proj|Attention\.o|attn\.out_proj|attention\.out_proj)$"
)
WRITES_HEADS = re.compile(
    r"(self\.(query|key|value)|[qkv]_lin|attention\.(query|key|value)|self\.(query|key|value)_proj|attn\.[qkv]|attn\.Wqkv|"
    r"attn\.c_attn|[qkv]_proj|Attention\.[qkv])$"
)
READS_NEURONS = re.compile(
    r"(layer\.\d+\.output\.dense|lin2|ffn_output|mlp\.Wo|mlp\.c_proj|down_proj|DenseReluDense\.wo|fc2|"
    r"feed_forward\.output_dense|layers\.\d+\.output\.dense)$"
)


def teacher_of(name: str, layers: int = 2, **settings: Any) -> Any:
    """Return a teacher with four heads (on two key-value heads if possible), and everything else as in `MODELS`."""
    tiny = MODELS[name]
    own = {key: N_HEADS for key in HEADS if key in tiny.settings}
    if "num_key_value_heads" in tiny.settings:
        own["num_key_value_heads"] = 2
    return tiny.make(layers=4 if name.startswith("Longformer") else layers, **{**own, **settings})


def error_for(name: str, kind: str) -> str | None:
    """Return why this size cannot be cut in this model, or None."""
    return next((why[kind] for model, why in ERRORS.items() if name.startswith(model) and kind in why), None)


def has_head_size(name: str) -> bool:
    return name.startswith(FREE)


def sizes_for(name: str) -> dict[str, int]:
    """Return a width and a number of heads that fit the model: heads of size 4 if they depend on the width."""
    return {"hidden": 12, "heads": 2} if has_head_size(name) else {"hidden": 12, "heads": 3}


def inner_axes(module: str) -> list[int]:
    """Return the axes of a matrix `[out, in]` along which heads lie."""
    return [0] if WRITES_HEADS.search(module) else [1] if READS_HEADS.search(module) else []


def masked(model: Any, modules: re.Pattern[str], keep: dict[str, torch.Tensor]) -> Any:
    """Set the inputs of the matched modules to 0 where the mask `keep` is 0; return the hooks."""
    hooks = []
    for name, module in model.named_modules():
        if modules.search(name) and name in keep:
            hooks.append(module.register_forward_pre_hook(lambda _, args, mask=keep[name]: (args[0] * mask, *args[1:])))
    return hooks
