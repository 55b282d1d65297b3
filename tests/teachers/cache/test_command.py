"""`hf-distill cache`: building from a folder and a dataset on disk, showing, and errors."""

from __future__ import annotations

import argparse
from pathlib import Path

import datasets
import pytest

from hf_distill import SettingError
from hf_distill.cli.cache import add_store_options, store_of
from hf_distill.cli.main import main
from hf_distill.teachers.cache import CachedTeacher, Dense, Hybrid, Sampled, TopK
from tests.tiny_tokenizers import tokenizer
from tests.trainer.tiny import bert, make

TEXTS = ["w3 w4 w5", "w6", "w7 w8 w9 w10", "w2 w2"]


@pytest.fixture
def teacher(tmp_path: Path) -> str:
    folder = tmp_path / "teacher"
    bert(seed=1, vocab_size=40).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.fixture
def texts(tmp_path: Path) -> str:
    folder = tmp_path / "texts"
    datasets.Dataset.from_dict({"text": TEXTS, "label": [0, 1, 2, 0]}).save_to_disk(folder)
    return str(folder)


def run(*arguments: str) -> int:
    return main(["cache", *arguments])


def test_the_command_builds_and_shows_a_cache_that_trains(
    tmp_path: Path, teacher: str, texts: str, capsys: pytest.CaptureFixture
) -> None:
    folder = str(tmp_path / "cache")
    build = ("build", teacher, texts, folder, "--task", "classification", "--text-column", "text", "--batch-size", "3")
    assert run(*build) == 0
    printed = capsys.readouterr()
    printed_text = " ".join(printed.out.split())
    assert "takes about 216 B in all: 4 examples with 10 bytes of predictions each" in printed_text
    assert "4/4" in printed.err and " examples/s" in printed.err and "TeacherCache(4 examples, dense," in printed_text
    assert run("show", folder) == 0
    shown = capsys.readouterr().out
    assert "all checksums match" in shown and "head: classification, 3 columns" in shown
    words = tokenizer()
    data = datasets.load_from_disk(texts).map(lambda one: words(one["text"]), desc=None)
    trainer = make(
        tmp_path,
        bert(vocab_size=40),
        CachedTeacher(folder),
        train_dataset=data,
        processing_class=words,
        data_collator=None,
    )
    assert trainer.train().global_step == 2


def test_the_command_builds_a_cache_of_hidden_states_alone(
    tmp_path: Path, teacher: str, texts: str, capsys: pytest.CaptureFixture
) -> None:
    folder = str(tmp_path / "cache")
    build = ("build", teacher, texts, folder, "--task", "classification", "--text-column", "text")
    assert run(*build, "--hidden", "-1", "0", "--no-predictions", "--activation-dtype", "bfloat16") == 0
    printed_text = " ".join(capsys.readouterr().out.split())
    assert "with 0 bytes of predictions each, and activations of 64 bytes at each of 2.5 tokens" in printed_text
    assert run("show", folder) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "activations: hidden of the embeddings, hidden of block 0, bfloat16" in shown
    card = (tmp_path / "cache" / "README.md").read_text()
    assert "| activations | hidden of the embeddings, hidden of block 0; bfloat16 |" in card


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (("--text-column", "words"), "--text-column: there is no column words. The dataset has text, label"),
        ((), "the dataset has the columns text, label, and no model input (input_ids,"),
    ],
)
def test_datasets_without_model_inputs_raise(
    tmp_path: Path, teacher: str, texts: str, capsys: pytest.CaptureFixture, changed: tuple[str, ...], message: str
) -> None:
    assert run("build", teacher, texts, str(tmp_path / "cache"), "--task", "classification", *changed) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "cache").exists()


def test_folders_without_a_dataset_or_cache_raise(tmp_path: Path, teacher: str, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "empty").mkdir()
    empty = str(tmp_path / "empty")
    assert run("build", teacher, empty, str(tmp_path / "cache"), "--task", "classification") == 2
    assert "cannot be loaded" in capsys.readouterr().err
    assert run("show", empty) == 2
    assert "holds no teacher cache" in capsys.readouterr().err


def parsed(*arguments: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_store_options(parser)
    return parser.parse_args(arguments)


@pytest.mark.parametrize(
    ("arguments", "store"),
    [
        ("", None),
        ("--store dense", Dense()),
        ("--store-dtype bfloat16", Dense("bfloat16")),
        ("--top-k 5", TopK(5)),
        ("--store top_k --temperature 1 3", TopK(temperatures=(1.0, 3.0))),
        ("--store sampled --samples 8 --proposal-power 0.5 --seed 3", Sampled(8, 1.0, 0.5, seed=3)),
        ("--store hybrid --top-k 4 --temperature 2 --store-dtype float32", Hybrid(4, temperature=2.0, dtype="float32")),
    ],
)
def test_options_select_the_store(arguments: str, store: object) -> None:
    assert store_of(parsed(*arguments.split())) == store


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            "--samples 8",
            "--samples is not an option of --store dense. It is one of --store sampled, hybrid",
        ),
        (
            "--store top_k --proposal-power 0.5",
            "--proposal-power is not an option of --store top_k. .* --store sampled",
        ),
        ("--store sampled --temperature 1 2", "--temperature 1 2: with --store sampled give one temperature"),
    ],
)
def test_options_of_another_store_raise(arguments: str, message: str) -> None:
    with pytest.raises(SettingError, match=message):
        store_of(parsed(*arguments.split()))
