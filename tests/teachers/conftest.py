"""A running completions server of the tiny causal language model."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.laws import measuring as m
from tests.teachers.asking import NAME, WORDS
from tests.teachers.completions_server import CompletionsServer, serving


@pytest.fixture
def server() -> Iterator[CompletionsServer]:
    with serving(m.teacher_of(NAME), WORDS) as running:
        yield running
