"""Handwritten signals, so that objectives can be tested without a model."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hf_distill import SettingError
from hf_distill.models.blocks import Blocks
from hf_distill.objectives import ObjectiveSetup
from hf_distill.signals import ActivationKey, Signals
from hf_distill.tasks import TASKS


class Shown:
    """A stand-in for `ActivationCapture`: blocks with the given width and heads, without a model."""

    def __init__(self, length: int, width: int, heads: int = 1, *, two_sided: bool = False) -> None:
        self.made = Blocks("blocks", (), length, nn.Module(), width=width, heads=heads, of_decoder=False)
        self.two_sided = two_sided
        self.asked: list[tuple[str | None, str | None]] = []

    def blocks(self, side: str | None = None, stack: str | None = None) -> Blocks:
        self.asked.append((side, stack))
        return dataclasses.replace(self.made, of_decoder=self.two_sided and side != "encoder")


def fitted(objective: Any, student: Shown, teacher: Shown, *, kind: str = "token_classification") -> Any:
    """Bind the objective to both stand-ins; the student's parameters are in float64."""
    models: Any = (student, teacher)
    setup = ObjectiveSetup(*models, TASKS[kind](), nn.Linear(1, 1).double())
    objective.bind(setup)
    return objective


def found(
    objective: Any,
    student: Mapping[ActivationKey, Any],
    teacher: Mapping[ActivationKey, Any],
    batch: Mapping[str, Tensor],
    *,
    kind: str = "token_classification",
) -> tuple[float, int]:
    """Return the value and the count of the objective."""
    result = objective(Signals(None, activations=student), Signals(None, activations=teacher), TASKS[kind](), batch)
    return result.value.item(), int(result.count)


def doubles(*values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def attended(*rows: list[int]) -> dict[str, Tensor]:
    """Return a batch of tokens with this attention mask."""
    mask = torch.tensor(rows)
    return {"input_ids": torch.ones_like(mask), "attention_mask": mask}


def hidden(layer: int, *rows: Any, side: str | None = None) -> dict[ActivationKey, Tensor]:
    """Return one block's hidden states `[b t d]`."""
    return {ActivationKey("hidden", layer, side): doubles(*rows)}


def refused(make: Callable[[], Any], *words: str, error: type[Exception] = SettingError) -> None:
    """Assert that `make` raises an error whose message contains all of `words`."""
    with pytest.raises(error) as raised:
        make()
    message = str(raised.value)
    for word in words:
        assert word in message, (word, message)
