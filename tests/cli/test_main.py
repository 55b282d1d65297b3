"""The command: help, version, errors in a line; and a whole tiny quickstart."""

import io
import re
from dataclasses import replace

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import hf_distill.cli.quickstart as quickstart
from hf_distill.cli import second_process
from hf_distill.cli.main import main
from hf_distill.cli.quickstart_training import FAST
from hf_distill.compare import read_report
from hf_distill.errors import DataError
from tests.distributed.launch import SERVER
from tests.trainer.tiny import assert_same_bits

TINY = replace(
    FAST,
    packages=6,
    vocabulary_size=300,
    labelled_share=0.2,
    batch_size=16,
    teacher_width=32,
    teacher_steps=80,
    teacher_learning_rate=5e-3,
    student_width=16,
    student_steps=8,
    latency_calls=50,
)


def test_help_names_every_option(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["quickstart", "--help"])
    assert stop.value.code == 0
    shown = capsys.readouterr().out
    for option in ("--output-dir", "--seed", "--fast", "--processes", "Downloads nothing"):
        assert option in shown


def test_version(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--version"])
    assert stop.value.code == 0
    assert re.fullmatch(r"hf-distill (\d+\.\d+\.\S+|unknown \(.+\))\n", capsys.readouterr().out)


def test_an_error_is_one_line_with_exit_code_2(tmp_path, capsys):
    (tmp_path / "thesis.tex").write_text("years of work")
    assert main(["quickstart", "--output-dir", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("hf-distill: error: output_dir") and error.count("\n") == 1
    assert "thesis.tex" in error and "--output-dir" in error


def test_an_interruption_prints_no_traceback(monkeypatch, capsys):
    def stop(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(quickstart, "run_quickstart", stop)
    assert main(["quickstart"]) == 130
    assert "nothing was left behind" in capsys.readouterr().err


def test_a_library_without_documentation_leaves_no_files(tmp_path, library):
    with pytest.raises(DataError, match="packages found"):
        quickstart.run_quickstart(tmp_path / "out", seed=0, settings=FAST, console=Console(quiet=True), root=library)
    assert not (tmp_path / "out").exists()


def test_a_whole_run(tmp_path, library, monkeypatch):
    monkeypatch.setattr(second_process.multiprocessing, "get_context", lambda kind: SERVER)
    out, alone, screen = tmp_path / "out", tmp_path / "alone", io.StringIO()
    run = {"seed": 3, "settings": TINY, "root": library}
    report = quickstart.run_quickstart(out, processes=2, console=Console(file=screen, width=80), **run)
    one_process = quickstart.run_quickstart(alone, processes=1, console=Console(quiet=True), **run)
    left = {path.name for path in out.iterdir() if not path.name.startswith(".")}
    assert left == set(quickstart.ENTRIES)
    check_report(report)
    assert read_report(out) == report
    check_students(out)
    shown = screen.getvalue()
    for text in ("student distilled, seed 4", "student, all labels, seed 4", "teacher", "Made with --fast", "± "):
        assert text in shown
    table, notes = shown.split("\n\n")  # a blank line between the two
    assert "speed" in table and notes.startswith("Made with")
    assert all(len(line) <= 80 for line in shown.splitlines())
    assert (out / quickstart.PLOT).read_bytes().startswith(b"\x89PNG")
    check_that_processes_change_nothing(report, one_process, out, alone)


def check_that_processes_change_nothing(two, one, of_two, of_one):
    for ours, theirs in zip(two.results, one.results, strict=True):
        assert ours.accuracy_share_runs == theirs.accuracy_share_runs
        assert ours.agreement_share_mean == theirs.agreement_share_mean
    for name in ("student-alone", "student-distilled"):
        weights = [load_file(folder / name / "model.safetensors") for folder in (of_two, of_one)]
        assert_same_bits(*weights)
    assert (two.settings["processes"], one.settings["processes"]) == (2, 1)
    assert two.cost["peak_memory_mb"] > one.cost["peak_memory_mb"] + 100  # of both together
    assert two.notes[-1].endswith(" MB in two processes.") and one.notes[-1].endswith(" MB.")


def check_report(report):
    assert [r.name for r in report.results] == ["student alone", "student distilled", "student, all labels", "teacher"]
    alone, distilled, all_labels, teacher = report.results
    assert alone.parameters == distilled.parameters == all_labels.parameters < teacher.parameters
    assert [len(one.accuracy_share_runs) for one in report.results] == [2, 2, 2, 1]
    assert teacher.speed_up_times == 1.0
    assert teacher.not_measured["accuracy_share_spread"].startswith("one teacher was trained")
    assert not alone.not_measured and not distilled.not_measured and not all_labels.not_measured
    assert report.settings["seeds"] == [3, 4] and report.settings["fast"] is True
    assert report.cost["seconds_total"] > 0
    assert teacher.accuracy_share_mean > 0.5  # the topic's name is in every paragraph


def check_students(out):
    for name in ("student-alone", "student-distilled"):
        model = AutoModelForSequenceClassification.from_pretrained(out / name)
        tokenizer = AutoTokenizer.from_pretrained(out / name)
        with torch.no_grad():
            logits = model(**tokenizer("Return the socket.", return_tensors="pt")).logits
        assert logits.shape == (1, 6) and set(model.config.label2id) >= {"socket", "colour"}
        others = {"README.md"} if name == "student-distilled" else set()
        files = {path.name for path in (out / name).iterdir()}
        assert files - others <= {
            "config.json",
            "model.safetensors",
            "tokenizer.json",
            "tokenizer_config.json",
        }
    card = (out / "student-distilled" / "README.md").read_text(encoding="utf-8")
    assert "hf-distill" in card and str(out) not in card and "unfinished" not in card
