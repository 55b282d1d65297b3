"""Two stages of a tiny classifier, as the tests of stages and their two-process program run them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hf_distill import DistillationArguments, HiddenMatch
from hf_distill.presets import Stage
from hf_distill.runs import StagesResult, train_in_stages
from tests.trainer.tiny import QUIET, bert, examples, padded

SETTINGS = {**QUIET, "save_strategy": "steps", "save_steps": 1, "logging_steps": 1, "learning_rate": 0.01}
RUN = {**SETTINGS, "max_steps": 3, "per_device_train_batch_size": 4, "weight_decay": 0.1}


def student(seed: int = 0, **changed: Any) -> Any:
    return bert(seed=seed, dropout=0.3, num_hidden_layers=2, **changed)


def teacher() -> Any:
    """Wider, so that the first stage learns projections."""
    return bert(seed=1, num_hidden_layers=2, hidden_size=24, intermediate_size=24)


def stages(**first: Any) -> list[Stage]:
    """The inside without labels, so without the head; then the logits."""
    inside = Stage("inside", lambda: [HiddenMatch("even", weight=2.0)], {"alpha": None, **first})
    return [inside, Stage("logits", (), {"alpha": 1.0, "temperature": 1.0, "learning_rate": 0.02})]


def arguments(folder: Path | str, **changed: Any) -> DistillationArguments:
    return DistillationArguments(output_dir=str(Path(folder) / "out"), **{**RUN, **changed})


def run(folder: Path | str, model: Any, listed: Any = None, *, settings: Any = None, **keywords: Any) -> StagesResult:
    given = {"teacher_model": teacher(), "train_dataset": examples(16), "data_collator": padded, **keywords}
    listed = stages() if listed is None else listed
    return train_in_stages(listed, model=model, args=arguments(folder, **(settings or {})), **given)
