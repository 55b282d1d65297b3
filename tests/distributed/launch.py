"""Running a program in several gloo processes: under torchrun, or two alone, which import torch once less."""

import os
import socket
import subprocess
import sys
from pathlib import Path

FOLDER = Path(__file__).parent
ROOT = FOLDER.parents[1]


def launched(program: str, *arguments: str, says: str, processes: int) -> str:
    """What the program printed after the word `says`."""
    # torchrun puts no folder of ours on the path, and two threads on two cores would only spin.
    paths = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
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


def free_port() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


def two_processes(program: Path, *arguments: str) -> list[str]:
    """What each of two processes printed, by rank."""
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    started = []
    for rank in ("0", "1"):
        env = {**os.environ, **common, "RANK": rank, "LOCAL_RANK": rank, "PYTHONPATH": str(ROOT)}
        pipe = subprocess.PIPE
        started.append(
            subprocess.Popen([sys.executable, str(program), *arguments], env=env, stdout=pipe, stderr=pipe, text=True)
        )
    printed = []
    try:
        for process in started:
            out, errors = process.communicate(timeout=500)
            assert process.returncode == 0, out[-3000:] + errors[-6000:]
            printed.append(out)
    finally:
        for process in started:
            if process.poll() is None:  # it would wait for the other for minutes
                process.kill()
                process.communicate()
    return printed
