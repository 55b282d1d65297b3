"""The model card: its YAML metadata, its text, and writing it without losing the metadata of the old card."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

import yaml  # type: ignore[import-untyped]  # its stubs are a separate package
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from hf_distill._utils import write_text_whole
from hf_distill.functional import PROPERTIES
from hf_distill.hub import sections
from hf_distill.hub.facts import HIDDEN_PATH, CardData, DatasetFacts, without_paths
from hf_distill.hub.usage import TEMPLATES, program, use_of

logger = logging.getLogger(__name__)

TAGS = ("hf-distill", "knowledge-distillation", "distillation", "generated_from_trainer")
_NOT_A_METRIC = ("loss", "divergence")
_ENTRIES = Path(__file__).with_name("papers.bib").read_text(encoding="utf-8").strip().split("\n\n")
BIBTEX: dict[str, str] = {re.findall(r"@\w+{(.+),", entry)[0]: entry for entry in _ENTRIES}
"""The entries of `papers.bib` by citation key. The `paper` of a class or a divergence is such a key."""
TEMPLATES.filters["md"] = sections.escape


def metadata(facts: CardData) -> ModelCardData:
    """Return the card's metadata, without keys whose value is not known."""
    results, use, adapter = _results(facts), use_of(facts), facts.student.adapter
    data = ModelCardData(
        language=list(facts.languages) or None,
        license=facts.license,
        library_name="peft" if adapter else "transformers",
        pipeline_tag=use.tag if use else None,
        base_model=facts.base_model,
        tags=_tags(facts),
        datasets=_unique(item.hub_id for item in facts.datasets) or None,
        metrics=_unique(name for name, _, _ in _metrics(facts)) or None,
        model_name=facts.name if results else None,
        eval_results=results or None,
    )
    # A smaller student that was made from its teacher is not a fine-tuned teacher.
    shrunk = any(facts.base_model == teacher.hub_id for teacher in facts.teachers)
    if facts.base_model and (adapter or not shrunk):
        data["base_model_relation"] = "adapter" if adapter else "finetune"
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
    """Yield each metric of the saved weights: its name, its value, and its dataset."""
    for evaluation in facts.evaluations:
        steps = (evaluation.step, facts.weights_step)
        if evaluation.subject == "student" and (None in steps or steps[0] == steps[1]):
            for name, value in evaluation.metrics.items():
                if name not in _NOT_A_METRIC and not name.startswith("teacher_"):
                    yield name, value, evaluation.dataset


def _results(facts: CardData) -> list[EvalResult]:
    """Return the model index. The Hub accepts only metrics whose task and dataset are known."""
    use = use_of(facts)
    if use is None:
        return []
    return [
        EvalResult(
            task_type=use.tag,
            task_name=use.title,
            dataset_type=dataset.hub_id or re.sub(r"[^a-z0-9]+", "-", dataset.name.lower()).strip("-") or "unnamed",
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


def render_card(facts: CardData) -> str:
    """Return the whole README.md: YAML metadata, then Markdown. Unknown facts are left out.

    >>> from hf_distill.hub.facts import ModelFacts
    >>> card = render_card(CardData(name="small", task="classification", student=ModelFacts()))
    >>> "pipeline_tag: text-classification" in card, "Not measured" in card
    (True, True)
    """
    text = TEMPLATES.get_template("card.md.jinja").render(
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
        papers=[BIBTEX.get(paper) or sections.plain(paper) for paper in _papers(facts)],
    )
    return str(ModelCard(text))


def _papers(facts: CardData) -> list[str]:
    """Return the papers of the methods that the run used."""
    papers: list[str | None] = ["hinton2015distilling"] if facts.teachers else []
    if facts.teachers and facts.divergence in PROPERTIES:
        papers.append(PROPERTIES[facts.divergence].paper)
    papers += [teacher.paper for teacher in facts.teachers]
    papers += [objective.paper for objective in facts.objectives]
    return _unique(papers)


def write_card(facts: CardData, output_dir: str | os.PathLike[str]) -> Path:
    """Write `output_dir/README.md`, whole or not at all, and return its path.

    Like `Trainer.create_model_card` it replaces an existing README.md, but keeps its tags, and its license and
    language if the facts have none.
    """
    path = Path(output_dir, "README.md")
    write_text_whole(path, render_card(_with_metadata_of(path, facts)))
    return path


def _with_metadata_of(path: Path, facts: CardData) -> CardData:
    """Return the facts with the metadata that the user wrote into the old card."""
    if not path.is_file():
        return facts
    try:
        old = ModelCard.load(path, ignore_metadata_errors=True).data
    except (ValueError, yaml.YAMLError) as error:
        logger.warning("The metadata of the old README.md cannot be read and is lost (%s).", error)
        return facts
    # PEFT writes its base model, which may be a local path, into a tag; `_tags` writes it again.
    tags = [tag for tag in _texts(old.get("tags")) if not tag.startswith("base_model:") and without_paths(tag) == tag]
    return replace(
        facts,
        tags=(*facts.tags, *tags),
        license=facts.license or next(iter(_texts(old.get("license"))), None),
        languages=facts.languages or tuple(_texts(old.get("language"))),
    )


def _texts(value: object) -> list[str]:
    return [item for item in (value if isinstance(value, list) else [value]) if isinstance(item, str)]
