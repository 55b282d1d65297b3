"""Agreement of relations between examples: what is near what in the batch. Couples the examples of a micro-batch."""

from __future__ import annotations

from torch import Tensor

from hf_distill.errors import SettingError, did_you_mean
from hf_distill.functional.similarity import SIMILARITIES, SIMILARITY_ALIASES
from hf_distill.layer_map import Link
from hf_distill.objectives.layers import LayerObjective, Layers, ValidPositions
from hf_distill.schedules import Schedule
from hf_distill.signals import HIDDEN, Signals
from hf_distill.tasks import Batch, Task
from hf_distill.tasks.regression import POOLING, POOLING_ALIASES


class SimilarityMatch(LayerObjective):
    """Examples that are alike to the teacher are alike to the student: hidden states, pooled to a vector an example.

    It couples examples: each is compared with the others of its micro-batch alone. So with accumulation or several
    processes the loss is the mean over micro-batches, weighted by their examples, of a loss over fewer pairs: it is not
    that of one large batch, and no rescaling makes it so. Choose the micro-batch accordingly (an example alone gives
    0).

    Tung and Mori 2019 (similarity_preserving), Park et al. 2019 (distance_relations, angle_relations: RKD-D and RKD-A,
    which they weigh 1 : 2), Kornblith et al. 2019 (centered_kernel_alignment).

    Args:
        distance: a name in `hf_distill.functional.similarity.SIMILARITIES`.
        layers: see `LayerObjective`; the last of both.
        pooling: "mean" over the positions that count, or the "first" ([CLS]) or "last" of them.

    Raises:
        SettingError: no such comparison or pooling.
    """

    paper = "tung2019similarity"
    default_name = "similarity"
    reads = (HIDDEN,)
    couples_examples = True
    shown = ("distance", "pooling", "side")

    def __init__(
        self,
        layers: Layers = ((-1, -1),),
        *,
        distance: str = "similarity_preserving",
        pooling: str = "mean",
        weight: float | Schedule = 1.0,
        side: str | None = None,
        name: str | None = None,
        student_stack: str | None = None,
        teacher_stack: str | None = None,
    ) -> None:
        super().__init__(
            layers, weight=weight, side=side, name=name, student_stack=student_stack, teacher_stack=teacher_stack
        )
        if distance not in SIMILARITIES:
            hint = did_you_mean(distance, SIMILARITIES, SIMILARITY_ALIASES)
            raise SettingError(f"SimilarityMatch: distance={distance!r}: allowed are {', '.join(SIMILARITIES)}.{hint}")
        if pooling not in POOLING:
            hint = did_you_mean(pooling, POOLING, POOLING_ALIASES)
            raise SettingError(f"SimilarityMatch: pooling={pooling!r}: allowed are {', '.join(POOLING)}.{hint}")
        self.distance = distance
        self.pooling = self.pools = pooling

    def count(self, task: Task, batch: Batch) -> Tensor:
        self._positions.check_not_packed(batch, "SimilarityMatch")
        return self._positions.count_examples(batch)

    def of_link(self, student: Signals, teacher: Signals, link: Link, kept: ValidPositions) -> Tensor:
        ours = student.activations[self._read(HIDDEN, link.student, 0)]
        theirs = teacher.activations[self._read(HIDDEN, link.teacher, 1)]
        kept.check(ours.shape[:2], theirs.shape[:2], "hidden states", link, paired=False)
        rows = kept.pooled(ours, self.pooling), kept.pooled(theirs, self.pooling)
        return SIMILARITIES[self.distance](*rows).sum()
