"""Text of unknown origin made safe for Markdown, and numbers made readable. Knows no card."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from hf_distill.hub.facts import CardData, EvaluationFacts, ModelFacts, ScheduleFacts
from hf_distill.hub.papers import DIVERGENCES
from hf_distill.hub.usage import COUNTS_LABELS, POOLED

# An underscore inside a word means nothing in Markdown.
_SPECIAL = re.compile(r"([\\`*{}\[\]<>|~$]|(?<!\w)_|_(?!\w))")
_LINE_START = re.compile(r"^(\d*)([#+\-=.)])(?=\s|$)")


def escape(text: object) -> str:
    r"""The text as it is to be read, on one line, wherever it stands in Markdown or a table.

    >>> print(escape("a|b\n<c> *d*"))
    a\|b \<c\> \*d\*
    """
    one_line = " ".join(str(text).split())
    escaped = _SPECIAL.sub(r"\\\1", one_line)
    return _LINE_START.sub(r"\1\\\2", escaped)


def plain(text: object) -> str:
    """The text on one line without backticks: for a code span or a code block."""
    return " ".join(str(text).replace("`", "'").split())


def code(text: object) -> str:
    """A code span that is safe in a table: `text`."""
    return "`" + plain(text).replace("|", "\\|") + "`"


def number(value: object) -> str:
    """A number to read: 12,345; 0.9131; 5e-05.

    >>> number(12345), number(0.91314), number(5e-5), number(2.0)
    ('12,345', '0.9131', '5e-05', '2')
    """
    if isinstance(value, bool) or not isinstance(value, int | float):
        return escape(value)
    if isinstance(value, int) or (value.is_integer() and abs(value) >= 1000):
        return f"{int(value):,}"
    return f"{value:.4g}" if abs(value) < 1000 else f"{value:,.1f}"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table; the cells are taken as they are, so escape them first."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


_LOCAL = "a local model"
_MEANING = {
    "labels": " (the model's own loss on the labels)",
    "logits": " (the divergence from the teacher's output)",
}
_SETTINGS = {
    "epochs": "epochs",
    "steps": "optimizer steps",
    "learning_rate": "learning rate",
    "learning_rate_schedule": "learning rate schedule",
    "optimizer": "optimizer",
    "weight_decay": "weight decay",
    "max_grad_norm": "gradient norm clipped at",
    "batch_size": "batch size per process",
    "accumulation": "gradient accumulation steps",
    "processes": "processes",
    "precision": "precision",
    "seed": "seed",
    "label_smoothing": "label smoothing",
    "train_loss": "mean training loss",
}


def link(hub_id: str) -> str:
    """A Hub id as a link to its page."""
    return f"[{escape(hub_id)}](https://huggingface.co/{hub_id})"


def named(model: ModelFacts) -> str:
    """A model in one phrase: its Hub id or "a local model", its class and its size."""
    if model.described:
        return escape(model.described)
    known = [code(model.class_name)] if model.class_name else []
    if model.parameters is not None:
        known.append(f"{number(model.parameters)} parameters")
    name = link(model.hub_id) if model.hub_id else _LOCAL
    return f"{name} ({', '.join(known)})" if known else name


def summary(facts: CardData) -> str:
    """What the model is, in two or three sentences."""
    student = code(facts.student.class_name) if facts.student.class_name else "A model"
    if facts.teachers:
        teachers = " and ".join(named(teacher) for teacher in facts.teachers)
        text = f"{student}, distilled with hf-distill from {teachers}"
    else:
        text = f"{student}, trained with hf-distill without a teacher"
    names = [link_dataset(item.name, item.hub_id) for item in facts.datasets if item.name]
    text += f", on {' and '.join(names)}." if names else "."
    if facts.base_model and facts.student.adapter:
        text += f" It is a {escape(facts.student.adapter)} adapter of {link(facts.base_model)}."
    elif facts.student.adapter:
        text += f" It is a {escape(facts.student.adapter)} adapter of {_LOCAL}."
    elif facts.base_model:
        # A config made from the Hub names its origin too, so whether weights were loaded is not known.
        text += f" It was made from {link(facts.base_model)}."
    if facts.pooling:
        text += f" Its embedding of an input is {POOLED[facts.pooling]}; the model does not pool so by itself."
    return text


def link_dataset(name: str, hub_id: str | None) -> str:
    """A dataset's name, linked if it is on the Hub."""
    if hub_id is None:
        return escape(name)
    return f"[{escape(name)}](https://huggingface.co/datasets/{hub_id})"


