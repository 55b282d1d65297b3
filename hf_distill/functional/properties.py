"""Catalogues of the functions in this package, their properties, and checks of their settings."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Annotated, TypeAlias, TypeVar

from torch import Tensor

from hf_distill._types import OneOf
from hf_distill.errors import SettingError, did_you_mean

Divergence = Callable[..., Tensor]
Function = TypeVar("Function", bound=Callable[..., Tensor])


@dataclass(frozen=True)
class Properties:
    """Properties of a distance or a similarity.

    Attributes:
        paper: the citation key of its paper in `hub/papers.bib`, or None.
        zero_at_equality: whether it is zero when student and teacher are equal.
    """

    paper: str | None
    zero_at_equality: bool = True


Stated = TypeVar("Stated", bound=Properties)


@dataclass(frozen=True)
class DivergenceProperties(Properties):
    """Properties of a divergence.

    Attributes:
        formula: its formula for model cards; p is the teacher's distribution, q the student's.
        temperature_power: p such that the gradient of `T**p * divergence(student / T, teacher / T)` does not depend
            on T while logits / T are small (law L5): 2 for the KL family, 1 for total variation, 0 if scale invariant.
        softens: whether temperature applies at all; if not, rows are compared without it.
        on_values: whether it can compare values (regression, embeddings) as well as logits.
        wants_target: whether it takes `target=`, the label of each row (-100 if unknown).
        couples_rows: whether the result of a row depends on the other rows of the batch.
    """

    formula: str = ""
    temperature_power: int = 2
    softens: bool = True
    on_values: bool = False
    wants_target: bool = False
    couples_rows: bool = False


DIVERGENCES: dict[str, Divergence] = {}
DivergenceName: TypeAlias = Annotated[str, OneOf(DIVERGENCES)]
PROPERTIES: dict[str, DivergenceProperties] = {}
# Names used by papers and other libraries. They are not accepted, only suggested in error messages.
DIVERGENCE_ALIASES: dict[str, str] = {
    **dict.fromkeys(("kl", "kld", "kl_div", "kldiv", "kl_divergence", "kldivloss", "fkl", "forward"), "forward_kl"),
    **dict.fromkeys(("forward_kld", "ce", "soft_ce", "cross_entropy", "soft_cross_entropy"), "forward_kl"),
    **dict.fromkeys(("rkl", "reverse", "reverse_kld", "backward_kl", "rev_kl"), "reverse_kl"),
    **dict.fromkeys(("js", "jsd", "js_divergence", "gkd", "generalized_jsd"), "jensen_shannon"),
    **dict.fromkeys(("symmetric_kl", "sym_kl", "j_divergence", "jeffrey"), "jeffreys"),
    **dict.fromkeys(("skl", "skew_kl", "skewed_kl", "sfkl", "skew_forward_kl"), "skewed_forward_kl"),
    **dict.fromkeys(("srkl", "skew_reverse_kl", "skewed_rkl"), "skewed_reverse_kl"),
    **dict.fromkeys(("tv", "tvd", "l1", "mae", "total_variation_distance"), "total_variation"),
    **dict.fromkeys(("mse", "mse_loss", "l2", "mean_square_error", "logits_mse"), "mean_squared_error"),
    **dict.fromkeys(("dkd", "decoupled_kd", "decoupled_kl"), "decoupled"),
    **dict.fromkeys(("dist_loss", "pearson", "correlation"), "dist"),
    **dict.fromkeys(("hard_label", "hard_labels", "argmax", "pseudo_labels", "hard_distillation"), "hard"),
}


def catalogue(
    functions: dict[str, Divergence], properties: dict[str, Stated]
) -> Callable[[Stated], Callable[[Function], Function]]:
    """Return a decorator that enters a function and its properties into two catalogues, under the function's name."""

    def catalogued(stated: Stated) -> Callable[[Function], Function]:
        def register(function: Function) -> Function:
            functions[function.__name__] = function
            properties[function.__name__] = stated
            return function

        return register

    return catalogued


catalogued = catalogue(DIVERGENCES, PROPERTIES)


def check_settings(what: str, function: Callable[..., Tensor], settings: Iterable[str]) -> None:
    """Raise SettingError if a function does not have these settings, which are its keyword-only parameters."""
    parameters = inspect.signature(function).parameters.values()
    allowed = [parameter.name for parameter in parameters if parameter.kind is parameter.KEYWORD_ONLY]
    unknown = sorted(set(settings) - set(allowed))
    if unknown:
        takes, hint = ", ".join(allowed) or "no settings", did_you_mean(unknown[0], allowed)
        raise SettingError(f"{what} has no setting {', '.join(unknown)}; it takes {takes}.{hint}")


def check_within(name: str, value: float, interval: str) -> None:
    """Raise SettingError if a number lies outside an interval, which is written as in "[0, 1)"; NaN always does."""
    low, high = (float(end) for end in interval[1:-1].split(","))
    above = value >= low if interval[0] == "[" else value > low
    below = value <= high if interval[-1] == "]" else value < high
    if not (above and below):
        raise SettingError(f"{name}={value}: must lie in {interval}.")
