"""The mathematics: tensors in, tensors out. No models, no state, no reduction over rows."""

from hf_distill.functional.divergences import (
    decoupled,
    dist,
    forward_kl,
    hard,
    jeffreys,
    jensen_shannon,
    mean_squared_error,
    reverse_kl,
    skewed_forward_kl,
    skewed_reverse_kl,
    total_variation,
)
from hf_distill.functional.features import DISTANCES
from hf_distill.functional.fused.inputs import (
    Head,
    Labels,
    TeacherHidden,
    TeacherLogits,
    TeacherSparse,
    Terms,
    fusable,
)
from hf_distill.functional.fused.loss import FusedOutput, fused_linear_distillation
from hf_distill.functional.properties import (
    DIVERGENCE_ALIASES,
    DIVERGENCES,
    PROPERTIES,
    Divergence,
    DivergenceProperties,
)
from hf_distill.functional.similarity import SIMILARITIES

__all__ = [
    "DISTANCES",
    "DIVERGENCES",
    "DIVERGENCE_ALIASES",
    "PROPERTIES",
    "SIMILARITIES",
    "Divergence",
    "DivergenceProperties",
    "FusedOutput",
    "Head",
    "Labels",
    "TeacherHidden",
    "TeacherLogits",
    "TeacherSparse",
    "Terms",
    "decoupled",
    "dist",
    "forward_kl",
    "fusable",
    "fused_linear_distillation",
    "hard",
    "jeffreys",
    "jensen_shannon",
    "mean_squared_error",
    "reverse_kl",
    "skewed_forward_kl",
    "skewed_reverse_kl",
    "total_variation",
]