def models(facts: CardData) -> str:
    """The table of student and teachers; a row that nobody knows is left out."""
    everyone = (facts.student, *facts.teachers)
    several = len(facts.teachers) > 1
    heads = [f"Teacher {i + 1}" if several else "Teacher" for i in range(len(facts.teachers))]
    where = [link(facts.repo_id) if facts.repo_id else escape(facts.name)]
    where += [link(one.hub_id) if one.hub_id else escape(one.described or _LOCAL) for one in facts.teachers]
    rows = [
        ("Name", where),
        ("Class", [code(m.class_name) if m.class_name else "" for m in everyone]),
        ("Parameters", [_count(m.parameters) for m in everyone]),
        ("Student / teacher", ["", *(_ratio(facts.student, t) for t in facts.teachers)]),
        ("Trained parameters", [_trained(facts.student), *("" for _ in facts.teachers)]),
        ("Layers", [_count(m.layers) for m in everyone]),
        ("Width", [_count(m.width) for m in everyone]),
        ("Labels", [_count(m.labels if facts.task in COUNTS_LABELS else None) for m in everyone]),
        ("Problem type", [_problem_type(m, facts.task) for m in everyone]),
        ("Number format", [code(m.dtype) if m.dtype else "" for m in everyone]),
    ]
    return table(["", "Student", *heads], [[name, *cells] for name, cells in rows if any(cells)])


def _count(value: int | None) -> str:
    return "" if value is None else number(value)


def _problem_type(model: ModelFacts, task: str) -> str:
    """What transformers makes of a sequence classifier's outputs: softmax, sigmoid or values."""
    return code(model.problem_type) if model.problem_type and task in ("classification", "regression") else ""


def _trained(student: ModelFacts) -> str:
    """Shown only when part of the student was frozen."""
    return "" if student.trainable_parameters == student.parameters else _count(student.trainable_parameters)


def _ratio(student: ModelFacts, teacher: ModelFacts) -> str:
    if not student.parameters or not teacher.parameters:
        return ""
    return f"{student.parameters / teacher.parameters:.1%} of the parameters"


def loss(facts: CardData) -> str:
    """The loss in symbols, its numbers, and the divergence in one line."""
    if not facts.teachers and not facts.objective_settings:
        return "The student's own loss on the labels: no teacher took part."
    lines = ["```text", f"loss = {_formula(facts)}", *_numbers(facts), "```"]
    if facts.objectives:
        names = (code(name) + _MEANING.get(name, "") for name in facts.objectives)
        lines += ["", f"Objectives: {', '.join(names)}."]
    if facts.joined:
        lines += ["", f"The teachers speak as one: {escape(facts.joined)}."]
    if facts.objective_settings:
        lines += ["", *(f"- {code(name)}: {code(text)}" for name, text in facts.objective_settings.items())]
    if facts.divergence is None:
        return "\n".join(lines)
    known = DIVERGENCES.get(facts.divergence)
    text = f"The divergence is {code(facts.divergence)}"
    if known is not None:
        text += f": `{known.formula}`"
        if re.search(r"\b[pq]\b", known.formula):
            text += ", with p the teacher's distribution and q the student's"
    if facts.divergence_kwargs:
        given = (f"{key}={plain(value)}" for key, value in facts.divergence_kwargs.items())
        text += f", set with {code(', '.join(given))}"
    if facts.temperature is not None:
        text += ", both at temperature T"
    return "\n".join([*lines, "", text + "."])


