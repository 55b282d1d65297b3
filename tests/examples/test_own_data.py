"""The scripts on a user's data: a CSV with missing values, folders of audio files, parquet; without torchcodec."""

from __future__ import annotations

import csv
import functools
import io
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import soundfile
import torch
import transformers as tf

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
QUICK = (
    "--max_steps 2 --logging_steps 1 --eval_strategy no --save_strategy no --report_to none --use_cpu --bf16 false "
    "--per_device_train_batch_size 2 --per_device_eval_batch_size 2 --disable_tqdm true --dataloader_num_workers 0 "
    "--dataloader_pin_memory false --output_dir student"
)
WORDS = ["Zero.", "one", "TWO", "three"]
Run = Callable[[str, str], None]


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Put the scripts' folder on the path as Python does; use a new working folder and cache."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache of datasets"))
    monkeypatch.syspath_prepend(str(EXAMPLES))
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Run:
    """Return a function that runs a script with options."""

    def script(name: str, options: str) -> None:
        monkeypatch.setattr(sys, "argv", [name, *options.split(), *QUICK.split()])
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")

    return script


def wave(pitch: int) -> bytes:
    """Return a WAV file of half a second at 8 kHz, another rate than the models'."""
    file = io.BytesIO()
    soundfile.write(file, np.sin(0.02 * pitch * np.arange(4000)), 8000, format="WAV")
    return file.getvalue()


def with_a_table(folder: Path, column: str, values: list[str]) -> None:
    """Write SPLIT/metadata.csv and the audio files that it lists."""
    for split in ("train", "test"):
        (folder / split).mkdir(parents=True)
        with (folder / split / "metadata.csv").open("w", newline="") as file:
            table = csv.writer(file)
            table.writerow(["file_name", column])
            for i, value in enumerate(values):
                (folder / split / f"{i}.wav").write_bytes(wave(i + 1))
                table.writerow([f"{i}.wav", value])


def by_folder(folder: Path, column: str, values: list[str]) -> None:
    """Write SPLIT/LABEL/x.wav."""
    for split in ("train", "test"):
        for i, value in enumerate(values):
            (folder / split / value).mkdir(parents=True, exist_ok=True)
            (folder / split / value / f"{i}.wav").write_bytes(wave(i + 1))


def as_parquet(folder: Path, column: str, values: list[str]) -> None:
    """Write bytes in a column marked as audio, as on the Hub."""
    folder.mkdir()
    rows = {"audio": [{"bytes": wave(i + 1), "path": None} for i in range(len(values))], column: values}
    for split in ("train", "test"):
        datasets.Dataset.from_dict(rows).cast_column("audio", datasets.Audio()).to_parquet(folder / f"{split}.parquet")


@pytest.mark.parametrize("written", [with_a_table, as_parquet])
def test_whisper_on_real_files(tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch, written: Any) -> None:
    """The evaluation detects no language: language and task are set, and saved with the student."""
    import smoke

    teacher, student, _ = smoke.whisper()
    detections = []
    detect = tf.WhisperForConditionalGeneration.detect_language

    def counted(self: Any, *arguments: Any, **settings: Any) -> Any:
        detections.append(1)
        return detect(self, *arguments, **settings)

    monkeypatch.setattr(tf.WhisperForConditionalGeneration, "detect_language", counted)
    written(tmp_path / "data", "text", WORDS)
    run("speech_seq2seq.py", f"--dataset data --teacher {teacher} --student {student} --generation_max_length 16")
    assert not detections
    made = tf.WhisperForConditionalGeneration.from_pretrained(tmp_path / "student")
    assert (made.generation_config.language, made.generation_config.task) == ("english", "transcribe")
    untold = tf.WhisperForConditionalGeneration.from_pretrained(student)
    assert not hasattr(untold.generation_config, "language")
    untold.generate(input_features=torch.zeros(1, 8, 100), max_new_tokens=2)
    assert detections  # a multilingual Whisper, like the published ones


def test_an_english_whisper_gets_no_language(tmp_path: Path, run: Run) -> None:
    """whisper-small.en has no tokens for language and task, so transformers raises if they are set."""
    import smoke

    teacher, student, _ = smoke.whisper()
    for path in (teacher, student):
        settings = tf.GenerationConfig.from_pretrained(path)
        settings.is_multilingual = False
        del settings.lang_to_id, settings.task_to_id
        settings.save_pretrained(path)
    with_a_table(tmp_path / "data", "text", WORDS)
    run("speech_seq2seq.py", f"--dataset data --teacher {teacher} --student {student} --generation_max_length 16")
    assert not hasattr(tf.GenerationConfig.from_pretrained(tmp_path / "student"), "language")


