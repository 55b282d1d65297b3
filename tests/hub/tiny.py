"""Tiny models, a tokenizer and datasets made from nothing, for the tests of the Hub."""

from __future__ import annotations

import torch
import transformers as tf
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers, processors

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "put", "your", "own", "text", "here", "|"]
SMALL = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
BERT = {**SMALL, "intermediate_size": 16, "vocab_size": len(WORDS)}


def tokenizer() -> tf.PreTrainedTokenizerFast:
    """A word-level tokenizer that knows `WORDS`."""
    core = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    core.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "mask_token": "[MASK]"}
    return tf.PreTrainedTokenizerFast(tokenizer_object=core, **names)


def bert(head: str, *, labels: int = 3, seed: int = 0, **changed: int) -> tf.PreTrainedModel:
    """A random `BertFor<head>`, in evaluation mode."""
    torch.manual_seed(seed)
    config = tf.BertConfig(**{**BERT, **changed}, num_labels=labels)
    return getattr(tf, f"BertFor{head}")(config).eval()


def sentences(words: tf.PreTrainedTokenizerFast, count: int = 8) -> Dataset:
    """Short tokenised texts of different lengths, each with one of three labels."""
    texts = [" ".join(WORDS[5 : 6 + i % 5]) for i in range(count)]
    return Dataset.from_dict({**words(texts), "labels": [i % 3 for i in range(count)]})
