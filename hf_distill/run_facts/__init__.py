"""What one distillation run was, as plain data, and readers that fill it. No torch, no card."""

from hf_distill.run_facts.facts import (
    DatasetFacts,
    EvaluationFacts,
    ModelFacts,
    RunFacts,
    ScheduleFacts,
    TrainingFacts,
)
from hf_distill.run_facts.names import looks_like_hub_id, without_paths
from hf_distill.run_facts.readers import (
    dataset_facts,
    evaluations_from_log,
    history_from_log,
    library_versions,
    model_facts,
    training_facts,
)

__all__ = [
    "DatasetFacts",
    "EvaluationFacts",
    "ModelFacts",
    "RunFacts",
    "ScheduleFacts",
    "TrainingFacts",
    "dataset_facts",
    "evaluations_from_log",
    "history_from_log",
    "library_versions",
    "looks_like_hub_id",
    "model_facts",
    "training_facts",
    "without_paths",
]
