"""A program, not a test: the stages in each of several processes, plain and with gradient checkpointing, and resumed.

`torchrun --nproc-per-node 2 stages_two_processes.py FOLDER` (started by
`test_stages_in_two_processes`). In fp64 and with plain SGD, so that only real differences from one process show.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers import TrainingArguments
from transformers.utils import logging

from tests.runs.tiny_stages import run, stages, student, teacher
from tests.trainer.tiny import PLAIN_STEP, examples, weights

FIELDS = TrainingArguments.__dataclass_fields__
CHECKPOINTING = "activation_checkpointing" if "activation_checkpointing" in FIELDS else "gradient_checkpointing"
CASES: dict[str, dict[str, Any]] = {"plain": {}, "checkpointing": {CHECKPOINTING: True}}


def both(folder: Path, name: str, *, examples_a_process: int) -> dict[str, Any]:
    """Return the weights after both stages, and the logged losses."""
    model = _without_dropout(student().double())  # two processes draw other numbers than one
    settings = {**PLAIN_STEP, "learning_rate": 0.1, "per_device_train_batch_size": examples_a_process, **CASES[name]}
    given = {"settings": settings, "teacher_model": teacher().double(), "train_dataset": examples(16)}
    listed = stages()
    if name == "plain":  # interrupted between the stages
        run(folder / name, model, listed[:1], **given)
        model = _without_dropout(student(seed=7).double())
        given["resume_from_checkpoint"] = True
    result = run(folder / name, model, listed, **given)
    losses = [[entry["loss"] for entry in stage.log_history if "loss" in entry] for stage in result.stages]
    return {"weights": weights(model), "losses": losses}


def _without_dropout(model: Any) -> Any:
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return model


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    found = {name: both(folder, name, examples_a_process=2) for name in CASES}
    found["processes"] = dist.get_world_size()
    if dist.get_rank() == 0:
        torch.save(found, folder / "found.partial")
        os.replace(folder / "found.partial", folder / "found.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
