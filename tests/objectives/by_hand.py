"""Signals written by hand for an objective, without a model: what its blocks are, and what they show of one batch."""

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
    """Stands for `ActivationCapture`: blocks of a width and with heads, and no model behind them."""

    def __init__(self, length: int, width: int, heads: int = 1, *, two_sided: bool = False) -> None:
        self.made = Blocks("blocks", (), length, nn.Module(), width=width, heads=heads, of_decoder=False)
        self.two_sided = two_sided
        self.asked: list[tuple[str | None, str | None]] = []

    def blocks(self, side: str | None = None, stack: str | None = None) -> Blocks:
        self.asked.append((side, stack))
        return dataclasses.replace(self.made, of_decoder=self.two_sided and side != "encoder")


def fitted(objective: Any, student: Shown, teacher: Shown, *, kind: str = "token_classification") -> Any:
    """The objective after it has learned of both models; of the student it asks the dtype of its parameters."""
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
    """Its sum and its count."""
    result = objective(Signals(None, activations=student), Signals(None, activations=teacher), TASKS[kind](), batch)
    return result.value.item(), int(result.count)


def doubles(*values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def attended(*rows: list[int]) -> dict[str, Tensor]:
    """A batch of tokens with this mask."""
    mask = torch.tensor(rows)
    return {"input_ids": torch.ones_like(mask), "attention_mask": mask}


def hidden(layer: int, *rows: Any, side: str | None = None) -> dict[ActivationKey, Tensor]:
    """`[b t d]` of one block."""
    return {ActivationKey("hidden", layer, side): doubles(*rows)}


def refused(make: Callable[[], Any], *words: str, error: type[Exception] = SettingError) -> None:
    """It raises, and says all of this."""
    with pytest.raises(error) as raised:
        make()
    said = str(raised.value)
    for word in words:
        assert word in said, (word, said)
