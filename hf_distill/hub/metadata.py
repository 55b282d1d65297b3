"""The card's YAML: what the Hub searches and shows beside the text. Writes no body."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

from huggingface_hub import EvalResult, ModelCardData

from hf_distill.hub.use import use_of
from hf_distill.run_facts import DatasetFacts, RunFacts
from hf_distill.run_facts.names import HIDDEN_PATH

TAGS = ("hf-distill", "knowledge-distillation", "distillation", "generated_from_trainer")
_NOT_A_METRIC = ("loss", "divergence")


def metadata(facts: RunFacts) -> ModelCardData:
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


def _tags(facts: RunFacts) -> list[str]:
    tags = [*TAGS, *facts.tags]
    if facts.student.adapter:
        tags += ["transformers", facts.student.adapter.lower()]
        tags += [f"base_model:adapter:{facts.base_model}"] if facts.base_model else []
    return _unique(tag for tag in tags if HIDDEN_PATH not in tag)


def _unique(items: Iterable[str | None]) -> list[str]:
    return list(dict.fromkeys(item for item in items if item))


def _metrics(facts: RunFacts) -> Iterator[tuple[str, float, DatasetFacts | None]]:
    """The task metrics of the weights that are saved, with the dataset of each."""
    for evaluation in facts.evaluations:
        steps = (evaluation.step, facts.weights_step)
        if evaluation.subject == "student" and (None in steps or steps[0] == steps[1]):
            for name, value in evaluation.metrics.items():
                if name not in _NOT_A_METRIC and not name.startswith("teacher_"):
                    yield name, value, evaluation.dataset


def _results(facts: RunFacts) -> list[EvalResult]:
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
