"""The quickstart's three kinds of training: a teacher, a student alone, a student distilled."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset
from transformers import (
    DataCollatorWithPadding,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    PrinterCallback,
    Trainer,
    TrainingArguments,
)

from hf_distill import DistillationArguments, DistillationTrainer
from hf_distill.cli.progress import Stages, StepBar
from hf_distill.cli.quickstart_settings import Settings


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
