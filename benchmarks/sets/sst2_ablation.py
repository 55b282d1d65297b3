"""What the ablation of starts learns from: SST-2 with a fine-tuned teacher, or tiny models and tokens by chance."""

from __future__ import annotations

import argparse
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import AutoTokenizer, BertConfig, BertForSequenceClassification, DataCollatorWithPadding, set_seed

from benchmarks import protocol
from benchmarks.places import data_folder, encoder_folder, read_json_lines
from benchmarks.sets import sst2

Features = list[dict[str, Any]]


@dataclass(frozen=True)
class Data:
    """Features for the collator, and a fine-tuned teacher."""

    train: Features
    held_out: Features
    dev: Features
    teacher: Any
    collator: Callable[[list[Any]], dict[str, torch.Tensor]]
    lengths_of: str = "input_ids"


def read_sst2(options: argparse.Namespace) -> Data:
    """Phrases to learn from, without those that are a part of a held-out sentence; the teacher of `real_data.py`."""
    folder, encoder = data_folder(options.data_dir, "sst2"), encoder_folder(options.encoder)
    case = sst2.load(folder, encoder, teacher_steps=options.teacher_steps)
    trained = protocol.Trainings(case, options.work_dir, print)
    teacher = trained("teacher", case.teacher_settings[0], 0).model
    texts = {split: read_json_lines(folder / f"{split}.jsonl") for split in ("train", "dev", "test")}
    known = {row["text"] for split in ("dev", "test") for row in texts[split]}
    sentences = [row for row in texts["train"] if row["text"] not in known]
    chance = random.Random(0)
    chosen = chance.sample(sentences, options.held_out)
    ids = AutoTokenizer.from_pretrained(encoder)([row["text"] for row in chosen])["input_ids"]
    held_out = [{"input_ids": i, "labels": row["label"]} for i, row in zip(ids, chosen, strict=True)]
    joined = "\n".join(as_text(row) for row in held_out)
    phrases = [row for row in case.transfer if as_text(row) not in joined]
    train = chance.sample(phrases, min(options.examples, len(phrases)))
    return with_own_tokens(Data(train, held_out, case.dev, teacher, DataCollatorWithPadding(case.collator.tokenizer)))


def as_text(row: dict[str, Any]) -> str:
    """A phrase's tokens without the special ones around it, so that one phrase can be found in another."""
    return f" {' '.join(map(str, row['input_ids'][1:-1]))} "


def with_own_tokens(data: Data) -> Data:
    """Only the embeddings of tokens that occur: outputs stay the same, and the optimizer has half as much to do."""
    renamed = only_own_tokens((data.train, data.held_out, data.dev), (data.teacher,))
    return Data(*renamed, data.teacher, data.collator)


def only_own_tokens(splits: Sequence[Features], models: Iterable[Any]) -> list[Features]:
    """The splits with tokens numbered anew; these models, in place, with the embeddings of those that occur."""
    kept = sorted({0, *(i for rows in splits for row in rows for i in row["input_ids"])})  # 0 pads
    new = {old: i for i, old in enumerate(kept)}
    for model in models:
        embeddings = model.get_input_embeddings()
        fewer = nn.Embedding.from_pretrained(embeddings.weight.detach()[kept].clone(), freeze=False, padding_idx=0)
        model.set_input_embeddings(fewer)
        model.config.vocab_size = len(kept)
    return [[{**row, "input_ids": [new[i] for i in row["input_ids"]]} for row in rows] for rows in splits]


def made_up(options: argparse.Namespace) -> Data:
    """For trying out the script: a tiny teacher that has learned nothing, and tokens by chance."""
    set_seed(0)
    sizes = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32, "vocab_size": 30}
    teacher = BertForSequenceClassification(BertConfig(num_hidden_layers=6, num_labels=2, **sizes))

    def rows(count: int) -> Features:
        lengths = torch.randint(3, 9, (count,)).tolist()
        return [{"input_ids": torch.randint(1, 30, (n,)).tolist(), "labels": n % 2} for n in lengths]

    def collate(examples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        ids = [torch.tensor(example["input_ids"]) for example in examples]
        padded = nn.utils.rnn.pad_sequence(ids, batch_first=True)
        labels = torch.tensor([example["labels"] for example in examples])
        return {"input_ids": padded, "attention_mask": (padded != 0).long(), "labels": labels}

    return with_own_tokens(Data(rows(40), rows(8), rows(12), teacher.eval(), collate))
