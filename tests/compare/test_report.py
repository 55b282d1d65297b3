"""The report: JSON, its table and plot, and no partly written files."""

import dataclasses
import json

import pytest
from rich.console import Console

from hf_distill._utils import write_text_whole, write_whole
from hf_distill.compare import (
    ModelResult,
    Report,
    markdown_table,
    plot_accuracy_against_latency,
    read_report,
    terminal_table,
    this_machine,
    write_report,
)
from hf_distill.errors import DataError, SettingError


def result(name, accuracy=0.7, spread=0.01, latency=0.8, **changes):
    values = {
        "name": name,
        "accuracy_share_mean": accuracy,
        "accuracy_share_spread": spread,
        "accuracy_share_runs": [accuracy],
        "parameters": 311_000,
        "size_mb": 1.244,
        "latency_ms_p50": latency,
        "latency_ms_p95": latency * 1.5,
        "speed_up_times": 2.5,
        "agreement_share_mean": 0.8,
        "agreement_share_spread": 0.02,
    }
    return ModelResult(**(values | changes))


def report(**changes):
    teacher = result(
        "teacher",
        0.78,
        None,
        2.0,
        not_measured={"accuracy_share_spread": "one teacher was trained"},
    )
    values = {
        "title": "A small comparison",
        "results": [result("student alone", 0.5), result("student distilled"), teacher],
        "machine": this_machine(),
        "settings": {"temperature": 2.0, "seeds": [0, 1, 2]},
        "notes": ["The test paragraphs were never trained on."],
    }
    return Report(**(values | changes))


def test_round_trip(tmp_path):
    write_report(report(), tmp_path / "new")
    assert read_report(tmp_path / "new") == report()
    write_report(report(), str(tmp_path / "by name"))
    assert read_report(str(tmp_path / "by name")) == report()
    assert sorted(p.name for p in (tmp_path / "new").iterdir()) == ["report.json", "report.md"]


def test_every_number_has_its_unit_in_its_name():
    units = ("_share_mean", "_share_spread", "_share_runs", "parameters", "_mb", "_times")
    latencies = ("latency_ms_p50", "latency_ms_p95")
    for field in dataclasses.fields(ModelResult):
        if field.name not in ("name", "not_measured"):
            assert field.name.endswith(units) or field.name in latencies, field.name


def test_a_missing_number_needs_its_reason():
    with pytest.raises(SettingError, match="These must be the same"):
        result("student", latency_ms_p50=None)
    with pytest.raises(SettingError, match="These must be the same"):
        result("student", not_measured={"size_mb": "it was measured"})


def test_a_row_is_found_by_name():
    assert report().result("teacher").accuracy_share_mean == 0.78
    with pytest.raises(SettingError, match="no result 'nobody'; there are"):
        report().result("nobody")


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"schema_version": 1}'])
def test_other_json_is_rejected(text):
    with pytest.raises(DataError, match="not a report that hf-distill wrote"):
        Report.from_json(text)


def test_another_schema_version_is_rejected():
    raw = json.loads(report().to_json()) | {"schema_version": 99}
    with pytest.raises(DataError, match="schema version 99; this release reads 1"):
        Report.from_json(json.dumps(raw))


def test_a_folder_without_a_report_is_rejected(tmp_path):
    with pytest.raises(DataError, match=r"no report\.json in"):
        read_report(tmp_path)


def test_not_a_number_is_never_written():
    with pytest.raises(ValueError, match="JSON"):
        report(results=[result("student", accuracy=float("nan"))]).to_json()


def test_tables_show_the_same_rows():
    console = Console(width=80)  # and nothing is cut
    with console.capture() as shown:
        console.print(terminal_table(report()))
    for text in (shown.get(), markdown_table(report())):
        lines = [line for line in text.splitlines() if "student" in line or "teacher" in line]
        assert "student alone" in lines[0] and "0.500 ± 0.010" in lines[0]
        assert "student distilled" in lines[1] and "311,000" in lines[1] and "1.24" in lines[1]
        assert "teacher" in lines[2] and "0.780 " in lines[2] and "±" in lines[2]


