"""The blocks of a model, and the axis of a block's output that holds its features, found from shapes alone.

A transformer's blocks compute on `[b t d]`. Convolutional image models compute on `[b c h w]` (ConvNeXt, ResNet), some
image models on `[b h w c]` (SAM), the convolutions of speech models on `[b c t]`; each stage may have its own width.
No config says which, so the model runs twice on torch's meta device, where a forward computes shapes and no numbers, on
inputs of two sizes: the axis that keeps its length holds the features, the others are positions.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call
from transformers import PreTrainedModel

from hf_distill.errors import SettingError, did_you_mean
from hf_distill.models.generation import evaluating
from hf_distill.models.stacks import REFUSALS, Stack, depth_of, empty_like, find_stacks, module_lists, shares_layers
from hf_distill.signals import EMBEDDINGS, HIDDEN, LAST_HIDDEN
from hf_distill.tasks.infer import main_input_of, unwrapped

_IMAGE, _SOUND = "pixel_values", "input_values"
_EXAMPLES, _DEFAULT_SIZE, _SAMPLES = 2, 224, 16_000
Place = tuple[str, int]  # what and layer, as in `ActivationKey`
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
    if isinstance(model, PreTrainedModel):  # a model of the same class: no hook of the user's sees these forwards
        names = {id(module): name for name, module in model.named_modules()}
        try:
            twin = empty_like(model, copy.deepcopy(model.config), "meta")
            modules = [twin.get_submodule(names[id(module)]) for module in modules]
            model, owner = twin, twin.get_submodule(names[id(owner)])
        except REFUSALS:
            return {}
    first, second = (_shapes(model, modules, owner, size) for size in sizes)
    widths = widths_in(getattr(model, "config", None))
    found = {place: _features(shape, second.get(place), widths) for place, shape in first.items()}
    return {place: features for place, features in found.items() if features is not None}


def as_positions(x: Tensor, features: Features | None, config: Any, *, what: str) -> Tensor:
    """Return a hidden state as `[b t d]`: features last, all positions on one axis, row by row.

    Args:
        x: the output of a block.
        features: the axis of its features, if that is known.
        config: the model's config, to find the axis by its width otherwise.
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
            why = (
                "which axis holds the features is not known: forwards on inputs of two sizes did not show it, and the "
                "config names no width that one axis alone is long"
            )
        raise SettingError(
            f"{what} is {list(x.shape)}. An objective compares [examples, positions, features], and {why}. Match "
            "another stack of blocks (student_stack=, teacher_stack=)."
        )
    return x.movedim(features.axis, -1).flatten(1, -2)


