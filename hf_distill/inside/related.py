"""Where a block computes its queries, keys and values, for relations (MiniLM). Finds modules, reads nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor, nn

from hf_distill.errors import SettingError
from hf_distill.signals import RELATED

# What architectures call the three projections, and one that makes all three side by side.
_NAMES = {
    "queries": ("query", "q_proj", "q_lin", "q", "query_proj", "q_linear", "linear_q", "wq"),
    "keys": ("key", "k_proj", "k_lin", "k", "key_proj", "k_linear", "linear_k", "wk"),
    "values": ("value", "v_proj", "v_lin", "v", "value_proj", "v_linear", "linear_v", "wv"),
}
_FUSED = ("c_attn", "Wqkv", "qkv", "qkv_proj")
# Their projections compute on [time, example, width].
_TIME_FIRST = ("LongformerSelfAttention", "LEDEncoderSelfAttention")
# Heads or partitions lie interleaved there, not queries, keys and values side by side.
_INTERLEAVED = ("CodeGenAttention", "GPTBigCodeAttention", "MiniMaxLightningAttention")
# Attention to another sequence is no relation within this one.
_CROSS = ("crossattention", "encoder_attn", "EncDecAttention", "cross_attn", "multihead_attn")


class Source(NamedTuple):
    """A module, and what is meant of its output (given its input, too)."""

    module: nn.Module
    part: Callable[[Tensor, Tensor], Tensor]


def sources_of(block: nn.Module, what: str, *, whose: str, layer: int) -> Source:
    """The module whose output holds the queries, keys or values of a block's self-attention.

    Raises:
        SettingError: it has none that is known by name, or several.
    """
    own = {name: m for name, m in block.named_modules() if not any(part in _CROSS for part in name.split("."))}
    found = [name for name in own if name.rpartition(".")[2] in _NAMES[what]]
    if len(found) == 1:
        time_first = _class_around(block, found[0]) in _TIME_FIRST
        return Source(own[found[0]], _examples_first if time_first else _whole)
    fused = [m for name, m in own.items() if name.rpartition(".")[2] in _FUSED and not _interleaves(block, name)]
    if not found and len(fused) == 1:
        return Source(fused[0], _third(RELATED.index(what)))
    names = [name for name in own if name and not any(True for _ in own[name].children())]
    raise SettingError(
        f"block {layer} of the {whose} ({type(block).__name__}): {len(found) or 'no'} modules for its {what} were "
        f"found. Known names: {', '.join((*_NAMES[what], *_FUSED))}; it has {', '.join(names)}. Use HiddenMatch there."
    )


def _interleaves(block: nn.Module, path: str) -> bool:
    return _class_around(block, path) in _INTERLEAVED


def _class_around(block: nn.Module, path: str) -> str:
    """The class of the module that holds the one at this path."""
    return type(block.get_submodule(path.rpartition(".")[0])).__name__


def _whole(given: Tensor, output: Tensor) -> Tensor:
    return output


def _examples_first(given: Tensor, output: Tensor) -> Tensor:
    return output.transpose(0, 1).clone()  # Longformer divides its queries in place afterwards


def _third(index: int) -> Callable[[Tensor, Tensor], Tensor]:
    def part(given: Tensor, output: Tensor) -> Tensor:
        if output.shape[-1] != 3 * given.shape[-1]:
            raise SettingError(
                f"a fused projection makes {output.shape[-1]} numbers of {given.shape[-1]}, which are not three equal "
                "parts (grouped keys and values). Its relations cannot be told apart; use HiddenMatch."
            )
        return output.chunk(3, dim=-1)[index]

    return part


def is_cross_attention(path: str) -> bool:
    """Whether a module's path inside a block is of attention to another sequence."""
    return any(part in _CROSS for part in path.split("."))
