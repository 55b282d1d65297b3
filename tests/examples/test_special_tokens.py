"""Scripts that cut causal-LM texts into examples, with a tokenizer that adds a start token to each text."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
import transformers as tf
from tokenizers.processors import TemplateProcessing

import hf_distill

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
START = "<|endoftext|>"


class Reached(Exception):
    """The script has built its dataset."""


def dataset_of(script: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """Return the tokens that the script would train on."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import smoke

    made = smoke.text()
    for path in made[:2]:
        tokenizer = tf.AutoTokenizer.from_pretrained(path)
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single=f"{START} $A", special_tokens=[(START, tokenizer.eos_token_id)]
        )
        tokenizer.save_pretrained(path)
        assert tf.AutoTokenizer.from_pretrained(path)("a")["input_ids"][0] == tokenizer.eos_token_id

    def caught(**keywords: Any) -> None:
        raise Reached(keywords["train_dataset"]["input_ids"], tokenizer.eos_token_id)

    monkeypatch.setattr(smoke, "text", lambda: made)
    monkeypatch.setattr(hf_distill, "DistillationTrainer", caught)
    monkeypatch.setattr(sys, "argv", [script, "--smoke", "--output_dir", str(folder)])
    with pytest.raises(Reached) as reached:
        runpy.run_path(str(EXAMPLES / script), run_name="__main__")
    rows, start = reached.value.args
    return [[place for place, token in enumerate(row) if token == start] + [len(row)] for row in rows]


def test_no_start_token_within_a_text(tmp_path, monkeypatch) -> None:
    """In this vocabulary the start token is also the end token."""
    for found in dataset_of("on_policy.py", tmp_path, monkeypatch):
        *places, length = found
        assert places == [0, length - 1]
    rows = dataset_of("causal_lm.py", tmp_path, monkeypatch)
    assert rows and all(row == [32] for row in rows)
