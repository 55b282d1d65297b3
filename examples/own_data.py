"""Data of your own, from files and folders: texts with labels, and recordings. No example: the scripts read by it."""

import csv
from pathlib import Path
from typing import Any

from datasets import Audio, ClassLabel, Dataset, DatasetDict, Features, Value, load_dataset

SUFFIXES = (".wav", ".flac", ".ogg", ".mp3")


def texts(file: str, validation_file: str | None, text_column: str, label_column: str) -> DatasetDict:
    """The splits train and validation with the columns text and label, of csv, jsonl or parquet files.

    Labels may be words or numbers. A row without one gets the label -100: the teacher teaches on it all the same.
    Without a validation file a tenth of the rows is held out.
    """
    kind = {".csv": "csv", ".parquet": "parquet"}.get(Path(file).suffix, "json")
    files = {"train": file} if validation_file is None else {"train": file, "validation": validation_file}
    data = load_dataset(kind, data_files=files)
    if validation_file is None:
        cut = data["train"].train_test_split(test_size=0.1, seed=42)
        data = DatasetDict({"train": cut["train"], "validation": cut["test"]})
    data["validation"] = data["validation"].filter(lambda row: row[label_column] is not None)

    def name(label: Any) -> str:
        return f"{label:g}" if isinstance(label, float) else str(label)  # numbers with gaps are read as floats

    labels = {name(label) for split in data.values() for label in split[label_column] if label is not None}
    known = ClassLabel(names=sorted(labels))
    return data.map(
        lambda row: {
            "text": row[text_column],
            "label": -100 if row[label_column] is None else known.str2int(name(row[label_column])),
        },
        remove_columns=data["train"].column_names,
        features=Features({"text": Value("string"), "label": known}),
    )


def recordings(dataset: str, config: str | None, train_split: str | None, column: str) -> tuple[Dataset, Dataset]:
    """What to train on and what to measure on (validation, or else test), with the columns audio and `column`.

    `hf_distill.data.audio` decodes them, by soundfile. (`datasets` itself needs torchcodec and FFmpeg for that.)

    Args:
        dataset: a Hub id; a folder of parquet files; or one of audio files, in which SPLIT/metadata.csv has their
            file_name and `column`, or, without it, a file's label is the name of its folder: SPLIT/LABEL/x.wav.
        config: which part of a dataset of the Hub; None: "clean" for LibriSpeech.
        train_split: the split to train on; None: "train.100" for LibriSpeech, else "train".
        column: what is taught: text or label.
    """
    if dataset == "openslr/librispeech_asr":
        config, train_split = config or "clean", train_split or "train.100"
    train_split = train_split or "train"
    splits = {path.name: _of_folder(path, column) for path in sorted(Path(dataset).glob("*/"))}
    splits = {name: rows for name, rows in splits.items() if rows} or load_dataset(dataset, config)
    held_out = "validation" if "validation" in splits else "test"
    for name in (train_split, held_out):
        if name not in splits or not {"audio", column} <= set(splits[name].column_names):
            found = {name: split.column_names for name, split in splits.items()}
            raise SystemExit(f"{dataset}: split {name} with columns audio and {column} is needed. There is {found}.")
    # Undecoded; a column that is not marked as audio holds bytes or paths already.
    train, test = (
        split.cast_column("audio", Audio(decode=False)) if isinstance(split.features["audio"], Audio) else split
        for split in (splits[train_split], splits[held_out])
    )
    return train, test


def _of_folder(folder: Path, column: str) -> Dataset | None:
    """A split that lies in a folder of audio files; None where there are none."""
    table = folder / "metadata.csv"
    if table.is_file():
        with table.open(newline="", encoding="utf-8") as file:
            rows = [{"audio": str(folder / row.pop("file_name")), **row} for row in csv.DictReader(file)]
    else:
        files = sorted(path for path in folder.glob("*/*") if path.suffix.lower() in SUFFIXES)
        rows = [{"audio": str(path), column: path.parent.name} for path in files]
    return Dataset.from_list(rows) if rows else None
