"""The card's YAML: what the Hub searches and shows beside the text. Writes no body."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

import yaml  # type: ignore[import-untyped]  # its stubs are a package of their own
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from hf_distill.hub import sections
from hf_distill.hub.facts import HIDDEN_PATH, CardData, DatasetFacts, without_paths
from hf_distill.hub.papers import DIVERGENCES, HINTON, OBJECTIVES, TEACHERS, Paper
from hf_distill.hub.sections import escape
from hf_distill.hub.usage import program, use_of

TAGS = ("hf-distill", "knowledge-distillation", "distillation", "generated_from_trainer")
_NOT_A_METRIC = ("loss", "divergence")


def metadata(facts: CardData) -> ModelCardData:
    """The card's metadata; a key without a known value is left out."""
    results = _results(facts)
    relation = "adapter" if facts.student.adapter else "finetune"
    use = use_of(facts)
    data = ModelCardData(
        language=list(facts.languages) or None,
        license=facts.license,
        library_name="peft" if facts.student.adapter else "transformers",
        pipeline_tag=use.tag if use else None,
        base_model=facts.base_model,
        tags=_tags(facts),
        datasets=_unique(item.hub_id for item in facts.datasets) or None,
        metrics=_unique(name for name, _, _ in _metrics(facts)) or None,
        model_name=facts.name if results else None,
        eval_results=results or None,
    )
    # A small student with its teacher's name for an origin is no fine-tuned teacher.
    shrunk = any(facts.base_model == teacher.hub_id for teacher in facts.teachers)
    if facts.base_model and (facts.student.adapter or not shrunk):
        data["base_model_relation"] = relation
    return data


def _tags(facts: CardData) -> list[str]:
    tags = [*TAGS, *facts.tags]
    if facts.student.adapter:
        tags += ["transformers", facts.student.adapter.lower()]
        tags += [f"base_model:adapter:{facts.base_model}"] if facts.base_model else []
    return _unique(tag for tag in tags if HIDDEN_PATH not in tag)


def _unique(items: Iterable[str | None]) -> list[str]:
    return list(dict.fromkeys(item for item in items if item))


def _metrics(facts: CardData) -> Iterator[tuple[str, float, DatasetFacts | None]]:
    """The task metrics of the weights that are saved, with the dataset of each."""
    for evaluation in facts.evaluations:
        steps = (evaluation.step, facts.weights_step)
        if evaluation.subject == "student" and (None in steps or steps[0] == steps[1]):
            for name, value in evaluation.metrics.items():
                if name not in _NOT_A_METRIC and not name.startswith("teacher_"):
                    yield name, value, evaluation.dataset


def _results(facts: CardData) -> list[EvalResult]:
    """The model index: only of metrics whose task and dataset are known, as the Hub asks."""
    use = use_of(facts)
    if use is None:
        return []
    return [
        EvalResult(
            task_type=use.tag,
            task_name=use.title,
            dataset_type=dataset.hub_id or _slug(dataset.name),
            dataset_name=dataset.name,
            dataset_config=dataset.config,
            dataset_split=dataset.split,
            metric_type=name,
            metric_name=name,
            metric_value=value,
        )
        for name, value, dataset in _metrics(facts)
        if dataset is not None and dataset.name
    ]


def _slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") or "unnamed"


logger = logging.getLogger(__name__)

_TEMPLATES = Environment(
    loader=FileSystemLoader(Path(__file__).parent),
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
    keep_trailing_newline=True,
    autoescape=False,  # the output is Markdown: every text goes through `escape` or `plain`
)
_TEMPLATES.filters["md"] = escape


def render_card(facts: CardData) -> str:
    """The whole README.md: YAML metadata, then Markdown. What is not in the facts is left out.

    >>> from hf_distill.hub.facts import ModelFacts
    >>> card = render_card(CardData(name="small", task="classification", student=ModelFacts()))
    >>> "pipeline_tag: text-classification" in card, "Not measured" in card
    (True, True)
    """
    text = _TEMPLATES.get_template("card.md.jinja").render(
        facts=facts,
        metadata=metadata(facts).to_yaml(),
        summary=sections.summary(facts),
        models=sections.models(facts),
        loss=sections.loss(facts),
        results=sections.results(facts),
        settings=sections.settings(facts),
        history=sections.history(facts),
        versions={k: v for k, v in facts.versions.items() if k != "peft" or facts.student.adapter},
        program=program(facts),
        no_program=sections.no_program(facts),
        papers=_papers(facts),
    )
    return str(ModelCard(text))


def _papers(facts: CardData) -> list[Paper]:
    known = DIVERGENCES.get(facts.divergence or "") if facts.teachers else None
    matched = [OBJECTIVES.get(text.partition("(")[0]) for text in facts.objective_settings.values()]
    teachers = [TEACHERS.get(teacher.class_name or "") for teacher in facts.teachers]
    found = [HINTON if facts.teachers else None, None if known is None else known.paper, *teachers, *matched]
    return list(dict.fromkeys(paper for paper in found if paper is not None))


def write_card(facts: CardData, output_dir: str | os.PathLike[str]) -> Path:
    """Write `output_dir/README.md`, whole or not at all; returns its path.

    As in `Trainer.create_model_card` a README.md that is there is replaced. Its tags are kept, and
    its license and language where the facts have none.
    """
    path = Path(output_dir) / "README.md"
    path.parent.mkdir(parents=True, exist_ok=True)
    text = render_card(_keeping(facts, path))
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        partial.write_text(text, encoding="utf-8", newline="\n")
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    return path


def _keeping(facts: CardData, path: Path) -> CardData:
    """The facts, with what the user had written into the old card's metadata."""
    if not path.is_file():
        return facts
    try:
        old = ModelCard.load(path, ignore_metadata_errors=True).data
    except (ValueError, yaml.YAMLError) as error:
        logger.warning("The metadata of the old README.md is lost: it cannot be read (%s).", error)
        return facts
    return replace(
        facts,
        tags=(*facts.tags, *filter(_is_the_users, _texts(old.get("tags")))),
        license=facts.license or next(iter(_texts(old.get("license"))), None),
        languages=facts.languages or tuple(_texts(old.get("language"))),
    )


def _texts(value: object) -> list[str]:
    items = value if isinstance(value, Iterable) and not isinstance(value, str) else [value]
    return [item for item in items if isinstance(item, str)]


def _is_the_users(tag: str) -> bool:
    """PEFT writes its base model, which may be a local path, into a tag; ours says it anew."""
    return not tag.startswith("base_model:") and without_paths(tag) == tag
