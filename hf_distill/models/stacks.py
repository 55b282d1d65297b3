"""The stacks of layers of a model, the settings that hold their length, and configs for other numbers of layers."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.initialization import meta_device_safe_creation_ops, no_init_weights

from hf_distill.errors import SettingError, TeacherError, is_whole

# Usual names of the number of layers in configs. For a stack that the user names, every integer is tried.
DEPTH_NAMES = (
    "num_hidden_layers", "num_layers", "n_layer", "n_layers", "depth", "num_blocks",
    "encoder_layers", "num_encoder_layers", "encoder_num_hidden_layers",
    "decoder_layers", "num_decoder_layers", "decoder_num_hidden_layers",
)  # fmt: skip


@dataclass(frozen=True)
class DepthSetting:
    """A number in a config.

    Attributes:
        parents: the names of the nested configs that lead to it.
        name: its name.
    """

    parents: tuple[str, ...]
    name: str

    def __str__(self) -> str:
        return ".".join(("config", *self.parents, self.name))

    def parent(self, config: PreTrainedConfig) -> PreTrainedConfig:
        """Return the nested config that holds the setting."""
        for name in self.parents:
            config = getattr(config, name)
        return config

    def value(self, config: PreTrainedConfig) -> int:
        """Return the value of the setting in this config."""
        return int(getattr(self.parent(config), self.name))


def _integer_settings(config: PreTrainedConfig, parents: tuple[str, ...] = ()) -> Iterator[DepthSetting]:
    """Yield the positive integers in a config and its nested configs."""
    for name, value in vars(config).items():
        if isinstance(value, PreTrainedConfig):
            yield from _integer_settings(value, (*parents, name))
        elif is_whole(value) and value > 0 and not name.startswith("_"):
            yield DepthSetting(parents, name)


def with_layers(config: PreTrainedConfig, setting: DepthSetting, layers: Sequence[int]) -> PreTrainedConfig:
    """Return a copy of a config for these layers (they may repeat), with one entry for each in its lists."""
    new = copy.deepcopy(config)
    holder = setting.parent(new)
    old = setting.value(config)
    for name, value in list(vars(holder).items()):
        if _has_entry_per_layer(name, value, setting, old):
            setattr(holder, name, [value[layer] for layer in layers])
    setattr(holder, setting.name, len(layers))
    _update_stages(holder, old, layers)
    return new


def _has_entry_per_layer(name: str, value: object, setting: DepthSetting, layers: int) -> bool:
    """Return whether an entry of a config is a list with one value for each layer that a setting counts."""
    if not isinstance(value, (list, tuple)) or len(value) != layers:
        return False
    if name == "attention_window":  # of Longformer, or of LED's encoder
        return "decoder" not in setting.name
    other = {"encoder": "decoder", "decoder": "encoder"}
    return "layer" in name and not any(side in setting.name and other[side] in name for side in other)


def _update_stages(config: PreTrainedConfig, before: int, layers: Sequence[int]) -> None:
    """Update the names of stages, and the stages that are returned, in a vision backbone's config.

    Outputs of removed layers are dropped; if none is left, the last layer's output is returned.
    """
    names: list[str] = vars(config).get("stage_names") or []
    if len(names) != before + 1 or not hasattr(config, "set_output_features_output_indices"):
        return
    out = {index % len(names) for index in config.out_indices}
    sources = [0, *(layer + 1 for layer in layers)]
    config.stage_names = [names[0], *(f"stage{number}" for number in range(1, len(sources)))]
    kept = [index for index, source in enumerate(sources) if source in out] or [len(layers)]
    config.set_output_features_output_indices(out_features=None, out_indices=kept)


SHARED_NOTE = "The layers share their weights: the student is faster than the teacher, and has as many parameters."


def shares_layers(teacher: PreTrainedModel) -> bool:
    """Return whether layers share weights as in ALBERT: `num_hidden_groups` sets for `num_hidden_layers` layers."""
    return "num_hidden_groups" in vars(teacher.config)


def depth_setting(config: PreTrainedConfig) -> DepthSetting:
    """Return the setting that holds the number of layers."""
    return DepthSetting((), config.attribute_map.get("num_hidden_layers", "num_hidden_layers"))


def check_layer_groups(config: PreTrainedConfig, kept: tuple[int, ...]) -> None:
    """Raise TeacherError if a kept layer would use the weights of another group than in the teacher.

    Layer i of n uses group int(i / (n / groups)), so with several groups not every choice of layers can be written.
    """
    groups, layers = config.num_hidden_groups, depth_setting(config).value(config)
    used = [int(layer / (layers / groups)) for layer in kept]
    would_use = [int(layer / (len(kept) / groups)) for layer in range(len(kept))]
    if used != would_use:
        raise TeacherError(
            f"inherit: the teacher's {layers} layers share {groups} groups of weights. Its layers {list(kept)} use "
            f"groups {used}; a student of {len(kept)} layers uses {would_use}. Choose layers of those groups."
        )


# Errors that a model may raise for a setting or an input that is only tried.
TRIAL_ERRORS = (
    ValueError,
    TypeError,
    RuntimeError,
    IndexError,
    KeyError,
    AttributeError,
    AssertionError,
    ArithmeticError,
    StrictDataclassError,
)


@dataclass(frozen=True)
class Stack:
    """The blocks of a model.

    Attributes:
        paths: the paths of its lists of modules; XLM keeps the parts of a block in several lists.
        length: number of layers.
        setting: the setting that holds this number.
    """

    paths: tuple[str, ...]
    length: int
    setting: DepthSetting

    @property
    def name(self) -> str:
        """The path of the first list in the model."""
        return self.paths[0]

    @property
    def side(self) -> str | None:
        """`encoder` or `decoder`, whichever the path names first."""
        return next((part for part in self.name.split(".") if part in ("encoder", "decoder")), None)


def empty_model(teacher: PreTrainedModel, config: PreTrainedConfig, device: str) -> PreTrainedModel:
    """Return a model of the teacher's class with uninitialized parameters, without drawing random numbers."""
    with (
        torch.random.fork_rng(devices=[]),
        torch.device(device),
        no_init_weights(),
        meta_device_safe_creation_ops() if device == "meta" else contextlib.nullcontext(),
    ):
        model = type(teacher)(config)
    model.tie_weights()
    return model


