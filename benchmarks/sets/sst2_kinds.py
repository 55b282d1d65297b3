"""What the comparison of kinds of teacher learns from: SST-2 with three fine-tuned teachers, or tiny made-up ones."""

from __future__ import annotations

import argparse
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import BertConfig, BertForSequenceClassification, DataCollatorWithPadding, set_seed

from benchmarks import protocol
from benchmarks.places import data_folder, encoder_folder
from benchmarks.sets import sst2
from benchmarks.sets.sst2_ablation import Features, made_up, only_own_tokens


@dataclass(frozen=True)
class Data:
    """Features for the collator, and one fine-tuned teacher a seed."""

    train: Features
    dev: Features
    test: Features
    teachers: Sequence[Any]
    collator: Callable[[list[Any]], dict[str, torch.Tensor]]
    lengths_of: str = "input_ids"


def read_sst2(options: argparse.Namespace, folder: Path) -> Data:
    """A part of the phrases to learn from; teachers as `real_data.py` fine-tunes them, one for each seed."""
    encoder = encoder_folder(options.encoder)
    case = sst2.load(data_folder(options.data_dir, "sst2"), encoder, teacher_steps=options.teacher_steps)
    trained = protocol.Trainings(case, folder, lambda line: print(line, flush=True))
    teachers = [trained("teacher", case.teacher_settings[0], seed).model.eval() for seed in options.seeds]
    train = random.Random(0).sample(case.transfer, min(options.examples, len(case.transfer)))
    splits = only_own_tokens((train, case.dev, case.test), teachers)
    return Data(*splits, teachers, DataCollatorWithPadding(case.collator.tokenizer))


def tiny(options: argparse.Namespace) -> Data:
    """For trying out the script: six layers that have learned nothing, and tokens by chance."""
    rows = made_up(options)
    config = rows.teacher.config
    sizes = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32, "vocab_size": config.vocab_size}
    teachers = []
    for seed in options.seeds:
        set_seed(seed)
        teachers.append(BertForSequenceClassification(BertConfig(num_hidden_layers=6, num_labels=2, **sizes)).eval())
    return Data(rows.train, rows.dev, rows.held_out, teachers, rows.collator)
