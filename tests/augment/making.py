"""Tiny tokenizers of each kind, masked LMs for them, and augmentations whose calls can be observed."""

from __future__ import annotations

from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import BertConfig, BertForMaskedLM, PreTrainedTokenizerFast

from hf_distill.teachers import ModelTeacher
from tests import tiny_tokenizers

SPECIAL = {"unk_token": "[UNK]", "pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
PIECES = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "good", "bad", "film", "play", "##ing", "##er", "see", ",", "7"]
PIECES += ["##7", "[unused1]", "fun", "sad", "act", "##th", "a", "the"]


def whole_words(count: int = 23) -> Any:
    """Return a tokenizer of words w0 …: w0 is padding and unknown, the last is the mask."""
    made = tiny_tokenizers.tokenizer(count)
    made.unk_token = "w0"
    made.mask_token = f"w{count - 1}"
    return made


def word_pieces() -> Any:
    """Return a tokenizer like BERT's."""
    model = models.WordPiece({piece: i for i, piece in enumerate(PIECES)}, unk_token="[UNK]")
    backend = Tokenizer(model)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    return PreTrainedTokenizerFast(tokenizer_object=backend, mask_token="[MASK]", **SPECIAL)


def byte_level() -> Any:
    """Return a tokenizer like GPT-2's and RoBERTa's: a space marks the beginning of a word."""
    pieces = [
        "Ġgood",
        "good",
        "Ġfilm",
        "s",
        "Ġ",
        ",",
        "g",
        "o",
        "d",
        "f",
        "i",
        "l",
        "m",
        "Ġg",
        "go",
        "Ġgo",
        "Ġgoo",
        "âĢĶ",
        "Ã",
        "Ġ(",
    ]
    ids = {piece: i for i, piece in enumerate(["<pad>", "<unk>", "<mask>", *pieces])}
    merges = [("Ġ", "g"), ("Ġg", "o"), ("Ġgo", "o"), ("Ġgoo", "d")]
    backend = Tokenizer(models.BPE(vocab=ids, merges=merges, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", pad_token="<pad>", mask_token="<mask>")


def sentence_piece() -> Any:
    """Return a tokenizer like T5's."""
    pieces = ["▁good", "▁film", "s", "▁", ",", "▁fun"]
    backend = Tokenizer(models.Unigram([(piece, -1.0) for piece in ["<pad>", "<unk>", *pieces]], unk_id=1))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", pad_token="<pad>")


def masked_lm(tokens: int, *, seed: int = 0) -> Any:
    """Return a masked LM with perturbed weights, so that no two words are equally likely."""
    size = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = BertForMaskedLM(BertConfig(vocab_size=tokens, **size))
        for parameter in model.parameters():
            parameter.data.add_(0.3 * torch.randn_like(parameter))
    return model


class NoPredictions:
    """An augmentation that draws from every generator but changes nothing."""

    moves_positions = False
    acts_on = "example"

    def __call__(self, example: dict[str, Any]) -> dict[str, Any]:
        torch.rand(3)
        return dict(example)


class Draws:
    """An augmentation that stores its random draw in a column."""

    moves_positions = False
    acts_on = "example"

    def __call__(self, example: dict[str, Any]) -> dict[str, Any]:
        return {**example, "drawn": float(torch.rand((), dtype=torch.float64))}


class Counting(NoPredictions):
    """An augmentation that counts its calls."""

    calls = 0

    def __call__(self, example: dict[str, Any]) -> dict[str, Any]:
        Counting.calls += 1
        return dict(example)


class PrecomputedTeacher(ModelTeacher):
    """Has its own collator, as a cached teacher does."""

    def wrap_collator(self, collator: Any) -> Any:
        return collator
