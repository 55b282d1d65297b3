"""The card: valid metadata and correct text for every task, and no local path."""

from __future__ import annotations

import ast
from dataclasses import replace

import pytest
import transformers
from huggingface_hub import ModelCard

from hf_distill.functional import PROPERTIES
from hf_distill.hub.card import render_card
from hf_distill.hub.facts import (
    CardData,
    DatasetFacts,
    EvaluationFacts,
    ModelFacts,
    ObjectiveFacts,
    ScheduleFacts,
    TrainingFacts,
)
from hf_distill.hub.usage import program
from hf_distill.tasks import TASKS
from tests.hub.fake_hub import card_errors
from tests.hub.sample_facts import GLUE, STUDENT, TEACHER, VALIDATION, sample_facts

KINDS = {
    ("classification", "input_ids"): "text-classification",
    ("classification", "input_values"): "audio-classification",
    ("classification", "pixel_values"): "image-classification",
    ("regression", "input_ids"): "text-classification",
    ("multiple_choice", "input_ids"): "multiple-choice",
    ("token_classification", "input_ids"): "token-classification",
    ("span", "input_ids"): "question-answering",
    ("masked_lm", "input_ids"): "fill-mask",
    ("causal_lm", "input_ids"): "text-generation",
    ("seq2seq", "input_ids"): "text2text-generation",
    ("seq2seq", "input_features"): "automatic-speech-recognition",
    ("ctc", "input_values"): "automatic-speech-recognition",
    ("embedding", "input_ids"): "feature-extraction",
    ("embedding", "pixel_values"): "image-feature-extraction",
}


def test_the_card_knows_every_task_and_every_divergence() -> None:
    assert set(TASKS) == {task for task, _ in KINDS}
    assert all(properties.formula for properties in PROPERTIES.values())


@pytest.mark.parametrize(("task", "main_input"), KINDS)
@pytest.mark.parametrize("processor", ["AnyTokenizer", "AnyProcessor", "AnyImageProcessor", None])
def test_metadata_and_program_of_each_task(task: str, main_input: str, processor: str) -> None:
    student = replace(STUDENT, main_input=main_input)
    facts = sample_facts(task=task, student=student, processing_class=processor)
    card = ModelCard(render_card(facts))
    assert card.data.pipeline_tag == KINDS[task, main_input]
    assert card.data.library_name == "transformers"
    assert card_errors(card.data.to_dict()) == []
    text = program(facts)
    assert text is not None and text in card.text and "tiny-user/small-student" in text
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ImportFrom) and node.module == "transformers":
            assert all(hasattr(transformers, name.name) for name in node.names)


def test_metadata_of_a_full_run() -> None:
    data = ModelCard(render_card(sample_facts())).data.to_dict()
    (entry,) = data.pop("model-index")
    assert data == {
        "base_model": "some-org/small-base",
        "base_model_relation": "finetune",
        "datasets": ["nyu-mll/glue"],
        "language": ["en"],
        "library_name": "transformers",
        "license": "apache-2.0",
        "metrics": ["accuracy"],
        "pipeline_tag": "text-classification",
        "tags": ["hf-distill", "knowledge-distillation", "distillation", "generated_from_trainer",
                 "mine"],
    }  # fmt: skip
    (result,) = entry["results"]
    assert result["dataset"] == {
        "type": "nyu-mll/glue", "name": "nyu-mll/glue", "config": "sst2", "split": "validation",
    }  # fmt: skip
    assert result["metrics"] == [{"type": "accuracy", "value": 0.8125, "name": "accuracy"}]


def test_the_text_describes_the_run() -> None:
    text = render_card(sample_facts())
    for part in (
        "[some-org/big-teacher](https://huggingface.co/some-org/big-teacher)",
        "| Parameters | 4,000 | 16,000 |",
        "25.0% of the parameters",
        "loss = (1 - alpha) * labels + alpha * T² * reverse_kl + 0.125 * hidden",
        "alpha = 0.75",
        "T = 2.5",
        "Objectives: `labels` (the model's own loss on the labels), `logits` (",
        "| Labels | 3 |  |",
        "KL(q ‖ p)",
        "| `accuracy` | 0.8125 | 0.875 |",
        "| learning rate | 5e-05 |",
        "| kept | ('a', 1) |",
        "| warm-up, share of the run | 0.1 |",
        "hinton2015distilling",
        "gu2024minillm",
        "- transformers 5.0",
        "- `hidden`: `HiddenMatch(layers 'even')`",
        "romero2015fitnets",
    ):
        assert part in text, part
    assert "was evaluated at step" not in text


