"""The quickstart's paragraphs as token ids, and which of them keep their label. Reads no files."""

from __future__ import annotations

import random
from collections.abc import Collection, Iterator, Sequence
from typing import Any

from datasets import Dataset
from transformers import DataCollatorWithPadding, PreTrainedTokenizerFast

from hf_distill.cli.stdlib_corpus import Paragraph

UNLABELLED = -100


def tokenize(paragraphs: Sequence[Paragraph], tokenizer: PreTrainedTokenizerFast) -> Dataset:
    """`input_ids`, `attention_mask` and `labels`, in the order of the paragraphs."""
    encoded = tokenizer([paragraph.text for paragraph in paragraphs], truncation=True)
    return Dataset.from_dict({**encoded, "labels": [paragraph.label for paragraph in paragraphs]})


def choose_labelled(labels: Sequence[int], *, share: float, seed: int) -> list[int]:
    """Indices of the examples that keep their label: the same share of every class, at least one.

    >>> choose_labelled([0, 0, 0, 0, 1, 1], share=0.5, seed=0)
    [1, 3, 4]
    """
    of_class: dict[int, list[int]] = {}
    for index, label in enumerate(labels):
        of_class.setdefault(label, []).append(index)
    chance = random.Random(seed)
    chosen: list[int] = []
    for label in sorted(of_class):
        members = of_class[label]
        chosen += chance.sample(members, max(1, round(share * len(members))))
    return sorted(chosen)


def hide_labels(dataset: Dataset, *, labelled: Collection[int]) -> Dataset:
    """The same examples; those not among `labelled` get -100, which means: no label is known."""
    kept = set(labelled)
    labels = [label if index in kept else UNLABELLED for index, label in enumerate(dataset["labels"])]
    return dataset.remove_columns("labels").add_column("labels", labels)


def batches(
    dataset: Dataset, tokenizer: PreTrainedTokenizerFast, *, batch_size: int, device: Any
) -> Iterator[dict[str, Any]]:
    """Padded batches in the dataset's order, on the device, without labels."""
    collate = DataCollatorWithPadding(tokenizer)
    inputs = dataset.remove_columns("labels")
    for start in range(0, len(inputs), batch_size):
        rows = [inputs[i] for i in range(start, min(start + batch_size, len(inputs)))]
        yield {name: value.to(device) for name, value in collate(rows).items()}
