"""One protocol for every real data set: a teacher, a student alone and the same student distilled, at equal steps.

Settings are chosen on dev with the first seed only; test is looked at once, by the chosen ones. The student alone is
trained by transformers' own `Trainer`, on the same examples in the same order, from the same initial weights.
"""

from __future__ import annotations

import copy
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PrinterCallback, Trainer, TrainingArguments

from hf_distill import DistillationArguments, DistillationTrainer

IGNORED = -100


@dataclass(frozen=True)
class Settings:
    """What is chosen on dev. alpha 0: no teacher, plain Trainer."""

    learning_rate: float
    alpha: float = 0.0
    temperature: float = 1.0

    def __str__(self) -> str:
        teacher = f", alpha {self.alpha:g}, T {self.temperature:g}" if self.alpha else ""
        return f"lr {self.learning_rate:g}{teacher}"


@dataclass(frozen=True)
class Case:
    """One data set with its models.

    Attributes:
        metric: name of what `score` returns, higher is better, 0 to 1.
        teacher_data, transfer, dev, test: sequences of features for the collator.
        make_teacher: seed → model. make_student: teacher, seed → model.
        score: predicted classes and labels, arrays of one shape, label -100 left out by it → metric.
        alone, distilled: settings tried with the first seed, by their score on dev.
    """

    name: str
    metric: str
    teacher_data: Any
    transfer: Any
    dev: Any
    test: Any
    collator: Callable[[list[Any]], dict[str, torch.Tensor]]
    make_teacher: Callable[[int], torch.nn.Module]
    make_student: Callable[[torch.nn.Module, int], torch.nn.Module]
    score: Callable[[np.ndarray, np.ndarray], float]
    teacher_settings: Sequence[Settings]
    alone: Sequence[Settings]
    distilled: Sequence[Settings]
    teacher_steps: int
    student_steps: int
    batch_size: int = 32
    lengths_of: str = "input_ids"
    processing_class: Any = None
    notes: Sequence[str] = ()


