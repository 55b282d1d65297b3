"""A results folder that is filled whole or not at all, and that never takes another's place."""

from __future__ import annotations

import argparse
import os
import shutil
import tempfile
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from transformers import BertForSequenceClassification

from hf_distill.cli.progress import Stages, quiet_libraries, show_stages
from hf_distill.cli.quickstart_jobs import (
    Material,
    Trained,
    distill,
    train_alone,
    train_distilled,
    train_on_all_labels,
    train_teacher,
)
from hf_distill.cli.quickstart_report import ALL_LABELS, ALONE, DISTILLED, TEACHER, Answers, make_report
from hf_distill.cli.quickstart_training import FAST, FULL, Settings, batches, make_tokenizer, tokenize
from hf_distill.cli.second_process import Jobs, cores, peak_memory_mb
from hf_distill.cli.stdlib_corpus import Corpus, read_stdlib_corpus
from hf_distill.compare import (
    Latency,
    Report,
    measure_latency,
    plot_accuracy_against_latency,
    terminal_table,
    write_report,
)
from hf_distill.errors import SettingError, require

MARK = ".made-by-hf-distill-quickstart"
_UNFINISHED = ".unfinished-"


@contextmanager
def fill_folder(folder: Path, *, entries: Collection[str]) -> Iterator[Path]:
    """Yield an empty folder to work in; its `entries` move into `folder` when the block succeeds.

    When the block fails, what was in `folder` is untouched, and a folder made here is gone again.

    Raises `SettingError` when `folder` holds anything that such a block did not put there.
    """
    _check(folder, entries)
    existed = folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for killed in folder.glob(f"{_UNFINISHED}*"):  # what a run left that was ended by force
            shutil.rmtree(killed)
        work = Path(tempfile.mkdtemp(prefix=_UNFINISHED, dir=folder))
    except OSError as error:
        raise SettingError(f"output_dir {folder}: cannot be written ({error.strerror}). Choose another one.") from error
    try:
        yield work
        (folder / MARK).touch()
        for name in entries:
            _put_in_place(work / name, folder / name)
    finally:
        shutil.rmtree(work, ignore_errors=True)
        if not existed and not any(folder.iterdir()):
            folder.rmdir()


def _check(folder: Path, entries: Collection[str]) -> None:
    if folder.exists() and not folder.is_dir():
        raise SettingError(f"output_dir {folder}: is a file. Give a folder, or a name not in use.")
    found = {path.name for path in folder.iterdir()} if folder.exists() else set()
    foreign = sorted(found if MARK not in found else found - {MARK, *entries})
    foreign = [name for name in foreign if not name.startswith(_UNFINISHED)]
    if foreign:
        raise SettingError(
            f"output_dir {folder}: holds files that the quickstart did not make "
            f"({', '.join(foreign[:3])}{', …' if len(foreign) > 3 else ''}). "
            "Give an empty or a new folder with --output-dir."
        )


def _put_in_place(new: Path, place: Path) -> None:
    if place.is_dir():
        shutil.rmtree(place)
    os.replace(new, place)


ALONE_FOLDER, DISTILLED_FOLDER = "student-alone", "student-distilled"
PLOT = "accuracy-against-latency.png"
ENTRIES = (ALONE_FOLDER, DISTILLED_FOLDER, "report.json", "report.md", PLOT)


def run_command(arguments: argparse.Namespace) -> None:
    """Run the quickstart with the options of the command line."""
    settings = FAST if arguments.fast else FULL
    run_quickstart(
        arguments.output_dir,
        seed=arguments.seed,
        settings=settings,
        processes=arguments.processes or min(2, cores()),
        console=Console(),
    )


def run_quickstart(
    output_dir: Path,
    *,
    seed: int,
    settings: Settings,
    console: Console,
    processes: int = 1,
    root: Path | None = None,
) -> Report:
    """Run all of it and return the report, which is also in `output_dir`.

    Args:
        output_dir: new, empty, or made by an earlier quickstart, whose results are replaced.
        seed: the first of `settings.runs` seeds.
        settings: the sizes of the run.
        console: where the bars and the table go.
        processes: 1, or 2 to train two models at a time. The results are the same.
        root: the library whose documentation is read; None: this Python's standard library.

    Raises:
        SettingError: the folder holds something else.
        DataError: there is too little documentation.
        MissingExtraError: matplotlib is not installed.
    """
    start = time.monotonic()
    require("matplotlib", extra="report")
    with fill_folder(output_dir.resolve(), entries=ENTRIES) as work:
        with quiet_libraries(), one_thread(), show_stages(console) as stages, Jobs(second=processes > 1) as jobs:
            stages.at_each_step = jobs.check
            corpus, material = _prepare(settings, root=root, work=work, stages=stages)
            trained = _train(material, jobs, seed=seed, stages=stages)
            models = _keep(material, trained, seed=seed)
            latencies = _time_models(material, models, stages)
        cost = {"seconds_total": time.monotonic() - start, **_peak_memory(jobs)}
        report = make_report(
            _answers(material, trained, seed=seed),
            models=models,
            latencies=latencies,
            corpus=corpus,
            settings=settings,
            seed=seed,
            processes=processes,
            cost=cost,
        )
        write_report(report, work)
        plot_accuracy_against_latency(report, work / PLOT)
    console.print(terminal_table(report))
    console.print()
    for note in report.notes:
        console.print(note, highlight=False)
    console.print(f"Students, report, plot and model card: {output_dir}", highlight=False)
    return report


