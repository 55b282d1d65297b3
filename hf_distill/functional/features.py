"""Distances between hidden states, one number a row.

A distance takes the student's and the teacher's vectors, both `[n d]` and projected to one width, and returns `[n]`. It
raises SettingError unless both have this shape. Everything is computed in fp32 (fp64 for fp64 vectors). A zero vector
has no direction: where a distance depends on directions, a zero vector counts as orthogonal to all others and has
gradient 0, never NaN.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, TypeAlias

import torch
from torch import Tensor
from torch.nn import functional as F

from hf_distill._types import OneOf
from hf_distill.errors import SettingError
from hf_distill.functional.properties import Properties, catalogue, check_within
from hf_distill.functional.rows import in_full_precision

Distance = Callable[..., Tensor]
TOO_SHORT = 1e-30  # a shorter vector counts as zero: its inverse length would leave the range of fp32

DISTANCES: dict[str, Distance] = {}
DistanceName: TypeAlias = Annotated[str, OneOf(DISTANCES)]
DISTANCE_PROPERTIES: dict[str, Properties] = {}
# Names used by papers and other libraries. They are not accepted, only suggested in error messages.
DISTANCE_ALIASES = {
    **dict.fromkeys(("mse", "mean_squared_error", "l2", "squared", "mse_loss"), "mean_squared"),
    **dict.fromkeys(("cos", "cosine_similarity", "cosine_embedding"), "cosine"),
    **dict.fromkeys(("l1", "huber", "mae"), "smooth_l1"),
}
_catalogued = catalogue(DISTANCES, DISTANCE_PROPERTIES)


@_catalogued(Properties(paper="romero2015fitnets"))
def mean_squared(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean over the width of the squared difference.

    Jiao et al. 2020 (section 3.1, equation 8). Romero et al. 2015 (section 2.2) take half the sum instead.

    >>> mean_squared(torch.tensor([[1.0, 3.0]]), torch.tensor([[1.0, 1.0]])).item()
    2.0
    """
    student, teacher = _paired(student, teacher)
    return (student - teacher).square().mean(-1)


@_catalogued(Properties(paper="sanh2019distilbert"))
def cosine(student: Tensor, teacher: Tensor) -> Tensor:
    """1 − the cosine of the angle between the vectors: 0 in the same direction, 1 when orthogonal, 2 when opposite.

    Sanh et al. 2019 (section 2, the cosine embedding loss). Computed as half the squared distance of the unit vectors,
    which is the same number but exactly 0 at equality. Two zero vectors are equal: 0.

    >>> cosine(torch.tensor([[2.0, 0.0]]), torch.tensor([[0.0, 1.0]])).item()
    1.0
    """
    return 0.5 * _unit_distance(*(unit_vectors(side) for side in _paired(student, teacher)))


@_catalogued(Properties(paper="sun2019pkd"))
def normalized_squared(student: Tensor, teacher: Tensor) -> Tensor:
    """Squared distance of the unit vectors: twice the cosine distance.

    Sun et al. 2019 (section 3, the patient loss, equation 7), who take it at the first token of each sequence.

    >>> normalized_squared(torch.tensor([[2.0, 0.0]]), torch.tensor([[0.0, 1.0]])).item()
    2.0
    """
    return _unit_distance(*(unit_vectors(side) for side in _paired(student, teacher)))


