"""`hf-distill quickstart`: the whole run, in a results folder that is filled completely or not at all."""

from __future__ import annotations

import argparse
import os
import shutil
import tempfile
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from rich.console import Console
from transformers import BertForSequenceClassification

from hf_distill.cli.progress import Stages, quiet_libraries, show_stages
from hf_distill.cli.quickstart_report import ALL_LABELS, ALONE, DISTILLED, TEACHER, make_report
from hf_distill.cli.quickstart_training import (
    FAST,
    FULL,
    Material,
    Settings,
    Trained,
    batches,
    distill,
    make_tokenizer,
    tokenize,
    train_alone,
    train_distilled,
    train_on_all_labels,
    train_teacher,
)
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
ALONE_FOLDER, DISTILLED_FOLDER = "student-alone", "student-distilled"
PLOT = "accuracy-against-latency.png"
ENTRIES = (ALONE_FOLDER, DISTILLED_FOLDER, "report.json", "report.md", PLOT)

Results = dict[tuple[str, int], Trained]
"""Trained models by name and seed."""


@contextmanager
def fill_folder(folder: Path, *, entries: Collection[str]) -> Iterator[Path]:
    """Yield an empty work folder whose `entries` move into `folder` if the block succeeds.

    If the block fails, the contents of `folder` stay as they were, and a folder that was made here is removed.

    Raises:
        SettingError: if `folder` holds files that were not put there in this way, or cannot be written.
    """
    _check(folder, entries)
    existed = folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for killed in folder.glob(f"{_UNFINISHED}*"):  # left by a run that was killed
            shutil.rmtree(killed)
        work = Path(tempfile.mkdtemp(prefix=_UNFINISHED, dir=folder))
    except OSError as error:
        raise SettingError(f"output_dir {folder}: cannot be written ({error.strerror}). Choose another one.") from error
    try:
        yield work
        (folder / MARK).touch()
        for name in entries:
            if (folder / name).is_dir():
                shutil.rmtree(folder / name)
            os.replace(work / name, folder / name)
    finally:
        shutil.rmtree(work, ignore_errors=True)
        if not existed and not any(folder.iterdir()):
            folder.rmdir()


def _check(folder: Path, entries: Collection[str]) -> None:
    if folder.exists() and not folder.is_dir():
        raise SettingError(f"output_dir {folder}: is a file. Give a folder, or a name not in use.")
    found = {path.name for path in folder.iterdir()} if folder.exists() else set()
    others = sorted(found if MARK not in found else found - {MARK, *entries})
    others = [name for name in others if not name.startswith(_UNFINISHED)]
    if others:
        raise SettingError(
            f"output_dir {folder}: holds files that the quickstart did not make "
            f"({', '.join(others[:3])}{', …' if len(others) > 3 else ''}). "
            "Give an empty or a new folder with --output-dir."
        )


def run_command(arguments: argparse.Namespace) -> None:
    """Run the quickstart with the options of the command line."""
    run_quickstart(
        arguments.output_dir,
        seed=arguments.seed,
        settings=FAST if arguments.fast else FULL,
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
    """Run the quickstart and return its report, which is also in `output_dir`.

    Args:
        output_dir: a new or empty folder, or that of an earlier quickstart, whose results are replaced.
        seed: the first of `settings.runs` seeds.
        settings: the sizes of the run.
        console: where the bars and the table go.
        processes: 1, or 2 to train two models at a time, with the same results.
        root: the library whose documentation is read, or None for this Python's standard library.

    Raises:
        SettingError: if the folder holds other files.
        DataError: if there is too little documentation.
        MissingExtraError: if matplotlib is not installed.
    """
    start = time.monotonic()
    require("matplotlib", extra="report")
    with fill_folder(output_dir.resolve(), entries=ENTRIES) as work:
        with quiet_libraries(), _one_thread(), show_stages(console) as stages, Jobs(second=processes > 1) as jobs:
            stages.at_each_step = jobs.check
            corpus, material = _prepare(settings, root=root, work=work, stages=stages)
            trained = _train(material, jobs, seed=seed, stages=stages)
            models = _measured_models(material, trained, seed=seed)
            _save(models[ALONE], material, work / ALONE_FOLDER)
            latencies = _time_models(material, models, stages)
        cost, own_peak = {"seconds_total": time.monotonic() - start}, peak_memory_mb()
        if own_peak is not None:
            cost["peak_memory_mb"] = own_peak + (jobs.second_peak_mb or 0.0)
        report = make_report(
            trained,
            models=models,
            latencies=latencies,
            material=material,
            corpus=corpus,
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
def _one_thread() -> Iterator[None]:
    """Limit torch to a thread: models this small gain little from more, and lose much on a busy machine."""
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


def _train(material: Material, jobs: Jobs, *, seed: int, stages: Stages) -> Results:
    """Train all models. A second process starts with the students that need no teacher."""
    seeds = range(seed, seed + material.settings.runs)
    for name, job in ((ALONE, train_alone), (ALL_LABELS, train_on_all_labels)):
        for run_seed in seeds:
            jobs.add((name, run_seed), job, material, run_seed)
    jobs.begin(stages)
    teacher = train_teacher(material, seed, stages=stages)
    for run_seed in seeds[1:]:
        jobs.add((DISTILLED, run_seed), train_distilled, material, teacher.weights, run_seed)
    first = _distill_with_card(material, teacher, seed, stages)
    return {**jobs.finish(stages), (DISTILLED, seed): first, (TEACHER, seed): teacher}


def _distill_with_card(material: Material, teacher: Trained, seed: int, stages: Stages) -> Trained:
    """Train and save the distilled student of the first seed, with a card that describes its training."""
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


def _measured_models(material: Material, trained: Results, *, seed: int) -> dict[str, BertForSequenceClassification]:
    """Return the models of the first seed, whose size and latency are measured."""
    students = (ALONE, DISTILLED, ALL_LABELS)
    models = {name: material.student(seed, trained[name, seed].weights) for name in students}
    return {**models, TEACHER: material.teacher(seed, trained[TEACHER, seed].weights)}


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