def widths_in(config: Any) -> set[int]:
    """Return the width of the blocks, or the widths of the stages, from a config."""
    found: set[int] = set()
    for name in ("hidden_size", "hidden_sizes", "embed_dim", "embed_dims"):
        value = getattr(config, name, None)
        found |= {one for one in (value if isinstance(value, (list, tuple)) else (value,)) if isinstance(one, int)}
    return found


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

    def note(place: Place, value: Any) -> None:
        if isinstance(value, Tensor):
            shapes.setdefault(place, tuple(value.shape))

    def after(place: Place) -> Any:
        return lambda module, inputs, output: note(place, passed_on(output))

    def before(module: nn.Module, inputs: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        note((HIDDEN, EMBEDDINGS), inputs[0] if inputs else keywords.get("hidden_states"))

    hooks = [module.register_forward_hook(after((HIDDEN, layer))) for layer, module in enumerate(modules)]
    hooks.append(owner.register_forward_hook(lambda module, inputs, output: note((LAST_HIDDEN, 0), ended_in(output))))
    hooks.append(modules[0].register_forward_pre_hook(before, with_kwargs=True))
    tensors = _on_meta(model)
    dtype = next((tensor.dtype for tensor in tensors.values() if tensor.is_floating_point()), None)
    given = torch.zeros(size, dtype=dtype, device="meta")
    try:
        with torch.no_grad(), evaluating(model):
            functional_call(model, tensors, (), {main_input_of(model): given})
    except REFUSALS:
        pass  # a size that this model does not take, or an operation without shapes: what came before counts
    finally:
        for hook in hooks:
            hook.remove()
    return shapes


def passed_on(output: Any) -> Any:
    """Return the hidden state in a block's output: the first tensor (PVT v2 returns a tuple in a tuple)."""
    while not isinstance(output, Tensor) and output is not None:
        output = output[0]
    return output


def ended_in(output: Any) -> Any:
    """Return the last hidden state in a base model's output; None if it names none."""
    return output.get("last_hidden_state") if isinstance(output, Mapping) else passed_on(output)


def _on_meta(model: nn.Module) -> dict[str, Tensor]:
    tensors = [*model.named_parameters(), *model.named_buffers()]
    return {name: torch.empty_like(tensor, device="meta") for name, tensor in tensors}


def _image_size(model: nn.Module) -> tuple[int, int]:
    for config in _configs(model):
        size = getattr(config, "image_size", None)
        if isinstance(size, int):
            return size, size
        if isinstance(size, (list, tuple)) and len(size) == 2:
            return int(size[0]), int(size[1])
    return _DEFAULT_SIZE, _DEFAULT_SIZE


def _channels(model: nn.Module) -> int:
    found = (getattr(config, "num_channels", None) for config in _configs(model))
    return next((value for value in found if isinstance(value, int)), 3)


def _configs(model: nn.Module) -> Iterator[Any]:
    """Return the config, and the nested ones that may describe images."""
    config = getattr(model, "config", None)
    yield config
    for name in ("vision_config", "backbone_config"):
        yield getattr(config, name, None)


SIDES = ("encoder", "decoder")
_TIME_FIRST = ("xlnet", "fsmt")  # a square mask would silently fit the wrong way round
# Their blocks compute on a multiple of an attention window or a chunk: the input is padded at its end inside the model,
# and what the model returns is cut again. `tests/models/test_internal_padding.py` compares each with padding outside.
_PADS_INSIDE = ("longformer", "led", "big_bird", "bigbird_pegasus", "pegasus_x", "reformer")


@dataclass(frozen=True)
class Blocks:
    """The blocks of one stack, in the order they run.

    Attributes:
        path: where the list is in the model.
        modules: one for each layer. If layers share weights (ALBERT) and a call does not tell its layer, `shared` is
            True and calls are counted.
        owner: the model whose output is the last hidden state: the nearest `PreTrainedModel` around the list.
        holder: the module that holds the list, and runs the blocks.
        width: width of the residual stream; None if no config has it.
        heads: number of attention heads; None if no config has it.
        of_decoder: whether it is the decoder of an encoder-decoder.
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


def find_blocks(model: nn.Module, *, whose: str, side: str | None = None, stack: str | None = None) -> Blocks:
    """Return the blocks of one side of a model.

    Args:
        whose: "student" or "teacher", for messages.
        side: "encoder" or "decoder" of an encoder-decoder; None is its decoder.
        stack: the path of the list of blocks, if it is not found automatically.

    Raises:
        SettingError: if there is no such side or list, or none is found; the message names the lists.
    """
    model = unwrapped(model)
    if side is not None and side not in SIDES:
        hint = did_you_mean(side, SIDES)
        raise SettingError(f"side={side!r}: allowed are 'encoder' and 'decoder', or None.{hint}")
    if getattr(getattr(model, "config", None), "model_type", None) in _TIME_FIRST:
        raise SettingError(
            f"the {whose} ({type(model).__name__}) computes on [time, example], not [example, time]; its inside cannot "
            "be read here. Compare its predictions alone."
        )
    if stack is not None:
        return _named(model, stack, whose, side)
    if not isinstance(model, PreTrainedModel):
        raise SettingError(_not_found(model, whose, "it is no model of transformers, so its config cannot be asked"))
    if shares_layers(model):
        return _shared(model)
    stacks = [one for one in find_stacks(model) if len(one.paths) == 1]
    if not stacks:
        raise SettingError(_not_found(model, whose, "no setting of its config makes one of its lists longer"))
    chosen = _of_side(model, stacks, side, whose)
    modules = tuple(model.get_submodule(chosen.name).children())
    return _blocks(model, chosen.name, modules, len(modules))


def _of_side(model: Any, stacks: list[Stack], side: str | None, whose: str) -> Stack:
    if len(stacks) == 1:
        only = stacks[0]
        if side is None or not model.config.is_encoder_decoder or only.side in (None, side):
            return only
    wanted = side or ("decoder" if model.config.is_encoder_decoder else None)
    found = [one for one in stacks if one.side == wanted]
    if wanted is not None and len(found) == 1:
        return found[0]
    listed = ", ".join(f"{one.name!r} ({one.length} blocks)" for one in stacks)
    raise SettingError(
        f"the {whose} ({type(model).__name__}) has several stacks of blocks: {listed}; side={side!r} does not choose "
        f"one. Name it: {whose}_stack={stacks[0].name!r}."
    )


def _named(model: nn.Module, path: str, whose: str, side: str | None) -> Blocks:
    lists = module_lists(model)
    try:
        found = model.get_submodule(path)
    except AttributeError:
        found = None
    if not isinstance(found, (nn.ModuleList, nn.Sequential)) or not len(found):
        raise SettingError(
            f"{whose}_stack={path!r}: {type(model).__name__} has no list of modules of that name. {_listed(lists)}"
        )
    modules = tuple(found.children())
    blocks = _blocks(model, path, modules, len(modules), wanted=side)
    if side is not None and model.config.is_encoder_decoder and blocks.of_decoder != (side == "decoder"):  # type: ignore[union-attr]  # an encoder-decoder has a config
        raise SettingError(f"{whose}_stack={path!r} is of the other side than side={side!r} says.")
    return blocks


def _shared(model: Any) -> Blocks:
    lists = [path for path in module_lists(model) if path.endswith("groups")]
    path = lists[0]
    modules = tuple(model.get_submodule(path).children())
    return _blocks(model, path, modules, depth_of(model.config).value(model.config), shared=True)


def _blocks(
    model: nn.Module,
    path: str,
    modules: tuple[nn.Module, ...],
    length: int,
    *,
    wanted: str | None = None,
    shared: bool = False,
) -> Blocks:
    owner = model
    parts = path.split(".")
    for end in range(len(parts) - 1, 0, -1):
        candidate = model.get_submodule(".".join(parts[:end]))
        if isinstance(candidate, PreTrainedModel):
            owner = candidate
            break
    whole = getattr(model, "base_model_prefix", None)
    if not getattr(getattr(model, "config", None), "is_encoder_decoder", False) and whole and parts[0] == whole:
        owner = model.get_submodule(whole)  # what ends the encoder may not be all that the head reads after (DINOv2)
    config = getattr(owner, "config", None)
    side = next((part for part in parts if part in SIDES), None)
    two_sided = bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))
    heads = getattr(config, f"{side}_attention_heads", None) if two_sided else None
    return Blocks(
        path,
        modules,
        length,
        owner,
        width=_whole(config, "hidden_size"),
        heads=heads or _whole(config, "num_attention_heads"),
        of_decoder=two_sided and (side or wanted or "decoder") == "decoder",
        shared=shared,
        split_heads=(getattr(model, "_tp_size", None) or 1) > 1,
        features={} if shared else find_features(model, modules, owner),
        pads_inside=getattr(config, "model_type", None) in _PADS_INSIDE,
        holder=model.get_submodule(path.rpartition(".")[0]),
    )


def _whole(config: Any, name: str) -> int | None:
    value = getattr(config, name, None)
    return value if isinstance(value, int) else None


def _not_found(model: nn.Module, whose: str, why: str) -> str:
    return (
        f"no stack of blocks found in the {whose} ({type(model).__name__}): {why}. {_listed(module_lists(model))} Name "
        f"one with {whose}_stack=."
    )


def _listed(lists: dict[str, int]) -> str:
    if not lists:
        return "It has no list of modules at all."
    return f"Its lists of modules: {', '.join(f'{path!r} ({length})' for path, length in lists.items())}."
