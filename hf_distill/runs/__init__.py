"""Several trainings, one after another, as one call that can be resumed: stages of one student, chains of students."""

from hf_distill.runs.chain import Chain, Link
from hf_distill.runs.results import ChainResult, LinkResult, StageResult, StagesResult
from hf_distill.runs.stages import train_in_stages

__all__ = ["Chain", "ChainResult", "Link", "LinkResult", "StageResult", "StagesResult", "train_in_stages"]
