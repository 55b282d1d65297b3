"""The measurements of the quickstart as a Report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict

from transformers import PreTrainedModel

from hf_distill.cli.quickstart_training import Material, Settings, Trained
from hf_distill.cli.stdlib_corpus import Corpus
from hf_distill.compare import (
    Latency,
    ModelResult,
    Report,
    parameter_count,
    share_equal,
    size_mb,
    spread_of,
    this_machine,
)

ALONE, DISTILLED, TEACHER = "student alone", "student distilled", "teacher"
ALL_LABELS = "student, all labels"


def make_report(
    trained: Mapping[tuple[str, int], Trained],
    *,
    models: Mapping[str, PreTrainedModel],
    latencies: Mapping[str, Latency],
    material: Material,
    corpus: Corpus,
    seed: int,
    processes: int,
    cost: Mapping[str, float],
) -> Report:
    """Return the report.

    Args:
        trained: all models by name and seed; the teacher has the first seed only.
        models: the models of the first seed, by name.
        latencies: their latencies.
        material: the data and settings of the trainings.
        corpus: the paragraphs.
        seed: the first seed.
        processes: the number of processes.
        cost: the duration and memory of the run.
    """
    settings, seeds = material.settings, range(seed, seed + material.settings.runs)
    truth = [material.packages[label] for label in material.test["labels"]]
    teacher = trained[TEACHER, seed].predictions
    results = tuple(
        _result(
            name,
            truth=truth,
            teacher=teacher,
            runs=[trained[name, run_seed].predictions for run_seed in seeds if (name, run_seed) in trained],
            model=models[name],
            latency=latencies[name],
            speed_up=latencies[TEACHER].latency_ms_p50 / latencies[name].latency_ms_p50,
        )
        for name in (ALONE, DISTILLED, ALL_LABELS, TEACHER)
    )
    return Report(
        title="hf-distill quickstart" + (" --fast" if settings.fast else ""),
        results=results,
        machine=this_machine(),
        settings={
            **asdict(settings),
            "seeds": list(seeds),
            "train_paragraphs": len(corpus.train),
            "validation_paragraphs": len(corpus.validation),
            "test_paragraphs": len(corpus.test),
            "package_names": list(corpus.packages),
            "processes": processes,
        },
        notes=_notes(results, truth, corpus, settings, cost, processes),
        cost=dict(cost),
    )


def gain_sentence(alone: Sequence[float], distilled: Sequence[float]) -> str:
    """Return a sentence on whether distillation helped, from the accuracies of each seed.

    >>> gain_sentence([0.50, 0.52], [0.60, 0.61])
    'Distillation gained 0.095 ± 0.007 accuracy over the same student alone, more than the spread
     over seeds (0.014).'
    >>> gain_sentence([0.50, 0.60], [0.54, 0.55])
    'Distillation gained -0.005 ± 0.064 accuracy over the same student alone, NOT more than the
     spread over seeds (0.071): this run shows no gain.'
    """
    gain = spread_of([ours - base for base, ours in zip(alone, distilled, strict=True)])
    if gain.spread is None:
        return f"Distillation gained {gain.mean:.3f} accuracy; one seed has no spread to compare with."
    spread = max(gain.spread, *(spread_of(values).spread or 0.0 for values in (alone, distilled)))
    sentence = f"Distillation gained {gain.mean:.3f} ± {gain.spread:.3f} accuracy over the same student alone, "
    if gain.mean > spread:
        return sentence + f"more than the spread over seeds ({spread:.3f})."
    return sentence + f"NOT more than the spread over seeds ({spread:.3f}): this run shows no gain."


def _result(
    name: str,
    *,
    truth: list[str],
    teacher: list[str],
    runs: list[list[str]],
    model: PreTrainedModel,
    latency: Latency,
    speed_up: float,
) -> ModelResult:
    accuracy = spread_of([share_equal(run, truth) for run in runs])
    agreement = spread_of([share_equal(run, teacher) for run in runs])
    missing = {}
    if accuracy.spread is None:
        one_run = "one teacher was trained, for all seeds" if name == TEACHER else "one seed was run"
        missing = {"accuracy_share_spread": one_run, "agreement_share_spread": one_run}
    if name == TEACHER:
        itself = "the other models are compared with the teacher"
        missing |= {"agreement_share_mean": itself, "agreement_share_spread": itself}
    return ModelResult(
        name=name,
        accuracy_share_mean=accuracy.mean,
        accuracy_share_spread=accuracy.spread,
        accuracy_share_runs=tuple(share_equal(run, truth) for run in runs),
        parameters=parameter_count(model),
        size_mb=size_mb(model),
        latency_ms_p50=latency.latency_ms_p50,
        latency_ms_p95=latency.latency_ms_p95,
        speed_up_times=speed_up,
        agreement_share_mean=None if name == TEACHER else agreement.mean,
        agreement_share_spread=None if name == TEACHER else agreement.spread,
        not_measured=missing,
    )


def _notes(
    results: Sequence[ModelResult],
    truth: list[str],
    corpus: Corpus,
    settings: Settings,
    cost: Mapping[str, float],
    processes: int,
) -> tuple[str, ...]:
    alone, distilled = results[0], results[1]
    most_common = max(truth.count(package) for package in corpus.packages) / len(truth)
    labelled = round(settings.labelled_share * len(corpus.train))
    peak = f" and {cost['peak_memory_mb']:.0f} MB" if "peak_memory_mb" in cost else ""
    together = " in two processes" if processes > 1 else ""
    notes = [
        gain_sentence(alone.accuracy_share_runs, distilled.accuracy_share_runs),
        f"The task: which of {len(corpus.packages)} standard library packages does this paragraph of documentation "
        f"belong to? Accuracy is on {len(corpus.test)} paragraphs that were used neither for training nor for choosing "
        f"settings. Always naming the most common package would score {most_common:.3f}.",
        f"All students took {settings.student_steps} steps of {settings.batch_size} paragraphs from the same first "
        f"weights. Alone: the {labelled} paragraphs with a label. Distilled: those, and the "
        f"{len(corpus.train) - labelled} others without their label. All labels: every label and no teacher, like the "
        "teacher itself. This is what labelling the others by hand would gain.",
        f"Size and latency are those of the first seed's models. The run took {cost['seconds_total']:.0f} s{peak}"
        f"{together}.",
    ]
    if settings.fast:
        notes.insert(0, "Made with --fast: a shorter run; its numbers are not those of a full one.")
    return tuple(notes)
