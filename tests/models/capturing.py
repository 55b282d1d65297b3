"""Tiny models of many architectures, their sides, and one forward with captured activations."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any

import pytest
import torch
import transformers as hf

from hf_distill.models.capture import ActivationCapture
from hf_distill.signals import ActivationKey
from tests.heads import _LLAMA
from tests.students.models import LAYERS, MODELS, Tiny, one_an_architecture

_WINDOWED = _LLAMA | {
    "head_dim": 8, "sliding_window": 3, "layer_types": ["sliding_attention", "full_attention"] * 2,
}  # fmt: skip
_BEIT = MODELS["BeitForImageClassification"].settings
READ_TOO = {
    "Gemma2ForCausalLM": Tiny(
        hf.Gemma2ForCausalLM,
        _WINDOWED | {"attn_logit_softcapping": 0.5, "query_pre_attn_scalar": 4},
        {"layers": "model.layers"},
    ),
    "Gemma3ForCausalLM": Tiny(hf.Gemma3ForCausalLM, _WINDOWED, {"layers": "model.layers"}),
    "Beit_biased": Tiny(
        hf.BeitForImageClassification, _BEIT | {"use_relative_position_bias": True}, {"layers": "beit.layers"}, "image"
    ),
}
ALL = MODELS | READ_TOO


def sides_of(name: str) -> tuple[str | None, ...]:
    return ("encoder", "decoder") if len(ALL[name].stacks) == 2 else (None,)


def with_sides(names: Iterable[str]) -> list[Any]:
    """Return test parameters (name, side); further heads of an architecture are slow."""
    return [
        pytest.param(*one.values, side, marks=one.marks)
        for one in one_an_architecture(names)
        for side in sides_of(str(one.values[0]))
    ]


@functools.cache
def model_of(name: str, attention: str | None = None) -> Any:
    """Return a shared model in evaluation mode, which no test may change, with this attention implementation."""
    return ALL[name].make() if attention is None else ALL[name].make(attn_implementation=attention)


def reads(what: str, side: str | None = None, layers: Iterable[int] = range(LAYERS)) -> list[ActivationKey]:
    return [ActivationKey(what, layer, side) for layer in layers]


@torch.no_grad()
def read(model: Any, wanted: Iterable[ActivationKey], batch: dict[str, Any], **keywords: Any) -> tuple[Any, Any]:
    """Return the activations and the outputs of one forward."""
    with ActivationCapture(model, "student").capture(set(wanted)) as seen:
        outputs = model(**batch, **keywords)
    return seen, outputs


def of_side(outputs: Any, what: str, side: str | None) -> Any:
    """Return `hidden_states` or `attentions` of this side from transformers' outputs."""
    return outputs[what] if side is None else outputs[f"{side}_{what}"]
