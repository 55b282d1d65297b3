"""Facts of an invented run, for the tests of cards. Each number occurs once."""

from __future__ import annotations

from dataclasses import replace

from hf_distill.hub.facts import (
    CardData,
    DatasetFacts,
    EvaluationFacts,
    ModelFacts,
    ObjectiveFacts,
    ScheduleFacts,
    TrainingFacts,
)

GLUE = DatasetFacts("nyu-mll/glue", "nyu-mll/glue", "sst2", "train")
VALIDATION = replace(GLUE, split="validation")
STUDENT = ModelFacts(
    class_name="BertForSequenceClassification",
    parameters=4_000,
    trainable_parameters=4_000,
    layers=2,
    width=16,
    labels=3,
    dtype="float32",
)
TEACHER = ModelFacts(hub_id="some-org/big-teacher", class_name="RobertaForSequenceClassification", parameters=16_000)

HIDDEN = ObjectiveFacts("hidden", 0.125, "romero2015fitnets", "HiddenMatch(layers 'even')")


def sample_facts(**changed: object) -> CardData:
    """Return the facts of a classification run of which everything is known; any field can be overridden."""
    facts = CardData(
        name="small-student",
        task="classification",
        student=STUDENT,
        repo_id="tiny-user/small-student",
        teachers=(TEACHER,),
        base_model="some-org/small-base",
        processing_class="BertTokenizer",
        divergence="reverse_kl",
        temperature=ScheduleFacts(2.5),
        alpha=ScheduleFacts(0.75),
        objectives=(ObjectiveFacts("labels"), ObjectiveFacts("logits"), HIDDEN),
        datasets=(GLUE,),
        evaluations=(
            EvaluationFacts({"accuracy": 0.8125, "loss": 0.5}, VALIDATION, 60),
            EvaluationFacts({"accuracy": 0.875}, VALIDATION, subject="teacher"),
        ),
        weights_step=60,
        history=({"epoch": 1.0, "step": 30, "loss": 0.7, "eval_accuracy": 0.75},),
        training=TrainingFacts(epochs=2.0, steps=60, learning_rate=5e-5, warmup=0.1, seed=7, extra={"kept": ["a", 1]}),
        versions={"transformers": "5.0"},
        languages=("en",),
        license="apache-2.0",
        tags=("mine",),
    )
    return replace(facts, **changed)
