"""The built wheel: it holds every file of the package, and its quickstart runs outside the checkout."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from hf_distill.compare import read_report

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation"]
    subprocess.run([*command, "--wheel-dir", str(folder), str(ROOT)], check=True)
    (built,) = folder.glob("hf_distill-*.whl")
    return built


def test_the_wheel_holds_every_file_of_the_package(wheel):
    package = ROOT / "hf_distill"
    expected = {
        path.relative_to(ROOT).as_posix()
        for path in package.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    names = set(zipfile.ZipFile(wheel).namelist())
    assert expected <= names
    assert {name.split("/")[0] for name in names} == {"hf_distill", wheel.name.rsplit("-", 3)[0] + ".dist-info"}


def test_the_quickstart_runs_from_the_wheel(wheel, tmp_path):
    site, elsewhere = tmp_path / "site", tmp_path / "elsewhere"
    elsewhere.mkdir()
    zipfile.ZipFile(wheel).extractall(site)
    environment = os.environ | {"PYTHONPATH": str(site), "HF_HUB_OFFLINE": "1"}
    found = subprocess.run(
        [sys.executable, "-c", "import hf_distill; print(hf_distill.__file__)"],
        cwd=elsewhere,
        env=environment,
        check=True,
        capture_output=True,
        text=True,
    )
    assert found.stdout.startswith(str(site))
    subprocess.run(
        [sys.executable, "-m", "hf_distill.cli.main", "quickstart", "--fast"],
        cwd=elsewhere,
        env=environment,
        check=True,
    )
    assert read_report(elsewhere / "hf-distill-quickstart").settings["fast"] is True
