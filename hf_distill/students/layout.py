"""Which axes of which tensors follow a model's width, heads, neurons and tokens, by experiment. It groups none."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedModel

from hf_distill.errors import TeacherError
from hf_distill.students.sizes import (
    HEAD_SIZES,
    Place,
    Setting,
    along,
    changed,
    grown,
    intermediate_from_experiment,
    settings_of,
    shapes,
)
from hf_distill.students.wiring import Wiring


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


def layout_of(teacher: PreTrainedModel, kinds: set[str], wiring: Wiring) -> Layout:
    """Try every size that is to change, on the meta device."""
    sizes = all_sizes(teacher, kinds)
    open_sizes = {s: v for one in sizes.values() for s, v in one.values.items() if s.value(teacher.config) is None}
    layout = Layout(sizes, changed(teacher.config, open_sizes))
    if kinds & {"hidden", "heads"} and {"hidden", "heads"} <= sizes.keys():
        _find_heads(teacher, layout, wiring)
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


def _find_heads(teacher: PreTrainedModel, layout: Layout, wiring: Wiring) -> None:
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
        readers = {(name, wiring.input_axis[name]) for name in wiring.reading}
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
