"""Distances of two sets of vectors of one width, one number a row; not of logits (divergences), not between rows.

Vectors are hidden states `[n d]`, already projected to one width; the result is `[n]`. Everything is computed in fp32
(fp64 for fp64 vectors). A zero vector has no direction: where a direction is asked for, it counts as orthogonal to
all others, and nothing pulls on it (gradient 0, never NaN).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional as F

from hf_distill.errors import SettingError
from hf_distill.functional.rows import in_full_precision

Distance = Callable[..., Tensor]
# What is shorter counts as zero: one over it would leave the range of fp32.
TOO_SHORT = 1e-30


@dataclass(frozen=True)
class DistanceProperties:
    """What a distance is like.

    Attributes:
        paper: where it comes from.
        zero_at_equality: whether it is zero when student and teacher are equal.
        kinked: whether it has no derivative at equality (it is used as 0 there).
        scale_free: whether the length of a vector does not matter, so that only its direction is learned.
        knobs: the settings that it takes.
    """

    paper: str
    zero_at_equality: bool = True
    kinked: bool = False
    scale_free: bool = False
    knobs: tuple[str, ...] = ()


DISTANCES: dict[str, Distance] = {}
DISTANCE_PROPERTIES: dict[str, DistanceProperties] = {}
# What people call them; only proposed in messages.
DISTANCE_ALIASES = {
    **dict.fromkeys(("mse", "mean_squared_error", "l2", "squared", "mse_loss"), "mean_squared"),
    **dict.fromkeys(("cos", "cosine_similarity", "cosine_embedding"), "cosine"),
    **dict.fromkeys(("l1", "huber", "mae"), "smooth_l1"),
}


def _catalogued(properties: DistanceProperties) -> Callable[[Distance], Distance]:
    """Put a distance into the catalogue under its own name, with its properties."""

    def register(function: Distance) -> Distance:
        DISTANCES[function.__name__] = function
        DISTANCE_PROPERTIES[function.__name__] = properties
        return function

    return register


@_catalogued(
    DistanceProperties(paper="Jiao et al. 2020, TinyBERT, section 3.1; Romero et al. 2015, FitNets, section 2.2")
)
def mean_squared(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean over the width of the squared difference.

    Jiao et al. 2020 (section 3.1, equation 8). Romero et al. 2015 (section 2.2) take half the sum instead.

    Args:
        student: `[n d]`. teacher: `[n d]`.

    Raises:
        SettingError: the two do not have one shape.

    >>> import torch
    >>> mean_squared(torch.tensor([[1.0, 3.0]]), torch.tensor([[1.0, 1.0]])).item()
    2.0
    """
    student, teacher = _paired(student, teacher)
    return (student - teacher).square().mean(-1)


@_catalogued(DistanceProperties(paper="Sanh et al. 2019, DistilBERT, section 2", scale_free=True))
def cosine(student: Tensor, teacher: Tensor) -> Tensor:
    """1 − the cosine of the angle between the two: 0 for one direction, 1 when orthogonal, 2 when opposite.

    Sanh et al. 2019 (section 2, the cosine embedding loss). Computed as half the squared distance of the unit
    vectors, which is the same number but exactly 0 at equality. Two zero vectors are equal: 0.

    Args:
        student: `[n d]`. teacher: `[n d]`.

    Raises:
        SettingError: the two do not have one shape.

    >>> import torch
    >>> cosine(torch.tensor([[2.0, 0.0]]), torch.tensor([[0.0, 1.0]])).item()
    1.0
    """
    return 0.5 * _apart(*(unit_vectors(side) for side in _paired(student, teacher)))


@_catalogued(DistanceProperties(paper="Sun et al. 2019, PKD, section 3", scale_free=True))
def normalized_squared(student: Tensor, teacher: Tensor) -> Tensor:
    """Squared distance of the two vectors after each is brought to length 1: twice the cosine distance.

    Sun et al. 2019 (section 3, the patient loss, equation 7), who take it at the first token of each sequence.

    Args:
        student: `[n d]`. teacher: `[n d]`.

    Raises:
        SettingError: the two do not have one shape.

    >>> import torch
    >>> normalized_squared(torch.tensor([[2.0, 0.0]]), torch.tensor([[0.0, 1.0]])).item()
    2.0
    """
    return _apart(*(unit_vectors(side) for side in _paired(student, teacher)))


