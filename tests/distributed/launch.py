"""Running a program of this folder under torchrun, and reading the line that it prints."""

import os
import subprocess
import sys
from pathlib import Path

FOLDER = Path(__file__).parent


def launched(program: str, *arguments: str, says: str, processes: int) -> str:
    """What the program printed after the word `says`."""
    # torchrun puts no folder of ours on the path, and two threads on two cores would only spin.
    paths = os.pathsep.join(filter(None, (str(FOLDER.parents[1]), os.environ.get("PYTHONPATH"))))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "PYTHONPATH": paths}
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    done = subprocess.run(
        [sys.executable, *launcher, str(FOLDER / program), *arguments],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith(f"{says} ")]
    assert lines, done.stderr[-3000:]
    return lines[0].removeprefix(f"{says} ")
