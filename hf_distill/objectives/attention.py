"""AttentionMatch: agreement of self-attention, as scores before the softmax or probabilities after it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from hf_distill.errors import SettingError, check_choice
from hf_distill.functional.attention import attention_kl, map_heads, score_distance
from hf_distill.layer_map import Link
from hf_distill.models.blocks import Blocks
from hf_distill.objectives.base import ObjectiveSetup
from hf_distill.objectives.layers import LayerObjective, Layers, ValidPositions
from hf_distill.schedules import Schedule
from hf_distill.signals import ATTENTION, Side, Signals

_COMPARED = {"scores": score_distance, "probabilities": attention_kl}
Heads = Literal["grouped"] | Sequence[int] | Sequence[Sequence[int]]


class AttentionMatch(LayerObjective):
    """A distance between the self-attention maps of student and teacher, head by head.

    The maps are computed from the queries and keys of each matched layer, so any attention implementation (SDPA, flash,
    eager) works and none is changed. In return, the scores `[b h t t]` of both models are computed a second time for
    each matched layer and held until the backward; other layers cost nothing. Attention dropout is not applied to them.
    Queries and keys at padding, and keys that the model's mask hides (the future, positions beyond a sliding window),
    are left out.

    TinyBERT (Jiao et al. 2020, section 3.1, equation 7: "scores", all layers by `LayerMap.skip`) and MiniLM (Wang et
    al. 2020, section 3.1: "probabilities", the last layer).

    Args:
        layers: see `LayerObjective`.
        distance: "scores" (mean squared difference) or "probabilities" (KL from the teacher).
        heads: for unequal numbers of heads, the teacher head of each student head, or a list of them (their scores are
            averaged), or "grouped" (neighbours are averaged, if the numbers divide).

    Raises:
        SettingError: if numbers of heads differ without `heads`, the attention cannot be captured (DeBERTa, MPNet,
            WavLM, BLOOM and others compute their own), or its mask is not known (flex attention, packed sequences under
            flash attention).
    """

    paper = "jiao2020tinybert"
    default_name = "attention"
    reads = (ATTENTION,)
    shown = ("distance", "heads", "side")

    def __init__(
        self,
        layers: Layers = "even",
        *,
        distance: Literal["scores", "probabilities"] = "scores",
        heads: Heads | None = None,
        weight: float | Schedule = 1.0,
        side: Side | None = None,
        name: str | None = None,
        student_stack: str | None = None,
        teacher_stack: str | None = None,
    ) -> None:
        super().__init__(
            layers, weight=weight, side=side, name=name, student_stack=student_stack, teacher_stack=teacher_stack
        )
        check_choice("AttentionMatch: distance", distance, _COMPARED)
        if isinstance(heads, str) and heads != "grouped":
            raise SettingError(f"AttentionMatch: heads={heads!r}: give 'grouped', teacher heads, or lists of them.")
        self.distance = distance
        self.heads = heads

    def check(self, student: Blocks, teacher: Blocks, setup: ObjectiveSetup) -> None:
        if student.heads is not None and teacher.heads is not None:
            self._head_map(student.heads, teacher.heads)

    def _head_map(self, ours: int, theirs: int) -> Sequence[Any] | None:
        """Return the teacher's heads for each student head, or None if they are the same."""
        if self.heads is None:
            if ours == theirs:
                return None
            raise SettingError(
                f"AttentionMatch: the student has {ours} attention heads, the teacher {theirs}. Pass heads= "
                "('grouped', or for each student head a teacher head or a list of them), or use RelationMatch."
            )
        if self.heads == "grouped":
            if theirs % ours:
                raise SettingError(
                    f"AttentionMatch: heads='grouped' cannot divide {theirs} teacher heads among {ours} student heads. "
                    "Pass a list of teacher heads for each student head."
                )
            size = theirs // ours
            return [list(range(i * size, (i + 1) * size)) for i in range(ours)]
        if len(self.heads) != ours:
            raise SettingError(f"AttentionMatch: heads has {len(self.heads)} entries, the student {ours} heads.")
        map_heads(torch.zeros(1, theirs, 1, 1), self.heads)
        return list(self.heads)

    def of_link(self, student: Signals, teacher: Signals, link: Link, kept: ValidPositions) -> Tensor:
        keep = kept.mask
        ours, theirs = self._activations(ATTENTION, student, teacher, link)
        for what, q, p in (("queries", ours.queries, theirs.queries), ("keys", ours.keys, theirs.keys)):
            kept.check((q.shape[0], q.shape[2]), (p.shape[0], p.shape[2]), what, link)
        q, p = ours.scores(keep), theirs.scores(keep)
        heads = self._head_map(q.shape[1], p.shape[1])
        p = p if heads is None else map_heads(p, heads)
        keys = _shared_by_heads(ours.allowed()) & _shared_by_heads(theirs.allowed())
        if keep is not None:
            keys = keys & keep[:, None, :, None] & keep[:, None, None, :]
        keys = keys.expand(q.shape[0], 1, *q.shape[2:])
        values = _COMPARED[self.distance](q, p, keys)
        return values.sum() * kept.share(q.shape[2])


def _shared_by_heads(allowed: Tensor) -> Tensor:
    """Return a mask `[b 1 t s]` that all heads share; if they differ, the positions that every head may see."""
    return allowed if allowed.shape[1] == 1 else allowed.all(1, keepdim=True)
