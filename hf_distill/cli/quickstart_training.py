"""The numbers of the quickstart, full and fast. Chosen on the validation paragraphs alone."""

from __future__ import annotations

import random
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    DataCollatorWithPadding,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    PrinterCallback,
    Trainer,
    TrainingArguments,
)

from hf_distill import DistillationArguments, DistillationTrainer
from hf_distill.cli.progress import Stages, StepBar
from hf_distill.cli.stdlib_corpus import Paragraph


@dataclass(frozen=True)
class Settings:
    """What one run of the quickstart does. Both students get the same steps and batch size."""

    packages: int = 16
    vocabulary_size: int = 4000
    max_tokens: int = 40
    labelled_share: float = 0.1
    """Of the training paragraphs, those whose labels the students may see."""
    runs: int = 3
    """Seeds. Each changes the student's first weights, the data order, and which labels are seen."""
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


UNLABELLED = -100


def tokenize(paragraphs: Sequence[Paragraph], tokenizer: PreTrainedTokenizerFast) -> Dataset:
    """`input_ids`, `attention_mask` and `labels`, in the order of the paragraphs."""
    encoded = tokenizer([paragraph.text for paragraph in paragraphs], truncation=True)
    return Dataset.from_dict({**encoded, "labels": [paragraph.label for paragraph in paragraphs]})


def choose_labelled(labels: Sequence[int], *, share: float, seed: int) -> list[int]:
    """Indices of the examples that keep their label: the same share of every class, at least one.

    >>> choose_labelled([0, 0, 0, 0, 1, 1], share=0.5, seed=0)
    [1, 3, 4]
    """
    of_class: dict[int, list[int]] = {}
    for index, label in enumerate(labels):
        of_class.setdefault(label, []).append(index)
    chance = random.Random(seed)
    chosen: list[int] = []
    for label in sorted(of_class):
        members = of_class[label]
        chosen += chance.sample(members, max(1, round(share * len(members))))
    return sorted(chosen)


def hide_labels(dataset: Dataset, *, labelled: Collection[int]) -> Dataset:
    """The same examples; those not among `labelled` get -100, which means: no label is known."""
    kept = set(labelled)
    labels = [label if index in kept else UNLABELLED for index, label in enumerate(dataset["labels"])]
    return dataset.remove_columns("labels").add_column("labels", labels)


def batches(
    dataset: Dataset, tokenizer: PreTrainedTokenizerFast, *, batch_size: int, device: Any
) -> Iterator[dict[str, Any]]:
    """Padded batches in the dataset's order, on the device, without labels."""
    collate = DataCollatorWithPadding(tokenizer)
    inputs = dataset.remove_columns("labels")
    for start in range(0, len(inputs), batch_size):
        rows = [inputs[i] for i in range(start, min(start + batch_size, len(inputs)))]
        yield {name: value.to(device) for name, value in collate(rows).items()}


_SPECIAL = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
_HEADS = 2
# BERT's 0.02 suits a width of 768. These widths learn sooner with a wider start.
_INITIALIZER_RANGE = 0.06


def make_tokenizer(texts: Sequence[str], *, vocabulary_size: int, max_tokens: int) -> PreTrainedTokenizerFast:
    """A lower-case tokenizer learned from `texts`, the same in every run.

    (The library's WordPiece trainer would do too, but breaks ties differently in every process.)
    """
    tokenizer = Tokenizer(models.BPE(unk_token=_SPECIAL["unk_token"]))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary_size, special_tokens=list(_SPECIAL.values()), show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    ends = [(name, tokenizer.token_to_id(name)) for name in ("[CLS]", "[SEP]")]
    tokenizer.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=ends)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=max_tokens,
        model_input_names=["input_ids", "attention_mask"],
        **_SPECIAL,
    )


def make_classifier(
    tokenizer: PreTrainedTokenizerFast,
    labels: Sequence[str],
    *,
    layers: int,
    width: int,
    seed: int,
) -> BertForSequenceClassification:
    """A BERT of the given size with one output a label; the seed alone decides its weights."""
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


def train_alone(
    model: PreTrainedModel,
    dataset: Dataset,
    *,
    tokenizer: PreTrainedTokenizerFast,
    arguments: TrainingArguments,
    stages: Stages,
    stage: str,
) -> Trainer:
    """Train on the labels, with the plain `Trainer`: the teacher, and the student without one."""
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=dataset,
        processing_class=tokenizer,
        data_collator=DataCollatorWithPadding(tokenizer),
    )
    _train_with_bar(trainer, stages, stage)
    return trainer


def train_distilled(
    model: PreTrainedModel,
    dataset: Dataset,
    *,
    teacher: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    arguments: DistillationArguments,
    stages: Stages,
    stage: str,
) -> DistillationTrainer:
    """Train on what the teacher says of every example, and on the labels where there are any."""
    trainer = DistillationTrainer(
        model=model,
        teacher_model=teacher,
        teacher_processing_class=tokenizer,  # the same: so it is compared, and found to be
        args=arguments,
        train_dataset=dataset,
        processing_class=tokenizer,
        data_collator=DataCollatorWithPadding(tokenizer),
        compute_metrics=_accuracy,
    )
    _train_with_bar(trainer, stages, stage)
    return trainer


def teacher_arguments(settings: Settings, *, folder: Path, seed: int) -> TrainingArguments:
    """The teacher's training: all labels, its own number of steps."""
    return TrainingArguments(
        **_common(settings, folder, seed),
        max_steps=settings.teacher_steps,
        learning_rate=settings.teacher_learning_rate,
        warmup_steps=round(settings.warmup_share * settings.teacher_steps),
    )


def alone_arguments(settings: Settings, *, folder: Path, seed: int) -> TrainingArguments:
    """The student's training without a teacher."""
    return TrainingArguments(**_common(settings, folder, seed), **_student(settings))


def distilled_arguments(settings: Settings, *, folder: Path, seed: int) -> DistillationArguments:
    """The same with a teacher: nothing differs but temperature and alpha."""
    return DistillationArguments(
        **_common(settings, folder, seed),
        **_student(settings),
        temperature=settings.temperature,
        alpha=settings.alpha,
    )


def _student(settings: Settings) -> dict[str, Any]:
    return {
        "max_steps": settings.student_steps,
        "learning_rate": settings.student_learning_rate,
        "warmup_steps": round(settings.warmup_share * settings.student_steps),
    }


def _common(settings: Settings, folder: Path, seed: int) -> dict[str, Any]:
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


def _train_with_bar(trainer: Trainer, stages: Stages, stage: str) -> None:
    trainer.remove_callback(PrinterCallback)
    with stages.stage(stage, total=trainer.args.max_steps) as advance:
        trainer.add_callback(StepBar(advance))
        trainer.train()


def _accuracy(prediction: Any) -> dict[str, float]:
    correct = np.argmax(prediction.predictions, axis=-1) == prediction.label_ids
    return {"accuracy": float(np.mean(correct))}
