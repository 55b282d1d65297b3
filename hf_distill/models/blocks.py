"""Which axis of a block's output holds its features, and how many: found from shapes alone. Reads no values.

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
Place = tuple[str, int]  # as `ActivationKey` has them: what, layer
Shapes = dict[Place, tuple[int, ...]]


class Features(NamedTuple):
    """The axis of a hidden state that holds the features, and its length."""

    axis: int
    width: int


def find_features(model: nn.Module, modules: Sequence[nn.Module], owner: nn.Module) -> Mapping[Place, Features]:
    """Where the features of each block are; empty for text, for transformers of sound, and where it cannot be told.

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
    """A hidden state as `[b t d]`: the features last, all positions on one axis, row by row.

    Args:
        x: what a block computed.
        features: where its features are, if that was found before.
        config: the model's, which may tell where that was not found.
        what: whose hidden state it is, for the message.

    Raises:
        SettingError: the axis of the features is not known.
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
    """What a config calls the width of its blocks, or the widths of its stages."""
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
    """The one axis that is as long as a width in the config; None: there is none, or several."""
    fitting = [axis for axis in range(1, len(shape)) if shape[axis] in widths]
    return Features(fitting[0], shape[fitting[0]]) if len(fitting) == 1 else None


def _sizes(model: nn.Module, modules: Sequence[nn.Module]) -> tuple[tuple[int, ...], ...]:
    """Two shapes of the model's input that differ in all but examples and channels; none where nothing is in doubt."""
    main = main_input_of(model)
    if main == _IMAGE:
        (height, width), channels = _image_size(model), _channels(model)
        return (_EXAMPLES, channels, height, width), (_EXAMPLES, channels, 2 * height, 3 * width)
    if main == _SOUND and any(isinstance(module, nn.Conv1d) for block in modules for module in block.children()):
        return (_EXAMPLES, _SAMPLES), (_EXAMPLES, 2 * _SAMPLES)
    return ()


def _shapes(model: nn.Module, modules: Sequence[nn.Module], owner: nn.Module, size: tuple[int, ...]) -> Shapes:
    """What each block puts out, as far as the forward came on an input of this size."""
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
    """The hidden state in what a block returns: the first tensor (PVT v2 returns a tuple in a tuple)."""
    while not isinstance(output, Tensor) and output is not None:
        output = output[0]
    return output


def ended_in(output: Any) -> Any:
    """The last hidden state in what a base model returns; None where its output names none."""
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
    """The config, and those within it that may describe the images."""
    config = getattr(model, "config", None)
    yield config
    for name in ("vision_config", "backbone_config"):
        yield getattr(config, name, None)


SIDES = ("encoder", "decoder")
_TIME_FIRST = ("xlnet", "fsmt")  # with as many examples as positions a mask would fit the wrong way round, unnoticed
# Their blocks compute on a multiple of an attention window or a chunk: the input is padded at its end inside the model,
# and what the model returns is cut again. `tests/models/test_padded_inside.py` compares each with padding outside.
_PADS_INSIDE = ("longformer", "led", "big_bird", "bigbird_pegasus", "pegasus_x", "reformer")


@dataclass(frozen=True)
class Blocks:
    """The blocks of one stack, in the order they run.

    Attributes:
        path: where the list is in the model.
        modules: one an entry; where layers share their weights (ALBERT) a module stands here several times, or the
            modules of the groups do not say which call is which layer: then `shared` is True and calls are counted.
        owner: the model whose output is the last hidden state: the nearest `PreTrainedModel` around the list.
        holder: the module that holds the list, and runs the blocks.
        width: of the stream between blocks; None where no config says so.
        heads: attention heads; None where no config says so.
        of_decoder: it reads decoder inputs: the decoder of an encoder-decoder.
        split_heads: tensor parallelism has shared out the attention heads over processes.
        features: where that is in doubt (images, convolutions), the axis and the number of a block's features.
        pads_inside: the model pads its input at the end, and cuts what it returns to the length of the input again.
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
        """How wide a block's hidden state is, or the last one; None where neither a forward nor the config shows it."""
        found = self.features.get((what, 0 if what == LAST_HIDDEN else layer))
        return self.width if found is None else found.width


def find_blocks(model: nn.Module, *, whose: str, side: str | None = None, stack: str | None = None) -> Blocks:
    """The blocks of one side of a model.

    Args:
        whose: "student" or "teacher", for messages.
        side: of an encoder-decoder; None is its decoder.
        stack: the path of the list, where it is not found.

    Raises:
        SettingError: no such side, no such list, or no list found; the message names the lists there are.
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