@pytest.mark.parametrize("written", [with_a_table, as_parquet])
def test_ctc_on_real_files(tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch, written: Any) -> None:
    """Texts are converted to the tokenizer's letters: capitals, without a full stop."""
    import smoke

    teacher, _ = smoke.wav2vec2()
    seen: list[list[int]] = []
    forward = tf.Wav2Vec2ForCTC.forward

    @functools.wraps(forward)
    def listened(self: Any, *arguments: Any, **inputs: Any) -> Any:
        seen.extend(labels[labels >= 0].tolist() for labels in inputs.get("labels", ()))
        return forward(self, *arguments, **inputs)

    monkeypatch.setattr(tf.Wav2Vec2ForCTC, "forward", listened)
    written(tmp_path / "data", "text", WORDS)
    run("speech_ctc.py", f"--dataset data --teacher {teacher} --student_layers 2")
    tokenizer = tf.AutoTokenizer.from_pretrained(teacher)
    spelled = {tokenizer.decode(ids, group_tokens=False) for ids in seen}
    assert spelled == {"ZERO", "ONE", "TWO", "THREE"}


@pytest.mark.parametrize("written", [by_folder, with_a_table, as_parquet])
def test_audio_classes_on_real_files(tmp_path: Path, run: Run, written: Any) -> None:
    """Labels are matched by the names in the teacher's config, where low is 0 and high is 1."""
    import smoke

    teacher, _ = smoke.audio_classifier()
    written(tmp_path / "data", "label", ["high", "low", "low", "high"])
    run("audio_classification.py", f"--dataset data --teacher {teacher} --student_layers 1")
    made = tf.AutoModelForAudioClassification.from_pretrained(tmp_path / "student")
    assert made.config.num_hidden_layers == 1 and made.config.label2id == {"low": 0, "high": 1}


def test_image_classes_of_a_folder(tmp_path: Path, run: Run) -> None:
    import smoke
    from PIL import Image

    teacher, _ = smoke.image_classifier()
    for split in ("train", "test"):
        for i, name in enumerate(["red", "blue"] * 2):
            (tmp_path / "data" / split / name).mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (20, 10), name).save(tmp_path / "data" / split / name / f"{i}.png")
    run("image_classification.py", f"--dataset data --teacher {teacher} --student_layers 1")
    assert tf.AutoModelForImageClassification.from_pretrained(tmp_path / "student").config.num_hidden_layers == 1


@pytest.mark.parametrize("script", ["audio_classification.py", "image_classification.py"])
def test_missing_arguments_are_named(run: Run, script: str, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        run(script, "")
    assert "error: --teacher and --dataset are needed" in capsys.readouterr().err


def test_labels_unknown_to_the_teacher_raise(tmp_path: Path, run: Run, capsys: pytest.CaptureFixture) -> None:
    import smoke

    teacher, _ = smoke.audio_classifier()
    by_folder(tmp_path / "data", "label", ["high", "middle"])
    with pytest.raises(SystemExit):
        run("audio_classification.py", f"--dataset data --teacher {teacher} --student_layers 1")
    assert "error: the teacher's labels are ['high', 'low']; it has no ['middle']" in capsys.readouterr().err


def test_text_classes_of_a_csv(tmp_path: Path, run: Run) -> None:
    """Labels are names, some of them missing; the teacher has them in another order, which is matched by name."""
    import smoke

    teacher, student = smoke._berts(tf.BertForSequenceClassification, smoke.SENTENCES, labels=["pos", "neg"])
    rows = [[text, "" if i == 2 else "pos" if "good" in text else "neg"] for i, text in enumerate(smoke.SENTENCES * 4)]
    for name in ("mine.csv", "held_out.csv"):
        with (tmp_path / name).open("w", newline="") as file:
            csv.writer(file).writerows([["utterance", "mood"], *rows])
    columns = "--text_column utterance --label_column mood --max_length 8"
    run("text_classification.py", f"--train_file mine.csv {columns} --teacher {teacher} --student {student}")
    made = tf.AutoModelForSequenceClassification.from_pretrained(tmp_path / "student")
    assert made.config.label2id == {"neg": 0, "pos": 1}


def test_label_values_of_a_csv_are_not_converted(tmp_path: Path) -> None:
    """Numbers with missing values, which pandas reads as floats, keep their names; unlabelled rows are kept."""
    import own_data

    (tmp_path / "train.csv").write_text("t,l\na,1\nb,\nc,10\nd,1\n")
    (tmp_path / "dev.csv").write_text("t,l\ne,10\nf,\n")
    data = own_data.texts("train.csv", "dev.csv", "t", "l")
    assert data["train"].features["label"].names == ["1", "10"]
    assert data["train"].to_dict() == {"text": ["a", "b", "c", "d"], "label": [0, -100, 1, 0]}
    assert data["validation"].to_dict() == {"text": ["e"], "label": [1]}
    (tmp_path / "many.jsonl").write_text("\n".join('{"t": "a", "l": "x"}' for _ in range(20)))
    data = own_data.texts("many.jsonl", None, "t", "l")
    assert (len(data["train"]), len(data["validation"])) == (18, 2)


def test_recordings_without_the_required_column_raise(tmp_path: Path) -> None:
    import own_data

    with_a_table(tmp_path / "data", "words", WORDS)
    with pytest.raises(
        SystemExit, match=r"data: split train with columns audio and text is needed. There is .*'words'"
    ):
        own_data.recordings("data", None, None, "text")
    with pytest.raises(SystemExit, match="split dev with columns audio and words is needed"):
        own_data.recordings("data", None, "dev", "words")