def test_the_card_shows_the_problem_type_of_a_classifier() -> None:
    """transformers sets the student's at the first labelled step, and pipelines read it."""
    facts = sample_facts()
    typed = replace(facts, student=replace(facts.student, problem_type="multi_label_classification"))
    assert "| Problem type | `multi_label_classification` |  |" in render_card(typed)
    assert "Problem type" not in render_card(facts)
    assert "Problem type" not in render_card(replace(typed, task="token_classification"))


def test_a_student_made_from_its_teacher_is_not_called_fine_tuned() -> None:
    data = ModelCard(render_card(sample_facts(base_model=TEACHER.hub_id))).data.to_dict()
    assert data["base_model"] == TEACHER.hub_id and "base_model_relation" not in data


def test_a_card_of_unknown_facts_invents_nothing() -> None:
    facts = CardData("bare", "causal_lm", ModelFacts(), teachers=(ModelFacts(),))
    text = render_card(facts)
    data = ModelCard(text).data.to_dict()
    assert set(data) == {"library_name", "pipeline_tag", "tags"}
    assert "Not measured: there was no evaluation." in text
    assert "The settings are not known." in text
    assert "a local model" in text
    assert "None" not in text and "unknown" not in text
    assert 'model = AutoModelForCausalLM.from_pretrained(".")' in text


def test_an_unknown_task_has_no_tag_and_no_program() -> None:
    text = render_card(sample_facts(task="own", student=replace(STUDENT, class_name="Mine")))
    assert ModelCard(text).data.pipeline_tag is None
    assert "Load it with its class, `Mine`." in text and "model-index" not in text


def test_the_card_of_a_run_without_a_teacher_mentions_none() -> None:
    text = render_card(sample_facts(teachers=(), evaluations=(), objectives=(ObjectiveFacts("labels"),)))
    assert "The student's own loss on the labels, without a teacher." in text
    assert "trained with hf-distill without a teacher" in text
    assert "hinton" not in text and "repeat the teacher's" not in text


def test_several_teachers_have_a_column_each() -> None:
    second = ModelFacts(class_name="BertForSequenceClassification", parameters=8_000)
    text = render_card(sample_facts(teachers=(TEACHER, second)))
    assert "|  | Student | Teacher 1 | Teacher 2 |" in text
    assert "|  | 25.0% of the parameters | 50.0% of the parameters |" in text


_BLEND = (ObjectiveFacts("labels"), ObjectiveFacts("logits"))


@pytest.mark.parametrize(
    ("power", "softens", "written"),
    [(2, True, "alpha * T² * mine"), (1, True, "alpha * T * mine"), (0, False, "alpha * mine")],
)
def test_the_power_of_the_temperature(power: int, softens: bool, written: str) -> None:
    temperature = ScheduleFacts(2.0) if softens else None
    facts = sample_facts(objectives=_BLEND, divergence="mine", temperature_power=power, temperature=temperature)
    text = render_card(facts)
    assert written in text
    assert ("T = 2" in text) == softens
    assert text.count("@misc") == 1  # Hinton's: the divergence has no paper


def test_a_divergence_of_raw_outputs_mentions_no_distributions() -> None:
    text = render_card(sample_facts(divergence="mean_squared_error", temperature=None, temperature_power=0))
    assert "alpha * mean_squared_error" in text and "raw outputs`." in text
    assert "distribution" not in text and "temperature" not in text


def test_the_card_shows_schedules_and_divergence_settings() -> None:
    facts = sample_facts(
        alpha=ScheduleFacts(0.9, 0.1, "cosine"),
        temperature=ScheduleFacts(4.0, 1.0, "linear"),
        divergence="jensen_shannon",
        divergence_kwargs={"beta": 0.3},
    )
    text = render_card(facts)
    assert "alpha = 0.9 → 0.1 (cosine)" in text and "T = 4 → 1 (linear)" in text
    assert "with `beta=0.3`" in text


def test_metrics_of_other_weights_are_marked_and_kept_out_of_the_model_index() -> None:
    old = EvaluationFacts({"accuracy": 0.5}, VALIDATION, 30)
    text = render_card(sample_facts(evaluations=(old,)))
    assert "evaluated at step 30; the saved weights are those of step 60" in text
    assert "model-index" not in text


