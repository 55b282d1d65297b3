"""A made-up standard library, small enough to train on in seconds."""

import pytest

TOPICS = ["socket", "colour", "fraction", "mailbox", "thread", "archive"]


@pytest.fixture
def library(tmp_path):
    """Return a library of six packages with sixty paragraphs each, and with files that the reader must skip."""
    root = tmp_path / "library"
    for topic in TOPICS:
        package = root / topic
        package.mkdir(parents=True)
        body = [f'"""The {topic} package helps with every kind of {topic} there is."""']
        for number in range(59):
            body.append(
                f"def {topic}{number}():\n"
                f'    """Return the {topic} that has number {number} in its table, or raise."""\n'
            )
        (package / "__init__.py").write_text("\n".join(body))
    (root / "test").mkdir()
    (root / "test" / "big.py").write_text('"""Tests are not documentation and must never be read."""')
    (root / "broken.py").write_text("def (:")
    (root / "rude.py").write_text("raise SystemExit('a module was imported')\n")
    return root
