"""Agreement of relations between positions, as MiniLM has them: no constraint on widths or heads."""

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
from hf_distill.signals import RELATED, Signals


class RelationMatch(LayerObjective):
    """How positions relate to each other, by their queries, keys or values: KL from the teacher's relations.

    Read by hooks on the projections of the matched layers, whatever the attention implementation. No learned
    projection, no equal widths, no equal numbers of attention heads. Each position is related to all that count, of a
    decoder also to those behind it; of packed sequences to those of its own.

    MiniLMv2 (Wang et al. 2021, section 3.1) takes queries, keys and values of one layer: the student's last, the
    teacher's
    last or, of large teachers, one below (`layers=[(-1, 20)]` of 24). MiniLM (Wang et al. 2020, section 3.2) takes the
    values alone, beside the attention of that layer.

    Args:
        layers: see `LayerObjective`; the last of both by default.
        relations: names among "queries", "keys", "values", or name → weight.
        relation_heads: how many pieces the vectors are cut into; None: the attention heads of the teacher, or of the
            student, whichever divides both widths. More pieces are finer (48 for a base-size teacher in the paper).

    Raises:
        SettingError: relation heads that do not divide both widths; a block whose projections are not known by name, or
            are not called (WavLM).
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
        side: str | None = None,
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
                f"student's) divides the widths {_listed(ours)} (student) and {_listed(theirs)} (teacher). Pass "
                "relation_heads=, a number that does."
            )

    def of_link(self, student: Signals, teacher: Signals, link: Link, kept: ValidPositions) -> Tensor:
        assert self._heads is not None  # `check` comes first
        totals = []
        for what, weight in self.relations.items():
            ours = student.activations[self._read(what, link.student, 0)]
            theirs = teacher.activations[self._read(what, link.teacher, 1)]
            kept.check(ours.shape[:-1], theirs.shape[:-1], what, link)
            mask = torch.ones(ours.shape[:2], dtype=torch.bool, device=ours.device) if kept.mask is None else kept.mask
            values = relation_kl(ours, theirs, mask, heads=self._heads, segments=kept.segments)
            totals.append(weight * values.sum() * kept.share(ours.shape[1]))
        return torch.stack(totals).sum()


def _listed(widths: Set[int | None]) -> str:
    return ", ".join(map(str, sorted(widths, key=str)))
