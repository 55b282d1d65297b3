"""A program: builds a cache repeatedly, killed by SIGKILL, and reports whether the bytes stay the same.

`killed.py FOLDER RANDOM_KILLS [drawn]`: with `drawn`, a sampled cache. Everything is imported once; each pass is
a fork that is killed right before or right after its n-th rename or removal on disk,
for every n, or after a random time. Then two processes build one cache together. Prints a line of JSON.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import torch
from accelerate import PartialState

from hf_distill.teachers.cache import Sampled
from tests.distributed.launch import free_port
from tests.heads import HEADS
from tests.teachers.cache.built import build, contents

DRAWN = "drawn" in sys.argv
STORE = {"store": Sampled(6)} if DRAWN else {}
HEAD = HEADS["llama_causal_lm" if DRAWN else "bert_tokens"]
TEACHER, EXAMPLES = HEAD.make(2), HEAD.examples(20)


def pass_of(folder: Path) -> None:
    build(folder, HEAD, TEACHER, EXAMPLES, **STORE)


def in_child(work: Callable[[], None], *, seconds: float | None = None) -> int:
    """Return the exit status of a fork that runs `work`; a negative status is the signal that ended it."""
    child = os.fork()
    if child == 0:
        try:
            work()
            os._exit(0)
        except ValueError:  # raised by the library; this process ends here anyway
            traceback.print_exc()
        finally:
            os._exit(1)
    if seconds is not None:
        time.sleep(seconds)
        os.kill(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def dying_at(folder: Path, number: int, *, after: bool) -> None:
    """Run a pass that is killed at the n-th rename or removal."""
    seen = 0

    def watched(change: Callable[..., None]) -> Callable[..., None]:
        def changing(*names: object, **keywords: object) -> None:
            nonlocal seen
            seen += 1
            if seen == number and not after:
                os.kill(os.getpid(), signal.SIGKILL)
            change(*names, **keywords)
            if seen == number and after:
                os.kill(os.getpid(), signal.SIGKILL)

        return changing

    os.replace, os.unlink = watched(os.replace), watched(os.unlink)  # type: ignore[assignment]  # and pathlib's
    pass_of(folder)


def resumed(folder: Path, expected: dict[str, bytes], ways: list[str], way: str) -> None:
    """Resume in another process, and record `way` if the bytes differ."""
    status, found = in_child(lambda: pass_of(folder)), contents(folder)
    if status != 0 or found != expected:
        apart = [name for name in {*found, *expected} if found.get(name) != expected.get(name)]
        ways.append(f"{way}: exit {status}, {apart}")
    shutil.rmtree(folder)


def in_two_processes(folder: Path) -> list[int]:
    """Return the exit statuses of two gloo processes that build one cache."""
    port = free_port()
    children = []
    for rank in range(2):
        child = os.fork()
        if child == 0:
            os.environ.update(
                RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=port
            )
            try:
                assert PartialState(cpu=True).num_processes == 2
                pass_of(folder)
                os._exit(0)
            finally:
                os._exit(1)
        children.append(child)
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


def main(root: Path, random_kills: int) -> None:
    torch.set_num_threads(1)
    whole = root / "whole"
    begun = time.monotonic()
    assert in_child(lambda: pass_of(whole)) == 0
    took, expected = time.monotonic() - begun, contents(whole)
    wrong: list[str] = []
    at = killed = 0
    while True:  # until a pass has fewer renames and removals
        at += 1
        folder = root / f"at-{at}"
        after = at % 2 == 0
        status = in_child(lambda: dying_at(folder, at, after=after))  # noqa: B023  # called at once
        if status == 0:
            break
        killed += status == -signal.SIGKILL
        resumed(folder, expected, wrong, f"at change {at}")
    rng = random.Random(0)
    for number in range(random_kills):
        folder, seconds = root / f"random-{number}", rng.uniform(0.0, took)
        status = in_child(lambda: pass_of(folder), seconds=seconds)  # noqa: B023  # called at once
        killed += status == -signal.SIGKILL
        resumed(folder, expected, wrong, f"after {seconds:.3f} s")
    both = root / "two"
    if in_two_processes(both) != [0, 0] or contents(both) != expected:
        wrong.append("two processes")
    print(json.dumps({"killed": killed, "changes": at - 1, "wrong": wrong, "files": sorted(expected)}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
