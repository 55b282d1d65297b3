"""Sizes in a config, and which axes of which tensors follow each, by experiment on the meta device. It cuts nothing.

The names of the settings are a table; which tensors they speak of is not: a setting is made larger, and what grew
follows it.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from hf_distill.errors import TeacherError
from hf_distill.inside.stacks import empty_like

NAMES: dict[str, tuple[str, ...]] = {
    "hidden": ("hidden_size", "d_model", "n_embd", "dim"),
    "heads": (
        "num_attention_heads", "n_head", "n_heads", "num_heads", "encoder_attention_heads", "decoder_attention_heads"
    ),
    "groups": ("num_key_value_heads",),
    "intermediate": (
        "intermediate_size", "d_ff", "n_inner", "ffn_dim", "hidden_dim", "encoder_ffn_dim", "decoder_ffn_dim"
    ),
    "vocabulary": ("vocab_size",),
}  # fmt: skip
# Settings that are cut along with one of the above where they are as large.
ALONG: dict[str, tuple[str, ...]] = {
    "hidden": ("embedding_size", "pooler_hidden_size", "output_hidden_size", "word_embed_proj_dim"),
    "vocabulary": ("decoder_vocab_size",),
}
# A head's size, where a config can say it by itself; some models read a name that their config does not declare.
HEAD_SIZES = ("head_dim", "d_kv", "attention_head_size")
# What a constructor may say to a size that was only tried.
_REFUSALS = (
    ValueError, TypeError, RuntimeError, IndexError, KeyError, AttributeError, AssertionError, ArithmeticError,
    StrictDataclassError,
)  # fmt: skip
Place = tuple[str, int]  # a tensor's name, and one of its axes


@dataclass(frozen=True)
class Setting:
    """A size in a config: `holder` are the names of the configs inside configs that lead to it."""

    holder: tuple[str, ...]
    name: str

    def __str__(self) -> str:
        return ".".join(("config", *self.holder, self.name))

    def of(self, config: Any) -> Any:
        """The config that holds the setting."""
        for name in self.holder:
            config = getattr(config, name)
        return config

    def value(self, config: Any) -> Any:
        """What it is now; None where the model works it out from other settings (GPT-2's n_inner)."""
        return getattr(self.of(config), self.name, None)


def settings_of(kind: str, config: PreTrainedConfig) -> list[Setting]:
    """The settings of that kind, each once: an alias is left out."""
    return [Setting(holder, name) for holder, name in _names(config) if name in NAMES[kind]]


def along(kind: str, setting: Setting, config: PreTrainedConfig) -> list[Setting]:
    """Settings that must stay equal to this one."""
    found = [Setting(setting.holder, name) for name in ALONG.get(kind, ())]
    return [one for one in found if one.value(config) is not None and one.value(config) == setting.value(config)]


def _names(config: PreTrainedConfig, holder: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], str]]:
    for name, value in vars(config).items():
        if isinstance(value, PreTrainedConfig):
            yield from _names(value, (*holder, name))
        else:
            yield holder, name


def changed(config: PreTrainedConfig, values: Mapping[Setting, int]) -> PreTrainedConfig:
    """A copy of the config with other sizes."""
    new = copy.deepcopy(config)
    for setting, value in values.items():
        setattr(setting.of(new), setting.name, value)
    return new


def shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Name → shape of every parameter and buffer, tied ones under each of their names."""
    named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    return {name: tuple(tensor.shape) for name, tensor in named}


def grown(teacher: PreTrainedModel, config: PreTrainedConfig, values: Mapping[Setting, int]) -> dict[Place, int] | None:
    """Axes that grow when the settings take these values, and by how much. None: no such model can be built."""
    try:
        before = shapes(empty_like(teacher, config, "meta"))
        after = shapes(empty_like(teacher, changed(config, values), "meta"))
    except _REFUSALS:
        return None
    if before.keys() != after.keys():
        return None  # another model, not a larger one
    found: dict[Place, int] = {}
    for name, shape in before.items():
        other = after[name]
        if len(other) != len(shape):
            return None
        found |= {(name, axis): b - a for axis, (a, b) in enumerate(zip(shape, other, strict=True)) if a != b}
    return found


def intermediate_from_experiment(teacher: PreTrainedModel, setting: Setting) -> int:
    """The size where the config leaves it open: the length of the axes that change when it is given."""
    trial = {setting: 1}
    found = grown(teacher, teacher.config, trial)
    ours = shapes(teacher)
    sizes = {ours[name][axis] for name, axis in found or {} if name in ours}
    if not sizes:
        raise TeacherError(f"narrow: {setting} is None, and setting it changes no tensor of {type(teacher).__name__}.")
    return min(sizes)
