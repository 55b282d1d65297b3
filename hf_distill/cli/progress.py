"""One progress bar a stage, in the terminal; and other libraries' own bars and logs kept quiet."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import datasets
import transformers
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from transformers import TrainerCallback


class Stages:
    """A list of bars that grows by one a stage; a finished stage's bar stays.

    Attributes:
        at_each_step: called whenever a bar moves; what it raises ends the stage.
    """

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self.at_each_step: Callable[[], None] = lambda: None

    @contextmanager
    def stage(self, name: str, *, total: int) -> Iterator[Callable[[], None]]:
        """A bar of `total` steps; call what this yields after each of them."""
        task = self._progress.add_task(name, total=total)

        def advance() -> None:
            self._progress.advance(task)
            self.at_each_step()

        yield advance
        self._progress.update(task, completed=total)

    def say(self, text: str) -> None:
        """A line above the bars."""
        self._progress.console.print(text, highlight=False)


@contextmanager
def show_stages(console: Console) -> Iterator[Stages]:
    """Bars on this console until the block ends."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=30),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console) as progress:
        yield Stages(progress)


class StepBar(TrainerCallback):
    """Moves a bar by one at each optimizer step of a Trainer."""

    def __init__(self, advance: Callable[[], None]) -> None:
        self._advance = advance

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._advance()


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Without the logs, warnings and bars of transformers and datasets, which come back after."""
    verbosity = transformers.utils.logging.get_verbosity()
    of_datasets = datasets.logging.get_verbosity()
    bars = datasets.are_progress_bars_disabled()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # it logs what it also raises
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        transformers.utils.logging.set_verbosity(verbosity)
        transformers.utils.logging.enable_progress_bar()
        datasets.logging.set_verbosity(of_datasets)
        if not bars:
            datasets.enable_progress_bars()