def settings_of(*, steps: int, batch_size: int, learning_rate: float, seed: int, folder: Any = None) -> dict[str, Any]:
    """Arguments of a short training on the CPU: linear, with a tenth of warm-up, nothing saved or logged."""
    return dict(
        output_dir=str(folder or tempfile.mkdtemp()),
        max_steps=steps,
        per_device_train_batch_size=batch_size,
        learning_rate=learning_rate,
        lr_scheduler_type="linear",
        warmup_steps=max(1, steps // 10),
        weight_decay=0.01,
        train_sampling_strategy="group_by_length",
        seed=seed,
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        save_strategy="no",
        logging_strategy="no",
    )


def train(
    case: Case, model: torch.nn.Module, data: Any, settings: Settings, *, steps: int, seed: int, teacher: Any = None
) -> float:
    """Train in place; returns seconds of processor time, the teacher's forward passes included."""
    common = settings_of(steps=steps, batch_size=case.batch_size, learning_rate=settings.learning_rate, seed=seed)
    given: dict[str, Any] = dict(model=model, train_dataset=data, data_collator=case.collator)
    given["processing_class"] = case.processing_class  # says by which column the lengths are measured
    if settings.alpha == 0:
        trainer = Trainer(args=TrainingArguments(**common), **given)
    else:
        args = DistillationArguments(**common, alpha=settings.alpha, temperature=settings.temperature)
        trainer = DistillationTrainer(args=args, teacher_model=teacher, **given)
    trainer.remove_callback(PrinterCallback)
    start = time.process_time()
    trainer.train()
    return time.process_time() - start


@torch.no_grad()
def predict(case: Case, model: torch.nn.Module, data: Any) -> tuple[np.ndarray, np.ndarray]:
    """Predicted classes and labels over a split, `[examples]` or `[examples, positions]` each, in the split's order."""
    model.eval()
    by_length = sorted(range(len(data)), key=lambda i: len(data[i][case.lengths_of]))  # little padding
    classes, labels = [], []
    for start in range(0, len(data), 64):
        batch = case.collator([data[i] for i in by_length[start : start + 64]])
        found = model(**{name: x for name, x in batch.items() if name != "labels"}).logits.argmax(-1)
        classes.append(found)
        labels.append(batch["labels"])
    order = np.argsort(by_length)
    return _stacked(classes)[order], _stacked(labels)[order]


def _stacked(parts: list[torch.Tensor]) -> np.ndarray:
    if parts[0].dim() == 1:
        return torch.cat(parts).numpy()
    width = max(part.shape[1] for part in parts)
    wide = [torch.nn.functional.pad(part, (0, width - part.shape[1]), value=IGNORED) for part in parts]
    return torch.cat(wide).numpy()


class Trainings:
    """The trainings of one case, each done once: with a folder, those that an earlier run finished are read back."""

    def __init__(self, case: Case, folder: Path | None, say: Callable[[str], None]) -> None:
        self.case, self.say = case, say
        self.folder = folder
        self.done: list[dict[str, Any]] = []

    def __call__(self, role: str, settings: Settings, seed: int, teacher: Any = None) -> Trained:
        """A trained model and its metric on dev."""
        case, is_teacher = self.case, role == "teacher"
        steps = case.teacher_steps if is_teacher else case.student_steps
        model = case.make_teacher(seed) if is_teacher else case.make_student(teacher, seed)
        name = f"{case.name}, {role}, seed {seed}, {settings}, {steps} steps of {case.batch_size}"
        kept = None if self.folder is None else self.folder / name.replace(", ", "_").replace(" ", "-")
        if kept is not None and (kept / "facts.json").is_file():
            facts = json.loads((kept / "facts.json").read_text(encoding="utf-8"))
            model.load_state_dict(torch.load(kept / "weights.pt", weights_only=True))
        else:
            data = case.teacher_data if is_teacher else case.transfer
            seconds = train(case, model, data, settings, steps=steps, seed=seed, teacher=teacher)
            dev = case.score(*predict(case, model, case.dev))
            facts = dict(role=role, seed=seed, **asdict(settings), steps=steps, seconds=seconds, dev=dev)
            if kept is not None:
                kept.mkdir(parents=True, exist_ok=True)
                torch.save(model.state_dict(), kept / "weights.pt")
                beside = kept / ".facts.json.partial"  # facts are there: the weights are whole
                beside.write_text(json.dumps(facts), encoding="utf-8")
                os.replace(beside, kept / "facts.json")
        self.done.append(facts)
        self.say(f"{name}: dev {case.metric} {facts['dev']:.4f} in {facts['seconds']:.0f} s of processor time")
        return Trained(model, settings, seed, facts["dev"])

    def best(self, role: str, choices: Sequence[Settings], seed: int, teacher: Any = None) -> Trained:
        """The one of these settings with the highest metric on dev."""
        return max((self(role, settings, seed, teacher) for settings in choices), key=lambda found: found.dev)


@dataclass(frozen=True)
class Trained:
    """A model, how it was trained, and its metric on dev."""

    model: Any
    settings: Settings
    seed: int
    dev: float


def run(
    case: Case, *, seeds: Sequence[int] = (0, 1, 2), folder: Path | None = None, say: Callable[[str], None] = print
) -> dict[str, Any]:
    """The whole protocol; returns everything that was measured, as plain data.

    Args: folder: keeps every finished training, so that a run that was cut off can go on; None: nothing is kept.
    """
    begun = time.perf_counter()
    trained = Trainings(case, folder, say)
    teacher = trained.best("teacher", case.teacher_settings, seeds[0])
    students = {
        "student alone": [trained.best("student alone", case.alone, seeds[0], teacher.model)],
        "student distilled": [trained.best("student distilled", case.distilled, seeds[0], teacher.model)],
    }
    for seed in seeds[1:]:
        for role, entries in students.items():
            entries.append(trained(role, entries[0].settings, seed, teacher.model))
    teacher_test, labels = predict(case, teacher.model, case.test)
    counted = labels != IGNORED
    table = {}
    for role, entries in students.items():
        rows = []
        for entry in entries:
            test, _ = predict(case, entry.model, case.test)
            agreement = float((test == teacher_test)[counted].mean())
            rows.append(dict(seed=entry.seed, dev=entry.dev, test=case.score(test, labels), agreement=agreement))
        table[role] = dict(settings=asdict(entries[0].settings), parameters=_parameters(entries[0].model), runs=rows)
    pairs = zip(table["student alone"]["runs"], table["student distilled"]["runs"], strict=True)
    return dict(
        case=case.name,
        metric=case.metric,
        teacher=dict(
            settings=asdict(teacher.settings),
            parameters=_parameters(teacher.model),
            dev=teacher.dev,
            test=case.score(teacher_test, labels),
        ),
        students=table,
        steps={"teacher": case.teacher_steps, "student": case.student_steps},
        batch_size=case.batch_size,
        gain_per_seed=[distilled["test"] - alone["test"] for alone, distilled in pairs],
        examples={name: len(getattr(case, name)) for name in ("teacher_data", "transfer", "dev", "test")},
        trainings=trained.done,
        seconds_of_training=sum(facts["seconds"] for facts in trained.done),
        seconds_of_this_run=time.perf_counter() - begun,
        notes=list(case.notes),
    )


def markdown(found: dict[str, Any]) -> str:
    """The table of one data set: student before teacher, mean ± sample standard deviation over the seeds."""
    metric = found["metric"]
    lines = [
        f"| {found['case']} | parameters | dev {metric} | test {metric} | agreement with teacher (test) | "
        "processor s a training |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for role, entry in found["students"].items():
        seconds = [t["seconds"] for t in found["trainings"] if t["role"] == role]
        cells = [spread([run[key] for run in entry["runs"]]) for key in ("dev", "test", "agreement")]
        lines.append(
            f"| {role} | {entry['parameters'] / 1e6:.2f} M | {' | '.join(cells)} | {statistics.median(seconds):.0f} |"
        )
    teacher = found["teacher"]
    seconds = [t["seconds"] for t in found["trainings"] if t["role"] == "teacher"]
    lines.append(
        f"| teacher | {teacher['parameters'] / 1e6:.2f} M | {teacher['dev']:.4f} | {teacher['test']:.4f} | | "
        f"{statistics.median(seconds):.0f} |"
    )
    gains = ", ".join(f"{gain:+.4f}" for gain in found["gain_per_seed"])
    lines += ["", f"Distilled minus alone on test, seed by seed: {gains}; {spread(found['gain_per_seed'])}."]
    lines += [
        f"Chosen on dev, first seed: {_chosen(found)}.",
        f"Training took {found['seconds_of_training']:.0f} s of processor time in all.",
    ]
    return "\n".join(lines)


def spread(values: Sequence[float]) -> str:
    """Mean ± sample standard deviation; the mean alone where there is one value."""
    mean = statistics.mean(values)
    return f"{mean:.4f} ± {statistics.stdev(values):.4f}" if len(values) > 1 else f"{mean:.4f}"


def _chosen(found: dict[str, Any]) -> str:
    entries = {**found["students"], "teacher": found["teacher"]}
    return "; ".join(f"{role}: {Settings(**entry['settings'])}" for role, entry in entries.items())


def _parameters(model: torch.nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def from_first_and_last_layer(teacher: Any) -> Any:
    """A two-layer BERT with the teacher's embeddings, first and last encoder layer, pooler and head, copied."""
    config = copy.deepcopy(teacher.config)
    last = config.num_hidden_layers - 1
    config.num_hidden_layers = 2
    student = type(teacher)(config)
    origin = {"encoder.layer.0.": "encoder.layer.0.", "encoder.layer.1.": f"encoder.layer.{last}."}
    theirs = teacher.state_dict()
    weights = {}
    for name in student.state_dict():
        source = name
        for ours, its in origin.items():
            source = source.replace(ours, its) if ours in name else source
        weights[name] = theirs[source].clone()
    student.load_state_dict(weights)  # strict: every weight of the student has an origin
    return student
