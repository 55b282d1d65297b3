"""A served teacher of the tiny causal language model, its student, and their batches."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from hf_distill import Distiller
from hf_distill.teachers.served import ServedTeacher
from tests.heads import HEADS, VOCABULARY
from tests.laws import measuring as m
from tests.teachers.completions_server import CompletionsServer
from tests.tiny_tokenizers import tokenizer

NAME = "llama_causal_lm"
WORDS = tokenizer(VOCABULARY)
SECRET = "sk-very-secret-1234"


def served(server: CompletionsServer, **settings: Any) -> ServedTeacher:
    settings = {"processing_class": WORDS, "top_logprobs": 6, "retries": 1, "timeout_s": 20.0, **settings}
    return ServedTeacher(server.url, "large", **settings)


def distiller_of(teacher: Any, **settings: Any) -> Distiller:
    return Distiller(
        m.student_of(NAME), teacher, **{"temperature": 1.0, "alpha": 0.5, "processing_class": WORDS, **settings}
    )


def batch_of(pad_to: int | None = None, count: int = 6) -> dict[str, Tensor]:
    return m.collated(NAME, HEADS[NAME].examples(count), pad_to)
