"""The trainings of the quickstart: settings, data, models, and a job for each training."""

from __future__ import annotations

import random
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset
from safetensors.torch import load, save
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    DataCollatorWithPadding,
    EvalPrediction,
    PreTrainedTokenizerFast,
    PrinterCallback,
    Trainer,
    TrainingArguments,
)

from hf_distill import DistillationArguments, DistillationTrainer
from hf_distill._types import Batch, Keywords
from hf_distill.cli.progress import Stages, StepBar
from hf_distill.cli.stdlib_corpus import Paragraph
from hf_distill.compare import predicted_labels

UNLABELLED = -100
Weights = bytes
"""A model's weights as safetensors, since bytes pass between processes without shared memory."""

_SPECIAL = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
_HEADS = 2
_INITIALIZER_RANGE = 0.06  # BERT's 0.02 suits a width of 768; these widths learn sooner with a wider start


@dataclass(frozen=True)
class Settings:
    """The settings of the quickstart, chosen on the validation paragraphs only."""

    packages: int = 16
    vocabulary_size: int = 4000
    max_tokens: int = 40
    labelled_share: float = 0.1  # the share of the training paragraphs whose labels the students see
    runs: int = 3  # seeds, which change the student's first weights, the data order, and the seen labels
    batch_size: int = 32
    teacher_layers: int = 2
    teacher_width: int = 128
    teacher_steps: int = 800
    teacher_learning_rate: float = 1e-3
    student_layers: int = 1
    student_width: int = 64
    student_steps: int = 800
    student_learning_rate: float = 3e-3
    warmup_share: float = 0.1
    weight_decay: float = 0.01
    temperature: float = 2.0
    alpha: float = 0.9
    latency_calls: int = 200
    fast: bool = False


FULL = Settings()
FAST = replace(FULL, runs=2, teacher_steps=250, student_steps=250, latency_calls=60, fast=True)


# Data.


def tokenize(paragraphs: Sequence[Paragraph], tokenizer: PreTrainedTokenizerFast) -> Dataset:
    """Return `input_ids`, `attention_mask` and `labels`, in the order of the paragraphs."""
    encoded = tokenizer([paragraph.text for paragraph in paragraphs], truncation=True)
    return Dataset.from_dict({**encoded, "labels": [paragraph.label for paragraph in paragraphs]})


def choose_labelled(labels: Sequence[int], *, share: float, seed: int) -> list[int]:
    """Return the indices of the examples that keep their label: the same share of every class, at least one.

    >>> choose_labelled([0, 0, 0, 0, 1, 1], share=0.5, seed=0)
    [1, 3, 4]
    """
    by_class: dict[int, list[int]] = {}
    for index, label in enumerate(labels):
        by_class.setdefault(label, []).append(index)
    chance = random.Random(seed)
    chosen = (chance.sample(by_class[c], max(1, round(share * len(by_class[c])))) for c in sorted(by_class))
    return sorted(index for indices in chosen for index in indices)


def hide_labels(dataset: Dataset, *, labelled: Collection[int]) -> Dataset:
    """Return the same examples with the label -100 (unknown) for all but `labelled`."""
    kept = set(labelled)
    labels = [label if index in kept else UNLABELLED for index, label in enumerate(dataset["labels"])]
    return dataset.remove_columns("labels").add_column("labels", labels)


def batches(
    dataset: Dataset, tokenizer: PreTrainedTokenizerFast, *, batch_size: int, device: torch.device | str
) -> Iterator[Batch]:
    """Yield padded batches in the dataset's order, on the device, without labels."""
    collate = DataCollatorWithPadding(tokenizer)
    inputs = dataset.remove_columns("labels")
    for start in range(0, len(inputs), batch_size):
        rows = [inputs[i] for i in range(start, min(start + batch_size, len(inputs)))]
        yield {name: value.to(device) for name, value in collate(rows).items()}


def make_tokenizer(texts: Sequence[str], *, vocabulary_size: int, max_tokens: int) -> PreTrainedTokenizerFast:
    """Return a lower-case tokenizer trained on `texts`, the same in every run.

    The library's WordPiece trainer is not used, since it breaks ties differently in every process.
    """
    tokenizer = Tokenizer(models.BPE(unk_token=_SPECIAL["unk_token"]))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    special = list(_SPECIAL.values())
    trainer = trainers.BpeTrainer(vocab_size=vocabulary_size, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    ends = [(name, tokenizer.token_to_id(name)) for name in ("[CLS]", "[SEP]")]
    tokenizer.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=ends)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=max_tokens,
        model_input_names=["input_ids", "attention_mask"],
        **_SPECIAL,
    )


# Models.


def make_classifier(
    tokenizer: PreTrainedTokenizerFast, labels: Sequence[str], *, layers: int, width: int, seed: int
) -> BertForSequenceClassification:
    """Return a BERT of this size with an output for each label; its weights depend on the seed only."""
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=_HEADS,
        intermediate_size=4 * width,
        max_position_embeddings=tokenizer.model_max_length,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        initializer_range=_INITIALIZER_RANGE,
        pad_token_id=tokenizer.pad_token_id,
        id2label=dict(enumerate(labels)),
        label2id={label: index for index, label in enumerate(labels)},
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return BertForSequenceClassification(config)


@dataclass(frozen=True)
class Trained:
    """A trained model: its weights, and its predicted labels for the test paragraphs."""

    weights: Weights
    predictions: list[str]


