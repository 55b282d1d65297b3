"""Where a model keeps its blocks, how wide they are, and which model's output ends them. Nothing is read here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from hf_distill.errors import SettingError, did_you_mean
from hf_distill.inside.features import Features, Place, find_features
from hf_distill.inside.shared import depth_of, shares_layers
from hf_distill.inside.stacks import Stack, find_stacks, module_lists
from hf_distill.signals import HIDDEN, LAST_HIDDEN
from hf_distill.tasks.infer import unwrapped

SIDES = ("encoder", "decoder")
_TIME_FIRST = ("xlnet", "fsmt")  # with as many examples as positions a mask would fit the wrong way round, unnoticed
# Their blocks compute on a multiple of an attention window or a chunk: the input is padded at its end inside the model,
# and what the model returns is cut again. `tests/inside/test_padded_inside.py` compares each with padding outside.
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
        side: of an encoder-decoder; None is its decoder. stack: the path of the list, where it is not found.

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
