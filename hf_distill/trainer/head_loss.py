"""The base trainer's own loss as a mean over one micro-batch, and the forwards that it makes."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hf_distill._types import Batch
from hf_distill._utils import random_state
from hf_distill.objectives.base import cross_entropy_of_probabilities
from hf_distill.signals import Outputs

if TYPE_CHECKING:
    from hf_distill.trainer.mixin import DistillationMixin


@contextlib.contextmanager
def observed_forwards(model: torch.nn.Module) -> Iterator[tuple[list[bool], list[tuple[Any, ...]]]]:
    """Whether each forward of the model has gradients, and the random state after each one that has."""
    with_gradient: list[bool] = []
    states: list[tuple[Any, ...]] = []

    def ended(*_: object) -> None:
        with_gradient.append(torch.is_grad_enabled())
        if with_gradient[-1]:
            states.append(random_state())

    hook = model.register_forward_hook(ended)
    try:
        yield with_gradient, states
    finally:
        hook.remove()


def carries_gradient(outputs: Outputs | tuple[object, ...]) -> bool:
    """Whether a model's outputs, other than its loss, lead back to its parameters."""
    values = [value for name, value in outputs.items() if name != "loss"] if isinstance(outputs, Mapping) else outputs
    return any(isinstance(value, Tensor) and value.requires_grad for value in values)


@contextlib.contextmanager
def loss_of_probabilities(trainer: DistillationMixin, batch: Batch) -> Iterator[None]:
    """Give labels that are a probability for each class their cross-entropy, for which no head has a loss."""
    if trainer.compute_loss_func is not None or not trainer.distiller.task.has_probabilities(batch):
        yield
        return
    smoothing = trainer.args.label_smoothing_factor

    def loss_of(outputs: Outputs, labels: Tensor, num_items_in_batch: object = None) -> Tensor:
        return cross_entropy_of_probabilities(outputs["logits"], labels, smoothing=smoothing)

    trainer.compute_loss_func = loss_of
    try:
        yield
    finally:
        trainer.compute_loss_func = None
