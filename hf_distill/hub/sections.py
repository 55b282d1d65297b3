"""The sections of the card, as Markdown in which text from users is escaped."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from hf_distill.errors import is_number, is_whole
from hf_distill.functional import PROPERTIES
from hf_distill.hub.facts import CardData, EvaluationFacts, ModelFacts, ScheduleFacts
from hf_distill.hub.usage import COUNTS_LABELS, POOLED

# An underscore inside a word means nothing in Markdown.
_SPECIAL = re.compile(r"([\\`*{}\[\]<>|~$]|(?<!\w)_|_(?!\w))")
_LINE_START = re.compile(r"^(\d*)([#+\-=.)])(?=\s|$)")


def escape(text: object) -> str:
    r"""Return the text on one line, with Markdown's special characters escaped.

    >>> print(escape("a|b\n<c> *d*"))
    a\|b \<c\> \*d\*
    """
    one_line = " ".join(str(text).split())
    escaped = _SPECIAL.sub(r"\\\1", one_line)
    return _LINE_START.sub(r"\1\\\2", escaped)


def plain(text: object) -> str:
    """Return the text on one line without backticks, for a code span or a code block."""
    return " ".join(str(text).replace("`", "'").split())


def code(text: object) -> str:
    """Return a code span that is safe in a table: `text`."""
    return "`" + plain(text).replace("|", "\\|") + "`"


def number(value: object) -> str:
    """Return a number in readable form, and other values escaped.

    >>> number(12345), number(0.91314), number(5e-5), number(2.0)
    ('12,345', '0.9131', '5e-05', '2')
    """
    if not is_number(value):
        return escape(value)
    if is_whole(value) or (value.is_integer() and abs(value) >= 1000):
        return f"{int(value):,}"
    return f"{value:.4g}" if abs(value) < 1000 else f"{value:,.1f}"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table. The cells must be escaped already."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


_LOCAL = "a local model"
_MEANING = {
    "labels": " (the model's own loss on the labels)",
    "logits": " (the divergence from the teacher's output)",
}
# Titles of settings that are not their names with spaces.
_TITLES = {
    "steps": "optimizer steps",
    "max_grad_norm": "gradient norm clipped at",
    "batch_size": "batch size per process",
    "accumulation": "gradient accumulation steps",
    "train_loss": "mean training loss",
}


def link(hub_id: str) -> str:
    """Return a link to the page of a Hub id."""
    return f"[{escape(hub_id)}](https://huggingface.co/{hub_id})"


def named(model: ModelFacts) -> str:
    """Return a model in one phrase: its Hub id or "a local model", its class and its size."""
    if model.description:
        return escape(model.description)
    known = [code(model.class_name)] if model.class_name else []
    if model.parameters is not None:
        known.append(f"{number(model.parameters)} parameters")
    name = link(model.hub_id) if model.hub_id else _LOCAL
    return f"{name} ({', '.join(known)})" if known else name


def summary(facts: CardData) -> str:
    """Return a description of the model in two or three sentences."""
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
        # A config without weights from the Hub names its origin too, so "made from" and not "fine-tuned from".
        text += f" It was made from {link(facts.base_model)}."
    if facts.pooling:
        text += f" Its embedding of an input is {POOLED[facts.pooling]}; the model itself does not pool."
    return text


def link_dataset(name: str, hub_id: str | None) -> str:
    """Return a dataset's name, linked if it is on the Hub."""
    if hub_id is None:
        return escape(name)
    return f"[{escape(name)}](https://huggingface.co/datasets/{hub_id})"


def models(facts: CardData) -> str:
    """Return the table of student and teachers, without rows of which nothing is known."""
    student, teachers = facts.student, facts.teachers
    everyone = (student, *teachers)
    heads = ["Teacher"] if len(teachers) == 1 else [f"Teacher {i}" for i in range(1, len(teachers) + 1)]
    names = [link(facts.repo_id) if facts.repo_id else escape(facts.name)]
    names += [link(model.hub_id) if model.hub_id else escape(model.description or _LOCAL) for model in teachers]
    frozen = student.trainable_parameters != student.parameters
    shows_labels = facts.task in COUNTS_LABELS
    # transformers treats the outputs of a sequence classifier by its problem type: softmax, sigmoid or values.
    shows_type = facts.task in ("classification", "regression")
    rows = [
        ("Name", names),
        ("Class", [_code(model.class_name) for model in everyone]),
        ("Parameters", [_count(model.parameters) for model in everyone]),
        ("Student / teacher", ["", *(_ratio(student, teacher) for teacher in teachers)]),
        ("Trained parameters", [_count(student.trainable_parameters if frozen else None), *("" for _ in teachers)]),
        ("Layers", [_count(model.layers) for model in everyone]),
        ("Width", [_count(model.width) for model in everyone]),
        ("Labels", [_count(model.labels if shows_labels else None) for model in everyone]),
        ("Problem type", [_code(model.problem_type if shows_type else None) for model in everyone]),
        ("Number format", [_code(model.dtype) for model in everyone]),
    ]
    return table(["", "Student", *heads], [[name, *cells] for name, cells in rows if any(cells)])


def _count(value: int | None) -> str:
    return "" if value is None else number(value)


def _code(text: str | None) -> str:
    return code(text) if text else ""


def _ratio(student: ModelFacts, teacher: ModelFacts) -> str:
    if not student.parameters or not teacher.parameters:
        return ""
    return f"{student.parameters / teacher.parameters:.1%} of the parameters"


