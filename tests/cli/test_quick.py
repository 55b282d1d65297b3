"""Help, versions and typing errors do not wait for torch, and `import hf_distill` is lazy and whole."""

from __future__ import annotations

import ast
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import hf_distill
from hf_distill.cli import cache
from hf_distill.cli.main import main
from hf_distill.tasks import TASKS
from hf_distill.teachers.cache.files import DTYPES as ACTIVATION_DTYPES
from hf_distill.teachers.load import DTYPES as TEACHER_DTYPES

ROOT = Path(__file__).parents[2]
HEAVY = ("torch", "transformers", "datasets", "numpy", "accelerate", "peft")


def in_a_fresh_process(program: str) -> str:
    """What the program prints, followed by the heavy modules that it imported."""
    program += f"\nimport sys\nprint('heavy:', *[name for name in {HEAVY} if name in sys.modules])"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    return done.stdout


@pytest.mark.parametrize(
    "arguments",
    [
        *("", "--help", "--version", "quikstart", "quickstart --help", "cache build --help", "cache show --help"),
        *("complete --help", "cache build a b c --task nope"),
    ],
)
def test_nothing_heavy_is_imported_to_answer(arguments: str) -> None:
    program = f"from hf_distill.cli.main import main\ntry: main({arguments.split()!r})\nexcept SystemExit: pass"
    assert in_a_fresh_process(program).splitlines()[-1] == "heavy:"


def test_importing_the_package_imports_nothing_heavy() -> None:
    light = "import hf_distill\nprint(hf_distill.__version__, 'Distiller' in dir(hf_distill), hf_distill.DataError)"
    assert in_a_fresh_process(light).splitlines()[-1] == "heavy:"


def test_import_star_takes_every_public_name() -> None:
    names: dict[str, Any] = {}
    exec("from hf_distill import *", names)
    assert set(hf_distill.__all__) <= set(names)


def test_the_three_lists_of_public_names_are_one() -> None:
    """What a type checker sees, what `import *` takes and what is imported at run time."""
    tree = ast.parse(Path(hf_distill.__file__).read_text(encoding="utf-8"))
    (typed,) = (node for node in tree.body if isinstance(node, ast.If))
    seen = {alias.name: node.module for node in typed.body for alias in node.names}
    assert seen == hf_distill._MODULE_OF
    assert sorted(seen) == sorted(hf_distill.__all__)


@pytest.mark.parametrize("name", hf_distill.__all__)
def test_a_public_name_is_that_of_its_module(name: str) -> None:
    value = getattr(hf_distill, name)
    assert value is getattr(sys.modules[hf_distill._MODULE_OF[name]], name)
    assert pickle.loads(pickle.dumps(value)) is value


def test_names_and_submodules_of_the_package() -> None:
    assert set(hf_distill.__all__) | {"__version__"} <= set(dir(hf_distill))
    assert hf_distill.augment.OnPolicy.__name__ == "OnPolicy"
    assert hf_distill.functional is sys.modules["hf_distill.functional"]
    with pytest.raises(AttributeError, match="module 'hf_distill' has no attribute 'Destiller'"):
        _ = hf_distill.Destiller
    with pytest.raises(ImportError, match="cannot import name 'Destiller' from 'hf_distill'"):
        from hf_distill import Destiller  # noqa: F401


def test_the_choices_of_the_options_are_those_of_the_library() -> None:
    assert list(cache._TASKS) == sorted(TASKS)
    assert cache._TEACHER_DTYPES == TEACHER_DTYPES
    assert tuple(ACTIVATION_DTYPES) == cache._ACTIVATION_DTYPES


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["quikstart"], "'quikstart' is not a choice. Did you mean quickstart? Allowed: quickstart, cache, complete."),
        (["cache", "bild"], "hf-distill cache: error: argument WHAT: 'bild' is not a choice. Did you mean build?"),
        (
            ["cache", "build", "a", "b", "c", "--task", "clasification"],
            "argument --task: 'clasification' is not a choice. Did you mean classification? Allowed: causal_lm,",
        ),
        (
            ["cache", "show", "a", "--spilt=x"],
            "unrecognized arguments: --spilt=x. Did you mean --split? See hf-distill",
        ),
        (["complete", "a"], "hf-distill complete: error: the following arguments are required: DATASET, FOLDER."),
        ([], "hf-distill: error: the following arguments are required: COMMAND. See hf-distill --help."),
        (["quickstart", "--seed", "-1"], "argument --seed: -1 is not between 0 and 2**32 - 11."),
        (["zzz"], "'zzz' is not a choice. Allowed: quickstart, cache, complete."),
    ],
)
def test_a_wrong_command_line_is_one_line_and_code_2(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture
) -> None:
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1
    assert message in error


def test_an_error_of_the_system_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "file").write_text("no folder")
    assert main(["quickstart", "--output-dir", str(tmp_path / "file" / "below")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("hf-distill: error: ") and error.count("\n") == 1
