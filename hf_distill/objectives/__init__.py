"""The objectives: where student and teacher should agree, and the labels. They return sums and counts, never means."""

from hf_distill.objectives.attention import AttentionMatch
from hf_distill.objectives.base import Objective, ObjectiveSetup
from hf_distill.objectives.exits import ExitMatch
from hf_distill.objectives.hidden import CosineEmbedding, HiddenMatch
from hf_distill.objectives.logits import LogitsMatch
from hf_distill.objectives.relations import RelationMatch
from hf_distill.objectives.similarity import SimilarityMatch
from hf_distill.objectives.universal_logit import UniversalLogitMatch

OBJECTIVES: dict[str, type[Objective]] = {
    "logits": LogitsMatch,
    "hidden": HiddenMatch,
    "cosine": CosineEmbedding,
    "attention": AttentionMatch,
    "relations": RelationMatch,
    "similarity": SimilarityMatch,
    "exits": ExitMatch,
    "universal_logit": UniversalLogitMatch,
}

__all__ = [
    "OBJECTIVES",
    "AttentionMatch",
    "CosineEmbedding",
    "ExitMatch",
    "HiddenMatch",
    "LogitsMatch",
    "Objective",
    "ObjectiveSetup",
    "RelationMatch",
    "SimilarityMatch",
    "UniversalLogitMatch",
]
