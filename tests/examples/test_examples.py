"""Every script in examples/: short, well formed, listed, with --help, and a loadable student after --smoke.

Only `--smoke` runs here. The Hub is not tested: no default model or dataset is loaded.
"""

from __future__ import annotations

import ast
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import transformers as tf

from tests.distributed.launch import alone

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "examples"
SCRIPTS = sorted(path for path in EXAMPLES.rglob("*.py") if path.stem not in ("own_data", "smoke", "withheld_class"))
every_script = pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
ENVIRONMENT = {
    **os.environ,
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "PYTHONPATH": str(ROOT),
    "CUDA_VISIBLE_DEVICES": "",
}


def run(command: list[str | Path], folder: Path) -> str:
    """Run the command, which must succeed; return its output."""
    done = subprocess.run(
        [sys.executable, *map(str, command)], cwd=folder, env=ENVIRONMENT, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, f"{done.stdout[-4000:]}\n{done.stderr[-6000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def smoked(tmp_path_factory) -> Path:
    """Return a folder with the output of `--help` and `--smoke` and the student of each script."""
    folder = tmp_path_factory.mktemp("smoked")
    alone(Path(__file__).with_name("run_smoke.py"), *map(str, SCRIPTS), folder=folder)
    return folder


@every_script
def test_help_shows_the_options_with_the_scripts_defaults(smoked, script) -> None:
    shown = (smoked / script.stem / "help.txt").read_text()
    for option in ("--smoke", "--student", "--teacher", "--temperature", "--alpha", "--learning_rate", "--output_dir"):
        assert option in shown
    if script.stem not in ("accelerate_loop", "own_trainer"):
        assert "--divergence" in shown and "--gradient_accumulation_steps" in shown
    first_words = ast.get_docstring(ast.parse(script.read_text())).split()[:6]
    assert " ".join(first_words) in " ".join(shown.split())


@every_script
def test_smoke_leaves_a_loadable_student(smoked, script) -> None:
    folder = smoked / script.stem / "student"
    config = tf.AutoConfig.from_pretrained(folder)
    model, loading = getattr(tf, config.architectures[0]).from_pretrained(folder, output_loading_info=True)
    assert not loading["missing_keys"] and not loading["unexpected_keys"]
    assert all(bool(parameter.isfinite().all()) for parameter in model.parameters())
    reader = {"speech": tf.AutoProcessor, "audio": tf.AutoFeatureExtractor, "image": tf.AutoImageProcessor}
    assert reader.get(script.stem.split("_")[0], tf.AutoTokenizer).from_pretrained(folder) is not None
    left = [path.name for path in (smoked / script.stem).iterdir()]
    expected = ["help.txt", "smoke.txt", "student", "student-alone"]
    assert sorted(left) == (expected if script.stem == "text_classification" else expected[:3])


@every_script
def test_smoke_logs_both_terms(smoked, script) -> None:
    printed = (smoked / script.stem / "smoke.txt").read_text()
    if script.stem in (
        "tinybert_stages",
        "on_policy",
        "embeddings",
    ):  # without a labels' term; stages have others
        terms = ("attention", "hidden", "embeddings", "logits") if script.stem == "tinybert_stages" else ("logits",)
        found = {term: re.findall(rf"'loss/{term}': '([\d.e-]+)'", printed) for term in terms}
        assert all(len(values) == 2 and min(map(float, values)) > 0 for values in found.values()), found
        return
    labels = re.findall(r"'(?:loss/)?labels': '?([\d.e-]+)", printed)
    logits = re.findall(r"'(?:loss/)?logits': '?([\d.e-]+)", printed)
    assert len(labels) >= 2 and all(float(value) > 0 for value in labels)
    assert len(logits) >= 2 and all(float(value) > 0 for value in logits)


def test_the_classification_baseline_trains_without_the_teacher(smoked) -> None:
    printed = (smoked / "text_classification" / "smoke.txt").read_text()
    assert "distilled: {" in printed and "alone: {" in printed
    training = [line for line in printed.splitlines() if "loss/labels" in line]
    assert len(training) == 4  # two steps for each of two runs
    assert [("loss/logits" in line) for line in training] == [True, True, False, False]
    assert _first_label_loss(training[0]) == _first_label_loss(training[2])  # from the same student


@every_script
def test_short_enough_to_read(script) -> None:
    limit = 60 if script.stem in ("accelerate_loop", "own_trainer") else 110
    assert len(script.read_text().splitlines()) <= limit


def test_code_only_for_smoke_is_small() -> None:
    assert len((EXAMPLES / "smoke.py").read_text().splitlines()) <= 200


@every_script
def test_the_readme_lists_every_script(script) -> None:
    readme = (EXAMPLES / "README.md").read_text()
    assert readme.count(f"`{script.name}`") >= 2 and f"python {script.name} --smoke" in readme


def test_ruff_passes() -> None:
    run(["-m", "ruff", "check", "--no-cache", EXAMPLES], ROOT)
    run(["-m", "ruff", "format", "--no-cache", "--check", EXAMPLES], ROOT)


@pytest.mark.parametrize(
    ("answer", "gold", "expected"),
    [
        ("The London.", "london", (1.0, 1.0)),
        ("in London town", "London", (0.0, 0.5)),
        ("Paris", "London", (0.0, 0.0)),
        ("", "London", (0.0, 0.0)),
        ("a U.S. state", "US state", (1.0, 1.0)),
    ],
)
def test_answers_are_compared_as_squad_does(answer, gold, expected, monkeypatch) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    compare = runpy.run_path(str(EXAMPLES / "question_answering.py"), run_name="example")["compare"]
    assert compare(answer, gold) == expected


@pytest.mark.slow  # a launcher and two workers import torch
def test_the_accelerate_loop_in_two_processes_equals_one(tmp_path) -> None:
    """All six examples form one step either way: 2 × 3 micro-batches of one, or 1 × 6."""
    script = EXAMPLES / "accelerate_loop.py"
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    two = run([*launch, script, "--smoke", "--accumulation", "3", "--output_dir", "two"], tmp_path)
    one = run([script, "--smoke", "--accumulation", "6", "--output_dir", "one"], tmp_path)
    assert "step 1 of 1" in two
    assert _numbers(two) == pytest.approx(_numbers(one), abs=2e-6)  # printed to six digits
    weights = [
        tf.DistilBertForSequenceClassification.from_pretrained(tmp_path / name).state_dict() for name in ("one", "two")
    ]
    # Except the biases of the keys: their gradient is 0 up to rounding, which Adam turns into a whole step.
    apart = {n: float((w - weights[1][n]).abs().max()) for n, w in weights[0].items() if not n.endswith("k_lin.bias")}
    assert max(apart.values()) < 1e-6, apart


def _first_label_loss(line: str) -> str:
    return re.search(r"'loss/labels': '([\d.e-]+)'", line)[1]


def _numbers(printed: str) -> list[float]:
    line = next(line for line in printed.splitlines() if line.startswith("step 1"))
    return [float(value) for value in re.findall(r": ([\d.e-]+)", line)]
