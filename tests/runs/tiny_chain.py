"""Three tiny classifiers, each the next one's teacher, as the tests of chains and their killed program run them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from hf_distill import DistillationArguments
from hf_distill.runs import Chain, ChainResult, Link
from tests.trainer.tiny import QUIET, bert, examples, padded

RUN = {
    **QUIET,
    **{"max_steps": 3, "per_device_train_batch_size": 4, "learning_rate": 0.02, "weight_decay": 0.1},
    **{"save_strategy": "steps", "save_steps": 1, "logging_steps": 1, "metric_for_best_model": "accuracy"},
}


def teacher() -> Any:
    return bert(seed=1, num_hidden_layers=3)


def student(layers: int) -> Any:
    """With dropout, so that the order of random numbers counts; of the caller's seed."""
    import torch

    return bert(seed=int(torch.randint(1000, ())), dropout=0.2, num_hidden_layers=layers)


def links() -> list[Link]:
    return [
        Link("assistant", lambda: student(2)),
        Link("half", lambda: student(1), {"temperature": 1.0, "alpha": 1.0}),
        Link("student", lambda: student(1), {"learning_rate": 0.03}),
    ]


def arguments(folder: Path | str, **changed: Any) -> DistillationArguments:
    return DistillationArguments(output_dir=str(Path(folder) / "out"), **{**RUN, **changed})


def accuracy(prediction: Any) -> dict[str, float]:
    return {"accuracy": float(np.mean(prediction.predictions.argmax(-1) == prediction.label_ids))}


def run(folder: Path | str, chain: Any = None, *, settings: Any = None, **keywords: Any) -> ChainResult:
    chain = Chain(links()) if chain is None else chain
    given = {
        **{"teacher_model": teacher(), "args": arguments(folder, **(settings or {})), "train_dataset": examples(16)},
        **{"eval_dataset": examples(12), "compute_metrics": accuracy, "data_collator": padded},
    }
    return chain.run(**{**given, **keywords})