@contextmanager
def one_thread() -> Iterator[None]:
    """One thread for torch: models this small gain little from more, and lose much on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _prepare(settings: Settings, *, root: Path | None, work: Path, stages: Stages) -> tuple[Corpus, Material]:
    with stages.stage("reading documentation", total=2) as advance:
        corpus = read_stdlib_corpus(root=root, packages=settings.packages)
        advance()
        tokenizer = make_tokenizer(
            [paragraph.text for paragraph in corpus.train],
            vocabulary_size=settings.vocabulary_size,
            max_tokens=settings.max_tokens,
        )
    train, test = (tokenize(paragraphs, tokenizer) for paragraphs in (corpus.train, corpus.test))
    return corpus, Material(settings, corpus.packages, tokenizer, train, test, work)


def _train(material: Material, jobs: Jobs, *, seed: int, stages: Stages) -> dict[Any, Trained]:
    """Train all models, by result name and seed. A second process begins with the students that need no teacher."""
    seeds = range(seed, seed + material.settings.runs)
    for one in seeds:
        jobs.add((ALONE, one), train_alone, material, one)
    for one in seeds:
        jobs.add((ALL_LABELS, one), train_on_all_labels, material, one)
    jobs.begin(stages)
    teacher = train_teacher(material, seed, stages=stages)
    for one in seeds[1:]:
        jobs.add((DISTILLED, one), train_distilled, material, teacher.weights, one)
    first = _distill_for_the_card(material, teacher, seed, stages)
    return {**jobs.finish(stages), (DISTILLED, seed): first, (TEACHER, seed): teacher}


def _distill_for_the_card(material: Material, teacher: Trained, seed: int, stages: Stages) -> Trained:
    """The distilled student of the first seed, saved with a card that says how it was trained."""
    folder = material.work / DISTILLED_FOLDER
    trainer = distill(material, teacher.weights, seed, folder=folder, stages=stages)
    _save(trainer.model, material, folder)
    trainer.evaluate(material.test)  # for the card
    trainer.create_model_card(
        language="en",
        model_name="hf-distill quickstart student",
        tasks="text-classification",
        dataset="Python standard library documentation",
        tags="hf-distill",
    )
    return material.trained(trainer.model)


def _keep(material: Material, trained: dict[Any, Trained], *, seed: int) -> dict[str, BertForSequenceClassification]:
    """The first seed's models, which are measured; the student alone is saved beside the distilled one."""
    students = (ALONE, DISTILLED, ALL_LABELS)
    models = {name: material.student(seed, trained[name, seed].weights) for name in students}
    _save(models[ALONE], material, material.work / ALONE_FOLDER)
    return {**models, TEACHER: material.teacher(seed, trained[TEACHER, seed].weights)}


def _answers(material: Material, trained: dict[Any, Trained], *, seed: int) -> Answers:
    def of(name: str) -> list[list[str]]:
        return [trained[name, seed + run].answers for run in range(material.settings.runs)]

    return Answers(
        truth=[material.packages[label] for label in material.test["labels"]],
        teacher=trained[TEACHER, seed].answers,
        alone=of(ALONE),
        distilled=of(DISTILLED),
        all_labels=of(ALL_LABELS),
    )


def _save(model: BertForSequenceClassification, material: Material, folder: Path) -> None:
    model.save_pretrained(folder)
    material.tokenizer.save_pretrained(folder)


def _time_models(
    material: Material, models: dict[str, BertForSequenceClassification], stages: Stages
) -> dict[str, Latency]:
    calls = material.settings.latency_calls
    inputs = material.test.select(range(min(len(material.test), calls)))
    singles = list(batches(inputs, material.tokenizer, batch_size=1, device=models[TEACHER].device))
    with stages.stage("latency at batch size 1", total=1):
        return measure_latency(models, singles, calls=calls)


def _peak_memory(jobs: Jobs) -> dict[str, float]:
    """The most memory that this process held, and the second one; in MB, and empty on a system that does not tell."""
    own = peak_memory_mb()
    return {} if own is None else {"peak_memory_mb": own + (jobs.second_peak_mb or 0.0)}
