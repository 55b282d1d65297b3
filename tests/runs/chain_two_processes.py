"""A program, not a test: a chain in each of several processes, at once and interrupted; what each did is written.

Started by `test_two_processes` with FOLDER. In fp64 and by plain SGD, so that only real differences from one process
are seen.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file
from transformers import TrainerCallback
from transformers.utils import logging

from hf_distill.runs import Chain, Link
from tests.runs.tiny_chain import run
from tests.trainer.tiny import PLAIN_STEP, bert, examples

CASES = ("whole", "interrupted")
FOLDERS = ("1-assistant", "2-half", "3-student", ".")


class Interrupted(RuntimeError):
    """As if the job's time had ended, in all processes at once."""


class Watch(TrainerCallback):
    """Which links were trained; one of them is interrupted in the middle, once."""

    def __init__(self, interrupted: str | None = None) -> None:
        self.trained: list[str] = []
        self.interrupted = interrupted

    def on_train_begin(self, args: Any, state: Any, control: Any, **keywords: Any) -> None:
        self.trained.append(f"{Path(args.output_dir).parent.name} from {state.global_step}")

    def on_save(self, args: Any, state: Any, control: Any, **keywords: Any) -> None:
        if self.interrupted is not None and self.interrupted in args.output_dir and state.global_step == 2:
            self.interrupted = None
            raise Interrupted


def links() -> list[Link]:
    """Three students, drawn from the seeds of their links."""

    def student(layers: int) -> Any:
        return bert(seed=int(torch.randint(1000, ())), num_hidden_layers=layers).double()

    return [
        Link("assistant", lambda: student(2)),
        Link("half", lambda: student(1), {"temperature": 1.0}),
        Link("student", lambda: student(1), {"learning_rate": 0.2}),
    ]


def chained(folder: Path, case: str, *, examples_a_process: int) -> dict[str, Any]:
    """The students, what their metrics are and which links were trained."""
    watch = Watch("2-half" if case == "interrupted" else None)
    settings = {**PLAIN_STEP, "learning_rate": 0.1, "per_device_train_batch_size": examples_a_process}
    given: dict[str, Any] = {
        "settings": {**settings, "per_device_eval_batch_size": 3 * examples_a_process // 2, "weight_decay": 0.0},
        "teacher_model": bert(seed=1, num_hidden_layers=3).double(),
        "train_dataset": examples(16),
        "callbacks": [watch],
    }
    resume = False
    if case == "interrupted":
        try:
            run(folder / case, Chain(links()), **given)
        except Interrupted:
            resume = True
    result = run(folder / case, Chain(links()), resume_from_checkpoint=resume, **given)
    return {
        "trained": watch.trained,
        "students": {name: load_file(folder / case / "out" / name / "model.safetensors") for name in FOLDERS},
        "metrics": [(one.metrics["eval_accuracy"], one.metrics["eval_loss"]) for one in result.links],
        "kept": (result.best, result.kept),
        "how": [one.how for one in result.links],
    }


def written_under(folder: Path) -> list[str]:
    """Filled with the name of every file that this process opens to write, or renames, in the folder."""
    names: list[str] = []

    def listen(event: str, args: tuple[Any, ...]) -> None:
        if event == "open" and isinstance(args[0], (str, bytes, os.PathLike)):
            writes = bool(args[2] & (os.O_WRONLY | os.O_RDWR)) if isinstance(args[2], int) else False
        else:
            writes = event in ("os.rename", "os.remove", "os.mkdir", "shutil.copyfile", "shutil.rmtree")
        if writes and str(folder) in os.fsdecode(args[0]):
            written = args[1] if event == "os.rename" else args[0]
            names.append(f"{event} {Path(os.fsdecode(written)).name}")

    sys.addaudithook(listen)
    return names


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    written = written_under(folder)
    found = {case: chained(folder, case, examples_a_process=2) for case in CASES}
    torch.save({"found": found, "written": list(written)}, f"{folder}-process-{dist.get_rank()}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
