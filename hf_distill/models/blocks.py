"""The blocks of a model, and the axis of a block's output that holds its features, found from shapes alone.

A transformer's blocks compute on `[b t d]`. Convolutional image models compute on `[b c h w]` (ConvNeXt, ResNet), some
image models on `[b h w c]` (SAM), the convolutions of speech models on `[b c t]`; each stage may have its own width.
No config says which, so the model runs twice on torch's meta device, where a forward computes shapes and no numbers, on
inputs of two sizes: the axis that keeps its length holds the features, the others are positions.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, get_args

import torch
from torch import Tensor, nn
from torch.func import functional_call
from transformers import PreTrainedConfig, PreTrainedModel

from hf_distill._types import Keywords
from hf_distill.errors import SettingError, did_you_mean
from hf_distill.models.generation import evaluating
from hf_distill.models.stacks import (
    TRIAL_ERRORS,
    Stack,
    depth_setting,
    empty_model,
    find_stacks,
    module_lists,
    shares_layers,
)
from hf_distill.signals import EMBEDDINGS, HIDDEN, LAST_HIDDEN, Side
from hf_distill.tasks.infer import config_of, main_input_of, unwrapped

_IMAGE, _SOUND = "pixel_values", "input_values"
_EXAMPLES, _DEFAULT_SIZE, _SAMPLES = 2, 224, 16_000
Place = tuple[str, int]  # `what` and `layer` of an `ActivationKey`
Shapes = dict[Place, tuple[int, ...]]


class Features(NamedTuple):
    """The axis of a hidden state that holds the features, and its length."""

    axis: int
    width: int


def find_features(model: nn.Module, modules: Sequence[nn.Module], owner: nn.Module) -> Mapping[Place, Features]:
    """Return the features of each block; empty for text, for speech transformers, and if they cannot be found.

    Args:
        model: the whole model.
        modules: its blocks.
        owner: the module whose output is the last hidden state.
    """
    sizes = _sizes(model, modules)
    if not sizes:
        return {}
    if isinstance(model, PreTrainedModel):  # an empty copy, so that no hook of the user sees these forwards
        names = {id(module): name for name, module in model.named_modules()}
        try:
            twin = empty_model(model, copy.deepcopy(model.config), "meta")
            modules = [twin.get_submodule(names[id(module)]) for module in modules]
            model, owner = twin, twin.get_submodule(names[id(owner)])
        except TRIAL_ERRORS:
            return {}
    first, second = (_shapes(model, modules, owner, size) for size in sizes)
    widths = widths_in(config_of(model))
    found = {place: _features(shape, second.get(place), widths) for place, shape in first.items()}
    return {place: features for place, features in found.items() if features is not None}


def as_positions(x: Tensor, features: Features | None, config: PreTrainedConfig | None, *, what: str) -> Tensor:
    """Return a hidden state as `[b t d]`: features last, all positions on one axis, row by row.

    Args:
        x: the output of a block.
        features: the axis of its features, if known; otherwise it is found by its width in the config.
        config: the model's config.
        what: the name of the hidden state, for the message.

    Raises:
        SettingError: if the axis of the features is not known.
    """
    if features is None or x.dim() <= features.axis or x.shape[features.axis] != features.width:
        if x.dim() == 3:
            return x
        features = _by_width(tuple(x.shape), widths_in(config))
    if x.dim() < 3 or features is None:
        why = "no axis is left for positions"
        if x.dim() > 3:
            why = "which axis holds the features is not known (from trial forwards, or the widths in the config)"
        raise SettingError(
            f"{what} is {list(x.shape)}, not [examples, positions, features]: {why}. Match another stack of blocks "
            "(student_stack=, teacher_stack=)."
        )
    return x.movedim(features.axis, -1).flatten(1, -2)


def text_config(config: PreTrainedConfig | None) -> PreTrainedConfig | None:
    """Return the config of the text model within a config."""
    return config.get_text_config() if isinstance(config, PreTrainedConfig) else config


def numbers_in(config: PreTrainedConfig | None, name: str) -> tuple[int, ...]:
    """Return the whole number, or the list of them, that a config has under this name; empty if it has none."""
    value = getattr(config, name, None)
    return tuple(n for n in (value if isinstance(value, (list, tuple)) else (value,)) if isinstance(n, int))


def _number_in(config: PreTrainedConfig | None, name: str) -> int | None:
    found = numbers_in(config, name)
    return found[0] if len(found) == 1 else None


def widths_in(config: PreTrainedConfig | None) -> set[int]:
    """Return the width of the blocks, or the widths of the stages, from a config."""
    names = ("hidden_size", "hidden_sizes", "embed_dim", "embed_dims")
    return {width for name in names for width in numbers_in(config, name)}


def _features(shape: tuple[int, ...], other: tuple[int, ...] | None, widths: set[int]) -> Features | None:
    if len(shape) < 3 or shape[0] != _EXAMPLES:
        return None
    if other is not None and len(other) == len(shape):
        kept = [axis for axis in range(1, len(shape)) if shape[axis] == other[axis]]
        if len(kept) == 1:
            return Features(kept[0], shape[kept[0]])
    found = _by_width(shape, widths)
    return Features(2, shape[2]) if found is None and len(shape) == 3 else found


def _by_width(shape: tuple[int, ...], widths: set[int]) -> Features | None:
    """Return the axis whose length is a width in the config; None if there is none or several."""
    fitting = [axis for axis in range(1, len(shape)) if shape[axis] in widths]
    return Features(fitting[0], shape[fitting[0]]) if len(fitting) == 1 else None


def _sizes(model: nn.Module, modules: Sequence[nn.Module]) -> tuple[tuple[int, ...], ...]:
    """Return two input shapes that differ except in examples and channels; none if the axis is certain."""
    main = main_input_of(model)
    if main == _IMAGE:
        (height, width), channels = _image_size(model), _channels(model)
        return (_EXAMPLES, channels, height, width), (_EXAMPLES, channels, 2 * height, 3 * width)
    if main == _SOUND and any(isinstance(module, nn.Conv1d) for block in modules for module in block.children()):
        return (_EXAMPLES, _SAMPLES), (_EXAMPLES, 2 * _SAMPLES)
    return ()


def _shapes(model: nn.Module, modules: Sequence[nn.Module], owner: nn.Module, size: tuple[int, ...]) -> Shapes:
    """Return the shape of each block's output, as far as the forward got on an input of this size."""
    shapes: Shapes = {}

    def note(place: Place, value: Tensor | None) -> None:
        if value is not None:
            shapes.setdefault(place, tuple(value.shape))

    def after(place: Place) -> Callable[[nn.Module, object, object], None]:
        return lambda module, inputs, output: note(place, stream_out(output))

    hooks = [module.register_forward_hook(after((HIDDEN, layer))) for layer, module in enumerate(modules)]
    hooks += [
        owner.register_forward_hook(lambda module, inputs, output: note((LAST_HIDDEN, 0), last_hidden_in(output))),
        modules[0].register_forward_pre_hook(
            lambda module, args, keywords: note((HIDDEN, EMBEDDINGS), stream_in(args, keywords)), with_kwargs=True
        ),
    ]
    tensors = {
        name: torch.empty_like(tensor, device="meta")
        for name, tensor in (*model.named_parameters(), *model.named_buffers())
    }
    dtype = next((tensor.dtype for tensor in tensors.values() if tensor.is_floating_point()), None)
    given = torch.zeros(size, dtype=dtype, device="meta")
    try:
        with torch.no_grad(), evaluating(model):
            functional_call(model, tensors, (), {main_input_of(model): given})
    except TRIAL_ERRORS:
        pass  # a size that this model does not take, or an operation without shapes: the shapes until here count
    finally:
        for hook in hooks:
            hook.remove()
    return shapes


