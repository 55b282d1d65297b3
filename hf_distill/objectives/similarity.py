"""SimilarityMatch: agreement about which examples of a micro-batch are near each other."""

from __future__ import annotations

from torch import Tensor

from hf_distill.errors import check_choice
from hf_distill.functional.similarity import SIMILARITIES, SIMILARITY_ALIASES, SimilarityName
from hf_distill.layer_map import Link
from hf_distill.objectives.layers import LayerObjective, Layers, ValidPositions
from hf_distill.schedules import Schedule
from hf_distill.signals import HIDDEN, Side, Signals
from hf_distill.tasks import Batch, Task
from hf_distill.tasks.regression import POOLING, POOLING_ALIASES, Pooling


class SimilarityMatch(LayerObjective):
    """Examples that are similar to the teacher should be similar to the student, by their pooled hidden states.

    Each example is compared with the others of its micro-batch only. So with accumulation or several processes the loss
    is a mean over micro-batches, weighted by their examples, of a loss over fewer pairs. This is not the loss of one
    large batch, and no rescaling makes it so; choose the micro-batch accordingly (a single example gives 0).

    Tung and Mori 2019 (similarity_preserving), Park et al. 2019 (distance_relations, angle_relations: RKD-D and RKD-A,
    which they weight 1 : 2), Kornblith et al. 2019 (centered_kernel_alignment).

    Args:
        layers: see `LayerObjective`; by default the last of both models.
        distance: a name in `hf_distill.functional.similarity.SIMILARITIES`.
        pooling: "mean" of the valid positions, or the "first" ([CLS]) or "last" of them.

    Raises:
        SettingError: for an unknown distance or pooling.
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
        distance: SimilarityName = "similarity_preserving",
        pooling: Pooling = "mean",
        weight: float | Schedule = 1.0,
        side: Side | None = None,
        name: str | None = None,
        student_stack: str | None = None,
        teacher_stack: str | None = None,
    ) -> None:
        super().__init__(
            layers, weight=weight, side=side, name=name, student_stack=student_stack, teacher_stack=teacher_stack
        )
        check_choice("SimilarityMatch: distance", distance, SIMILARITIES, SIMILARITY_ALIASES)
        check_choice("SimilarityMatch: pooling", pooling, POOLING, POOLING_ALIASES)
        self.distance = distance
        self.pooling = self.pools = pooling

    def count(self, task: Task, batch: Batch) -> Tensor:
        self._positions.check_not_packed(batch, "SimilarityMatch")
        return self._positions.count_examples(batch)

    def of_link(self, student: Signals, teacher: Signals, link: Link, kept: ValidPositions) -> Tensor:
        ours, theirs = self._activations(HIDDEN, student, teacher, link)
        kept.check(ours.shape[:2], theirs.shape[:2], "hidden states", link, paired=False)
        rows = kept.pooled(ours, self.pooling), kept.pooled(theirs, self.pooling)
        return SIMILARITIES[self.distance](*rows).sum()
