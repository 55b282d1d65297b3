"""RelationMatch: agreement of the relations between positions (MiniLM), for any widths and numbers of heads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set

import torch
from torch import Tensor

from hf_distill.errors import SettingError
from hf_distill.functional.relations import relation_kl
from hf_distill.layer_map import Link
from hf_distill.models.blocks import Blocks
from hf_distill.objectives.base import ObjectiveSetup
from hf_distill.objectives.layers import LayerObjective, Layers, ValidPositions, checked_weight
from hf_distill.schedules import Schedule
from hf_distill.signals import RELATED, Side, Signals


class RelationMatch(LayerObjective):
    """The KL divergence between how positions relate to each other, by their queries, keys or values.

    Hooks on the projections of the matched layers read them, for any attention implementation. Nothing is learned, and
    neither widths nor numbers of attention heads must be equal. Each position is related to all valid positions, in a
    decoder also to later ones, and in packed data to those of its own sequence.

    MiniLMv2 (Wang et al. 2021, section 3.1) takes the queries, keys and values of one layer: the student's last, and
    the teacher's last or, in large teachers, a lower one (`layers=[(-1, 20)]` of 24). MiniLM (Wang et al. 2020, section
    3.2) takes the values only, beside the attention of that layer.

    Args:
        layers: see `LayerObjective`; by default the last of both models.
        relations: some of "queries", "keys" and "values", or their weights by name.
        relation_heads: number of pieces into which the vectors are cut. None means the attention heads of the teacher
            or else of the student, if they divide both widths. The paper has 48 for a base-size teacher.

    Raises:
        SettingError: if the relation heads do not divide both widths, or the projections of a block are not known by
            name or not called (WavLM).
    """

    paper = "wang2021minilmv2"
    default_name = "relations"
    shown = ("relations", "relation_heads", "side")

    def __init__(
        self,
        layers: Layers = ((-1, -1),),
        *,
        relations: Sequence[str] | Mapping[str, float] = RELATED,
        relation_heads: int | None = None,
        weight: float | Schedule = 1.0,
        side: Side | None = None,
        name: str | None = None,
        student_stack: str | None = None,
        teacher_stack: str | None = None,
    ) -> None:
        super().__init__(
            layers, weight=weight, side=side, name=name, student_stack=student_stack, teacher_stack=teacher_stack
        )
        weights = dict(relations) if isinstance(relations, Mapping) else dict.fromkeys(relations, 1.0)
        if isinstance(relations, str) or not weights or set(weights) - set(RELATED):
            raise SettingError(f"RelationMatch: relations={relations!r}: name some of {', '.join(RELATED)}.")
        for value in weights.values():
            checked_weight("RelationMatch: relations", value)
        if relation_heads is not None and (not isinstance(relation_heads, int) or relation_heads < 1):
            raise SettingError(f"RelationMatch: relation_heads={relation_heads!r}: give a whole number of at least 1.")
        self.relations = weights
        self.relation_heads = relation_heads
        self.reads = tuple(weights)
        self._heads = relation_heads

    def check(self, student: Blocks, teacher: Blocks, setup: ObjectiveSetup) -> None:
        self._heads = self.relation_heads
        ours = {student.width_of(link.student) for link in self._links()}
        theirs = {teacher.width_of(link.teacher) for link in self._links()}
        if self._heads is None and None not in ours | theirs:
            numbers = [n for n in (teacher.heads, student.heads) if n]
            both = [n for n in numbers if not any(width % n for width in ours | theirs if width is not None)]
            self._heads = both[0] if both else None
        if self._heads is None:
            raise SettingError(
                f"RelationMatch: neither {teacher.heads} (the teacher's attention heads) nor {student.heads} (the "
                f"student's) divides the widths {_listed(ours)} (student) and {_listed(theirs)} (teacher). Pass a "
                "relation_heads= that does."
            )

    def of_link(self, student: Signals, teacher: Signals, link: Link, kept: ValidPositions) -> Tensor:
        assert self._heads is not None  # `check` comes first
        totals = []
        for what, weight in self.relations.items():
            ours, theirs = self._activations(what, student, teacher, link)
            kept.check(ours.shape[:-1], theirs.shape[:-1], what, link)
            mask = torch.ones(ours.shape[:2], dtype=torch.bool, device=ours.device) if kept.mask is None else kept.mask
            values = relation_kl(ours, theirs, mask, heads=self._heads, segments=kept.segments)
            totals.append(weight * values.sum() * kept.share(ours.shape[1]))
        return torch.stack(totals).sum()


def _listed(widths: Set[int | None]) -> str:
    return ", ".join(map(str, sorted(widths, key=str)))