def test_the_card_gives_the_reason_for_a_missing_number() -> None:
    missing = EvaluationFacts({}, None, not_measured={"f1": "it was nan"})
    text = render_card(sample_facts(evaluations=(missing,)))
    assert "| `f1` | not measured: it was nan |" in text and "On the evaluation set" in text


def test_an_adapter() -> None:
    student = replace(STUDENT, adapter="LORA", trainable_parameters=100)
    card = ModelCard(render_card(sample_facts(student=student)))
    assert card.data.library_name == "peft"
    assert card.data["base_model_relation"] == "adapter"
    assert {"lora", "transformers", "base_model:adapter:some-org/small-base"} <= {*card.data.tags}
    assert 'from_pretrained("some-org/small-base", num_labels=3)' in card.text
    assert "| Trained parameters | 100 |  |" in card.text
    local = ModelCard(render_card(sample_facts(student=student, base_model="/home/me/base")))
    assert local.data.base_model is None
    assert "LORA adapter of a local model" in local.text and "```python" not in local.text


NASTY = "a|b`c`*d*\n# <img src=x> [e](f) $g$"


def test_text_from_users_is_escaped() -> None:
    dataset = DatasetFacts(NASTY, split=NASTY)
    facts = sample_facts(
        name=NASTY,
        divergence=NASTY,
        divergence_kwargs={NASTY: NASTY},
        objectives=(ObjectiveFacts(NASTY, 0.5, NASTY, NASTY),),
        datasets=(dataset,),
        teachers=(replace(TEACHER, class_name=NASTY),),
        evaluations=(EvaluationFacts({NASTY: 0.5}, dataset, subject=NASTY),),
        history=({NASTY: 1.0},),
        training=TrainingFacts(optimizer=NASTY, extra={NASTY: NASTY}),
        versions={NASTY: NASTY},
        tags=(NASTY,),
        license=NASTY,
    )
    card = ModelCard(render_card(facts))
    assert card.data.license == NASTY and NASTY in card.data.tags
    lines = card.text.splitlines()
    assert [line for line in lines if line.startswith("#")] == [
        "# a\\|b\\`c\\`\\*d\\* # \\<img src=x\\> \\[e\\](f) \\$g\\$",
        "## Student and teacher", "## Loss", "## Results", "## Training", "### During training",
        "### Framework versions", "## How to use", "## Limits", "## Citation",
    ]  # fmt: skip
    for block in _tables(lines):
        widths = {line.replace("\\|", "").count("|") for line in block}
        assert len(widths) == 1, block


def _tables(lines: list[str]) -> list[list[str]]:
    blocks: list[list[str]] = [[]]
    for line in lines:
        if line.startswith("|"):
            blocks[-1].append(line)
        elif blocks[-1]:
            blocks.append([])
    return [block for block in blocks if block]


@pytest.mark.parametrize("path", ["/home/someone/x", "~/someone", "C:\\someone", "./someone/x"])
def test_no_local_path_is_ever_shown(path: str) -> None:
    dataset = DatasetFacts(path, path, config=path, split=path)
    facts = sample_facts(
        name=path,
        repo_id=path,
        base_model=path,
        processing_class=path,
        student=replace(STUDENT, hub_id=path, dtype=path),
        teachers=(replace(TEACHER, hub_id=path), ModelFacts(hub_id=path)),
        divergence_kwargs={"weights": path},
        datasets=(dataset,),
        evaluations=(EvaluationFacts({"accuracy": 1.0}, dataset, not_measured={"f1": path}),),
        training=TrainingFacts(optimizer=f"SGD from {path}", extra={path: [path]}),
        versions={"mine": path},
        tags=(path, f"base_model:adapter:{path}", f"see {path}"),
        license=path,
        languages=(path,),
    )
    title = facts.name
    assert "/" not in title and "\\" not in title
    text = render_card(replace(facts, name="title"))
    assert "someone" not in text and "someone" not in facts.to_json().replace(title, "")


def test_datasets_without_a_hub_id_are_named_but_not_linked() -> None:
    text = render_card(sample_facts(datasets=(DatasetFacts("My phrases"), GLUE)))
    assert "on My phrases and [nyu-mll/glue]" in text
    assert ModelCard(text).data.datasets == ["nyu-mll/glue"]
