"""What a teacher with a tokenizer of its own reads, and what a model was called with."""

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


def heard_by(model: Any) -> list[dict[str, Any]]:
    """Grows by what the model's forward is called with."""
    seen: list[dict[str, Any]] = []
    model.register_forward_pre_hook(lambda _, __, given: seen.append(dict(given)), with_kwargs=True)
    return seen


def of_another_tokenizer() -> Any:
    """A teacher that embeds the eleven words of `tests.hub.tiny`, where the student embeds 23."""
    return bert(seed=1, vocab_size=11)