@_catalogued(Properties(paper="wei2022feature"))
def standardized_squared(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared difference of the vectors after scaling each to mean 0 and variance 1 over its width.

    A layer norm without weights on both sides; Wei et al. 2022 apply it to the teacher alone. There is no epsilon under
    the root, so the length of a vector has no effect; a vector whose entries are all equal counts as zero. It equals
    2 − 2 · the correlation of the two vectors.

    >>> round(standardized_squared(torch.tensor([[1.0, 2.0]]), torch.tensor([[7.0, 3.0]])).item(), 4)
    4.0
    """
    # With variance 1 a vector of width d has length √d, and the mean divides by d again.
    return _unit_distance(*(unit_vectors(_centered(side)) for side in _paired(student, teacher)))


@_catalogued(Properties(paper="girshick2015fast"))
def smooth_l1(student: Tensor, teacher: Tensor, *, beta: float = 1.0) -> Tensor:
    """Mean over the width of x² / (2 beta) where the difference |x| is below beta, and of |x| − beta / 2 elsewhere.

    Girshick 2015 (section 2.3, equation 3), with beta = 1 there: a few outlying activations do not dominate the loss.

    Args:
        student: `[n d]` vectors.
        teacher: `[n d]` vectors.
        beta: the difference at which it turns from squared to absolute, in units of the vectors.

    Raises:
        SettingError: if beta is not above 0, or the shapes differ.

    >>> smooth_l1(torch.tensor([[1.0, 3.0]]), torch.tensor([[0.0, 0.0]])).item()
    1.5
    """
    check_within("beta", beta, "(0, inf)")
    student, teacher = _paired(student, teacher)
    return F.smooth_l1_loss(student, teacher, reduction="none", beta=beta).mean(-1)


@_catalogued(Properties(paper="chang2022distilhubert", zero_at_equality=False))
def l1_cosine(student: Tensor, teacher: Tensor, *, cosine_weight: float = 1.0) -> Tensor:
    """Mean over the width of the absolute difference, minus cosine_weight · log sigmoid(cosine).

    Chang et al. 2022 (equation 1; λ there). At equality it is cosine_weight · log(1 + 1/e), about 0.3133 for weight 1,
    with gradient 0.

    Args:
        student: `[n d]` vectors.
        teacher: `[n d]` vectors.
        cosine_weight: the weight of the second part.

    Raises:
        SettingError: if cosine_weight is below 0, or the shapes differ.

    >>> round(l1_cosine(torch.tensor([[2.0, 0.0]]), torch.tensor([[0.0, 1.0]])).item(), 4)  # 3 / 2 + log 2
    2.1931
    """
    check_within("cosine_weight", cosine_weight, "[0, inf)")
    student, teacher = _paired(student, teacher)
    angle = (unit_vectors(student) * unit_vectors(teacher)).sum(-1)
    return (student - teacher).abs().mean(-1) - cosine_weight * F.logsigmoid(angle)


def unit_vectors(vectors: Tensor) -> Tensor:
    """Scale vectors `[... d]` to length 1; a zero vector stays zero, with gradient 0.

    Neither very long nor very short vectors lose precision, as each is first divided by its largest entry. NaN stays
    NaN.

    >>> unit_vectors(torch.tensor([[3.0, 4.0], [0.0, 0.0]])).tolist()
    [[0.6000..., 0.8000...], [0.0, 0.0]]
    """
    largest = vectors.detach().abs().amax(-1, keepdim=True)
    zero = largest < TOO_SHORT
    # The result is invariant to scale, so this factor may be treated as a constant.
    scaled = (vectors / largest.masked_fill(zero, 1.0)).masked_fill(zero, 0.0)
    return scaled / (scaled.square().sum(-1, keepdim=True) + zero).sqrt()


def _unit_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """Squared distance of unit vectors; 2, as for orthogonal vectors, if exactly one of the two is zero."""
    one_is_zero = torch.any(student.detach() != 0, -1) != torch.any(teacher.detach() != 0, -1)
    return (student - teacher).square().sum(-1) + one_is_zero


def _centered(vectors: Tensor) -> Tensor:
    """Subtract the mean; the first entry is subtracted before, so that equal entries give exactly 0."""
    vectors = vectors - vectors[..., :1]
    return vectors - vectors.mean(-1, keepdim=True)


def _paired(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    if student.dim() != 2 or student.shape != teacher.shape:
        raise SettingError(
            f"student vectors are {list(student.shape)}, teacher vectors {list(teacher.shape)}: both must have one "
            "shape [n d]. Flatten all axes but the features, and project the student's features to the teacher's width."
        )
    return in_full_precision(student), in_full_precision(teacher)
