"""The documents are true: their programs run, and the commands, links and names in them exist.

A block that cannot run is marked on the line before it: `<!-- not run: reason -->`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import pytest

import hf_distill
from hf_distill.cli.main import make_parser
from hf_distill.functional import DIVERGENCES
from hf_distill.tasks import TASKS
from hf_distill.trainer.arguments import DistillationArguments

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = sorted({ROOT / "README.md", ROOT / "hf_distill/README.md", *(ROOT / "docs").glob("**/*.md")})
LINKED = sorted(
    {
        *DOCUMENTS,
        *ROOT.glob("*.md"),
        *ROOT.glob("examples/*.md"),
        *ROOT.glob("benchmarks/*.md"),
        *ROOT.glob("model_cards/*.md"),
    }
)
NOT_RUN = re.compile(r"<!-- not run: (?P<reason>.+?) -->\s*$")


@dataclass(frozen=True)
class Block:
    """A fenced block: its place, language and text, and why it is not run (None if it is)."""

    document: Path
    line: int
    language: str
    text: str
    not_run: str | None

    @property
    def name(self) -> str:
        return f"{self.document.relative_to(ROOT)}:{self.line}"


def blocks(document: Path) -> list[Block]:
    found, lines = [], document.read_text(encoding="utf-8").splitlines()
    start = None
    for number, line in enumerate(lines):
        if not line.lstrip().startswith("```"):
            continue
        if start is None:
            start = number
            continue
        marked = NOT_RUN.search(lines[start - 1]) if start else None
        language = lines[start].strip().removeprefix("```").split(" ")[0]
        text = "\n".join(lines[start + 1 : number])
        found.append(Block(document, start + 1, language, text, marked["reason"] if marked else None))
        start = None
    assert start is None, f"{document}: the block of line {(start or 0) + 1} is not closed"
    return found


PROGRAMS = [block for document in DOCUMENTS for block in blocks(document) if block.language == "python"]


@pytest.mark.parametrize("block", PROGRAMS, ids=lambda block: block.name)
def test_every_program_runs(block: Block, tmp_path: Path, monkeypatch) -> None:
    if block.not_run is not None:
        pytest.skip(block.not_run)
    monkeypatch.chdir(tmp_path)
    # Keep the document's line numbers, so that a traceback points at it.
    source = "\n" * block.line + block.text
    exec(compile(source, str(block.document), "exec"), {"__name__": "__main__"})


def test_the_readme_shows_a_whole_program() -> None:
    assert [block for block in PROGRAMS if block.document == ROOT / "README.md" and block.not_run is None]


def commands(document: Path) -> list[str]:
    """Return the lines of shell blocks, and commands in running text, without comments."""
    shell = [
        line
        for block in blocks(document)
        if block.language in ("", "sh", "bash", "console")
        for line in block.text.splitlines()
    ]
    outside = re.sub(r"^```.*?^```", "", document.read_text(encoding="utf-8"), flags=re.S | re.M)
    inline = re.findall(r"`([^`\n]+)`", outside)
    return [line.split("#")[0].strip().removeprefix("$ ") for line in [*shell, *inline]]


def make_targets() -> set[str]:
    return set(re.findall(r"^([a-z][a-z-]*):", (ROOT / "Makefile").read_text(), flags=re.M))


@pytest.mark.parametrize("document", LINKED, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_mentioned_make_target_exists(document: Path) -> None:
    named = {
        word
        for command in commands(document)
        if command.startswith("make ")
        for word in command.split()[1:]
        if re.fullmatch(r"[a-z][a-z-]*", word)
    }
    assert named <= make_targets(), named - make_targets()


def test_the_readme_names_the_two_commands() -> None:
    named = {command for command in commands(ROOT / "README.md") if command.startswith("make ")}
    assert {"make quickstart", "make test"} <= named


@pytest.mark.parametrize("document", LINKED, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_hf_distill_command_parses(document: Path) -> None:
    for command in commands(document):
        words = command.split()
        if words[:1] != ["hf-distill"] or len(words) == 1:
            continue
        if words[1].startswith("-"):
            assert words[1] in ("--help", "--version"), command
            continue
        try:
            make_parser().parse_args(words[1:])
        except SystemExit as stopped:  # argparse exits with 0 after --help, and with 2 for unknown arguments
            assert stopped.code == 0, command


@pytest.mark.parametrize("document", LINKED, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_linked_file_exists(document: Path) -> None:
    targets = re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", document.read_text(encoding="utf-8"))
    local = [target for target in targets if not re.match(r"[a-z]+:", target)]
    missing = [target for target in local if not (document.parent / target).exists()]
    assert not missing, missing


@pytest.mark.parametrize("document", LINKED, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_mentioned_program_exists(document: Path) -> None:
    """Commands such as `python benchmarks/x.py --flag`."""
    for command in commands(document):
        for word in command.split():
            if re.fullmatch(r"(examples|benchmarks|tests|hf_distill)/[\w/]+\.(py|md)", word):
                assert (ROOT / word).exists(), (document.name, word)


def test_the_readme_lists_exactly_the_divergences() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    (listed,) = re.findall(r"^Divergences .*?\n\n", text, flags=re.S | re.M)
    named = {word for word in re.findall(r"`(\w+)`", listed)} - {"alpha", "temperature"}
    schedules = {"constant", "linear", "cosine"}
    assert set(DIVERGENCES) <= named
    assert named - schedules <= set(DIVERGENCES)


def test_the_readme_has_a_row_for_every_kind_of_head() -> None:
    words = {
        "classification": "sequence classification",
        "regression": "regression",
        "multiple_choice": "multiple choice",
        "token_classification": "token classification",
        "span": "extractive QA",
        "masked_lm": "masked LM",
        "causal_lm": "causal LM",
        "seq2seq": "seq2seq",
        "ctc": "CTC",
        "embedding": "embeddings",
    }
    assert set(words) == set(TASKS), "a new kind of head needs a row in the README's table, and a word here"
    rows = [line for line in (ROOT / "README.md").read_text(encoding="utf-8").splitlines() if line.startswith("| ")]
    for kind, word in words.items():
        assert any(row.startswith(f"| {word}") for row in rows), kind


def test_the_readme_begins_with_a_definition() -> None:
    """The comparison with TRL's class comes once, later."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    lines = [line for line in text.splitlines() if line.strip()]
    assert lines[0].startswith("# ") and "distillation" in lines[0]
    assert "*student*" in lines[1] and "*teacher*" in lines[1]
    assert text.index("TRL has a class of the same name") > text.index("## A whole script")


def test_the_index_lists_every_page() -> None:
    index = (ROOT / "docs/README.md").read_text(encoding="utf-8")
    pages = {path.name for path in (ROOT / "docs").glob("*.md")} - {"README.md"}
    assert pages <= set(re.findall(r"\]\((\w+\.md)", index))


@pytest.mark.parametrize("name", ["README.md", "hf_distill/README.md"])
def test_no_placeholders_are_left(name: str) -> None:
    text = (ROOT / name).read_text(encoding="utf-8")
    assert not re.findall(r"\b(?:QUICKSTART_OUTPUT|TODO|FIXME|TBD|XXX)\b", text)


def test_settings_named_in_the_readme_exist() -> None:
    """`name=` in running text must be a setting of the arguments, the trainer, or a public constructor."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    trainer = {"teacher_model", "teacher_processing_class", "task", "distiller", "model", "args", "train_dataset"}
    known = {*DistillationArguments.__dataclass_fields__, *trainer}
    named = set(re.findall(r"`(\w+)=[^`]*`", text))
    assert named <= known, named - known


@pytest.mark.parametrize("name", hf_distill.__all__)
def test_every_public_name_exists_and_has_a_docstring(name: str) -> None:
    assert getattr(hf_distill, name).__doc__
