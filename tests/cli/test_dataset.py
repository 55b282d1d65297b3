"""The dataset that a command names: files, folders and ids, and what is said where there is none."""

from __future__ import annotations

import argparse
import csv
import json
import re
from pathlib import Path
from typing import Any

import datasets
import pytest

from hf_distill.cli.dataset import add_dataset_arguments, dataset_of
from hf_distill.cli.main import main
from hf_distill.errors import DataError, SettingError
from hf_distill.teachers.cache.build import CachePass
from hf_distill.teachers.passes import ShardedPass
from tests.heads import HEADS
from tests.tiny_tokenizers import tokenizer
from tests.trainer.tiny import bert

ROWS = [{"question": f"w{i} w{i + 1}", "intent": "yes" if i % 2 else "no"} for i in range(3, 9)]


@pytest.fixture(autouse=True)
def cache_of_datasets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache of datasets"))


def write(path: Path) -> str:
    """The rows as a file of the kind that the name ends with."""
    path.parent.mkdir(exist_ok=True)
    if path.suffix in (".csv", ".tsv"):
        with path.open("w", newline="") as file:
            table = csv.DictWriter(file, list(ROWS[0]), delimiter="\t" if path.suffix == ".tsv" else ",")
            table.writeheader()
            table.writerows(ROWS)
    elif path.suffix == ".parquet":
        datasets.Dataset.from_list(ROWS).to_parquet(path)
    else:
        path.write_text(json.dumps(ROWS) if path.suffix == ".json" else "\n".join(map(json.dumps, ROWS)))
    return str(path)


def named(*arguments: str) -> Any:
    parser = argparse.ArgumentParser()
    add_dataset_arguments(parser)
    return dataset_of(parser.parse_args(arguments))


@pytest.mark.parametrize("name", ["a.csv", "a.CSV", "a.tsv", "a.json", "a.jsonl", "a.parquet"])
def test_a_file_is_a_dataset(tmp_path: Path, name: str) -> None:
    if name == "a.CSV":
        Path(write(tmp_path / "a.csv")).rename(tmp_path / name)
    else:
        write(tmp_path / name)
    assert named(str(tmp_path / name)).to_list() == ROWS


def test_folders_of_files_and_of_save_to_disk(tmp_path: Path) -> None:
    write(tmp_path / "files" / "train.csv")
    write(tmp_path / "files" / "test.csv")
    assert named(str(tmp_path / "files"), "--split", "test").to_list() == ROWS
    datasets.Dataset.from_list(ROWS).save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"dev": datasets.Dataset.from_list(ROWS)}).save_to_disk(tmp_path / "splits")
    assert named(str(tmp_path / "one")).to_list() == ROWS
    assert named(str(tmp_path / "splits"), "--split", "dev").to_list() == ROWS


@pytest.mark.parametrize(
    ("name", "content", "error", "message"),
    [
        ("train.csv", None, DataError, "dataset '.*train.csv': there is no such file or folder.$"),
        ("./data", None, DataError, "there is no such file or folder.$"),
        ("a/b/c", None, DataError, "dataset 'a/b/c': there is no such file or folder.$"),
        ("a.xlsx", "x", SettingError, r"a file of this kind is not read. Allowed: .csv, .tsv, .json, .jsonl, .parquet"),
        ("empty.csv", "", DataError, "cannot be read as csv: No columns to parse from file"),
        ("bad.json", "{", DataError, "bad.json' cannot be read as json: "),
        ("some-org/nope", None, DataError, "'some-org/nope', split 'train': there is no such file or folder, and as a"),
    ],
)
def test_what_is_no_dataset(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, content: str | None, error: Any, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(error, match=message):
        named(name)


def test_a_file_beside_it_may_have_been_meant(tmp_path: Path) -> None:
    write(tmp_path / "train.csv")
    with pytest.raises(DataError, match=r"no such file or folder. Did you mean '.*/train.csv'\?"):
        named(str(tmp_path / "trian.csv"))
    (tmp_path / "folder").mkdir()
    with pytest.raises(DataError, match=r"cannot be loaded: .*contain any data files. Give a file"):
        named(str(tmp_path / "folder"))


def test_ctrl_c_in_a_cache_build_says_what_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    bert(seed=1, vocab_size=40).save_pretrained(tmp_path / "teacher")
    tokenizer().save_pretrained(tmp_path / "teacher")
    file = write(tmp_path / "a.csv")
    command = ["cache", "build", str(tmp_path / "teacher"), file, str(tmp_path / "made")]
    command += ["--task", "classification", "--text-column", "question", "--batch-size", "2"]
    part = CachePass._make_part
    monkeypatch.setattr(CachePass, "_make_part", _interrupted(part, at=2))
    assert re.match(r"Stopped. 0 (of 6 )?examples are kept in ", stopped(command, capsys))
    monkeypatch.setattr(CachePass, "_make_part", part)
    assert main(command) == 0
    assert "TeacherCache(6 examples" in capsys.readouterr().out


def test_ctrl_c_in_complete_says_what_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    HEADS["llama_causal_lm"].make(2).save_pretrained(tmp_path / "teacher")
    tokenizer(40).save_pretrained(tmp_path / "teacher")
    datasets.Dataset.from_list([{"prompt": "w5"}] * 520).save_to_disk(tmp_path / "prompts")  # two shards
    command = ["complete", *(str(tmp_path / name) for name in ("teacher", "prompts", "made"))]
    command += ["--max-new-tokens", "1", "--batch-size", "512"]
    write_shard = ShardedPass.write_shard
    monkeypatch.setattr(ShardedPass, "write_shard", _interrupted(write_shard, at=2))
    said = stopped(command, capsys)
    kept = sum(json.loads(receipt.read_text())["rows"] for receipt in (tmp_path / "made").glob("shard-*.json"))
    assert 0 < kept < 520 and said.startswith("Stopped. ") and f"{kept} " in said and "are kept in" in said
    monkeypatch.setattr(ShardedPass, "write_shard", write_shard)
    assert main(command) == 0
    assert "520 answers in" in capsys.readouterr().out


def stopped(command: list[str], capsys: pytest.CaptureFixture) -> str:
    """The beginning of the last message of a command that is interrupted."""
    with pytest.raises(SystemExit) as stop:
        main(command)
    assert stop.value.code == 130
    said = " ".join(capsys.readouterr().out.split())
    return re.search("Stopped.*", said)[0][:80]


def _interrupted(method: Any, *, at: int) -> Any:
    """Ctrl-C at the call of this number."""
    calls = []

    def called(*arguments: Any, **named: Any) -> Any:
        calls.append(1)
        if len(calls) == at:
            raise KeyboardInterrupt
        return method(*arguments, **named)

    return called
