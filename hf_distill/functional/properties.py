"""The catalogue of divergences, and what the rest of the library must know of each beside its value."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

Divergence = Callable[..., Tensor]


@dataclass(frozen=True)
class DivergenceProperties:
    """What a divergence is like.

    Attributes:
        temperature_power: p such that `T**p * divergence(student / T, teacher / T)` has a gradient
            that does not depend on T when logits / T are small (law L5): 2 for the KL family, 1 for
            total variation, 0 for what is invariant to scale.
        softens: whether temperature applies at all; where it does not, rows come as they are.
        on_values: whether it may compare values (regression, embeddings) rather than logits.
        wants_target: whether it takes `target=`, the label of each row (-100: unknown).
        couples_rows: whether a row's result depends on the other rows of the batch.
        zero_at_equality: whether it is zero when student and teacher are equal.
        paper: where it comes from.
    """

    paper: str
    temperature_power: int = 2
    softens: bool = True
    on_values: bool = False
    wants_target: bool = False
    couples_rows: bool = False
    zero_at_equality: bool = True


DIVERGENCES: dict[str, Divergence] = {}
PROPERTIES: dict[str, DivergenceProperties] = {}


def catalogued(properties: DivergenceProperties) -> Callable[[Divergence], Divergence]:
    """Put a divergence into the catalogue under its own name, with its properties."""

    def register(function: Divergence) -> Divergence:
        name = function.__name__
        DIVERGENCES[name] = function
        PROPERTIES[name] = properties
        return function

    return register
