"""A progress bar for each stage, and no bars or logs of other libraries."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import datasets
import transformers
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


class Stages:
    """The bars of all stages, also of finished ones.

    Attributes:
        at_each_step: a function that is called whenever a bar moves; its error ends the stage.
    """

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self.at_each_step: Callable[[], None] = lambda: None

    @contextmanager
    def stage(self, name: str, *, total: int) -> Iterator[Callable[[], None]]:
        """Show a bar of `total` steps, and yield a function that advances it by a step."""
        task = self._progress.add_task(name, total=total)

        def advance() -> None:
            self._progress.advance(task)
            self.at_each_step()

        yield advance
        self._progress.update(task, completed=total)


@contextmanager
def show_stages(console: Console) -> Iterator[Stages]:
    """Show bars on this console inside the context."""
    columns = (TextColumn("{task.description}"), BarColumn(bar_width=30), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        yield Stages(progress)


class StepBar(TrainerCallback):
    """Advances a bar at each optimizer step of a Trainer."""

    def __init__(self, advance: Callable[[], None]) -> None:
        self._advance = advance

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        self._advance()


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Silence the logs, warnings and bars of transformers and datasets inside the context."""
    verbosity, bars_disabled = transformers.utils.logging.get_verbosity(), datasets.are_progress_bars_disabled()
    datasets_verbosity = datasets.logging.get_verbosity()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # it also logs the errors that it raises
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        transformers.utils.logging.set_verbosity(verbosity)
        transformers.utils.logging.enable_progress_bar()
        datasets.logging.set_verbosity(datasets_verbosity)
        if not bars_disabled:
            datasets.enable_progress_bars()
