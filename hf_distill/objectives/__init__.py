"""What student and teacher should agree about, and what the labels say. Sums and counts, never means."""

from hf_distill.objectives.base import Objective
from hf_distill.objectives.labels import LabelsTerm
from hf_distill.objectives.logits import LogitsMatch

OBJECTIVES: dict[str, type[Objective]] = {"logits": LogitsMatch}

__all__ = ["OBJECTIVES", "LabelsTerm", "LogitsMatch", "Objective"]
