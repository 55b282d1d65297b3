"""Relations between the examples of a batch: what is near what, at which angle; not within a sequence (`relations.py`).

Rows are one vector an example, `[n d_s]` and `[n d_t]`: the widths need not agree, as only relations are compared. The
result is `[n]`, a share for each example, such that its sum / n is the loss. Every share depends on the other
examples of the micro-batch, so the loss depends on how a batch is cut (accumulation, processes): all of these couple
rows. Computed in fp32 (fp64 for fp64). Too few examples to have a relation give 0, with a graph.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from hf_distill.errors import SettingError
from hf_distill.functional.features import TOO_SHORT, unit_vectors
from hf_distill.functional.rows import in_full_precision

Similarity = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class SimilarityProperties:
    """What a comparison of relations is like.

    Attributes:
        paper: where it comes from.
        couples_rows: whether a row's result depends on the other rows of the batch: always.
        fewest_rows: with fewer rows than this it is 0, whatever they are.
    """

    paper: str
    couples_rows: bool = True
    fewest_rows: int = 2


SIMILARITIES: dict[str, Similarity] = {}
SIMILARITY_PROPERTIES: dict[str, SimilarityProperties] = {}
# What papers call them; only proposed in messages.
SIMILARITY_ALIASES = {
    "cka": "centered_kernel_alignment",
    "sp": "similarity_preserving",
    "rkd": "distance_relations",
    "rkd_distance": "distance_relations",
    "rkd_angle": "angle_relations",
}


def _catalogued(properties: SimilarityProperties) -> Callable[[Similarity], Similarity]:
    """Put it into the catalogue under its own name, with its properties."""

    def register(function: Similarity) -> Similarity:
        SIMILARITIES[function.__name__] = function
        SIMILARITY_PROPERTIES[function.__name__] = properties
        return function

    return register


@_catalogued(SimilarityProperties(paper="Tung and Mori 2019, section 3"))
def similarity_preserving(student: Tensor, teacher: Tensor) -> Tensor:
    """Squared difference of the two tables of inner products `[n n]`, each row of a table brought to length 1.

    Tung and Mori 2019 (section 3): 1 / n² of the squared Frobenius norm. A share is 1 / n of its row's part, so sum / n
    is the paper's number exactly. Does not change when one side is rotated or scaled. Memory: n².

    Args:
        student: `[n d_s]`. teacher: `[n d_t]`.

    Raises:
        SettingError: unequal numbers of rows.

    >>> rows = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    >>> similarity_preserving(rows, 3 * rows).tolist()
    [0.0, 0.0]
    """
    student, teacher = _paired(student, teacher)
    n = student.shape[0]
    if n < 2:
        return _nothing_to_compare(student, teacher)
    q, p = (unit_vectors(side @ side.T) for side in (_to_unit_scale(student), _to_unit_scale(teacher)))
    return (q - p).square().sum(-1) / n


@_catalogued(SimilarityProperties(paper="Park et al. 2019, RKD, section 3"))
def distance_relations(student: Tensor, teacher: Tensor) -> Tensor:
    """Huber distance (δ = 1) of the distances between examples, each side in units of its own mean distance.

    Park et al. 2019 (section 3, RKD-D). They write a sum over the n (n − 1) ordered pairs of distinct examples; a share
    is the mean over its n − 1 partners, so sum / n is the paper's sum / (n (n − 1)). (Their code takes the mean over n²
    pairs, the diagonal included: (n − 1) / n of ours.) Does not change when one side is moved, rotated or scaled. The
    gradient goes through the student's mean distance too. Memory: n² (in the backward pass on CUDA: n² d).

    Args:
        student: `[n d_s]`. teacher: `[n d_t]`.

    Raises:
        SettingError: unequal numbers of rows.

    >>> rows = torch.tensor([[0.0], [1.0], [3.0]])
    >>> distance_relations(rows, 5 - 2 * rows).max().item() < 1e-6
    True
    """
    student, teacher = _paired(student, teacher)
    n = student.shape[0]
    if n < 2:
        return _nothing_to_compare(student, teacher)
    return F.smooth_l1_loss(_distances(student), _distances(teacher), reduction="none").sum(-1) / (n - 1)


@_catalogued(SimilarityProperties(paper="Park et al. 2019, RKD, section 3", fewest_rows=3))
def angle_relations(student: Tensor, teacher: Tensor) -> Tensor:
    """Huber distance (δ = 1) of the cosines of the angles that any two examples make, seen from a third.

    Park et al. 2019 (section 3, RKD-A). They write a sum over the n (n − 1) (n − 2) ordered triples of distinct
    examples; a share is the mean over the (n − 1) (n − 2) pairs seen from its example, so sum / n is the paper's sum
    / (n (n − 1) (n − 2)). (Their code takes the mean over n³: (n − 1) (n − 2) / n² of ours.) An example that coincides
    with the one it is seen from is in no direction: its cosines are 0, with gradient 0. Does not change when one side
    is moved, rotated or scaled. Memory: n² d + n³.

    Args:
        student: `[n d_s]`. teacher: `[n d_t]`.

    Raises:
        SettingError: unequal numbers of rows.

    >>> rows = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 2.0]])
    >>> angle_relations(rows, 1 - 3 * rows).max().item() < 1e-6
    True
    """
    student, teacher = _paired(student, teacher)
    n = student.shape[0]
    if n < 3:
        return _nothing_to_compare(student, teacher)
    huber = F.smooth_l1_loss(_cosines(student), _cosines(teacher), reduction="none")
    itself = torch.eye(n, dtype=torch.bool, device=huber.device)  # the angle of a direction with itself says nothing
    return huber.masked_fill(itself, 0.0).sum((-1, -2)) / ((n - 1) * (n - 2))


@_catalogued(SimilarityProperties(paper="Kornblith et al. 2019, CKA, section 3"))
def centered_kernel_alignment(student: Tensor, teacher: Tensor) -> Tensor:
    """1 − linear CKA: 0 when the two sets of rows are the same up to rotation, scale and a shift; at most 1.

    Kornblith et al. 2019 (section 3). One number for the batch: with a and b the two tables of inner products of the
    centred rows `[n n]`, each of Frobenius norm 1, it is 1 − ⟨a, b⟩ = ½ ‖a − b‖². A share is n times its row's part,
    so sum / n is 1 − CKA exactly. Where all rows of one side are equal CKA is not defined: it counts as 0, the loss as
    1 (0 where both sides are so), with gradient 0. Two examples always have CKA 1. Memory: n².

    Args:
        student: `[n d_s]`. teacher: `[n d_t]`.

    Raises:
        SettingError: unequal numbers of rows.

    >>> rows = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    >>> centered_kernel_alignment(rows, 4 - 2 * rows).max().item() < 1e-6
    True
    """
    student, teacher = _paired(student, teacher)
    n = student.shape[0]
    if n < 2:
        return _nothing_to_compare(student, teacher)
    a, b = _centered_table(student), _centered_table(teacher)
    one_is_flat = (a.detach() != 0).any() != (b.detach() != 0).any()
    return 0.5 * (n * (a - b).square().sum(-1) + one_is_flat)


def _distances(rows: Tensor) -> Tensor:
    """`[n n]`, of mean 1 over distinct pairs; all 0 where all rows are equal."""
    n = rows.shape[0]
    # Not by matrix products, which lose small distances; cdist's derivative at 0 is 0.
    rows = _to_unit_scale(rows)
    distances = torch.cdist(rows, rows, compute_mode="donot_use_mm_for_euclid_dist")
    mean = distances.sum() / (n * (n - 1))
    return distances / mean.masked_fill(mean.detach() < TOO_SHORT, 1.0)


def _cosines(rows: Tensor) -> Tensor:
    """`[n n n]`: seen from the first, the cosine of the angle between the second and the third."""
    directions = unit_vectors(rows[None, :] - rows[:, None])
    return directions @ directions.transpose(-1, -2)


def _centered_table(rows: Tensor) -> Tensor:
    """Inner products `[n n]` of the centred rows, brought to Frobenius norm 1."""
    shifted = rows - rows[:1]  # equal rows give exactly 0
    centered = _to_unit_scale(shifted - shifted.mean(0))
    table = centered @ centered.T
    return unit_vectors(table.flatten()).view_as(table)


def _to_unit_scale(rows: Tensor) -> Tensor:
    """Divided by their largest entry, so that squares of squares stay in range; for what does not change with scale."""
    largest = rows.detach().abs().amax()
    return rows / largest.masked_fill(largest < TOO_SHORT, 1.0)


def _nothing_to_compare(student: Tensor, teacher: Tensor) -> Tensor:
    """0 for each row, with a graph; what is no number stays none."""
    return (0 * student).sum(-1) + (0 * teacher).sum(-1)


def _paired(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    if student.dim() != 2 or teacher.dim() != 2:
        raise SettingError(
            f"the student's rows are {list(student.shape)}, the teacher's {list(teacher.shape)}: relations are between "
            "examples, one vector each, [n d]. Pool all other axes."
        )
    if student.shape[0] != teacher.shape[0]:
        raise SettingError(
            f"the student shows {student.shape[0]} examples, the teacher {teacher.shape[0]}: both must show the same "
            "examples, in the same order."
        )
    return in_full_precision(student), in_full_precision(teacher)
