"""Runs a chain in a child process again and again, each time killed at another moment; the last time to its end.

`python killed.py FOLDER MOMENT ...`: a child for each moment, all forked from this process, which imports torch once.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from hf_distill.runs import record
from tests.runs.tiny_chain import run


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


class KillAtStep(TrainerCallback):
    """In the second link, after the checkpoint of its second step."""

    def on_save(self, args: Any, state: Any, control: Any, **keywords: Any) -> None:
        if "2-half" in args.output_dir and state.global_step == 2:
            kill()


def when_written(name: str, link: str, *, before: bool) -> Callable[[], None]:
    """Killed just before, or just after, a file of a link stands in its place."""

    def prepare() -> None:
        replace = os.replace

        def watched(source: Any, target: Any) -> None:
            hit = Path(target).name == name and Path(target).parent.name == link
            if hit and before:
                kill()
            replace(source, target)
            if hit:
                kill()

        os.replace = watched

    return prepare


MOMENTS: dict[str, Callable[[], None] | None] = {
    "before the first link is finished": when_written(record.FINISHED, "1-assistant", before=True),
    "between two links": when_written(record.FINISHED, "1-assistant", before=False),
    "when the second is begun": when_written(record.BEGUN, "2-half", before=False),
    "inside of the second": None,
    "before the last link is finished": when_written(record.FINISHED, "3-student", before=True),
    "while the student is kept": when_written("model.safetensors", "out", before=True),
    "before the report": when_written("report.json", "out", before=True),
}


def child(folder: str, moment: str) -> None:
    prepare = MOMENTS.get(moment)
    if prepare is not None:
        prepare()
    callbacks = [KillAtStep()] if moment == "inside of the second" else []
    run(folder, resume_from_checkpoint=True, callbacks=callbacks)


def main(folder: str, *moments: str) -> None:
    torch.set_num_threads(1)
    for moment in [*moments, "never"]:
        pid = os.fork()
        if pid == 0:
            child(folder, moment)
            os._exit(0)
        _, status = os.waitpid(pid, 0)
        print(f"{moment}: {'killed' if os.WIFSIGNALED(status) else os.waitstatus_to_exitcode(status)}", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