def stream_in(args: tuple[Any, ...], keywords: Keywords) -> Tensor | None:
    """Return the hidden state in the arguments of a block's forward; None if there is none."""
    given = args[0] if args else keywords.get("hidden_states")
    return given if isinstance(given, Tensor) else None


def stream_out(output: Any) -> Tensor | None:
    """Return the hidden state in a block's output: the first tensor (PVT v2 returns a tuple in a tuple)."""
    while not isinstance(output, Tensor) and output is not None:
        output = output[0]
    return output


def last_hidden_in(output: Any) -> Tensor | None:
    """Return the last hidden state in a base model's output; None if there is none."""
    return output.get("last_hidden_state") if isinstance(output, Mapping) else stream_out(output)


def _image_size(model: nn.Module) -> tuple[int, int]:
    """Return height and width."""
    for config in _image_configs(model):
        size = numbers_in(config, "image_size")
        if len(size) in (1, 2):
            return size[0], size[-1]
    return _DEFAULT_SIZE, _DEFAULT_SIZE


def _channels(model: nn.Module) -> int:
    found = (_number_in(config, "num_channels") for config in _image_configs(model))
    return next((number for number in found if number is not None), 3)


def _image_configs(model: nn.Module) -> list[PreTrainedConfig | None]:
    """Return the config, and the nested configs that may describe images."""
    config = config_of(model)
    return [config, *(getattr(config, name, None) for name in ("vision_config", "backbone_config"))]