@dataclass(frozen=True)
class Material:
    """The data and settings of all trainings. It can be sent to another process."""

    settings: Settings
    packages: tuple[str, ...]
    tokenizer: PreTrainedTokenizerFast
    train: Dataset
    test: Dataset
    work: Path

    def teacher(self, seed: int, weights: Weights | None = None) -> BertForSequenceClassification:
        """Return the teacher with these weights, or with random weights of this seed."""
        return self._classifier(seed, weights, layers=self.settings.teacher_layers, width=self.settings.teacher_width)

    def student(self, seed: int, weights: Weights | None = None) -> BertForSequenceClassification:
        """Return a student with these weights, or with random weights of this seed."""
        return self._classifier(seed, weights, layers=self.settings.student_layers, width=self.settings.student_width)

    def _classifier(self, seed: int, weights: Weights | None, **size: int) -> BertForSequenceClassification:
        model = make_classifier(self.tokenizer, self.packages, seed=seed, **size)
        if weights is not None:
            model.load_state_dict(load(weights))
        return model.eval()

    def labelled(self, seed: int) -> list[int]:
        """Return the indices of the training paragraphs whose labels the students of this seed see."""
        return choose_labelled(self.train["labels"], share=self.settings.labelled_share, seed=seed)

    def trained(self, model: BertForSequenceClassification) -> Trained:
        """Return the weights of a trained model, and its predictions."""
        test = batches(self.test, self.tokenizer, batch_size=64, device=model.device)
        return Trained(save(model.state_dict()), predicted_labels(model, test))


# Jobs, which either process can run.


def train_teacher(material: Material, seed: int, *, stages: Stages) -> Trained:
    """Train the teacher on all labels."""
    settings = material.settings
    schedule = _schedule(settings, settings.teacher_steps, settings.teacher_learning_rate)
    return _train_on_labels(material, material.teacher(seed), material.train, "teacher", seed, stages, schedule)


def train_alone(material: Material, seed: int, *, stages: Stages) -> Trained:
    """Train a student on the labels that it sees."""
    dataset = material.train.select(material.labelled(seed))
    return _train_on_labels(material, material.student(seed), dataset, f"student alone, seed {seed}", seed, stages)


def train_on_all_labels(material: Material, seed: int, *, stages: Stages) -> Trained:
    """Train a student on all labels, to compare distillation with labelling the other paragraphs by hand."""
    name = f"student, all labels, seed {seed}"
    return _train_on_labels(material, material.student(seed), material.train, name, seed, stages)


def train_distilled(material: Material, teacher: Weights, seed: int, *, stages: Stages) -> Trained:
    """Train a student with the teacher, on the labels that it sees and on the other paragraphs without labels."""
    trainer = distill(material, teacher, seed, folder=material.work / f"distilled-{seed}", stages=stages)
    return material.trained(trainer.model)


def distill(material: Material, teacher: Weights, seed: int, *, folder: Path, stages: Stages) -> DistillationTrainer:
    """Return the trainer of a distilled student after the training."""
    settings = material.settings
    arguments = DistillationArguments(
        **_arguments(settings, folder, seed),
        **_schedule(settings, settings.student_steps, settings.student_learning_rate),
        temperature=settings.temperature,
        alpha=settings.alpha,
    )
    trainer = DistillationTrainer(
        model=material.student(seed),
        teacher_model=material.teacher(seed, teacher),
        teacher_processing_class=material.tokenizer,
        args=arguments,
        train_dataset=hide_labels(material.train, labelled=material.labelled(seed)),
        processing_class=material.tokenizer,
        data_collator=DataCollatorWithPadding(material.tokenizer),
        compute_metrics=_accuracy,
    )
    _train_with_bar(trainer, stages, f"student distilled, seed {seed}")
    return trainer


def _train_on_labels(
    material: Material,
    model: BertForSequenceClassification,
    dataset: Dataset,
    name: str,
    seed: int,
    stages: Stages,
    schedule: Keywords | None = None,
) -> Trained:
    settings = material.settings
    schedule = schedule or _schedule(settings, settings.student_steps, settings.student_learning_rate)
    trainer = Trainer(
        model=model,
        args=TrainingArguments(**_arguments(settings, material.work / name.replace(" ", "-"), seed), **schedule),
        train_dataset=dataset,
        processing_class=material.tokenizer,
        data_collator=DataCollatorWithPadding(material.tokenizer),
    )
    _train_with_bar(trainer, stages, name)
    return material.trained(model)


def _schedule(settings: Settings, steps: int, learning_rate: float) -> Keywords:
    return {"max_steps": steps, "learning_rate": learning_rate, "warmup_steps": round(settings.warmup_share * steps)}


def _arguments(settings: Settings, folder: Path, seed: int) -> Keywords:
    return {
        "output_dir": str(folder),
        "seed": seed,
        "per_device_train_batch_size": settings.batch_size,
        "per_device_eval_batch_size": 64,
        "weight_decay": settings.weight_decay,
        "logging_strategy": "no",
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }


def _train_with_bar(trainer: Trainer, stages: Stages, name: str) -> None:
    trainer.remove_callback(PrinterCallback)
    with stages.stage(name, total=trainer.args.max_steps) as advance:
        trainer.add_callback(StepBar(advance))
        trainer.train()


def _accuracy(prediction: EvalPrediction) -> dict[str, float]:
    correct = np.argmax(prediction.predictions, axis=-1) == prediction.label_ids
    return {"accuracy": float(np.mean(correct))}