def names_and_numbers(width, models):
    console = Console(width=width)
    with console.capture() as shown:
        console.print(terminal_table(report(results=models)))
    lines = shown.get().splitlines()
    assert max(len(line.rstrip()) for line in lines) <= width
    return " ".join(lines)


@pytest.mark.parametrize("width", [120, 80, 60, 36])
def test_no_word_and_no_number_is_truncated(width):
    shown = names_and_numbers(width, [result("student, all labels", 0.5), result("teacher", 0.78)])
    for text in ("student, all labels", "teacher", "0.500 ± 0.010", "311,000", "1.24", "0.80", "1.20", "2.5 ×"):
        assert text in shown
    for heading in ("accuracy", "MB", "agreement", "speed", "params" if width > 72 else "parameters"):
        assert f" {heading}" in shown
    assert "…" not in shown and "- " not in shown


def test_a_table_that_fits_has_a_line_for_each_model():
    assert names_and_numbers(80, [result("a student of twenty-two")]).count("accuracy") == 1
    assert names_and_numbers(60, [result("one"), result("two")]).count("accuracy") == 2


def test_report_md_gives_the_reason_for_a_missing_number(tmp_path):
    write_report(report(), tmp_path)
    text = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert "- teacher, `accuracy_share_spread`: one teacher was trained" in text
    assert "- The test paragraphs were never trained on." in text
    assert "| `seeds` | [0, 1, 2] |" in text
    assert "`torch_version`" in text


def test_a_failed_write_keeps_the_old_file(tmp_path):
    path = tmp_path / "report.json"
    write_text_whole(path, "before")

    def fail(beside):
        beside.write_text("half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_whole(path, fail)
    assert path.read_text() == "before"
    assert [p.name for p in tmp_path.iterdir()] == ["report.json"]


def test_the_plot_is_an_image_and_changes_no_global_state(tmp_path):
    import matplotlib

    before = dict(matplotlib.rcParams)
    backend = matplotlib.rcParams._get_backend_or_none()
    plot_accuracy_against_latency(report(), tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    assert matplotlib.rcParams._get_backend_or_none() == backend
    assert dict(matplotlib.rcParams) == before


def test_the_plot_names_shown_and_absent_models(tmp_path):
    absent = result(
        "student alone",
        latency_ms_p50=None,
        latency_ms_p95=None,
        not_measured={"latency_ms_p50": "no clock", "latency_ms_p95": "no clock"},
    )
    shown = report(results=[absent, result("student distilled")])
    plot_accuracy_against_latency(shown, tmp_path / "plot.svg")
    drawn = (tmp_path / "plot.svg").read_text(encoding="utf-8")
    assert "not measured: student alone" in drawn and "student distilled" in drawn


def test_no_name_in_the_plot_covers_another_or_a_point(tmp_path, monkeypatch):
    import matplotlib.figure

    figures, make = [], matplotlib.figure.Figure
    monkeypatch.setattr(matplotlib.figure, "Figure", lambda **settings: figures.append(make(**settings)) or figures[0])
    models = [("student alone", 0.457, 0.06), ("student distilled", 0.789, 0.002), ("student, all labels", 0.788, 0.01)]
    shown = report(results=[result(*model, latency=0.38) for model in models])
    plot_accuracy_against_latency(shown, tmp_path / "plot.png")
    (figure,) = figures
    texts = [text.get_window_extent() for legend in figure.legends for text in legend.get_texts()]
    assert len(texts) == 3
    inside, (axes,) = figure.bbox, figure.axes
    for number, box in enumerate(texts):
        assert not any(box.overlaps(other) for other in (*texts[:number], axes.get_window_extent()))
        assert inside.x0 <= box.x0 and box.x1 <= inside.x1 and inside.y0 <= box.y0
    low, high = axes.get_ylim()
    assert low < 0.457 - 0.06 and 0.789 + 0.002 < high < 0.9 and low > 0.3  # no half of it is empty


def test_nothing_to_plot_is_an_error(tmp_path):
    with pytest.raises(DataError, match="nothing to plot"):
        plot_accuracy_against_latency(report(results=[]), tmp_path / "plot.png")
    assert list(tmp_path.iterdir()) == []
