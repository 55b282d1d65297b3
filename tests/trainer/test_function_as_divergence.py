"""A function as divergence: saved by its name if it cannot be pickled, and resumed."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from hf_distill.functional import jensen_shannon
from tests.trainer.tiny import arguments, assert_same_bits, bert, make, weights


def apart(student: Tensor, teacher: Tensor) -> Tensor:
    return (student - teacher).abs().mean(-1)


class Apart:
    def __call__(self, student: Tensor, teacher: Tensor) -> Tensor:
        return apart(student, teacher)


def local() -> Callable[[Tensor, Tensor], Tensor]:
    def within(student: Tensor, teacher: Tensor) -> Tensor:
        return apart(student, teacher)

    return within


# The divergence, and its form in training_args.bin and JSON.
FUNCTIONS: dict[str, tuple[Any, str]] = {
    "lambda": (lambda student, teacher: apart(student, teacher), "own:<lambda>"),
    "local": (local(), "own:within"),
    "function": (apart, "own:apart"),
    "object": (Apart(), "own:Apart"),
    "settings_bound": (functools.partial(jensen_shannon, beta=0.3), "jensen_shannon"),
    "settings_bound_to_a_lambda": (functools.partial(lambda s, t, *, by: by * apart(s, t), by=2.0), "own:<lambda>"),
}
PICKLED = ("function", "object", "settings_bound")


@pytest.mark.parametrize("name", FUNCTIONS)
def test_checkpoints_with_a_function_are_saved_and_resumed(tmp_path, name: str) -> None:
    function, named = FUNCTIONS[name]
    run = {"alpha": 1.0, "divergence": function, "save_strategy": "steps", "save_steps": 1, "max_steps": 2}
    whole = make(tmp_path / "a", bert(dropout=0.3), bert(seed=1), **run)
    whole.train()
    assert whole.args.divergence is function
    checkpoint = Path(whole.args.output_dir) / "checkpoint-1"
    saved = torch.load(checkpoint / "training_args.bin", weights_only=False)
    assert (saved.divergence == named) == (name not in PICKLED)
    resumed = make(tmp_path / "b", bert(seed=5, dropout=0.3), bert(seed=1), **run)
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert_same_bits(weights(resumed.model), weights(whole.model))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_arguments_with_a_function_are_written_as_json(tmp_path, name: str) -> None:
    """TensorBoard receives them at the start of a training."""
    function, named = FUNCTIONS[name]
    args = arguments(tmp_path, divergence=function)
    assert json.loads(args.to_json_string())["divergence"] == named
    assert args.divergence is function


def test_the_model_is_saved_with_a_local_function(tmp_path) -> None:
    trainer = make(tmp_path, bert(), bert(seed=1), divergence=FUNCTIONS["lambda"][0])
    trainer.save_model(str(tmp_path / "student"))
    assert torch.load(tmp_path / "student" / "training_args.bin", weights_only=False).divergence == "own:<lambda>"
