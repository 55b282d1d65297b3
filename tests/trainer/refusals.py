"""Checks that an error has the expected message and leaves models and folders unchanged."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn


def state_of(model: nn.Module) -> tuple[Any, ...]:
    """Return everything that an error must not change: bits, dtypes, mode, trainable parameters."""
    return (
        {name: (value.dtype, value.clone()) for name, value in model.state_dict().items()},
        [module.training for module in model.modules()],
        [parameter.requires_grad for parameter in model.parameters()],
    )


def assert_unchanged(model: nn.Module, before: tuple[Any, ...]) -> None:
    after = state_of(model)
    for name, (dtype, value) in before[0].items():
        assert after[0][name][0] == dtype, name
        assert torch.equal(after[0][name][1], value), name
    assert after[1:] == before[1:]


@contextmanager
def refused(folder: Path, error: type[Exception], *words: str, models: tuple[Any, ...] = ()) -> Iterator[None]:
    """Expect `error` with all of these words in its message; models and folder must be unchanged afterwards."""
    before = [state_of(model) for model in models]
    there = sorted(folder.rglob("*"))
    with pytest.raises(error) as raised:
        yield
    message = str(raised.value)
    for word in words:
        assert word in message, (word, message)
    for model, state in zip(models, before, strict=True):
        assert_unchanged(model, state)
    assert sorted(folder.rglob("*")) == there, "something was left behind"
