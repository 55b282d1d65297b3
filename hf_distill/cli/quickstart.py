"""`hf-distill quickstart`: a whole distillation on this machine's own text, offline, in minutes.

Reads the standard library's documentation, trains a teacher and the same small student with and
without it, and leaves models, report, plot and card in one folder.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from datasets import Dataset
from rich.console import Console
from transformers import BertForSequenceClassification, PreTrainedTokenizerFast

from hf_distill.cli import quickstart_training as training
from hf_distill.cli.output_folder import fill_folder
from hf_distill.cli.progress import Stages, quiet_libraries, show_stages
from hf_distill.cli.quickstart_data import batches, choose_labelled, hide_labels, tokenize
from hf_distill.cli.quickstart_models import make_classifier, make_tokenizer
from hf_distill.cli.quickstart_report import ALONE, DISTILLED, TEACHER, Answers, make_report
from hf_distill.cli.quickstart_settings import FAST, FULL, Settings
from hf_distill.cli.stdlib_corpus import Corpus, read_stdlib_corpus
from hf_distill.compare import (
    Latency,
    Report,
    measure_latency,
    plot_accuracy_against_latency,
    predicted_labels,
    terminal_table,
    write_report,
)
from hf_distill.errors import require

ALONE_FOLDER, DISTILLED_FOLDER = "student-alone", "student-distilled"
PLOT = "accuracy-against-latency.png"
ENTRIES = (ALONE_FOLDER, DISTILLED_FOLDER, "report.json", "report.md", PLOT)


def run_command(arguments: argparse.Namespace) -> None:
    """Run the quickstart with the options of the command line."""
    settings = FAST if arguments.fast else FULL
    run_quickstart(arguments.output_dir, seed=arguments.seed, settings=settings, console=Console())


@dataclass(frozen=True)
class _Setup:
    """What every stage needs."""

    settings: Settings
    corpus: Corpus
    tokenizer: PreTrainedTokenizerFast
    train: Dataset
    test: Dataset
    work: Path
    stages: Stages

    def classifier(self, *, layers: int, width: int, seed: int) -> BertForSequenceClassification:
        return make_classifier(self.tokenizer, self.corpus.packages, layers=layers, width=width, seed=seed)

    def answers_of(self, model: BertForSequenceClassification) -> list[str]:
        return predicted_labels(model, batches(self.test, self.tokenizer, batch_size=64, device=model.device))


def run_quickstart(
    output_dir: Path, *, seed: int, settings: Settings, console: Console, root: Path | None = None
) -> Report:
    """Run all of it and return the report, which is also in `output_dir`.

    Args:
        output_dir: new, empty, or made by an earlier quickstart, whose results are replaced.
        seed: the first of `settings.runs` seeds.
        settings: the sizes of the run.
        console: where the bars and the table go.
        root: the library whose documentation is read; None: this Python's standard library.

    Raises:
        SettingError: the folder holds something else.
        DataError: there is too little documentation.
        MissingExtraError: matplotlib is not installed.
    """
    start = time.monotonic()
    require("matplotlib", extra="report")
    with fill_folder(output_dir.resolve(), entries=ENTRIES) as work:
        with quiet_libraries(), one_thread(), show_stages(console) as stages:
            setup = _prepare(settings, root=root, work=work, stages=stages)
            report = _train_and_measure(setup, seed=seed, start=start)
        write_report(report, work)
        plot_accuracy_against_latency(report, work / PLOT)
    console.print(terminal_table(report))
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


def _prepare(settings: Settings, *, root: Path | None, work: Path, stages: Stages) -> _Setup:
    with stages.stage("reading documentation", total=2) as advance:
        corpus = read_stdlib_corpus(root=root, packages=settings.packages)
        advance()
        tokenizer = make_tokenizer(
            [paragraph.text for paragraph in corpus.train],
            vocabulary_size=settings.vocabulary_size,
            max_tokens=settings.max_tokens,
        )
    return _Setup(
        settings=settings,
        corpus=corpus,
        tokenizer=tokenizer,
        train=tokenize(corpus.train, tokenizer),
        test=tokenize(corpus.test, tokenizer),
        work=work,
        stages=stages,
    )


def _train_and_measure(setup: _Setup, *, seed: int, start: float) -> Report:
    """Train the teacher and the students of every seed; the first seed's are kept and timed."""
    teacher = _train_teacher(setup, seed)
    answers = Answers(
        truth=[setup.corpus.packages[label] for label in setup.test["labels"]],
        teacher=setup.answers_of(teacher),
        alone=[],
        distilled=[],
    )
    kept: dict[str, BertForSequenceClassification] = {}
    for run in range(setup.settings.runs):
        alone, distilled = _train_students(setup, teacher, seed=seed + run, keep=run == 0)
        answers.alone.append(setup.answers_of(alone))
        answers.distilled.append(setup.answers_of(distilled))
        kept = kept or {ALONE: alone, DISTILLED: distilled, TEACHER: teacher}
    latencies = _time_models(setup, kept)
    cost = {"seconds_total": time.monotonic() - start, **_peak_memory()}
    return make_report(
        answers,
        models=kept,
        latencies=latencies,
        corpus=setup.corpus,
        settings=setup.settings,
        seed=seed,
        cost=cost,
    )


