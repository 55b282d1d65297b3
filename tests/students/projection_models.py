"""Teachers whose hidden states may be rotated, and how to compare them exactly. No assertions."""

from __future__ import annotations

from typing import Any

import torch
import transformers as hf
from torch.overrides import TorchFunctionMode

from tests.students.models import MODELS, Tiny
from tests.students.narrow_models import teacher_of

_SIZES = {
    "vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 4, "intermediate_size": 32, "max_position_embeddings": 32, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip
_MT5 = MODELS["T5ForConditionalGeneration"].settings | {"num_layers": 2, "num_decoder_layers": 2, "num_heads": 4}
_BIASES = {"attention_bias": True, "mlp_bias": True, "num_labels": 3}
OTHERS: dict[str, Tiny] = {
    "Mistral": Tiny(hf.MistralForCausalLM, _SIZES, {"layers": "model.layers"}),
    "Gemma": Tiny(hf.GemmaForCausalLM, _SIZES, {"layers": "model.layers"}),
    "Gemma2": Tiny(hf.Gemma2ForCausalLM, _SIZES, {"layers": "model.layers"}),
    "Llama with biases": Tiny(hf.LlamaForSequenceClassification, _SIZES | _BIASES, {"layers": "model.layers"}),
    "mT5": Tiny(hf.MT5ForConditionalGeneration, _MT5, {"encoder_layers": "encoder.block", "decoder_layers": "decoder"}),
}
NAMES = ("LlamaForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM", "T5ForConditionalGeneration", "Mistral", "Gemma",
         "Llama with biases", "mT5")  # fmt: skip
WRITERS = (
    "o_proj",
    "down_proj",
    "Attention.o",
    "DenseReluDense.wo",
)  # written by hand: their outputs are added to the hidden states


def tiny_of(name: str) -> Tiny:
    return OTHERS.get(name) or MODELS[name]


def make(name: str, **settings: Any) -> Any:
    """Return a teacher in float64 whose norms have different weights."""
    layers = 2 if name in ("LlamaForCausalLM", "Gemma", "Gemma2") else 1
    settings = {"layers": layers, **settings}
    return (OTHERS[name].make(**settings) if name in OTHERS else teacher_of(name, **settings)).double()


class Exactly(TorchFunctionMode):
    """Keep float64, where norms and softmax would convert to float32."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = dict(kwargs or {})
        if any(isinstance(one, torch.Tensor) and one.dtype == torch.float64 for one in args):
            if func is torch.Tensor.float:
                return args[0]
            args = tuple(torch.float64 if one is torch.float32 else one for one in args)
            given = {name: torch.float64 if one is torch.float32 else one for name, one in given.items()}
        return func(*args, **given)


def logits(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad(), Exactly():
        return model.double()(**batch).logits  # position tables too are float32 in a new model


def keep_in_subspace(teacher: Any, basis: torch.Tensor, leak: float = 0.0) -> None:
    """Project everything that is added to the hidden states to an orthonormal basis; `leak` of it stays outside."""
    projector = basis @ basis.T * (1 - leak) + leak * torch.eye(len(basis), dtype=basis.dtype)
    with torch.no_grad():
        tables = {
            id(one): one
            for one in [module.weight for module in teacher.modules() if isinstance(module, torch.nn.Embedding)]
            if one.shape[1] == len(basis)
        }
        for table in tables.values():  # a tied table once
            table.copy_(table @ projector)
        for name, parameter in teacher.named_parameters():
            if name.rpartition(".")[0].endswith(WRITERS):
                parameter.copy_(projector @ parameter)