def _formula(facts: CardData) -> str:
    divergence = plain(facts.divergence or "divergence")
    power = facts.temperature_power if facts.temperature else 0
    softened = {0: "", 1: "T * ", 2: "T² * "}.get(power, f"T^{power} * ") + divergence
    blends = facts.alpha is not None and "logits" in facts.objectives
    terms = ["(1 - alpha) * labels", f"alpha * {softened}"] if blends else []
    for name, weight in facts.objectives.items():
        if blends and name in ("labels", "logits"):
            continue
        term = softened if name == "logits" else plain(name)
        terms.append(term if weight is None else f"{weight:g} * {term}")
    return " + ".join(terms) or softened


def _numbers(facts: CardData) -> Iterable[str]:
    alpha = facts.alpha if "logits" in facts.objectives else None  # without them labels weigh 1
    for symbol, schedule in (("alpha", alpha), ("T", facts.temperature)):
        if schedule is not None:
            yield f"{symbol} = {_scheduled(schedule)}"


def _scheduled(schedule: ScheduleFacts) -> str:
    if schedule.schedule == "constant" or schedule.end is None:
        return f"{schedule.start:g}"
    return f"{schedule.start:g} → {schedule.end:g} ({plain(schedule.schedule)})"


def results(facts: CardData) -> str:
    """One table a dataset; a column for each model that was measured there."""
    groups: dict[str, list[EvaluationFacts]] = {}
    for evaluation in facts.evaluations:
        groups.setdefault(_place(evaluation), []).append(evaluation)
    blocks = [_results_on(place, group, facts) for place, group in groups.items()]
    return "\n\n".join(blocks) or "Not measured: the run evaluated nothing."


def _place(evaluation: EvaluationFacts) -> str:
    dataset = evaluation.dataset
    if dataset is None or not dataset.name:
        return "the evaluation set"
    name = link_dataset(dataset.name, dataset.hub_id)
    config = f" ({escape(dataset.config)})" if dataset.config else ""
    return name + config + (f", {escape(dataset.split)} split" if dataset.split else "")


def _results_on(place: str, group: list[EvaluationFacts], facts: CardData) -> str:
    names = dict.fromkeys(n for e in group for n in (*e.metrics, *e.not_measured))
    rows = [[code(name), *(_measured(e, name) for e in group)] for name in names]
    head = ["Metric", *(escape(e.subject) for e in group)]
    notes = [
        f"\n\nThe {escape(e.subject)} was measured at step {number(e.step)}; the saved weights are "
        f"those of step {number(facts.weights_step)}."
        for e in group
        if e.subject == "student" and None not in (e.step, facts.weights_step) and e.step != facts.weights_step
    ]
    return f"On {place}:\n\n" + table(head, rows) + "".join(notes)


def _measured(evaluation: EvaluationFacts, name: str) -> str:
    if name in evaluation.metrics:
        return number(evaluation.metrics[name])
    reason = evaluation.not_measured.get(name)
    return f"not measured: {escape(reason)}" if reason else "not measured"


def settings(facts: CardData) -> str:
    """The training settings that are known, as a table."""
    training = facts.training
    rows = [
        [title, number(value)] for name, title in _SETTINGS.items() if (value := getattr(training, name)) is not None
    ]
    if training.warmup is not None:
        unit = "warm-up, share of the run" if training.warmup < 1 else "warm-up steps"
        rows.append([unit, number(training.warmup)])
    rows += [[escape(name), number(value)] for name, value in training.extra.items()]
    return table(["Setting", "Value"], rows) if rows else "The settings are not known."


def history(facts: CardData) -> str:
    """The table of evaluations during training; empty when there were none."""
    if not facts.history:
        return ""
    names = list(dict.fromkeys(name for row in facts.history for name in row))
    rows = [[number(row[n]) if n in row else "" for n in names] for row in facts.history]
    return table([code(name) for name in names], rows)


def no_program(facts: CardData) -> str:
    """Why no program is shown."""
    if facts.student.adapter and facts.base_model is None:
        return "The adapter needs its base model, which is not known to be on the Hub."
    return f"Load it with its class, {code(facts.student.class_name or 'see config.json')}."
