"""The model card of a distilled student, from the facts of its run. Uploads nothing itself."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import yaml  # type: ignore[import-untyped]  # its stubs are a package of their own
from huggingface_hub import ModelCard
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from hf_distill.hub import sections
from hf_distill.hub.markdown import escape
from hf_distill.hub.metadata import metadata
from hf_distill.hub.papers import DIVERGENCES, HINTON, OBJECTIVES, TEACHERS, Paper
from hf_distill.hub.use import program
from hf_distill.run_facts import RunFacts, without_paths

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


def render_card(facts: RunFacts) -> str:
    """The whole README.md: YAML metadata, then Markdown. What is not in the facts is left out.

    >>> from hf_distill.run_facts import ModelFacts
    >>> card = render_card(RunFacts(name="small", task="classification", student=ModelFacts()))
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


def _papers(facts: RunFacts) -> list[Paper]:
    known = DIVERGENCES.get(facts.divergence or "") if facts.teachers else None
    matched = [OBJECTIVES.get(text.partition("(")[0]) for text in facts.objective_settings.values()]
    teachers = [TEACHERS.get(teacher.class_name or "") for teacher in facts.teachers]
    found = [HINTON if facts.teachers else None, None if known is None else known.paper, *teachers, *matched]
    return list(dict.fromkeys(paper for paper in found if paper is not None))


def write_card(facts: RunFacts, output_dir: str | os.PathLike[str]) -> Path:
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


def _keeping(facts: RunFacts, path: Path) -> RunFacts:
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
