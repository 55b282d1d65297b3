"""A second process that runs jobs at the same time, with its progress bars and its errors shown by the first."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import traceback
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from multiprocessing.connection import Connection
from typing import Any

from hf_distill.cli.progress import Stages, quiet_libraries

Job = Callable[..., Any]
"""A function at the top level of a module, called with its arguments and the keyword `stages`."""


def cores() -> int:
    """Return the number of processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def peak_memory_mb(*, stages: Stages | None = None) -> float | None:
    """Return the peak memory of this process, or None on Windows. Can be a `Job`."""
    if sys.platform == "win32":
        return None
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak * (1 if sys.platform == "darwin" else 1024) / 1e6  # macOS counts bytes, Linux KiB


class Jobs:
    """Jobs that run in this process or in the second one, whichever is free. The results do not depend on which.

    Args:
        second: whether there is a second process. It starts at once and ends with the `with` block.

    Attributes:
        second_peak_mb: the peak memory of the second process, known after `finish`.
    """

    def __init__(self, *, second: bool) -> None:
        self.second_peak_mb: float | None = None
        self._waiting: deque[tuple[Any, Job, tuple[Any, ...]]] = deque()
        self._results: dict[Any, Any] = {}
        self._running: list[Any] = []  # the name of the job in the second process, if it runs one
        self._bars: list[tuple[AbstractContextManager[Any], Callable[[], None]]] = []
        self._stages: Stages | None = None
        self._receiving = False
        self._process = None
        if second:
            context = multiprocessing.get_context("spawn")
            self._pipe, other = context.Pipe()
            self._process = context.Process(target=_serve, args=(other,), daemon=True)
            with _interrupts_blocked():  # Ctrl-C reaches all processes of a terminal, and only this one handles it
                self._process.start()
            other.close()

    def __enter__(self) -> Jobs:
        return self

    def __exit__(self, *error: object) -> None:
        if self._process is not None:
            self._process.terminate()
            self._process.join()
            self._pipe.close()

    def add(self, name: Any, job: Job, *arguments: Any) -> None:
        """Add a job.

        Args:
            name: the key of its result.
            job: the function.
            arguments: its positional arguments.
        """
        self._waiting.append((name, job, arguments))

    def begin(self, stages: Stages) -> None:
        """Let the second process run jobs from now on, with its bars in `stages`."""
        self._stages = stages
        self.check()

    def check(self) -> None:
        """Show the progress of the second process, give it the next job, and raise its error. Call this often."""
        if self._process is None or self._stages is None or self._receiving:  # a bar that moves calls it again
            return
        while self._running and self._pipe.poll():
            self._receive(self._stages)
        if not self._running and self._waiting:
            self._send(*self._waiting.popleft())

    def finish(self, stages: Stages) -> dict[Any, Any]:
        """Run the remaining jobs, wait for the second process, and return the results of all jobs by name."""
        while self._waiting:
            name, job, arguments = self._waiting.popleft()
            self._results[name] = job(*arguments, stages=stages)
            self.check()
        self._wait(stages)
        if self._process is not None:
            self._send("peak memory", peak_memory_mb, ())
            self._wait(stages)
            self.second_peak_mb = self._results.pop("peak memory")
        return self._results

    def _send(self, name: Any, job: Job, arguments: tuple[Any, ...]) -> None:
        self._running = [name]
        self._pipe.send((job, arguments))

    def _wait(self, stages: Stages) -> None:
        while self._running:
            self._receive(stages)

    def _receive(self, stages: Stages) -> None:
        """Handle a message of the second process: a movement of a bar, a result, or an error."""
        try:
            message, *values = self._pipe.recv()
        except (EOFError, ConnectionError) as error:
            assert self._process is not None
            self._process.join(timeout=5)
            raise RuntimeError(
                f"the second process has ended with exit code {self._process.exitcode}; -9 mostly means too little "
                "memory. Run with --processes 1."
            ) from error
        self._receiving = True
        try:
            self._handle(message, values, stages)
        finally:
            self._receiving = False

    def _handle(self, message: str, values: list[Any], stages: Stages) -> None:
        if message == "begin":
            bar = stages.stage(values[0], total=values[1])
            self._bars.append((bar, bar.__enter__()))
        elif message == "step":
            self._bars[-1][1]()
        elif message == "end":
            self._bars.pop()[0].__exit__(None, None, None)
        elif message == "error":
            raise values[0] from RuntimeError(f"in the second process:\n{values[1]}")
        else:
            self._results[self._running.pop()] = values[0]


class _RemoteStages(Stages):
    """Bars that the first process shows."""

    def __init__(self, pipe: Connection) -> None:
        self._pipe = pipe

    @contextmanager
    def stage(self, name: str, *, total: int) -> Iterator[Callable[[], None]]:
        self._pipe.send(("begin", name, total))
        yield lambda: self._pipe.send(("step",))
        self._pipe.send(("end",))


def _serve(pipe: Connection) -> None:
    """Run jobs in the second process until the pipe is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    import torch

    torch.set_num_threads(1)
    stages = _RemoteStages(pipe)
    with quiet_libraries(), ThreadPoolExecutor(1) as thread:  # the thread's future holds any error
        while True:
            try:
                job, arguments = pipe.recv()
            except EOFError:
                return
            done = thread.submit(job, *arguments, stages=stages)
            error = done.exception()
            if error is None:
                pipe.send(("result", done.result()))
            else:
                pipe.send(("error", error, "".join(traceback.format_exception(error))))


@contextmanager
def _interrupts_blocked() -> Iterator[None]:
    """Block SIGINT for processes that start in this context, if the system has signal masks."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
