"""A second process that does jobs while this one does others; its progress bars are shown by this one."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from multiprocessing.connection import Connection
from queue import Empty, SimpleQueue
from typing import Any

from hf_distill.cli.progress import Stages, quiet_libraries

Job = Callable[..., Any]
"""A function at the top level of a module. It is called with its arguments, and with `stages` by name."""


def cores() -> int:
    """How many processors this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def peak_memory_mb() -> float | None:
    """The most memory that this process held; None on a system that does not tell."""
    if sys.platform == "win32":
        return None
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # macOS counts bytes, Linux KiB.
    return peak * (1 if sys.platform == "darwin" else 1024) / 1e6


class Jobs:
    """Jobs that wait until this process, or the second one, is free to do them. Who does a job changes no result.

    Args:
        second: whether there is a second process. It starts at once, and ends with the `with` block.

    Attributes:
        second_peak_mb: the most memory that the second process held, known after `finish`; None where it is not.
    """

    def __init__(self, *, second: bool) -> None:
        self.second_peak_mb: float | None = None
        self._waiting: SimpleQueue[tuple[Any, Job, tuple[Any, ...]] | None] = SimpleQueue()
        self._results: dict[Any, Any] = {}
        self._second = _SecondProcess() if second else None
        self._thread = ThreadPoolExecutor(1)
        self._driven: Future[None] | None = None

    def __enter__(self) -> Jobs:
        return self

    def __exit__(self, *error: object) -> None:
        if self._second is not None:
            self._second.end()
        self._waiting.put(None)
        self._thread.shutdown()

    def add(self, name: Any, job: Job, *arguments: Any) -> None:
        """Let a job wait; `name` is the key of its result."""
        self._waiting.put((name, job, arguments))

    def begin(self, stages: Stages) -> None:
        """Let the second process take jobs from now on."""
        if self._second is not None:
            self._driven = self._thread.submit(self._drive, self._second, stages)

    def check(self) -> None:
        """Raise the error of the second process, if it has ended by one. Call it often."""
        if self._driven is not None and self._driven.done():
            self._driven.result()

    def finish(self, stages: Stages) -> dict[Any, Any]:
        """Do the jobs that still wait, wait for the second process, and return every job's result by its name."""
        while (given := self._next()) is not None:
            name, job, arguments = given
            self._results[name] = job(*arguments, stages=stages)
        if self._driven is not None:
            self._waiting.put(None)
            self._driven.result()
        return self._results

    def _next(self) -> tuple[Any, Job, tuple[Any, ...]] | None:
        self.check()
        try:
            return self._waiting.get_nowait()
        except Empty:
            return None

    def _drive(self, second: _SecondProcess, stages: Stages) -> None:
        """In a thread: hand jobs to the second process, one after the other."""
        while (given := self._waiting.get()) is not None:
            name, job, arguments = given
            self._results[name] = second.do(job, arguments, stages)
        self.second_peak_mb = second.do(_peak, (), stages)


class _SecondProcess:
    """The process, and this end of the pipe to it."""

    def __init__(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, other = context.Pipe()
        self._process = context.Process(target=_serve, args=(other,), daemon=True)
        with _interrupts_blocked():  # Ctrl-C reaches every process of a terminal; this one answers it
            self._process.start()
        other.close()

    def do(self, job: Job, arguments: tuple[Any, ...], stages: Stages) -> Any:
        """Return the result of the job, which is done over there; its errors are raised here."""
        try:
            self._pipe.send((job, arguments))
            return self._result(stages)
        except (EOFError, ConnectionError) as error:
            self._process.join(timeout=5)
            raise RuntimeError(
                f"the second process has ended with exit code {self._process.exitcode}; -9 mostly means that memory "
                "was short. Run with --processes 1."
            ) from error

    def _result(self, stages: Stages) -> Any:
        """Show the job's bars until it sends its result."""
        bars: list[tuple[Any, Callable[[], None]]] = []
        while True:
            message, *values = self._pipe.recv()
            if message == "begin":
                name, total = values
                bar = stages.stage(name, total=total)
                bars.append((bar, bar.__enter__()))
            elif message == "step":
                bars[-1][1]()
            elif message == "end":
                bars.pop()[0].__exit__(None, None, None)
            elif message == "error":
                error, text = values
                raise error from RuntimeError(f"in the second process:\n{text}")
            else:
                return values[0]

    def end(self) -> None:
        """End it, whatever it is doing."""
        self._process.terminate()
        self._process.join()
        self._pipe.close()


class _RemoteStages(Stages):
    """The other process's bars, for a job in this one."""

    def __init__(self, pipe: Connection) -> None:
        self._pipe = pipe

    @contextmanager
    def stage(self, name: str, *, total: int) -> Iterator[Callable[[], None]]:
        self._pipe.send(("begin", name, total))
        yield lambda: self._pipe.send(("step",))
        self._pipe.send(("end",))


def _serve(pipe: Connection) -> None:
    """In the second process: do jobs until the other end closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    import torch

    torch.set_num_threads(1)
    stages = _RemoteStages(pipe)
    with quiet_libraries(), ThreadPoolExecutor(1) as thread:
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


def _peak(*, stages: Stages) -> float | None:
    return peak_memory_mb()


@contextmanager
def _interrupts_blocked() -> Iterator[None]:
    """A process that is started in here does not get SIGINT, where the system has masks of signals."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
