"""What the push tests run in a process of their own: train two steps, push, leave notes behind.

The working folder is the test's; nothing here knows the Hub it talks to.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers as tf

from hf_distill import DistillationArguments, DistillationTrainer
from tests.hub.tiny import bert, sentences, tokenizer

TEACHER, BASE = "secret-teacher", "secret-base"
"""Relative folders: spelled like Hub ids, yet on this disk."""


def accuracy(prediction: tf.EvalPrediction) -> dict[str, float]:
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


def student_from_folder(**changed: int) -> tf.PreTrainedModel:
    bert("SequenceClassification", **changed).save_pretrained(BASE)
    return tf.AutoModelForSequenceClassification.from_pretrained(BASE)


def trainer_of(model: Any, *, evaluate: bool = True, **settings: Any) -> DistillationTrainer:
    """A trainer whose teacher is a folder on this disk."""
    bert("SequenceClassification", seed=1, hidden_size=32).save_pretrained(TEACHER)
    words = tokenizer()
    words.save_pretrained(TEACHER)
    arguments = DistillationArguments(
        output_dir="small-student", max_steps=2, per_device_train_batch_size=4, use_cpu=True,
        report_to="none", disable_tqdm=True, temperature=2.5, alpha=0.75, logging_steps=1,
        **{"save_strategy": "no", **settings},
    )  # fmt: skip
    return DistillationTrainer(
        model=model,
        teacher_model=str(Path(TEACHER).absolute()),
        args=arguments,
        train_dataset=sentences(words),
        eval_dataset=sentences(words, 4) if evaluate else None,
        processing_class=words,
        compute_metrics=accuracy,
    )


def note(model: torch.nn.Module, **facts: Any) -> None:
    """Leave the student's logits and some facts for the test."""
    batch = tokenizer()("put your text", return_tensors="pt")
    with torch.no_grad():
        torch.save(model.eval()(**batch).logits, "logits.pt")
    Path("notes.json").write_text(json.dumps(facts))


def saved_files(*parts: Any) -> list[str]:
    """The names that `save_pretrained` of these writes."""
    folder = Path("as-saved")
    for part in parts:
        part.save_pretrained(folder)
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())


def plain() -> None:
    """Train, evaluate, push by hand."""
    model = student_from_folder()
    trainer = trainer_of(model)
    trainer.train()
    metrics = trainer.evaluate()
    trainer.push_to_hub(dataset="Nine words")
    files = saved_files(model, trainer.processing_class)
    note(model, files=files, accuracy=metrics["eval_accuracy"])


def during_training(strategy: str) -> None:
    """Push at each save, and at the end."""
    model = student_from_folder()
    trainer = trainer_of(
        model, push_to_hub=True, hub_strategy=strategy, save_strategy="steps", save_steps=1,
        hub_always_push=True,
    )  # fmt: skip
    trainer.train()
    trainer.push_to_hub()
    note(model, files=saved_files(model, trainer.processing_class))


def never_trained() -> None:
    """A card and a push before any step: nothing was measured."""
    model = student_from_folder()
    trainer = trainer_of(model)
    trainer.push_to_hub()
    note(model, files=saved_files(model, trainer.processing_class))


def adapter(base: str) -> None:
    """Train LoRA on a base from the Hub (or, for a path, from this disk), and push."""
    from peft import LoraConfig, get_peft_model

    words = tokenizer()
    if base == BASE:
        student_from_folder()
    else:
        bert("SequenceClassification").push_to_hub(base)
        words.push_to_hub(base)
    model = tf.AutoModelForSequenceClassification.from_pretrained(base, num_labels=3)
    settings = LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["query", "value"])
    trainer = trainer_of(get_peft_model(model, settings))
    trainer.train()
    trainer.push_to_hub()
    note(trainer.model, files=saved_files(trainer.model, words))


def load_back(repo: str) -> None:
    """The pushed student gives the noted logits, bit for bit."""
    model = tf.AutoModelForSequenceClassification.from_pretrained(repo).eval()
    words = tf.AutoTokenizer.from_pretrained(repo)
    with torch.no_grad():
        logits = model(**words("put your text", return_tensors="pt")).logits
    assert torch.equal(logits, torch.load("logits.pt"))


PROGRAMS: dict[str, Callable[..., None]] = {
    f.__name__: f for f in (plain, during_training, never_trained, adapter, load_back)
}