SIDES: tuple[Side, ...] = get_args(Side)
_TIME_FIRST = ("xlnet", "fsmt")  # [time, example]: a square mask would silently be transposed
# Their blocks compute on a multiple of an attention window or a chunk: the model pads its input at the end, and cuts
# its output. `tests/models/test_internal_padding.py` compares each with padding outside.
_PADS_INSIDE = ("longformer", "led", "big_bird", "bigbird_pegasus", "pegasus_x", "reformer")


@dataclass(frozen=True)
class Blocks:
    """The blocks of one stack, in the order they run.

    Attributes:
        path: the path of the list in the model.
        modules: the blocks, one for each layer; fewer if layers share them (`shared`).
        length: number of layers.
        owner: the model whose output is the last hidden state: the nearest `PreTrainedModel` around the list.
        holder: the module that holds the list, and runs the blocks.
        width: width of the residual stream, or None if no config has it.
        heads: number of attention heads, or None if no config has it.
        of_decoder: whether it is the decoder of an encoder-decoder.
        shared: whether layers share weights (ALBERT); a block's calls are then counted to know the layer.
        split_heads: whether tensor parallelism splits the attention heads over processes.
        features: the axis and number of a block's features, if that is not obvious (images, convolutions).
        pads_inside: whether the model pads its input at the end, and cuts its output to the old length again.
    """

    path: str
    modules: tuple[nn.Module, ...]
    length: int
    owner: nn.Module
    width: int | None
    heads: int | None
    of_decoder: bool = False
    shared: bool = False
    split_heads: bool = False
    features: Mapping[Place, Features] = field(default_factory=dict)
    pads_inside: bool = False
    holder: nn.Module = field(default_factory=nn.Identity)

    def width_of(self, layer: int, what: str = HIDDEN) -> int | None:
        """Return the width of a block's hidden state, or of the last one; None if it cannot be found."""
        found = self.features.get((what, 0 if what == LAST_HIDDEN else layer))
        return self.width if found is None else found.width


def find_blocks(model: nn.Module, *, whose: str, side: Side | None = None, stack: str | None = None) -> Blocks:
    """Return the blocks of one side of a model.

    Args:
        model: plain, compiled or PEFT.
        whose: "student" or "teacher", for messages.
        side: "encoder" or "decoder" of an encoder-decoder; None means its decoder.
        stack: the path of the list of blocks, if it is not found automatically.

    Raises:
        SettingError: if there is no such side or list, or none is found; the message names the lists.
    """
    model = unwrapped(model)
    if side is not None and side not in SIDES:
        hint = did_you_mean(side, SIDES)
        raise SettingError(f"side={side!r}: allowed are 'encoder' and 'decoder', or None.{hint}")
    if getattr(config_of(model), "model_type", None) in _TIME_FIRST:
        raise SettingError(
            f"the {whose} ({type(model).__name__}) computes on [time, example], not [example, time], so its "
            "activations cannot be captured. Compare predictions only."
        )
    if stack is not None:
        return _named(model, stack, whose, side)
    if not isinstance(model, PreTrainedModel):
        raise SettingError(_not_found(model, whose, "it is not a PreTrainedModel, so no config describes it"))
    if shares_layers(model):
        groups = next(path for path in module_lists(model) if path.endswith("groups"))
        return _blocks(model, groups, shared_by=depth_setting(model.config).value(model.config))
    stacks = [stack for stack in find_stacks(model) if len(stack.paths) == 1]
    if not stacks:
        raise SettingError(_not_found(model, whose, "no setting of its config makes one of its lists longer"))
    return _blocks(model, _of_side(model, stacks, side, whose).name)