def loss(facts: CardData) -> str:
    """Return the loss in symbols, its numbers, and the divergence in one line."""
    described = [term for term in facts.objectives if term.description is not None]
    if not facts.teachers and not described:
        return "The student's own loss on the labels, without a teacher."
    lines = ["```text", f"loss = {_formula(facts)}", *_numbers(facts), "```"]
    if facts.objectives:
        names = (code(term.name) + _MEANING.get(term.name, "") for term in facts.objectives)
        lines += ["", f"Objectives: {', '.join(names)}."]
    if facts.ensemble:
        lines += ["", f"The teachers' predictions are combined: {escape(facts.ensemble)}."]
    if described:
        lines += ["", *(f"- {code(term.name)}: {code(term.description)}" for term in described)]
    if facts.divergence is None:
        return "\n".join(lines)
    known = PROPERTIES.get(facts.divergence)
    text = f"The divergence is {code(facts.divergence)}"
    if known is not None:
        text += f": `{known.formula}`"
        if re.search(r"\b[pq]\b", known.formula):
            text += ", with p the teacher's distribution and q the student's"
    if facts.divergence_kwargs:
        settings = (f"{key}={plain(value)}" for key, value in facts.divergence_kwargs.items())
        text += f", with {code(', '.join(settings))}"
    if facts.temperature is not None:
        text += ", both at temperature T"
    return "\n".join([*lines, "", text + "."])


def _formula(facts: CardData) -> str:
    divergence = plain(facts.divergence or "divergence")
    power = facts.temperature_power if facts.temperature else 0
    softened = {0: "", 1: "T * ", 2: "T² * "}.get(power, f"T^{power} * ") + divergence
    blends = facts.alpha is not None and _compares_logits(facts)
    terms = ["(1 - alpha) * labels", f"alpha * {softened}"] if blends else []
    for term in facts.objectives:
        if blends and term.name in ("labels", "logits"):
            continue
        symbol = softened if term.name == "logits" else plain(term.name)
        terms.append(symbol if term.weight is None else f"{term.weight:g} * {symbol}")
    return " + ".join(terms) or softened


def _compares_logits(facts: CardData) -> bool:
    return any(term.name == "logits" for term in facts.objectives)


def _numbers(facts: CardData) -> Iterable[str]:
    alpha = facts.alpha if _compares_logits(facts) else None  # otherwise the labels' weight is 1
    for symbol, schedule in (("alpha", alpha), ("T", facts.temperature)):
        if schedule is not None:
            yield f"{symbol} = {_scheduled(schedule)}"


def _scheduled(schedule: ScheduleFacts) -> str:
    if schedule.schedule == "constant" or schedule.end is None:
        return f"{schedule.start:g}"
    return f"{schedule.start:g} → {schedule.end:g} ({plain(schedule.schedule)})"


def results(facts: CardData) -> str:
    """Return a table for each dataset, with a column for each model that was evaluated on it."""
    by_dataset: dict[str, list[EvaluationFacts]] = {}
    for evaluation in facts.evaluations:
        by_dataset.setdefault(_dataset_of(evaluation), []).append(evaluation)
    tables = [_results_on(dataset, group, facts) for dataset, group in by_dataset.items()]
    return "\n\n".join(tables) or "Not measured: there was no evaluation."


def _dataset_of(evaluation: EvaluationFacts) -> str:
    dataset = evaluation.dataset
    if dataset is None or not dataset.name:
        return "the evaluation set"
    name = link_dataset(dataset.name, dataset.hub_id)
    config = f" ({escape(dataset.config)})" if dataset.config else ""
    return name + config + (f", {escape(dataset.split)} split" if dataset.split else "")


def _results_on(dataset: str, group: list[EvaluationFacts], facts: CardData) -> str:
    names = dict.fromkeys(n for e in group for n in (*e.metrics, *e.not_measured))
    rows = [[code(name), *(_measured(e, name) for e in group)] for name in names]
    head = ["Metric", *(escape(e.subject) for e in group)]
    notes = [
        f"\n\nThe {escape(e.subject)} was evaluated at step {number(e.step)}; the saved weights are "
        f"those of step {number(facts.weights_step)}."
        for e in group
        if e.subject == "student" and None not in (e.step, facts.weights_step) and e.step != facts.weights_step
    ]
    return f"On {dataset}:\n\n" + table(head, rows) + "".join(notes)


def _measured(evaluation: EvaluationFacts, name: str) -> str:
    if name in evaluation.metrics:
        return number(evaluation.metrics[name])
    reason = evaluation.not_measured.get(name)
    return f"not measured: {escape(reason)}" if reason else "not measured"


def settings(facts: CardData) -> str:
    """Return a table of the known training settings."""
    training = facts.training
    rows = [
        [_TITLES.get(name, name.replace("_", " ")), number(value)]
        for name, value in vars(training).items()
        if value is not None and name not in ("warmup", "extra")
    ]
    if training.warmup is not None:
        unit = "warm-up, share of the run" if training.warmup < 1 else "warm-up steps"
        rows.append([unit, number(training.warmup)])
    rows += [[escape(name), number(value)] for name, value in training.extra.items()]
    return table(["Setting", "Value"], rows) if rows else "The settings are not known."


def history(facts: CardData) -> str:
    """Return a table of the evaluations during training, or an empty text if there were none."""
    if not facts.history:
        return ""
    names = list(dict.fromkeys(name for row in facts.history for name in row))
    rows = [[number(row[n]) if n in row else "" for n in names] for row in facts.history]
    return table([code(name) for name in names], rows)


def no_program(facts: CardData) -> str:
    """Return the reason why the card shows no program."""
    if facts.student.adapter and facts.base_model is None:
        return "The adapter needs its base model, which is not known to be on the Hub."
    return f"Load it with its class, {code(facts.student.class_name or 'see config.json')}."