@_catalogued(DistanceProperties(paper="Wei et al. 2022, feature distillation (whitened features)", scale_free=True))
def standardized_squared(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared difference after each vector is brought to mean 0 and variance 1 over its width.

    A layer norm without weights on both sides; Wei et al. 2022 put it on the teacher alone. There is no epsilon under
    the root, so the scale of a vector does not matter at all; a vector whose entries are all equal counts as zero.
    It is 2 − 2 · the correlation of the two vectors.

    Args:
        student: `[n d]`. teacher: `[n d]`.

    Raises:
        SettingError: the two do not have one shape.

    >>> import torch
    >>> round(standardized_squared(torch.tensor([[1.0, 2.0]]), torch.tensor([[7.0, 3.0]])).item(), 4)
    4.0
    """
    # With variance 1 a vector of width d has length √d; the mean over d takes that d away again.
    return _apart(*(unit_vectors(_centered(side)) for side in _paired(student, teacher)))


@_catalogued(DistanceProperties(paper="Girshick 2015, Fast R-CNN, section 2.3", knobs=("beta",)))
def smooth_l1(student: Tensor, teacher: Tensor, *, beta: float = 1.0) -> Tensor:
    """Mean over the width of x² / (2 beta) where the difference |x| is below beta, and of |x| − beta / 2 beyond.

    Girshick 2015 (section 2.3, equation 3), with beta = 1 there: a few outlying activations do not rule the loss.

    Args:
        student: `[n d]`. teacher: `[n d]`.
        beta: the difference at which it turns from squared to absolute, in units of the vectors.

    Raises:
        SettingError: beta not above 0; the two do not have one shape.

    >>> import torch
    >>> smooth_l1(torch.tensor([[1.0, 3.0]]), torch.tensor([[0.0, 0.0]])).item()
    1.5
    """
    if not 0 < beta < math.inf:
        raise SettingError(f"beta={beta}: must lie in (0, inf).")
    student, teacher = _paired(student, teacher)
    return F.smooth_l1_loss(student, teacher, reduction="none", beta=beta).mean(-1)


@_catalogued(
    DistanceProperties(
        paper="Chang et al. 2022, DistilHuBERT, equation 1",
        zero_at_equality=False,
        kinked=True,
        knobs=("cosine_weight",),
    )
)
def l1_cosine(student: Tensor, teacher: Tensor, *, cosine_weight: float = 1.0) -> Tensor:
    """Mean over the width of the absolute difference, minus cosine_weight · log sigmoid(cosine).

    Chang et al. 2022 (equation 1; λ there). At equality it is cosine_weight · log(1 + 1/e), about 0.3133, and its
    gradient is 0.

    Args:
        student: `[n d]`. teacher: `[n d]`.
        cosine_weight: the weight of the second part.

    Raises:
        SettingError: cosine_weight below 0; the two do not have one shape.

    >>> import torch
    >>> round(l1_cosine(torch.tensor([[2.0, 0.0]]), torch.tensor([[0.0, 1.0]])).item(), 4)  # 3 / 2 + log 2
    2.1931
    """
    if not 0 <= cosine_weight < math.inf:
        raise SettingError(f"cosine_weight={cosine_weight}: must lie in [0, inf).")
    student, teacher = _paired(student, teacher)
    angle = (unit_vectors(student) * unit_vectors(teacher)).sum(-1)
    return (student - teacher).abs().mean(-1) - cosine_weight * F.logsigmoid(angle)


def unit_vectors(vectors: Tensor) -> Tensor:
    """Vectors along the last axis, each brought to length 1; a zero vector becomes zero, with gradient 0.

    Neither very long nor very short vectors lose precision: each is first divided by its largest entry. NaN stays NaN.

    Args:
        vectors: `[... d]`.

    >>> import torch
    >>> unit_vectors(torch.tensor([[3.0, 4.0], [0.0, 0.0]])).tolist()
    [[0.6000..., 0.8000...], [0.0, 0.0]]
    """
    largest = vectors.detach().abs().amax(-1, keepdim=True)
    zero = largest < TOO_SHORT
    # The result does not change with the length, so the factor may be taken as a constant.
    scaled = (vectors / largest.masked_fill(zero, 1.0)).masked_fill(zero, 0.0)
    return scaled / (scaled.square().sum(-1, keepdim=True) + zero).sqrt()


def _apart(student: Tensor, teacher: Tensor) -> Tensor:
    """Squared distance of unit vectors; 2, as of orthogonal ones, where exactly one of the two is zero."""
    one_is_zero = (student.detach() != 0).any(-1) != (teacher.detach() != 0).any(-1)
    return (student - teacher).square().sum(-1) + one_is_zero


def _centered(vectors: Tensor) -> Tensor:
    """Less the mean; the first entry goes first, so that equal entries give exactly 0."""
    vectors = vectors - vectors[..., :1]
    return vectors - vectors.mean(-1, keepdim=True)


def _paired(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    if student.dim() != 2 or teacher.dim() != 2:
        raise SettingError(
            f"student vectors are {list(student.shape)}, teacher vectors {list(teacher.shape)}: a distance is of "
            "vectors [n d], one number a vector. Bring the features to the last axis, and flatten all others to one."
        )
    if student.shape != teacher.shape:
        raise SettingError(
            f"student vectors are {list(student.shape)}, teacher vectors {list(teacher.shape)}: a distance needs one "
            "shape [n d]. Project the student's to the teacher's width."
        )
    return in_full_precision(student), in_full_precision(teacher)
