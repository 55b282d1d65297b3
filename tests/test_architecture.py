"""House rules checked by a machine: import direction, sizes, docstrings, and words that do not belong in code."""

from __future__ import annotations

import ast
import functools
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "hf_distill"
LINES_WITHOUT_A_REASON = 600
# A file is one idea. Longer files have their reason here.
REASONS_TO_BE_LONG: dict[str, str] = {
    "hf_distill/trainer/mixin.py": "one class, read from top to bottom",
    "hf_distill/distiller.py": "one class, read from top to bottom",
    "hf_distill/teachers/cache/build.py": "one pass, from the plan to the manifest",
    "hf_distill/teachers/cache/stores.py": "one table of stores",
}

# A line may import from the lines above it. Parts on one line do not import each other, unless joined by a +.
# Parts of the design that are yet to be built have their place already.
LAYERS = (
    "errors | _types",
    "_compat | _utils | learned | schedules | layer_map | vocabulary",
    "ddp | signals",
    "functional",
    "tasks",
    "models | data",
    "hub",
    "objectives | students | finite | augment",
    "teachers + label_agreement",
    "distiller + fused_forward + blend | presets",
    "trainer | compare",
    "runs",
    "recipes",
    "cli",
)
LEVEL: dict[str, tuple[int, int]] = {}  # part → its line, and its place in it
for _level, _line in enumerate(LAYERS):
    for _place, _parts in enumerate(_line.split(" | ")):
        for _part in _parts.split(" + "):
            LEVEL[_part] = (_level, _place)

FILES = sorted(PACKAGE.rglob("*.py"))
BESIDE = [path for folder in ("tests", "examples", "benchmarks") for path in sorted((ROOT / folder).rglob("*.py"))]
CHECKED = [*FILES, *BESIDE]


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def part_of(path: Path) -> str:
    """Return the part of a file: `tasks` for `hf_distill/tasks/ctc.py`, `errors` for `hf_distill/errors.py`."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


@functools.cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def imported_modules(path: Path) -> Iterator[str]:
    """Yield the modules of this package that the file imports anywhere."""
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.split(".")[0] == "hf_distill")
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name_of(path)}: relative import"
            if node.module == "hf_distill":  # a part by its name, or a public name of the root
                yield from (f"hf_distill.{alias.name}" for alias in node.names)
            elif node.module and node.module.startswith("hf_distill."):
                yield node.module


def refused(importing: str, imported: str) -> str | None:
    """Return why one part may not import the other, or None if it may."""
    if importing == imported:
        return None
    (level, place), (other_level, other_place) = LEVEL[importing], LEVEL[imported]
    if other_level > level:
        return "upward"
    if other_level == level and other_place != place:
        return "sideways"
    return None


def test_every_part_of_the_package_has_a_layer() -> None:
    assert {part_of(path) for path in FILES} - {"__init__"} <= set(LEVEL)


@pytest.mark.parametrize("path", [path for path in FILES if path != PACKAGE / "__init__.py"], ids=name_of)
def test_imports_point_down_the_layers(path: Path) -> None:
    for module in imported_modules(path):
        imported = module.split(".")[1]
        if imported not in LEVEL:  # a public name of the root, which imports everything but the top layer
            assert part_of(path) == LAYERS[-1], f"imports {module} from the root"
            continue
        why = refused(part_of(path), imported)
        assert why is None, f"{part_of(path)} imports {module}: {why}"


@pytest.mark.parametrize(
    ("importing", "imported", "why"),
    [
        ("functional", "tasks", "upward"),
        ("objectives", "students", "sideways"),
        ("hub", "trainer", "upward"),
        ("learned", "schedules", "sideways"),
        ("trainer", "hub", None),
        ("runs", "trainer", None),
        ("cli", "errors", None),
        ("distiller", "cli", "upward"),
    ],
)
def test_the_import_rule_can_fail(importing: str, imported: str, why: str | None) -> None:
    assert refused(importing, imported) == why


def test_functional_imports_no_models() -> None:
    for path in sorted((PACKAGE / "functional").glob("*.py")):
        text = path.read_text(encoding="utf-8")
        assert "transformers" not in text and "accelerate" not in text, name_of(path)


@pytest.mark.parametrize("path", CHECKED, ids=name_of)
def test_files_have_docstrings_and_long_files_a_reason(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    if path.name == "__init__.py" and not text.strip():
        return
    assert re.match(r'"""\S.*?"""', text, re.DOTALL), "no docstring in the first line"
    if len(text.splitlines()) > LINES_WITHOUT_A_REASON:
        assert name_of(path) in REASONS_TO_BE_LONG, "is it one idea? Then say in REASONS_TO_BE_LONG why it is long"


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_no_bare_except(path: Path) -> None:
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.ExceptHandler):
            assert node.type is not None, f"line {node.lineno}: bare except"
            caught = {name.id for name in ast.walk(node.type) if isinstance(name, ast.Name)}
            assert not caught & {"Exception", "BaseException"}, f"line {node.lineno}: catches everything"


@pytest.mark.parametrize("path", CHECKED, ids=name_of)
def test_no_banned_words(path: Path) -> None:
    paths = ["/" + "tmp/", "/" + "work/", "/" + "root/"]  # of a machine
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        assert not [word for word in paths if word in line], f"line {number}: {line.strip()}"
        assert not re.search(r"(#|\"\"\"|^)\s*(TODO|FIXME|XXX)\b", line), f"line {number}: left undone"
        if "type: " + "ignore" in line:
            reason = line.split("type: " + "ignore", 1)[1].partition("]")[2]
            assert "#" in reason or "(" in reason, f"line {number}: an ignored type without a reason beside it"
