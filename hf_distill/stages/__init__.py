"""Several trainings of one student, one after another, as one call that can be resumed."""

from hf_distill.stages.result import StageResult, StagesResult
from hf_distill.stages.run import train_in_stages

__all__ = ["StageResult", "StagesResult", "train_in_stages"]
