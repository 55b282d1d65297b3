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
# What papers and other libraries call them; only proposed in messages.
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


def catalogued(properties: DivergenceProperties) -> Callable[[Divergence], Divergence]:
    """Put a divergence into the catalogue under its own name, with its properties."""

    def register(function: Divergence) -> Divergence:
        name = function.__name__
        DIVERGENCES[name] = function
        PROPERTIES[name] = properties
        return function

    return register
