"""Trainings with each kind of teacher of `teacher_rows.py`; as a program, the same in several processes.

`teacher_runs.py FOLDER`, started by `test_teachers_in_two_processes.py`: process i writes FOLDER-process-i.pt.
"""

from __future__ import annotations

import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import PartialState
from torch import Tensor
from transformers.utils import logging

from tests.heads import HEADS
from tests.laws.making_teachers import Place, TeacherCase
from tests.laws.teacher_rows import TEACHER_ROWS, TeacherRow
from tests.trainer.tiny import PLAIN_STEP, make, weights

TOGETHER = [kind for kind, row in TEACHER_ROWS.items() if not row.batch_matters]
OVER_PROCESSES = ("cached, dense", "ensemble", "moving average", "adapters off", "temporal ensemble", "peer")
Weights = dict[str, Tensor]


def trainer_of(folder: Path, row: TeacherRow, place: Place, made: TeacherCase | None = None, **settings: Any) -> Any:
    made = made or row.make(place)
    given = {"train_dataset": place.examples, "data_collator": HEADS[place.head].collate, "alpha": 0.5, **settings}
    return make(
        folder, made.student, made.teacher, temperature=row.temperature, processing_class=made.processor, **given
    )


def three_steps(kind: str, place: Place, *, micro_batch: int, parts: int = 1) -> tuple[Weights, Weights]:
    """Return the student before and after three steps of plain SGD, each on the same eight ragged examples.

    Teachers that follow the student have been updated.
    """
    cut = {"per_device_train_batch_size": micro_batch, "gradient_accumulation_steps": parts, "max_steps": 3}
    settings = {**PLAIN_STEP, "learning_rate": 0.1, **cut}
    trainer = trainer_of(place.folder / f"{micro_batch}x{parts}", TEACHER_ROWS[kind], place, **settings)
    start = weights(trainer.model)
    trainer.train()
    return start, weights(trainer.model)


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    PartialState(cpu=True)  # the process group in which caches are built together
    found = {}
    for kind in OVER_PROCESSES:
        with ExitStack() as stack:
            place = Place(TEACHER_ROWS[kind].heads[-1], folder / kind, stack)
            found[kind] = three_steps(kind, place, micro_batch=2, parts=2)[1]
    torch.save({"found": found, "processes": dist.get_world_size()}, f"{folder}-process-{dist.get_rank()}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
