"""The quickstart's measurements, as a Report. Trains nothing and prints nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from transformers import PreTrainedModel

from hf_distill.cli.quickstart_training import Settings
from hf_distill.cli.stdlib_corpus import Corpus
from hf_distill.compare import (
    Latency,
    ModelResult,
    Report,
    Spread,
    parameter_count,
    share_equal,
    size_mb,
    spread_of,
    this_machine,
)

ALONE, DISTILLED, TEACHER = "student alone", "student distilled", "teacher"
ALL_LABELS = "student, all labels"
_ONE_TEACHER = "one teacher was trained, for all seeds"


@dataclass(frozen=True)
class Answers:
    """What the models answered on the test paragraphs: label names, one list a seed."""

    truth: list[str]
    teacher: list[str]
    alone: list[list[str]]
    distilled: list[list[str]]
    all_labels: list[list[str]]


def make_report(
    answers: Answers,
    *,
    models: Mapping[str, PreTrainedModel],
    latencies: Mapping[str, Latency],
    corpus: Corpus,
    settings: Settings,
    seed: int,
    processes: int,
    cost: Mapping[str, float],
) -> Report:
    """The report; `models` and `latencies` are of the first seed, by result name."""
    runs = {
        ALONE: answers.alone,
        DISTILLED: answers.distilled,
        ALL_LABELS: answers.all_labels,
        TEACHER: [answers.teacher],
    }
    results = tuple(
        _result(
            name,
            answers=answers,
            predicted=runs[name],
            model=models[name],
            latency=latencies[name],
            teacher_latency=latencies[TEACHER],
        )
        for name in runs
    )
    title = "hf-distill quickstart" + (" --fast" if settings.fast else "")
    return Report(
        title=title,
        results=results,
        machine=this_machine(),
        settings=_settings(settings, corpus, seed) | {"processes": processes},
        notes=_notes(results, answers, corpus, settings, cost, processes),
        cost=dict(cost),
    )


def gain_sentence(alone: Sequence[float], distilled: Sequence[float]) -> str:
    """Whether distillation helped, by seed, in one sentence: also when it did not.

    >>> gain_sentence([0.50, 0.52], [0.60, 0.61])
    'Distillation gained 0.095 ± 0.007 accuracy over the same student alone, more than the spread
     over seeds (0.014).'
    >>> gain_sentence([0.50, 0.60], [0.54, 0.55])
    'Distillation gained -0.005 ± 0.064 accuracy over the same student alone, NOT more than the
     spread over seeds (0.071): this run shows no gain.'
    """
    gain = spread_of([ours - base for base, ours in zip(alone, distilled, strict=True)])
    if gain.spread is None:
        return f"Distillation gained {gain.mean:.3f} accuracy; one seed has no spread to compare."
    spread = max(spread_of(values).spread or 0.0 for values in (alone, distilled))
    spread = max(spread, gain.spread)
    sentence = f"Distillation gained {gain.mean:.3f} ± {gain.spread:.3f} accuracy over the same student alone, "
    if gain.mean > spread:
        return sentence + f"more than the spread over seeds ({spread:.3f})."
    return sentence + f"NOT more than the spread over seeds ({spread:.3f}): this run shows no gain."


def _result(
    name: str,
    *,
    answers: Answers,
    predicted: list[list[str]],
    model: PreTrainedModel,
    latency: Latency,
    teacher_latency: Latency,
) -> ModelResult:
    accuracies = [share_equal(run, answers.truth) for run in predicted]
    accuracy = spread_of(accuracies)
    agreement: Spread = spread_of([share_equal(run, answers.teacher) for run in predicted])
    values: dict[str, Any] = {
        "accuracy_share_mean": accuracy.mean,
        "accuracy_share_spread": accuracy.spread,
        "parameters": parameter_count(model),
        "size_mb": size_mb(model),
        "latency_ms_p50": latency.latency_ms_p50,
        "latency_ms_p95": latency.latency_ms_p95,
        "speed_up_times": teacher_latency.latency_ms_p50 / latency.latency_ms_p50,
        "agreement_share_mean": agreement.mean,
        "agreement_share_spread": agreement.spread,
    }
    reason = _ONE_TEACHER if name == TEACHER else "one seed was run"
    missing = {field: reason for field, value in values.items() if value is None}
    if name == TEACHER:
        values |= {"agreement_share_mean": None, "agreement_share_spread": None}
        itself = "the teacher is what the others are compared with"
        missing |= {"agreement_share_mean": itself, "agreement_share_spread": itself}
    return ModelResult(name=name, accuracy_share_runs=tuple(accuracies), not_measured=missing, **values)


def _settings(settings: Settings, corpus: Corpus, seed: int) -> dict[str, Any]:
    return {
        **asdict(settings),
        "seeds": list(range(seed, seed + settings.runs)),
        "train_paragraphs": len(corpus.train),
        "validation_paragraphs": len(corpus.validation),
        "test_paragraphs": len(corpus.test),
        "package_names": list(corpus.packages),
    }


def _notes(
    results: Sequence[ModelResult],
    answers: Answers,
    corpus: Corpus,
    settings: Settings,
    cost: Mapping[str, float],
    processes: int,
) -> tuple[str, ...]:
    by_name = {result.name: result for result in results}
    alone, distilled = by_name[ALONE], by_name[DISTILLED]
    most_common = max(answers.truth.count(package) for package in corpus.packages)
    labelled = round(settings.labelled_share * len(corpus.train))
    peak = f" and {cost['peak_memory_mb']:.0f} MB" if "peak_memory_mb" in cost else ""
    together = " in two processes" if processes > 1 else ""
    notes = [
        gain_sentence(alone.accuracy_share_runs, distilled.accuracy_share_runs),
        f"The task: which of {len(corpus.packages)} standard library packages is this paragraph "
        f"of documentation about? Accuracy is on {len(corpus.test)} paragraphs that no model was "
        f"trained on and that no "
        f"setting was chosen by. Naming the most common package always would score "
        f"{most_common / len(answers.truth):.3f}.",
        f"All students took {settings.student_steps} steps of {settings.batch_size} paragraphs "
        f"from the same first weights. Alone: the {labelled} paragraphs with a label. Distilled: "
        f"those, and the {len(corpus.train) - labelled} others without their label. All labels: every label and no "
        f"teacher, as the teacher itself was trained. That is what labelling the others by hand would buy.",
        f"Size and latency are of the first seed's models. The run took {cost['seconds_total']:.0f} s{peak}{together}.",
    ]
    if settings.fast:
        notes.insert(0, "Made with --fast: a shorter run; its numbers are not those of a full one.")
    return tuple(notes)
