"""Both sides of each fork on the version of transformers, whatever version is installed."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from transformers import Trainer

from hf_distill import _compat

SAYS_SO = "loss_is_scaled_for_ga"  # from transformers 5.19 on


def trainer(*, accepts: bool, own: Any = None) -> Any:
    return SimpleNamespace(model_accepts_loss_kwargs=accepts, compute_loss_func=own)


def test_a_trainer_with_loss_is_scaled_for_ga_does_not_divide() -> None:
    assert _compat.TRAINER_MAY_DIVIDE is not hasattr(Trainer, SAYS_SO)


@pytest.mark.parametrize(
    ("accepts", "count", "own", "divides"),
    [
        (True, 7, None, False),  # the model gets the count of the whole step
        (True, None, None, True),
        (False, 7, None, True),
        (False, None, None, True),
        (False, 7, max, False),  # the user's own loss does too
        (False, None, max, False),
        (True, 7, max, False),
        (True, None, max, False),
    ],
)
def test_older_trainers_divide_losses_without_a_count(accepts: bool, count: Any, own: Any, divides: bool) -> None:
    """The condition in `Trainer.training_step` of transformers 5.17 and 5.18."""
    assert _compat.divides_the_loss(trainer(accepts=accepts, own=own), count) is divides
