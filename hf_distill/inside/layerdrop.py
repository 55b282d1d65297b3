"""Layerdrop: what a stack of blocks was given in a forward in which every block was left out at random.

A block that is left out puts out what went past it: the input of the next block that ran. Where none ran there is no
such input, and the module that holds the blocks runs again up to its first block, from the same random state: its
dropout before the blocks is the same, so this is the tensor that went past, with its graph.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

RandomState = list[tuple[torch.device, Tensor]]  # a device, and the state of its generator


def layerdrop_of(holder: nn.Module) -> float:
    """The share of blocks that the module which holds them leaves out in training.

    >>> layerdrop_of(nn.Linear(1, 1))
    0.0
    """
    return next((rate for _, _, rate in _settings(holder)), 0.0)


def random_state(*values: Any) -> RandomState:
    """The state of the generators that draw for these tensors: the CPU's, and their device's."""
    devices = {x.device for x in values if isinstance(x, Tensor)} | {torch.device("cpu")}
    return [(device, _state_of(device)) for device in devices]


def input_of_stack(
    holder: nn.Module, blocks: Any, args: tuple[Any, ...], keywords: Mapping[str, Any], before: RandomState
) -> Tensor:
    """What the first block would have been given.

    Args:
        holder: the module that holds the blocks and runs them.
        blocks: the list of blocks in it.
        args: what the holder was called with.
        keywords: what it was called with by name.
        before: the random state in which its forward began.
    """
    now = [(device, _state_of(device)) for device, _ in before]
    first = blocks[0]
    try:
        _restore(before)
        with _without_layerdrop(holder):
            blocks[0] = _End()
            # Clones: HuBERT writes into its input, which the backward of the first run needs as it is.
            holder(*map(_cloned, args), **{name: _cloned(value) for name, value in keywords.items()})
    except _EndError as end:
        return end.stream
    finally:
        blocks[0] = first
        _restore(now)
    raise AssertionError(f"{type(holder).__name__} has run without its first block")


class _EndError(Exception):
    """The first block was reached."""

    def __init__(self, stream: Tensor) -> None:
        super().__init__()
        self.stream = stream


class _End(nn.Module):
    """In the place of the first block: no hook and no checkpointing of its own."""

    def forward(self, *args: Any, **keywords: Any) -> None:
        raise _EndError(args[0] if args else keywords["hidden_states"])


def _settings(holder: nn.Module) -> Iterator[tuple[Any, str, float]]:
    """Where the rate stands that this module reads: object, name, value."""
    config = getattr(holder, "config", None)
    for place, name in ((holder, "layerdrop"), (config, "layerdrop"), (config, "speech_encoder_layerdrop")):
        rate = getattr(place, name, None)
        if isinstance(rate, (int, float)):
            yield place, name, float(rate)


@contextlib.contextmanager
def _without_layerdrop(holder: nn.Module) -> Iterator[None]:
    """No block is left out, and the running means of batch norms stay as they are."""
    norms = [module for module in holder.modules() if isinstance(module, _BatchNorm)]
    changed = [(place, name, rate, 0.0) for place, name, rate in _settings(holder)]
    changed += [(norm, "track_running_stats", norm.track_running_stats, False) for norm in norms]
    try:
        for place, name, _, value in changed:
            setattr(place, name, value)
        yield
    finally:
        for place, name, before, _ in changed:
            setattr(place, name, before)


def _state_of(device: torch.device) -> Tensor:
    source, which = _generator_of(device)
    state: Tensor = source.get_rng_state(*which)
    return state


def _restore(states: RandomState) -> None:
    for device, state in states:
        source, which = _generator_of(device)
        source.set_rng_state(state, *which)


def _generator_of(device: torch.device) -> tuple[Any, tuple[torch.device, ...]]:
    """The module of torch that draws on a device, and what it wants to know of it: where there is one, nothing."""
    if device.type == "cpu":
        return torch, ()
    return torch.get_device_module(device), () if device.type == "mps" else (device,)


def _cloned(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value