def _train_teacher(setup: _Setup, seed: int) -> BertForSequenceClassification:
    settings = setup.settings
    model = setup.classifier(layers=settings.teacher_layers, width=settings.teacher_width, seed=seed)
    training.train_alone(
        model,
        setup.train,
        tokenizer=setup.tokenizer,
        arguments=training.teacher_arguments(settings, folder=setup.work / TEACHER, seed=seed),
        stages=setup.stages,
        stage="teacher",
    )
    return model


def _train_students(
    setup: _Setup, teacher: BertForSequenceClassification, *, seed: int, keep: bool
) -> tuple[BertForSequenceClassification, BertForSequenceClassification]:
    """The same student twice: same first weights, same steps; without and with the teacher."""
    settings = setup.settings
    labelled = choose_labelled(setup.train["labels"], share=settings.labelled_share, seed=seed)
    alone, distilled = (
        setup.classifier(layers=settings.student_layers, width=settings.student_width, seed=seed) for _ in range(2)
    )
    training.train_alone(
        alone,
        setup.train.select(labelled),
        tokenizer=setup.tokenizer,
        arguments=training.alone_arguments(settings, folder=setup.work / "alone", seed=seed),
        stages=setup.stages,
        stage=f"student alone, seed {seed}",
    )
    folder = setup.work / (DISTILLED_FOLDER if keep else "distilled")
    trainer = training.train_distilled(
        distilled,
        hide_labels(setup.train, labelled=labelled),
        teacher=teacher,
        tokenizer=setup.tokenizer,
        arguments=training.distilled_arguments(settings, folder=folder, seed=seed),
        stages=setup.stages,
        stage=f"student distilled, seed {seed}",
    )
    if keep:
        _save(alone, setup.tokenizer, setup.work / ALONE_FOLDER)
        _save(distilled, setup.tokenizer, folder)
        trainer.evaluate(setup.test)  # for the card
        trainer.create_model_card(
            language="en",
            model_name="hf-distill quickstart student",
            tasks="text-classification",
            dataset="Python standard library documentation",
            tags="hf-distill",
        )
    return alone, distilled


def _save(model: BertForSequenceClassification, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _time_models(setup: _Setup, models: dict[str, BertForSequenceClassification]) -> dict[str, Latency]:
    device = models[TEACHER].device
    inputs = setup.test.select(range(min(len(setup.test), setup.settings.latency_calls)))
    singles = list(batches(inputs, setup.tokenizer, batch_size=1, device=device))
    with setup.stages.stage("latency at batch size 1", total=1):
        return measure_latency(models, singles, calls=setup.settings.latency_calls)


def _peak_memory() -> dict[str, float]:
    """The most memory this process held, in MB; empty on a system that does not tell."""
    if sys.platform == "win32":
        return {}
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # macOS counts bytes, Linux KiB.
    return {"peak_memory_mb": peak * (1 if sys.platform == "darwin" else 1024) / 1e6}
