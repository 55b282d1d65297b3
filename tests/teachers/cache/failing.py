"""A program, not a test: two processes build a cache, and one of them fails.

`failing.py FOLDER RANK WHEN`: one process fails, or its disk is full, at one point of the pass. Each process prints
its error; then both build the cache with the same call.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from accelerate import PartialState

from hf_distill.teachers import shards
from hf_distill.teachers.cache.build import CachePass
from hf_distill.teachers.passes import ShardedPass
from tests.heads import HEADS
from tests.teachers.cache.built import build
from tests.teachers.cache.test_interrupted import Quota

HEAD = HEADS["bert_tokens"]
BROKEN = {
    "plan": (ShardedPass, "_find"),
    "begin": (ShardedPass, "_begin"),
    "shard": (CachePass, "_make_part"),
    "end": (CachePass, "_write_index"),
}


def broken(*_: Any) -> None:
    raise RuntimeError("out of memory")


def main(folder: Path, rank: int, when: str) -> None:
    torch.set_num_threads(1)
    state = PartialState(cpu=True)
    teacher, examples, message = HEAD.make(2), HEAD.examples(20), ""
    if when == "disk":
        fault = mock.patch.object(shards, "_open", Quota(5500).open)
    else:
        fault = mock.patch.object(*BROKEN[when], broken)
    if state.process_index == rank:
        fault.start()
    try:
        build(folder, HEAD, teacher, examples)
    except (ValueError, RuntimeError) as error:
        message = f"{type(error).__name__}: {error}"
    if state.process_index == rank:
        fault.stop()
    print(json.dumps({"message": message, "examples": len(build(folder, HEAD, teacher, examples))}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
