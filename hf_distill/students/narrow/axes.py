"""Sizes in a config, and which axes of which tensors follow each, by experiment on the meta device. It cuts nothing.

The names of the settings are a table; which tensors they speak of is not: a setting is made larger, and what grew
follows it.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from hf_distill.errors import TeacherError
from hf_distill.models.stacks import empty_like
from hf_distill.students.narrow.dataflow import Dataflow

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


@dataclass
class Sizes:
    """The settings of one kind in a teacher's config."""

    kind: str
    settings: list[Setting]
    values: dict[Setting, int]

    @property
    def value(self) -> int:
        """The one value; several sides of a model that differ are refused."""
        if len(set(self.values.values())) > 1:
            said = ", ".join(f"{setting} is {value}" for setting, value in self.values.items())
            raise TeacherError(f"narrow: {said}. {self.kind}= is one number, for sides that have equally many.")
        return next(iter(self.values.values()))


@dataclass
class Layout:
    """What the experiments on a config gave. `head_setting`: where it says how large a head is; None: it cannot."""

    sizes: dict[str, Sizes]
    config: Any
    head_size: int | None = None
    head_setting: Setting | None = None
    hidden: dict[Place, int] = field(default_factory=dict)
    heads: dict[Place, int] = field(default_factory=dict)
    groups: dict[Place, int] = field(default_factory=dict)
    intermediate: dict[Place, int] = field(default_factory=dict)
    vocabulary: dict[Place, int] = field(default_factory=dict)


def sizes_of(teacher: PreTrainedModel, kind: str) -> Sizes | None:
    """The settings of that kind. None: the config has none that this model reads."""
    found = {}
    for setting in settings_of(kind, teacher.config):
        value = setting.value(teacher.config)
        if value is None and kind == "intermediate":
            value = intermediate_from_experiment(teacher, setting)
        if isinstance(value, int) and not isinstance(value, bool):
            found[setting] = value
    holders = {setting.holder for setting in found}
    if len(holders) > 1:
        said = ", ".join(str(setting) for setting in found)
        raise TeacherError(
            f"narrow: {type(teacher).__name__} has several models inside ({said}). Narrow each by itself."
        )
    return Sizes(kind, list(found), found) if found else None


def all_sizes(teacher: PreTrainedModel, kinds: set[str]) -> dict[str, Sizes]:
    """The settings of every kind; TeacherError where one of `kinds` has none."""
    sizes = {kind: one for kind in ("hidden", "heads", "groups", "intermediate", "vocabulary")
             if (one := sizes_of(teacher, kind)) is not None}  # fmt: skip
    for kind in kinds:
        if kind not in sizes:
            raise TeacherError(f"narrow: no usual setting of {type(teacher.config).__name__} says its {kind} size.")
    return sizes


def layout_of(teacher: PreTrainedModel, kinds: set[str], dataflow: Dataflow) -> Layout:
    """Try every size that is to change, on the meta device."""
    sizes = all_sizes(teacher, kinds)
    open_sizes = {s: v for one in sizes.values() for s, v in one.values.items() if s.value(teacher.config) is None}
    layout = Layout(sizes, changed(teacher.config, open_sizes))
    if kinds & {"hidden", "heads"} and {"hidden", "heads"} <= sizes.keys():
        _find_heads(teacher, layout, dataflow)
    if "hidden" in kinds or ("heads" in kinds and layout.head_setting is None):
        _find_hidden(teacher, layout)
    for kind in sorted(kinds & {"intermediate", "vocabulary"}):
        setattr(layout, kind, _doubled(teacher, layout.config, kind, sizes[kind]))
    return layout


def _twice(config: Any, kind: str, sizes: Sizes) -> dict[Setting, int]:
    both = {setting: 2 * value for setting, value in sizes.values.items()}
    for setting in sizes.settings:
        both |= {other: 2 * other.value(config) for other in along(kind, setting, config)}
    return both


def _doubled(teacher: PreTrainedModel, config: Any, kind: str, sizes: Sizes) -> dict[Place, int]:
    """The axes that become twice as long with the setting, and their length now."""
    found = grown(teacher, config, _twice(config, kind, sizes))
    names = ", ".join(str(setting) for setting in sizes.settings)
    if not found:
        why = "cannot be built with it doubled" if found is None else "has no tensor that grows with it"
        raise TeacherError(f"narrow: {names}: {type(teacher).__name__} {why}, so {kind}= cannot be cut by it.")
    _check_doubled(teacher, found, names)
    return found


def _check_doubled(teacher: PreTrainedModel, found: Mapping[Place, int], names: str) -> None:
    lengths = shapes(teacher)
    for (name, axis), growth in found.items():
        if name not in lengths or lengths[name][axis] != growth:
            raise TeacherError(
                f"narrow: {name} does not simply grow with {names} (by {growth}, and its axis {axis} has "
                f"{lengths.get(name, ('nothing',) * 9)[axis]}): several things lie fused in it, or the teacher was "
                "changed after it was built."
            )


def _find_heads(teacher: PreTrainedModel, layout: Layout, dataflow: Dataflow) -> None:
    """Axes of heads where the config can say a head's size; else those that have one number a head."""
    heads, hidden, groups = layout.sizes["heads"], layout.sizes["hidden"], layout.sizes.get("groups")
    holder = heads.settings[0].holder
    twice = _twice(layout.config, "heads", heads)
    for name in HEAD_SIZES:
        setting = Setting(holder, heads.settings[0].of(layout.config).attribute_map.get(name, name))
        size = setting.value(layout.config) or hidden.value // heads.value
        try:
            config = changed(layout.config, {setting: size})
        except AttributeError:  # a config that works it out and cannot be told
            continue
        found = grown(teacher, config, twice)
        readers = {(name, dataflow.input_axis[name]) for name in dataflow.reading}
        if found and readers and readers <= found.keys() and grown(teacher, config, {setting: 2 * size}):
            _check_doubled(teacher, found, str(heads.settings[0]))
            layout.config, layout.head_setting, layout.head_size, layout.heads = config, setting, size, found
            if groups is not None:
                both = grown(teacher, config, twice | _twice(config, "groups", groups)) or {}
                layout.groups = {place: growth for place, growth in both.items() if place not in found}
                _check_doubled(teacher, layout.groups, str(groups.settings[0]))
            return
    layout.head_size = hidden.value // heads.value
    single = grown(teacher, layout.config, twice) or {}
    layout.heads = {place: growth for place, growth in single.items() if growth == heads.value}


def _find_hidden(teacher: PreTrainedModel, layout: Layout) -> None:
    hidden = layout.sizes["hidden"]
    values = _twice(layout.config, "hidden", hidden)
    if layout.head_setting is None:  # heads keep their size, so there must be twice as many
        for kind in {"heads", "groups"} & layout.sizes.keys():
            values |= _twice(layout.config, kind, layout.sizes[kind])
    found = grown(teacher, layout.config, values)
    if not found:
        raise TeacherError(f"narrow: {type(teacher).__name__} cannot be built with {hidden.settings[0]} doubled.")
    layout.hidden = {place: growth for place, growth in found.items() if place not in layout.heads}
    _check_doubled(teacher, layout.hidden, str(hidden.settings[0]))
