"""Tiny generalists and specialists, and their predictions."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hf_distill import Distiller
from hf_distill.signals import Needs
from hf_distill.teachers.specialists import Specialists
from tests.trainer.tiny import bert, examples, padded

FOUR = {"num_labels": 4}


def specialist(classes: tuple[int, ...], seed: int = 5, **changed: Any) -> Any:
    return bert(seed=seed, **{"num_labels": len(classes) + 1, **changed}).double()


def asked(teacher: Specialists, temperature: float = 1.0, student: Any = None) -> tuple[Tensor, Any]:
    """Return the probabilities for some sentences at this temperature, and the batch."""
    distiller = Distiller(student or bert(seed=9, **FOUR).double(), teacher, alpha=1.0, temperature=temperature)
    batch = padded(examples(24, labels=4))
    needs = Needs(logits=True, temperature=temperature)
    return (distiller.teacher(distiller.task, batch, needs).predictions() / temperature).softmax(-1), batch


def told_by(model: Any, batch: Any, temperature: float = 1.0) -> Tensor:
    with torch.no_grad():
        logits = model.eval()(**{name: batch[name] for name in ("input_ids", "attention_mask")}).logits
    return (logits / temperature).softmax(-1)


def named(model: Any, names: list[str]) -> Any:
    model.config.id2label = dict(enumerate(names))
    model.config.label2id = {name: index for index, name in enumerate(names)}
    return model