def _of_side(model: PreTrainedModel, stacks: list[Stack], side: Side | None, whose: str) -> Stack:
    two_sided = model.config.is_encoder_decoder
    if len(stacks) == 1 and (side is None or not two_sided or stacks[0].side in (None, side)):
        return stacks[0]
    wanted = side or ("decoder" if two_sided else None)
    found = [stack for stack in stacks if stack.side == wanted]
    if wanted is not None and len(found) == 1:
        return found[0]
    listed = ", ".join(f"{stack.name!r} ({stack.length} blocks)" for stack in stacks)
    raise SettingError(
        f"the {whose} ({type(model).__name__}) has several stacks of blocks: {listed}; side={side!r} does not choose "
        f"one. Name it: {whose}_stack={stacks[0].name!r}."
    )


def _named(model: nn.Module, path: str, whose: str, side: Side | None) -> Blocks:
    found = dict(model.named_modules(remove_duplicate=False)).get(path)
    if not isinstance(found, (nn.ModuleList, nn.Sequential)) or not len(found):
        listed = _listed(module_lists(model))
        raise SettingError(
            f"{whose}_stack={path!r}: {type(model).__name__} has no list of modules of that name. {listed}"
        )
    if side is not None and _is_two_sided(model) and _side_in(path) not in (None, side):
        raise SettingError(f"{whose}_stack={path!r} is not in the {side}. Leave out side={side!r}.")
    return _blocks(model, path, side=side)


def _is_two_sided(model: nn.Module) -> bool:
    return bool(getattr(config_of(model), "is_encoder_decoder", False))


def _side_in(path: str) -> Side | None:
    return next((side for part in path.split(".") for side in SIDES if side == part), None)


def _blocks(model: nn.Module, path: str, *, side: Side | None = None, shared_by: int | None = None) -> Blocks:
    """Return the blocks at a path.

    Args:
        model: the model without wrappers.
        path: the path of the list of blocks.
        side: the side of an encoder-decoder, if the path does not name it; None means the decoder.
        shared_by: number of layers that share the blocks; None means that each block is a layer.
    """
    modules = tuple(model.get_submodule(path).children())
    parents = [path.rsplit(".", count)[0] for count in range(1, path.count(".") + 1)]
    around = (model.get_submodule(parent) for parent in parents)
    owner: nn.Module = next((module for module in around if isinstance(module, PreTrainedModel)), model)
    two_sided, whole = _is_two_sided(model), path.partition(".")[0]
    split_heads = False
    if isinstance(model, PreTrainedModel):
        split_heads = (model.tp_size or 1) > 1
        if not two_sided and whole == model.base_model_prefix:
            owner = model.base_model  # DINOv2's head reads more than the output of the encoder
    config, own_side = config_of(owner), _side_in(path)
    heads = _number_in(config, f"{own_side}_attention_heads") if two_sided else None
    return Blocks(
        path,
        modules,
        shared_by or len(modules),
        owner,
        holder=model.get_submodule(path.rpartition(".")[0]),
        width=_number_in(config, "hidden_size"),
        heads=heads or _number_in(config, "num_attention_heads"),
        of_decoder=two_sided and (own_side or side or "decoder") == "decoder",
        shared=shared_by is not None,
        split_heads=split_heads,
        features=find_features(model, modules, owner) if shared_by is None else {},
        pads_inside=getattr(config, "model_type", None) in _PADS_INSIDE,
    )


def _not_found(model: nn.Module, whose: str, why: str) -> str:
    return (
        f"no stack of blocks found in the {whose} ({type(model).__name__}): {why}. {_listed(module_lists(model))} Name "
        f"one with {whose}_stack=."
    )


def _listed(lists: dict[str, int]) -> str:
    if not lists:
        return "It has no list of modules at all."
    return f"Its lists of modules: {', '.join(f'{path!r} ({length})' for path, length in lists.items())}."
