"""Which axis of a block's output holds its features, and how many: found from shapes alone. Reads no values.

A transformer's blocks compute on `[b t d]`. Convolutional image models compute on `[b c h w]` (ConvNeXt, ResNet), some
image models on `[b h w c]` (SAM), the convolutions of speech models on `[b c t]`; each stage may have its own width.
No config says which, so the model runs twice on torch's meta device, where a forward computes shapes and no numbers, on
inputs of two sizes: the axis that keeps its length holds the features, the others are positions.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call
from transformers import PreTrainedModel

from hf_distill.errors import SettingError
from hf_distill.inside.stacks import REFUSALS, empty_like
from hf_distill.signals import EMBEDDINGS, HIDDEN, LAST_HIDDEN
from hf_distill.tasks.generating import evaluating
from hf_distill.tasks.infer import main_input_of

_IMAGE, _SOUND = "pixel_values", "input_values"
_EXAMPLES, _DEFAULT_SIZE, _SAMPLES = 2, 224, 16_000
Place = tuple[str, int]  # as `Read` has them: what, layer
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