def find_stacks(teacher: PreTrainedModel) -> list[Stack]:
    """Return the stacks that are controlled by a setting with a usual name, in the order of the model."""
    lists = module_lists(teacher)
    found: dict[tuple[str, ...], Stack] = {}
    for setting in _integer_settings(teacher.config):
        stack = _stack_for_setting(teacher, setting, lists) if setting.name in DEPTH_NAMES else None
        if stack is not None:
            found.setdefault(stack.paths, stack)
    order = list(lists)
    return sorted(found.values(), key=lambda stack: order.index(stack.name))


def named_stack(teacher: PreTrainedModel, path: str) -> Stack:
    """Return the stack that the user names, and the setting that controls it, whatever its name."""
    lists = module_lists(teacher)
    if path not in lists:
        raise SettingError(
            f"stack={path!r}: {type(teacher).__name__} has no ModuleList of that name. {describe_lists(teacher)}"
        )
    fitting = [setting for setting in _integer_settings(teacher.config) if setting.value(teacher.config) == lists[path]]
    for setting in sorted(fitting, key=lambda setting: setting.name not in DEPTH_NAMES):  # usual names first
        stack = _stack_for_setting(teacher, setting, lists)
        if stack is not None and path in stack.paths:
            return stack
    raise TeacherError(
        f"stack={path!r}: no setting of {type(teacher.config).__name__} that is {lists[path]} makes this list longer, "
        f"so no config has fewer layers. {describe_lists(teacher)}"
    )


def describe_lists(teacher: nn.Module) -> str:
    """Return the paths that could be a stack, for messages."""
    lists = module_lists(teacher)
    if not lists:
        return "The model has no ModuleList at all."
    classes = {path: {type(block).__name__ for block in teacher.get_submodule(path).children()} for path in lists}
    shown = [f"{path!r} ({length} × {' or '.join(sorted(classes[path]))})" for path, length in lists.items()]
    first = next(iter(lists))
    return f"Its lists of modules: {', '.join(shown)}. Name one: inherit(teacher, layers=..., stack={first!r})."


def module_lists(model: nn.Module) -> dict[str, int]:
    """Return path → length of the non-empty module lists that are not in another list."""
    found: dict[str, int] = {}
    for path, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) and not any(path.startswith(f"{p}.") for p in found):
            found[path] = len(module)
    return found


def _stack_for_setting(teacher: PreTrainedModel, setting: DepthSetting, lists: dict[str, int]) -> Stack | None:
    """Return the lists that get one block more if a setting is one higher, as a stack; None if no list does."""
    layers = setting.value(teacher.config)
    same_length = [path for path, length in lists.items() if length == layers]
    if not same_length:
        return None
    try:
        config = with_layers(teacher.config, setting, [*range(layers), layers - 1])
        longer = module_lists(empty_model(teacher, config, "meta"))
    except TRIAL_ERRORS:
        return None
    paths = tuple(path for path in same_length if longer.get(path) == layers + 1)
    return Stack(paths, layers, setting) if paths else None


def layers_of(model: nn.Module, stack: Stack) -> list[tuple[nn.Module, ...]]:
    """Return the modules of each layer: one of each list."""
    return list(zip(*(model.get_submodule(path).children() for path in stack.paths), strict=True))
