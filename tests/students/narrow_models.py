"""Teachers with four heads for the tests of `narrow`, and by hand what lies where in them. No assertions."""

from __future__ import annotations

import re
from typing import Any

import torch

from tests.students.models import MODELS

HEADS = (
    "num_attention_heads", "n_heads", "n_head", "num_heads", "encoder_attention_heads", "decoder_attention_heads"
)  # fmt: skip
HIDDEN, NEURONS, TOKENS, N_HEADS = 16, 32, 40, 4
# Architectures whose config can say a head's size: heads and hidden are cut one without the other.
FREE = ("Llama", "Qwen2", "Qwen3", "T5", "AST", "ViT", "Dinov2", "Beit")
# Why hidden and heads, or the neurons, cannot be cut there.
REFUSED = {
    "Marian": {"hidden": r"embed_positions.weight is not saved with MarianMTModel but computed from the config"},
    "WavLM": {"hidden": r"gru_rel_pos_const has an axis of heads, but .* no attention that uses it"},
    "Longformer": {"hidden": r"the first batch of data does not reach .*key_global.weight"},
    "Dinov2": {"intermediate": r"config.intermediate_size: .* has no tensor that grows with it"},
}
# The matrices that read the heads, those that make them, and those that read the neurons.
READS_HEADS = re.compile(
    r"(layer\.\d+\.attention\.output\.dense|attention\.out_lin|albert_layers\.\d+\.attention\.dense|attn\.o|attn\.Wo|"
    r"attn\.c_proj|o_proj|Attention\.o|attn\.out_proj|attention\.out_proj)$"
)
MAKES_HEADS = re.compile(
    r"(self\.(query|key|value)|[qkv]_lin|attention\.(query|key|value)|self\.(query|key|value)_proj|attn\.[qkv]|attn\.Wqkv|"
    r"attn\.c_attn|[qkv]_proj|Attention\.[qkv])$"
)
READS_NEURONS = re.compile(
    r"(layer\.\d+\.output\.dense|lin2|ffn_output|mlp\.Wo|mlp\.c_proj|down_proj|DenseReluDense\.wo|fc2|"
    r"feed_forward\.output_dense|layers\.\d+\.output\.dense)$"
)


def teacher_of(name: str, layers: int = 2, **settings: Any) -> Any:
    """Four heads (on two key-value heads, where the model can), and everything else as in `MODELS`."""
    tiny = MODELS[name]
    own = {key: N_HEADS for key in HEADS if key in tiny.settings}
    if "num_key_value_heads" in tiny.settings:
        own["num_key_value_heads"] = 2
    return tiny.make(layers=4 if name.startswith("Longformer") else layers, **{**own, **settings})


def refused(name: str, kind: str) -> str | None:
    """Why this cannot be cut in this model."""
    return next((why[kind] for model, why in REFUSED.items() if name.startswith(model) and kind in why), None)


def is_free(name: str) -> bool:
    return name.startswith(FREE)


def sizes_for(name: str) -> dict[str, int]:
    """A width and a number of heads that fit the model: heads of 4 where they are tied to the width."""
    return {"hidden": 12, "heads": 2} if is_free(name) else {"hidden": 12, "heads": 3}


def inner_axes(module: str) -> list[int]:
    """Axes of a matrix `[out, in]` along which heads lie."""
    return [0] if MAKES_HEADS.search(module) else [1] if READS_HEADS.search(module) else []


def masked(model: Any, modules: re.Pattern[str], keep: dict[str, torch.Tensor]) -> Any:
    """Hooks that set to 0 what the matched modules read of units that are not kept: `keep` is a mask of the input."""
    hooks = []
    for name, module in model.named_modules():
        if modules.search(name) and name in keep:
            hooks.append(module.register_forward_pre_hook(lambda _, args, mask=keep[name]: (args[0] * mask, *args[1:])))
    return hooks
