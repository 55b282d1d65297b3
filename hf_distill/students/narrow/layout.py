"""Which axes of which tensors follow each size in a config, found by experiments on the meta device.

The names of settings are a table. Which tensors they control is not: a setting is doubled, and the axes that grow
follow it.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from hf_distill.errors import TeacherError
from hf_distill.models.stacks import TRIAL_ERRORS, empty_model
from hf_distill.models.stacks import DepthSetting as Setting
from hf_distill.students.building import all_tensors
from hf_distill.students.narrow.dataflow import Dataflow

Kind = Literal["hidden", "heads", "key_value_heads", "intermediate", "vocabulary"]
Place = tuple[str, int]  # a tensor's name, and one of its axes
Lengths = dict[Place, int]

NAMES: dict[Kind, tuple[str, ...]] = {
    "hidden": ("hidden_size", "d_model", "n_embd", "dim"),
    "heads": (
        "num_attention_heads", "n_head", "n_heads", "num_heads", "encoder_attention_heads", "decoder_attention_heads"
    ),
    "key_value_heads": ("num_key_value_heads",),
    "intermediate": (
        "intermediate_size", "d_ff", "n_inner", "ffn_dim", "hidden_dim", "encoder_ffn_dim", "decoder_ffn_dim"
    ),
    "vocabulary": ("vocab_size",),
}  # fmt: skip
# Settings that are cut together with those above where they are equal.
_FOLLOWERS: dict[Kind, tuple[str, ...]] = {
    "hidden": ("embedding_size", "pooler_hidden_size", "output_hidden_size", "word_embed_proj_dim"),
    "vocabulary": ("decoder_vocab_size",),
}
# The size of a head, where a config can set it; some models read a name that their config does not declare.
_HEAD_SIZES = ("head_dim", "d_kv", "attention_head_size")


def value_of(setting: Setting, config: PreTrainedConfig) -> int | None:
    """Return a size, or None if the model derives it from other settings (GPT-2's n_inner)."""
    value = getattr(setting.parent(config), setting.name, None)
    return value if type(value) is int else None


@dataclass
class Sizes:
    """The settings of one kind in a teacher's config.

    Attributes:
        kind: the kind of size.
        values: the value of each setting.
    """

    kind: Kind
    values: dict[Setting, int]

    @property
    def value(self) -> int:
        """The value. Raises TeacherError if the sides of the model have different values."""
        if len(set(self.values.values())) > 1:
            found = ", ".join(f"{setting} is {value}" for setting, value in self.values.items())
            raise TeacherError(f"narrow: {found}. {self.kind}= is one number, so both sides must have the same.")
        return next(iter(self.values.values()))

    @property
    def first(self) -> Setting:
        """The first setting."""
        return next(iter(self.values))


@dataclass
class Layout:
    """What follows the sizes of a teacher.

    Attributes:
        sizes: the settings of each kind.
        config: the teacher's config, with derived sizes set.
        head_size: width of a head, or None if no experiment needed it.
        head_setting: the setting that holds the width of a head, or None if it is always hidden / heads.
        axes: for each kind of size, the length of each axis that follows it. Key-value heads only if heads share them.
    """

    sizes: dict[Kind, Sizes]
    config: PreTrainedConfig
    head_size: int | None = None
    head_setting: Setting | None = None
    axes: dict[Kind, Lengths] = field(default_factory=lambda: {kind: {} for kind in NAMES})


def find_layout(teacher: PreTrainedModel, kinds: set[Kind], flow: Dataflow) -> Layout:
    """Double every size that is to change, and return the axes that grow.

    Raises:
        TeacherError: if the config has no such size, or a tensor does not follow it in a known way.
    """
    sizes = find_sizes(teacher, kinds)
    derived = {s: v for one in sizes.values() for s, v in one.values.items() if value_of(s, teacher.config) is None}
    layout = Layout(sizes, changed(teacher.config, derived))
    if kinds & {"hidden", "heads"} and {"hidden", "heads"} <= sizes.keys():
        _find_heads(teacher, layout, flow)
    if "hidden" in kinds or ("heads" in kinds and layout.head_setting is None):
        _find_hidden(teacher, layout)
    for kind in kinds - {"hidden", "heads"}:
        layout.axes[kind] = _doubled(teacher, layout.config, sizes[kind])
    return layout


def find_sizes(teacher: PreTrainedModel, kinds: set[Kind]) -> dict[Kind, Sizes]:
    """Return the settings of every kind of size. Raises TeacherError if one of `kinds` has none."""
    sizes = {kind: one for kind in NAMES if (one := _sizes_of(teacher, kind)) is not None}
    for kind in kinds:
        if kind not in sizes:
            raise TeacherError(f"narrow: {type(teacher.config).__name__} has no known setting for its {kind} size.")
    return sizes


def _sizes_of(teacher: PreTrainedModel, kind: Kind) -> Sizes | None:
    found = {}
    for setting, raw in _settings(teacher.config):
        if setting.name in NAMES[kind]:
            is_derived = raw is None and kind == "intermediate"
            value = _derived_intermediate(teacher, setting) if is_derived else value_of(setting, teacher.config)
            if value is not None:
                found[setting] = value
    if len({setting.parents for setting in found}) > 1:
        raise TeacherError(
            f"narrow: the teacher contains several models ({', '.join(map(str, found))}). Narrow each one."
        )
    return Sizes(kind, found) if found else None


def _settings(config: PreTrainedConfig, parents: tuple[str, ...] = ()) -> Iterator[tuple[Setting, object]]:
    for name, value in vars(config).items():
        if isinstance(value, PreTrainedConfig):
            yield from _settings(value, (*parents, name))
        else:
            yield Setting(parents, name), value


def _derived_intermediate(teacher: PreTrainedModel, setting: Setting) -> int:
    """Return the size that the model derives: the length of the axes that change when the setting is set."""
    ours = shapes(teacher)
    sizes = {ours[name][axis] for name, axis in _grown(teacher, teacher.config, {setting: 1}) or {} if name in ours}
    if not sizes:
        raise TeacherError(f"narrow: {setting} is None, and setting it changes no tensor of {type(teacher).__name__}.")
    return min(sizes)


def followers(kind: Kind, setting: Setting, config: PreTrainedConfig) -> list[Setting]:
    """Return the settings that must stay equal to this one."""
    value = value_of(setting, config)
    others = [Setting(setting.parents, name) for name in _FOLLOWERS.get(kind, ())]
    return [other for other in others if value is not None and value_of(other, config) == value]


def changed(config: PreTrainedConfig, values: Mapping[Setting, int]) -> PreTrainedConfig:
    """Return a copy of the config with these sizes."""
    new = copy.deepcopy(config)
    for setting, value in values.items():
        setattr(setting.parent(new), setting.name, value)
    return new


def shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Return the shape of every parameter and buffer, tied ones under each of their names."""
    return {name: tuple(tensor.shape) for name, tensor in all_tensors(model).items()}


def _grown(teacher: PreTrainedModel, config: PreTrainedConfig, values: Mapping[Setting, int]) -> Lengths | None:
    """Return by how much each axis grows with these sizes, or None if no such model can be built."""
    try:
        before = shapes(empty_model(teacher, config, "meta"))
        after = shapes(empty_model(teacher, changed(config, values), "meta"))
    except TRIAL_ERRORS:
        return None
    if before.keys() != after.keys() or any(len(shape) != len(after[name]) for name, shape in before.items()):
        return None  # another model, not a larger one
    return {
        (name, axis): new - old
        for name, shape in before.items()
        for axis, (old, new) in enumerate(zip(shape, after[name], strict=True))
        if old != new
    }


def _twice(config: PreTrainedConfig, sizes: Sizes) -> dict[Setting, int]:
    both = {setting: 2 * value for setting, value in sizes.values.items()}
    for setting, value in sizes.values.items():
        both |= dict.fromkeys(followers(sizes.kind, setting, config), 2 * value)
    return both


def _doubled(teacher: PreTrainedModel, config: PreTrainedConfig, sizes: Sizes) -> Lengths:
    """Return the axes that double with a size, and their length."""
    names = ", ".join(map(str, sizes.values))
    found = _grown(teacher, config, _twice(config, sizes))
    if not found:
        why = "cannot be built with it doubled" if found is None else "has no tensor that grows with it"
        raise TeacherError(f"narrow: {names}: {type(teacher).__name__} {why}, so {sizes.kind}= cannot be cut.")
    _check_doubled(teacher, found, names)
    return found


def _check_doubled(teacher: PreTrainedModel, found: Lengths, names: str) -> None:
    lengths = shapes(teacher)
    for (name, axis), growth in found.items():
        if name not in lengths or lengths[name][axis] != growth:
            raise TeacherError(
                f"narrow: axis {axis} of {name} does not double with {names}: several parts are fused in it."
            )


def _find_heads(teacher: PreTrainedModel, layout: Layout, flow: Dataflow) -> None:
    """Find the axes of heads if the config can set a head's size; otherwise those with one number for each head."""
    heads, hidden, shared = layout.sizes["heads"], layout.sizes["hidden"], layout.sizes.get("key_value_heads")
    twice = _twice(layout.config, heads)
    for name in _HEAD_SIZES:
        setting = Setting(heads.first.parents, heads.first.parent(layout.config).attribute_map.get(name, name))
        size = value_of(setting, layout.config) or hidden.value // heads.value
        try:
            config = changed(layout.config, {setting: size})
        except AttributeError:  # a config that derives it
            continue
        found = _grown(teacher, config, twice)
        readers = {(name, flow.input_axis[name]) for name in flow.attention_readers}
        if found and readers and readers <= found.keys() and _grown(teacher, config, {setting: 2 * size}):
            _check_doubled(teacher, found, str(heads.first))
            layout.config, layout.head_setting, layout.head_size = config, setting, size
            layout.axes["heads"] = found
            if shared is not None:
                both = _grown(teacher, config, twice | _twice(config, shared)) or {}
                layout.axes["key_value_heads"] = {place: growth for place, growth in both.items() if place not in found}
                _check_doubled(teacher, layout.axes["key_value_heads"], str(shared.first))
            return
    layout.head_size = hidden.value // heads.value
    single = _grown(teacher, layout.config, twice) or {}
    layout.axes["heads"] = {place: growth for place, growth in single.items() if growth == heads.value}


def _find_hidden(teacher: PreTrainedModel, layout: Layout) -> None:
    hidden = layout.sizes["hidden"]
    values = _twice(layout.config, hidden)
    if layout.head_setting is None:  # heads keep their size, so there must be twice as many
        for kind in ("heads", "key_value_heads"):
            if kind in layout.sizes:
                values |= _twice(layout.config, layout.sizes[kind])
    found = _grown(teacher, layout.config, values)
    if not found:
        raise TeacherError(f"narrow: {type(teacher).__name__} cannot be built with {hidden.first} doubled.")
    layout.axes["hidden"] = {place: growth for place, growth in found.items() if place not in layout.axes["heads"]}
    _check_doubled(teacher, layout.axes["hidden"], str(hidden.first))
