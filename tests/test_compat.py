"""Forks on the version of transformers, each way of them, on whatever version is installed."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from transformers import Trainer

from hf_distill import _compat

SAYS_SO = "loss_is_scaled_for_ga"  # from transformers 5.19 on


def trainer(*, accepts: bool, own: Any = None) -> Any:
    return SimpleNamespace(model_accepts_loss_kwargs=accepts, compute_loss_func=own)


def test_a_trainer_that_can_be_told_divides_nothing() -> None:
    assert _compat.TRAINER_MAY_DIVIDE is not hasattr(Trainer, SAYS_SO)


@pytest.mark.parametrize(
    ("accepts", "count", "own", "divides"),
    [
        (True, 7, None, False),  # the head is given the count of the whole step
        (True, None, None, True),
        (False, 7, None, True),
        (False, None, None, True),
        (False, 7, max, False),  # as is the user's own loss
        (False, None, max, False),
        (True, 7, max, False),
        (True, None, max, False),
    ],
)
def test_an_older_one_divides_what_no_count_was_given_to(accepts: bool, count: Any, own: Any, divides: bool) -> None:
    """The condition in `Trainer.training_step` of transformers 5.17 and 5.18."""
    assert _compat.divides_the_loss(trainer(accepts=accepts, own=own), count) is divides
