"""ZeRO 0 to 3 on two CPU processes: the curve of one process, with the teacher sharded at stage 3."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

PROGRAM = Path(__file__).with_name("zero_program.py")


def curve(stage: int, *, processes: int) -> dict[str, object]:
    # torchrun puts no folder of ours on the path, and two threads on two cores would only spin.
    root = str(PROGRAM.parents[2])
    paths = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "PYTHONPATH": paths}
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    done = subprocess.run(
        [sys.executable, *launcher, str(PROGRAM), str(stage)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("CURVE ")]
    assert lines, done.stderr[-3000:]
    return json.loads(lines[0].removeprefix("CURVE "))


@pytest.mark.slow  # DeepSpeed builds an operator with g++ the first time
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_zero_has_the_curve_of_one_process(stage: int) -> None:
    pytest.importorskip("deepspeed", reason="DeepSpeed is not installed: pip install deepspeed")
    alone, sharded = curve(-1, processes=1), curve(stage, processes=2)
    np.testing.assert_allclose(sharded["losses"], alone["losses"], rtol=1e-5)
    np.testing.assert_allclose(sharded["divergence"], alone["divergence"], rtol=1e-5)
