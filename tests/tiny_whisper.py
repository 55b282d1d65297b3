"""A tiny multilingual Whisper with its tokenizer: languages, tasks and timestamps as in the published models."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers as tf

START, *TASKS = "<|startoftranscript|>", "<|en|>", "<|de|>", "<|transcribe|>", "<|translate|>", "<|notimestamps|>"
TIMES = [f"<|{0.02 * i:.2f}|>" for i in range(51)]  # for a window of one second
FRAMES, MELS = 100, 8


def tokenizer() -> tf.WhisperTokenizer:
    """Return a tokenizer of bytes, special tokens for beginning and end, and timestamps."""
    vocabulary = {**{chr(i) if 33 <= i < 127 else chr(256 + i): i for i in range(256)}, "<|endoftext|>": 256}
    made = tf.WhisperTokenizer(vocab=vocabulary, merges=[], pad_token="<|endoftext|>")
    made.add_special_tokens({"additional_special_tokens": [START, *TASKS]})
    made.add_tokens(TIMES)
    return made


def ids_of(*names: str) -> list[int]:
    return tokenizer().convert_tokens_to_ids(list(names))


def whisper(seed: int = 1, **settings: Any) -> Any:
    """Return a model with generation settings as published, which include neither language nor task."""
    torch.manual_seed(seed)
    parts = {f"{side}_{size}": n for side in ("encoder", "decoder") for size, n in (("layers", 1), ("ffn_dim", 16))}
    heads = {f"{side}_attention_heads": 2 for side in ("encoder", "decoder")}
    ends = {"pad_token_id": 256, "bos_token_id": 256, "eos_token_id": 256, "decoder_start_token_id": 257}
    config = tf.WhisperConfig(
        vocab_size=len(tokenizer()), d_model=16, num_mel_bins=MELS, max_source_positions=FRAMES // 2,
        max_target_positions=48, begin_suppress_tokens=None, suppress_tokens=None, init_std=0.3,
        **parts, **heads, **ends,
    )  # fmt: skip
    model = tf.WhisperForConditionalGeneration(config)
    with torch.no_grad():  # the end token is also padding, whose row starts at 0: it would never be the likeliest
        model.proj_out.weight[256] = 0.5 * torch.randn(16)
    english, german, transcribe, translate, notimestamps = ids_of(*TASKS)
    published = {
        "is_multilingual": True,
        "lang_to_id": {"<|en|>": english, "<|de|>": german},
        "task_to_id": {"transcribe": transcribe, "translate": translate},
        "no_timestamps_token_id": notimestamps,
        "max_initial_timestamp_index": 50,
        **ends,
        **settings,
    }
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "generation_config.json").write_text(json.dumps(published))
        model.generation_config = tf.GenerationConfig.from_pretrained(folder)
    return model.eval()


def sounds(count: int = 3, *, seed: int = 0) -> torch.Tensor:
    """Return features of `count` recordings, `[count mel frames]`."""
    return torch.randn(count, MELS, FRAMES, generator=torch.Generator().manual_seed(seed))
