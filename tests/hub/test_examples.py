"""The example cards in `model_cards/` equal the rendering of their recorded facts."""

from __future__ import annotations

import importlib.util
from pathlib import Path

FOLDER = Path(__file__).resolve().parents[2] / "model_cards"


def renderer():
    spec = importlib.util.spec_from_file_location("render_examples", FOLDER / "render_examples.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_no_example_is_stale() -> None:
    assert list(FOLDER.glob("*.facts.json"))
    assert renderer().stale() == []


def test_a_changed_card_is_stale(tmp_path) -> None:
    for name in ("quickstart-student.facts.json", "quickstart-student.md"):
        (tmp_path / name).write_text((FOLDER / name).read_text(encoding="utf-8"), encoding="utf-8")
    assert renderer().stale(tmp_path) == []
    (tmp_path / "quickstart-student.md").write_text("old")
    assert renderer().stale(tmp_path) == ["quickstart-student.md"]
