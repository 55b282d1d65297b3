"""Run a program in separate processes: under torchrun, or forked from a server that has imported torch.

An interpreter takes five to ten seconds to import torch and transformers. The standard library's fork server imports
them once for all programs that a test process starts.
"""

import multiprocessing
import multiprocessing.connection
import os
import runpy
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

from tests.cheap import make_trainings_cheap

FOLDER = Path(__file__).parent
ROOT = FOLDER.parents[1]
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(
    ["transformers.trainer", "transformers.models.bert.modeling_bert", "datasets", "peft", "hf_distill.trainer.mixin"]
)
SECONDS = 300


def launched(program: str, *arguments: str, says: str, processes: int) -> str:
    """Return the line that the program printed after the word `says`."""
    # torchrun does not add the repository to the path; two threads on two cores would only spin.
    paths = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "PYTHONPATH": paths}
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    done = subprocess.run(
        [sys.executable, *launcher, str(FOLDER / program), *arguments],
        env=environment,
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith(f"{says} ")]
    assert lines, done.stderr[-3000:]
    return lines[0].removeprefix(f"{says} ")


def free_port() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


def alone(program: Path, *arguments: str, folder: Path | None = None) -> str:
    """Run the program as the main module of a new process in `folder`; return its output."""
    return _forked(program, arguments, [{}], folder)[0]


def two_processes(program: Path, *arguments: str) -> list[str]:
    """Run the program in a group of two processes; return their outputs by rank."""
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "WORLD_SIZE": "2"}
    return _forked(program, arguments, [{**common, "RANK": rank, "LOCAL_RANK": rank} for rank in ("0", "1")], None)


def _forked(
    program: Path, arguments: Sequence[str], environments: Sequence[Mapping[str, str]], folder: Path | None
) -> list[str]:
    """Run a process in each of these environments; return their outputs. All of them must exit with 0."""
    with tempfile.TemporaryDirectory() as printed, ExitStack() as stack:
        started = []
        for number, environment in enumerate(environments):
            given = (str(program), arguments, dict(environment), f"{printed}/{number}", folder or Path.cwd())
            started.append(SERVER.Process(target=_run, args=given))
            stack.callback(_end, started[-1])
            started[-1].start()
        running = {process.sentinel: process for process in started}
        while running:
            ended = multiprocessing.connection.wait(list(running), timeout=SECONDS)
            output = "\n".join(path.read_text()[-6000:] for path in sorted(Path(printed).iterdir()))
            assert ended, f"{program} has not ended after {SECONDS} s: {output}"
            for sentinel in ended:
                process = running.pop(sentinel)
                process.join()
                assert process.exitcode == 0, output  # otherwise the others may wait for minutes
        return [Path(f"{printed}/{number}.out").read_text() for number in range(len(started))]


def _end(process: multiprocessing.process.BaseProcess) -> None:
    if process.is_alive():
        process.kill()
        process.join()
    process.close()


def _run(program: str, arguments: Sequence[str], environment: Mapping[str, str], printed: str, folder: Path) -> None:
    """In the new process: do what `python program ARGUMENTS` does."""
    make_trainings_cheap()
    os.chdir(folder)
    os.environ.update(environment)
    for stream, name in ((1, "out"), (2, "err")):
        with open(f"{printed}.{name}", "wb") as file:
            os.dup2(file.fileno(), stream)
    sys.argv = [program, *arguments]
    runpy.run_path(program, run_name="__main__")
