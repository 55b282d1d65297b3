"""A teacher with its own tokenizer, and a record of a model's inputs."""

from __future__ import annotations

from typing import Any

from tests.trainer.tiny import bert

WORDS = (
    "put your own text here |",
    "put text",
    "own text here",
    "here your |",
    "text",
    "put put put put",
    "| |",
    "own",
)


def inputs_of(model: Any) -> list[dict[str, Any]]:
    """Return a list that collects the inputs of every forward of the model."""
    seen: list[dict[str, Any]] = []
    model.register_forward_pre_hook(lambda _, __, given: seen.append(dict(given)), with_kwargs=True)
    return seen


def of_another_tokenizer() -> Any:
    """Return a teacher that embeds the eleven words of `tests.hub.tiny`; the student embeds 23."""
    return bert(seed=1, vocab_size=11)
