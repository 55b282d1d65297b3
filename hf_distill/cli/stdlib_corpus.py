"""Paragraphs of the standard library's documentation strings, labelled with their package.

The source files are parsed and not imported.
"""

import ast
import gc
import hashlib
import re
import sysconfig
from collections import Counter, deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from hf_distill.errors import DataError

# Tests are not documentation, and site-packages is not the standard library.
_SKIPPED_FOLDERS = frozenset({"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"})
_STATEMENTS = (ast.stmt, ast.excepthandler, ast.match_case)
_DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
# Shares of the hash range [0, 1): train below the first, validation below the second, test above.
_TRAIN_BELOW, _VALIDATION_BELOW = 0.75, 0.85


@dataclass(frozen=True)
class Paragraph:
    """A paragraph of a documentation string, with the index of its package."""

    text: str
    label: int


@dataclass(frozen=True)
class Corpus:
    """Three disjoint lists of paragraphs, and the names of the packages in the order of the labels."""

    packages: tuple[str, ...]
    train: tuple[Paragraph, ...]
    validation: tuple[Paragraph, ...]
    test: tuple[Paragraph, ...]


def read_stdlib_corpus(*, root: Path | None = None, packages: int = 16, min_words: int = 6) -> Corpus:
    """Return the documentation of the largest packages.

    A paragraph occurs once, and not at all if two packages share it. Its split depends only on its words, so the test
    paragraphs are the same in every run and for every seed.

    Args:
        root: the folder of the packages, or None for the standard library.
        packages: the number of packages.
        min_words: the minimum number of words of a paragraph.

    Raises:
        DataError: if there are too few packages, as in a Python without source files.
    """
    folder = Path(sysconfig.get_paths()["stdlib"]) if root is None else root
    owners: dict[str, set[str]] = {}
    texts: dict[str, str] = {}
    with _no_garbage_collection():
        for package, text in _paragraphs(folder):
            words = _words(text)
            if len(words.split()) >= min_words:
                owners.setdefault(words, set()).add(package)
                texts.setdefault(words, text)
    labelled = {words: min(names) for words, names in owners.items() if len(names) == 1}
    sizes = Counter(labelled.values())
    if len(sizes) < packages:
        raise DataError(
            f"{folder}: documentation of {len(sizes)} packages found, {packages} are needed. Use a Python whose "
            "standard library has source files."
        )
    largest = sorted(sizes, key=lambda name: (-sizes[name], name))[:packages]
    names = tuple(sorted(largest))
    parts: dict[str, list[Paragraph]] = {"train": [], "validation": [], "test": []}
    for words in sorted(labelled):
        if labelled[words] in names:
            paragraph = Paragraph(text=texts[words], label=names.index(labelled[words]))
            parts[split_of(words)].append(paragraph)
    return Corpus(packages=names, **{part: tuple(found) for part, found in parts.items()})


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """Disable the garbage collector, which would double the time: syntax trees hold no cycles."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def split_of(words: str) -> str:
    """Return the split of a paragraph, from a hash of its words.

    >>> split_of("return the number of items")
    'train'
    """
    digest = hashlib.sha256(words.encode()).digest()
    place = int.from_bytes(digest[:8], "big") / 2**64
    if place < _TRAIN_BELOW:
        return "train"
    return "validation" if place < _VALIDATION_BELOW else "test"


def _words(text: str) -> str:
    """Return the words in lower case, without punctuation, to compare paragraphs."""
    return " ".join(re.findall(r"\w+", text.lower()))


def _paragraphs(folder: Path) -> Iterator[tuple[str, str]]:
    """Yield (package, paragraph) for all documentation strings, in a fixed order."""
    for path in sorted(folder.rglob("*.py")):
        place = path.relative_to(folder)
        if _SKIPPED_FOLDERS.intersection(place.parts):
            continue
        package = place.parts[0].removesuffix(".py").lstrip("_")
        for docstring in _docstrings(path):
            for paragraph in re.split(r"\n\s*\n", docstring):
                yield package, " ".join(paragraph.split())


def _docstrings(path: Path) -> Iterator[str]:
    """Yield the documentation strings of a file, or none if it has a syntax error, as some test files have."""
    try:
        tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):
        return
    nodes: deque[ast.AST] = deque([tree])
    while nodes:  # in the order of `ast.walk`, which would also visit all expressions, in twice the time
        node = nodes.popleft()
        nodes.extend(child for child in ast.iter_child_nodes(node) if isinstance(child, _STATEMENTS))
        if isinstance(node, _DOCUMENTED):
            docstring = ast.get_docstring(node)
            if docstring:
                yield docstring
