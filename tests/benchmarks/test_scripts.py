"""The scripts under benchmarks/ start, report missing requirements, and measure what they claim. No timing."""

from __future__ import annotations

import re
import runpy
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"
SCRIPTS = (
    "causal_lm_ways",
    "end_to_end",
    "heads_under_accumulation",
    "init_ablation",
    "large_vocabulary",
    "objectives_cost",
    "real_data",
    "sixteen_bits",
    "store_training",
    "teacher_cost",
    "teacher_kinds",
    "teacher_precision",
    "trainer_overhead",
)


def run(script: str, *arguments: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", [f"{script}.py", *arguments])
    monkeypatch.setattr(sys, "path", list(sys.path))
    runpy.run_path(str(FOLDER / f"{script}.py"), run_name="__main__")


def test_every_script_is_listed_here_and_in_the_readme() -> None:
    with_main = {path.stem for path in FOLDER.glob("*.py") if '__name__ == "__main__"' in path.read_text()}
    assert with_main == set(SCRIPTS)
    readme = (FOLDER / "README.md").read_text()
    assert all(f"benchmarks/{script}.py" in readme for script in SCRIPTS)


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_script_prints_help(
    script: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        run(script, "--help", monkeypatch=monkeypatch)
    assert stopped.value.code == 0
    assert "usage:" in capsys.readouterr().out


def test_update_does_not_depend_on_accumulation(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    heads = ("bert_single_label", "gpt2_causal_lm")
    run("heads_under_accumulation", "--heads", *heads, monkeypatch=monkeypatch)
    rows = [line.split("|")[1:-1] for line in capsys.readouterr().out.splitlines()[2:]]
    assert [row[0].strip() for row in rows] == list(heads)
    for row in rows:
        assert row[3].strip() == row[4].strip() == "1.000 / 1.000 / 1.000"
        assert float(row[5]) < 1e-6
    assert rows[0][2].strip() == "2.000 / 4.000 / 8.000"  # Trainer, single-label classification


@pytest.mark.parametrize("kind", ["sequence", "token"])
def test_overhead_reports_every_way_on_both_clocks(
    kind: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    sizes = {"--batch": 2, "--length": 8, "--vocabulary": 50, "--blocks": 2, "--steps": 2, "--warm-up": 1}
    tiny = ["--tiny", *(str(part) for option in sizes.items() for part in option)]
    run("trainer_overhead", "--kind", kind, *tiny, "--output", str(tmp_path / "x.json"), monkeypatch=monkeypatch)
    output = capsys.readouterr().out
    for way in ("bare loop", "Trainer, hand-written loss", "DistillationTrainer"):
        assert len(re.findall(rf"^\| {way} \| [\d.]+ \| [\d.]+ \| [\d.]+ \|$", output, re.MULTILINE)) == 2
    assert len(re.findall(r"^\| DistillationTrainer / Trainer, hand-written loss \|", output, re.MULTILINE)) == 2
    assert (tmp_path / "x.json").is_file()


@pytest.mark.parametrize("kind", ["causal_lm", "masked_lm"])
def test_every_way_of_a_step_has_the_same_loss(
    kind: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    sizes = ["--batch", "2", "--length", "8", "--vocabulary", "50", "--student", "1", "16", "--teacher", "1", "16"]
    ways = ["--ways", "bare loop", "DistillationTrainer, whole logits", "DistillationTrainer"]  # without TRL
    few = ["--blocks", "1", "--steps", "1", "--no-memory", "--alpha", "0.7", "--output", str(tmp_path / "x.json")]
    run("end_to_end", "--kind", kind, *sizes, *ways, *few, monkeypatch=monkeypatch)
    rows = re.findall(r"^\| ([^|]+) \| [\d.]+ \| [\d.]+ \|  \| ([\d.]+) \|$", capsys.readouterr().out, re.MULTILINE)
    assert [way for way, _ in rows] == ways[1:]
    first, *others = (float(loss) for _, loss in rows)
    assert first > 0 and others == [pytest.approx(first, abs=2e-4)] * 2


def test_errors_in_16_bits_are_measured_for_both_ways(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny = ["--seeds", "1", "--rows", "10", "--columns", "12", "--widths", "4", "5", "--heads", "gpt2_causal_lm"]
    run("sixteen_bits", *tiny, monkeypatch=monkeypatch)
    rows = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith("| f")]
    assert [row[0] for row in rows] == ["forward_kl"] * 2 and [len(row) for row in rows] == [9, 5]
    for _, *numbers in rows:
        for plain, ours, ratio, largest in zip(*[iter(map(float, numbers))] * 4, strict=True):
            assert 1e-4 < plain < 0.1 and [ratio, largest] == pytest.approx([ours / plain] * 2, abs=0.02)


def test_missing_data_raise_with_the_searched_path(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"no data set 'sst2' in .* Pass --data-dir FOLDER, or set HF_DISTILL_DATA"):
        run("real_data", "sst2", "--data-dir", str(tmp_path), monkeypatch=monkeypatch)


def test_a_missing_encoder_raises_with_instructions(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    data = tmp_path / "wnut17"
    data.mkdir()
    (data / "README.md").write_text("")
    with pytest.raises(SystemExit, match=r"no pretrained encoder in .* Pass --encoder FOLDER, or: pip install"):
        run("real_data", "wnut17", "--data-dir", str(tmp_path), "--encoder", str(tmp_path), monkeypatch=monkeypatch)
