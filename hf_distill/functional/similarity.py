"""Relations between the examples of a batch: which are near each other, and at which angles.

A similarity takes one vector for each example, `[n d_s]` of the student and `[n d_t]` of the teacher; the widths need
not agree, as only relations are compared. It raises SettingError for other shapes. The result is `[n]`, a share for
each example, and sum / n is the loss. Every share depends on the other examples of the micro-batch, so the loss depends
on the division into micro-batches (accumulation, processes). Everything is computed in fp32 (fp64 for fp64 vectors).
Too few examples give 0, with a graph. For relations within a sequence see `relations.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, TypeAlias

import torch
from torch import Tensor
from torch.nn import functional as F

from hf_distill._types import OneOf
from hf_distill.errors import SettingError
from hf_distill.functional.features import TOO_SHORT, unit_vectors
from hf_distill.functional.properties import Properties, catalogue
from hf_distill.functional.rows import in_full_precision

Similarity = Callable[..., Tensor]

SIMILARITIES: dict[str, Similarity] = {}
SimilarityName: TypeAlias = Annotated[str, OneOf(SIMILARITIES)]
SIMILARITY_PROPERTIES: dict[str, Properties] = {}
# Names used by papers. They are not accepted, only suggested in error messages.
SIMILARITY_ALIASES = {
    "cka": "centered_kernel_alignment",
    "sp": "similarity_preserving",
    "rkd": "distance_relations",
    "rkd_distance": "distance_relations",
    "rkd_angle": "angle_relations",
}
_catalogued = catalogue(SIMILARITIES, SIMILARITY_PROPERTIES)


@_catalogued(Properties(paper="tung2019similarity"))
def similarity_preserving(student: Tensor, teacher: Tensor) -> Tensor:
    """Squared difference of the two matrices of inner products `[n n]`, each row scaled to length 1.

    Tung and Mori 2019 (section 3): 1 / n² of the squared Frobenius norm. A share is 1 / n of its row's part, so sum / n
    is the paper's number exactly. Invariant to rotation and scale of either side. Memory: n².

    >>> rows = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    >>> similarity_preserving(rows, 3 * rows).tolist()
    [0.0, 0.0]
    """
    student, teacher = _paired(student, teacher)
    n = student.shape[0]
    if n < 2:
        return _zeros(student, teacher)
    q, p = (unit_vectors(side @ side.T) for side in (_to_unit_scale(student), _to_unit_scale(teacher)))
    return (q - p).square().sum(-1) / n


@_catalogued(Properties(paper="park2019relational"))
def distance_relations(student: Tensor, teacher: Tensor) -> Tensor:
    """Huber distance (δ = 1) of the distances between examples, each side in units of its own mean distance.

    Park et al. 2019 (section 3, RKD-D). They write a sum over the n (n − 1) ordered pairs of distinct examples; a share
    is the mean over its n − 1 partners, so sum / n is the paper's sum / (n (n − 1)). (Their code takes the mean over n²
    pairs, the diagonal included: (n − 1) / n of ours.) Invariant to translation, rotation and scale of either side. The
    gradient flows through the student's mean distance too. Memory: n² (in the backward pass on CUDA: n² d).

    >>> rows = torch.tensor([[0.0], [1.0], [3.0]])
    >>> distance_relations(rows, 5 - 2 * rows).max().item() < 1e-6
    True
    """
    student, teacher = _paired(student, teacher)
    n = student.shape[0]
    if n < 2:
        return _zeros(student, teacher)
    return F.smooth_l1_loss(_distances(student), _distances(teacher), reduction="none").sum(-1) / (n - 1)


@_catalogued(Properties(paper="park2019relational"))
def angle_relations(student: Tensor, teacher: Tensor) -> Tensor:
    """Huber distance (δ = 1) of the cosines of the angles that two examples make at a third.

    Park et al. 2019 (section 3, RKD-A). They write a sum over the n (n − 1) (n − 2) ordered triples of distinct
    examples; a share is the mean over the (n − 1) (n − 2) pairs at its example, so sum / n is the paper's sum
    / (n (n − 1) (n − 2)). (Their code takes the mean over n³: (n − 1) (n − 2) / n² of ours.) Two examples that coincide
    have no direction to each other: their cosines are 0, with gradient 0. Invariant to translation, rotation and scale
    of either side. Memory: n² d + n³.

    >>> rows = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 2.0]])
    >>> angle_relations(rows, 1 - 3 * rows).max().item() < 1e-6
    True
    """
    student, teacher = _paired(student, teacher)
    n = student.shape[0]
    if n < 3:
        return _zeros(student, teacher)
    huber = F.smooth_l1_loss(_cosines(student), _cosines(teacher), reduction="none")
    itself = torch.eye(n, dtype=torch.bool, device=huber.device)  # a direction makes no angle with itself
    return huber.masked_fill(itself, 0.0).sum((-1, -2)) / ((n - 1) * (n - 2))


@_catalogued(Properties(paper="kornblith2019similarity"))
def centered_kernel_alignment(student: Tensor, teacher: Tensor) -> Tensor:
    """1 − linear CKA: 0 if the two sets of rows are equal up to rotation, scale and translation; at most 1.

    Kornblith et al. 2019 (section 3). With a and b the two matrices of inner products of the centred rows `[n n]`, each
    scaled to Frobenius norm 1, it is 1 − ⟨a, b⟩ = ½ ‖a − b‖². A share is n times its row's part, so sum / n is 1 − CKA
    exactly. If all rows of one side are equal CKA is undefined and counts as 0, so the loss is 1 (0 if that holds for
    both sides), with gradient 0. Two examples always have CKA 1. Memory: n².

    >>> rows = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    >>> centered_kernel_alignment(rows, 4 - 2 * rows).max().item() < 1e-6
    True
    """
    student, teacher = _paired(student, teacher)
    n = student.shape[0]
    if n < 2:
        return _zeros(student, teacher)
    a, b = _centered_gram(student), _centered_gram(teacher)
    one_is_flat = (a.detach() != 0).any() != (b.detach() != 0).any()
    return 0.5 * (n * (a - b).square().sum(-1) + one_is_flat)


def _distances(rows: Tensor) -> Tensor:
    """Distances `[n n]` with mean 1 over distinct pairs; all 0 if all rows are equal."""
    n = rows.shape[0]
    # Matrix products would lose small distances. The derivative of cdist at 0 is 0.
    rows = _to_unit_scale(rows)
    distances = torch.cdist(rows, rows, compute_mode="donot_use_mm_for_euclid_dist")
    mean = distances.sum() / (n * (n - 1))
    return distances / mean.masked_fill(mean.detach() < TOO_SHORT, 1.0)


def _cosines(rows: Tensor) -> Tensor:
    """Cosines `[n n n]` of the angle that the second and the third example make at the first."""
    directions = unit_vectors(rows[None, :] - rows[:, None])
    return directions @ directions.transpose(-1, -2)


def _centered_gram(rows: Tensor) -> Tensor:
    """Inner products `[n n]` of the centred rows, scaled to Frobenius norm 1."""
    shifted = rows - rows[:1]  # equal rows give exactly 0
    centered = _to_unit_scale(shifted - shifted.mean(0))
    gram = centered @ centered.T
    return unit_vectors(gram.flatten()).view_as(gram)


def _to_unit_scale(rows: Tensor) -> Tensor:
    """Divide by the largest entry, so that fourth powers stay in range; for scale-invariant results only."""
    largest = rows.detach().abs().amax()
    return rows / largest.masked_fill(largest < TOO_SHORT, 1.0)


def _zeros(student: Tensor, teacher: Tensor) -> Tensor:
    """0 for each row, with a graph; NaN stays NaN."""
    return (0 * student).sum(-1) + (0 * teacher).sum(-1)


def _paired(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    if student.dim() != 2 or teacher.dim() != 2 or student.shape[0] != teacher.shape[0]:
        raise SettingError(
            f"student vectors are {list(student.shape)}, teacher vectors {list(teacher.shape)}: both must be [n d], "
            "one vector for each of the same n examples, in the same order. Pool all other axes."
        )
    return in_full_precision(student), in_full_precision(teacher)
