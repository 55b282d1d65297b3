"""Finding a model's layer stacks, and the setting that controls each, by experiment: no table of model names.

A stack is a ModuleList that grows when a setting of the config grows. Models whose layers share one set of weights
(ALBERT) have none: see `shared.py`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.initialization import meta_device_safe_creation_ops, no_init_weights

from hf_distill.errors import SettingError, TeacherError
from hf_distill.inside.depth import DepthSetting, any_depths, usual_depths, with_layers

# What a constructor may say to a setting that was only tried.
REFUSALS = (
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
    """The blocks of a model. XLM keeps a block's parts in several lists, so there may be several `paths`."""

    paths: tuple[str, ...]
    length: int
    setting: DepthSetting

    @property
    def name(self) -> str:
        """The path of the blocks in the model."""
        return self.paths[0]

    @property
    def side(self) -> str | None:
        """`encoder` or `decoder`, when the path says so first."""
        return next((part for part in self.name.split(".") if part in ("encoder", "decoder")), None)


def empty_like(teacher: PreTrainedModel, config: PreTrainedConfig, device: str) -> Any:
    """A model of the teacher's class without values: its parameters hold nothing of use. No random number is drawn."""
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
    """Every stack that a setting with a usual name controls, in the order of the model."""
    lists = module_lists(teacher)
    found: dict[tuple[str, ...], Stack] = {}
    for setting in usual_depths(teacher.config):
        stack = _controlled(teacher, setting, lists)
        if stack is not None:
            found.setdefault(stack.paths, stack)
    order = list(lists)
    return sorted(found.values(), key=lambda stack: order.index(stack.name))


def named_stack(teacher: PreTrainedModel, path: str) -> Stack:
    """The stack that the user names, and the setting that controls it, whatever the setting is called."""
    lists = module_lists(teacher)
    if path not in lists:
        raise SettingError(
            f"stack={path!r}: {type(teacher).__name__} has no ModuleList of that name. {candidates(teacher)}"
        )
    for setting in any_depths(teacher.config, lists[path]):
        stack = _controlled(teacher, setting, lists)
        if stack is not None and path in stack.paths:
            return stack
    raise TeacherError(
        f"stack={path!r}: no setting of {type(teacher.config).__name__} that is {lists[path]} makes this list longer, "
        f"so no config for a student of fewer layers can be written. {candidates(teacher)}"
    )


def candidates(teacher: nn.Module) -> str:
    """What could be a stack, for messages."""
    lists = module_lists(teacher)
    if not lists:
        return "The model has no ModuleList at all."
    shown = [f"{path!r} ({n} × {_class_inside(teacher, path)})" for path, n in lists.items()]
    first = next(iter(lists))
    return f"Its lists of modules: {', '.join(shown)}. Name one: inherit(teacher, layers=..., stack={first!r})."


def _class_inside(teacher: nn.Module, path: str) -> str:
    return " or ".join(sorted({type(module).__name__ for module in teacher.get_submodule(path).children()}))


def module_lists(model: nn.Module) -> dict[str, int]:
    """Path → length of the lists that are not empty and lie in no other list."""
    found: dict[str, int] = {}
    for path, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) and not any(path.startswith(f"{p}.") for p in found):
            found[path] = len(module)
    return found


def _controlled(teacher: PreTrainedModel, setting: DepthSetting, lists: dict[str, int]) -> Stack | None:
    """The lists that are one longer when the setting is one higher."""
    layers = setting.value(teacher.config)
    of_that_length = [path for path, length in lists.items() if length == layers]
    if not of_that_length:
        return None
    try:
        config = with_layers(teacher.config, setting, [*range(layers), layers - 1])
        longer = module_lists(empty_like(teacher, config, "meta"))
    except REFUSALS:
        return None
    paths = tuple(path for path in of_that_length if longer.get(path) == layers + 1)
    return Stack(paths, layers, setting) if paths else None


def blocks(model: nn.Module, stack: Stack) -> Iterator[tuple[int, list[nn.Module]]]:
    """Index, and the modules of that layer."""
    lists = [list(model.get_submodule(path).children()) for path in stack.paths]
    for index, parts in enumerate(zip(*lists, strict=True)):
        yield index, list(parts)
