"""The quickstart's trainings, each a job that either process can do; and the material that all of them share."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset
from safetensors.torch import load, save
from transformers import BertForSequenceClassification, PreTrainedTokenizerFast

from hf_distill import DistillationTrainer
from hf_distill.cli import quickstart_training as training
from hf_distill.cli.progress import Stages
from hf_distill.cli.quickstart_training import Settings, batches, choose_labelled, hide_labels, make_classifier
from hf_distill.compare import predicted_labels

Weights = bytes
"""A model's weights as safetensors: bytes pass between processes without shared memory."""


@dataclass(frozen=True)
class Material:
    """What every training needs. It can be sent to another process."""

    settings: Settings
    packages: tuple[str, ...]
    tokenizer: PreTrainedTokenizerFast
    train: Dataset
    test: Dataset
    work: Path

    def teacher(self, seed: int, weights: Weights | None = None) -> BertForSequenceClassification:
        """The teacher, with these weights or those of the seed."""
        size = {"layers": self.settings.teacher_layers, "width": self.settings.teacher_width}
        return self._classifier(seed, weights, **size)

    def student(self, seed: int, weights: Weights | None = None) -> BertForSequenceClassification:
        """A student, with these weights or those of the seed."""
        size = {"layers": self.settings.student_layers, "width": self.settings.student_width}
        return self._classifier(seed, weights, **size)

    def _classifier(self, seed: int, weights: Weights | None, **size: int) -> BertForSequenceClassification:
        model = make_classifier(self.tokenizer, self.packages, seed=seed, **size)
        if weights is not None:
            model.load_state_dict(load(weights))
        return model.eval()

    def answers_of(self, model: BertForSequenceClassification) -> list[str]:
        """The label that the model predicts for each test paragraph."""
        return predicted_labels(model, batches(self.test, self.tokenizer, batch_size=64, device=model.device))

    def labelled(self, seed: int) -> list[int]:
        """Which training paragraphs the students of this seed may see the label of."""
        return choose_labelled(self.train["labels"], share=self.settings.labelled_share, seed=seed)

    def trained(self, model: BertForSequenceClassification) -> Trained:
        """What is kept of a model that is trained."""
        return Trained(save(model.state_dict()), self.answers_of(model))


@dataclass(frozen=True)
class Trained:
    """A trained model's weights, and its answers on the test paragraphs."""

    weights: Weights
    answers: list[str]


def train_teacher(material: Material, seed: int, *, stages: Stages) -> Trained:
    """The teacher, on all labels."""
    folder = material.work / "teacher"
    return _trained_on_labels(
        material,
        material.teacher(seed),
        material.train,
        training.teacher_arguments(material.settings, folder=folder, seed=seed),
        stages,
        "teacher",
    )


def train_alone(material: Material, seed: int, *, stages: Stages) -> Trained:
    """A student on the labels that it may see."""
    folder = material.work / f"alone-{seed}"
    return _trained_on_labels(
        material,
        material.student(seed),
        material.train.select(material.labelled(seed)),
        training.alone_arguments(material.settings, folder=folder, seed=seed),
        stages,
        f"student alone, seed {seed}",
    )


def train_on_all_labels(material: Material, seed: int, *, stages: Stages) -> Trained:
    """The same student on every label, which is what labelling the rest by hand would buy."""
    folder = material.work / f"all-labels-{seed}"
    return _trained_on_labels(
        material,
        material.student(seed),
        material.train,
        training.alone_arguments(material.settings, folder=folder, seed=seed),
        stages,
        f"student, all labels, seed {seed}",
    )


def _trained_on_labels(
    material: Material,
    model: BertForSequenceClassification,
    dataset: Dataset,
    arguments: Any,
    stages: Stages,
    stage: str,
) -> Trained:
    training.train_alone(model, dataset, tokenizer=material.tokenizer, arguments=arguments, stages=stages, stage=stage)
    return material.trained(model)


def train_distilled(material: Material, teacher: Weights, seed: int, *, stages: Stages) -> Trained:
    """The same student with the teacher, on the labels that it may see and on the paragraphs without them."""
    trainer = distill(material, teacher, seed, folder=material.work / f"distilled-{seed}", stages=stages)
    return material.trained(trainer.model)


def distill(material: Material, teacher: Weights, seed: int, *, folder: Path, stages: Stages) -> DistillationTrainer:
    """The trainer, after its training."""
    return training.train_distilled(
        material.student(seed),
        hide_labels(material.train, labelled=material.labelled(seed)),
        teacher=material.teacher(seed, teacher),
        tokenizer=material.tokenizer,
        arguments=training.distilled_arguments(material.settings, folder=folder, seed=seed),
        stages=stages,
        stage=f"student distilled, seed {seed}",
    )
