"""The map (`hf_distill/README.md`): its files exist, its layers are those of test_architecture, its loop runs."""

from __future__ import annotations

import re
from collections.abc import Iterable

import pytest

from hf_distill.functional import DIVERGENCES
from hf_distill.objectives import OBJECTIVES
from hf_distill.tasks import TASKS
from tests.laws.teacher_rows import TEACHER_ROWS
from tests.test_architecture import LAYERS, PACKAGE, ROOT

MAP = (PACKAGE / "README.md").read_text(encoding="utf-8")
_, _, _AFTER = MAP.partition("## I want to add a …")
ROWS = [line for line in _AFTER.partition("## ")[0].splitlines() if line.startswith("| ")][1:]


def test_the_layers_are_those_of_test_architecture() -> None:
    shown = MAP.partition("## The layers")[2].split("```")[1].strip().splitlines()
    assert tuple(shown) == LAYERS


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.split("|")[1].strip())
def test_the_files_of_each_row_exist(row: str) -> None:
    named = re.findall(r"`((?:hf_distill|tests)/[^`]+)`", row)
    assert named
    for name in named:
        assert (ROOT / name).exists(), name


def test_every_file_and_folder_of_the_package_is_mentioned() -> None:
    table = MAP.partition("## The layers")[2].partition("## I want")[0]
    parts = {path.name + "/" if path.is_dir() else path.name for path in PACKAGE.iterdir() if path.suffix != ".md"}
    missing = sorted(part for part in parts - {"__init__.py", "__pycache__/", "py.typed"} if f"`{part}`" not in table)
    assert missing == []


def test_every_mentioned_file_exists() -> None:
    for name in re.findall(r"`([a-z_]+/(?:[a-z_]+/)*[a-z_]+\.py)`", MAP):
        assert any((base / name).exists() for base in (ROOT, PACKAGE)), name


MEMBERS: dict[str, Iterable[str]] = {
    "divergence": DIVERGENCES,
    "kind of head": [task.__name__ for task in TASKS.values()],
    "objective": [kind.__name__ for name, kind in OBJECTIVES.items() if name != "logits"],
    "teacher": {row.of for row in TEACHER_ROWS.values()},
}
TABLES = [path for path in (ROOT / "tests" / "laws").glob("*.py") if not path.name.startswith("test_")]
SEARCHED = [*PACKAGE.rglob("*.py"), *TABLES, ROOT / "tests" / "heads.py"]


@pytest.mark.parametrize("kind", MEMBERS)
def test_each_row_names_every_file_that_lists_the_members(kind: str) -> None:
    """A file that names two thirds of the members must also name a new one."""
    row = next(row for row in ROWS if row.split("|")[1].strip() == kind)
    members = list(MEMBERS[kind])
    for path in SEARCHED:
        text = path.read_text(encoding="utf-8")
        share = sum(bool(re.search(rf"\b{re.escape(member)}\b", text)) for member in members) / len(members)
        assert share < 2 / 3 or f"`{path.relative_to(ROOT)}`" in row, path
