"""Augmented copies of a whole dataset, made once before training, as in TinyBERT."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import datasets

from hf_distill._types import Example
from hf_distill.augment.augmentation import AnyAugmentation, before_collation, checked, seeded
from hf_distill.errors import SettingError


def augment_dataset(
    dataset: datasets.Dataset,
    *augmentations: AnyAugmentation,
    copies: int = 20,
    keep_original: bool = True,
    seed: int = 0,
    batch_size: int = 32,
) -> datasets.Dataset:
    """Return a dataset with `copies` augmented copies after each example; labels are kept.

    `datasets.Dataset.map` makes it: on disk for a dataset on disk, and cached by its fingerprint for the same dataset,
    augmentations and settings.

    Jiao et al. 2020, TinyBERT, algorithm 1: `copies` is N_a, 20 there.

    Args:
        dataset: a `datasets.Dataset`, tokenized or otherwise ready for a collator.
        augmentations: applied in this order, each on examples; see `Augmentation`.
        copies: number of copies of each example.
        keep_original: whether the example itself comes before its copies.
        seed: seed of the copies.
        batch_size: number of examples at once, which also changes the random numbers.

    Raises:
        SettingError: for another kind of dataset, no augmentation or one of collated batches, or copies below 1.

    >>> from hf_distill.augment import Augmentation
    >>> longer = Augmentation(lambda example: {"text": example["text"] + "!"}, moves_positions=False)
    >>> augment_dataset(datasets.Dataset.from_dict({"text": ["a", "b"]}), longer, copies=2)["text"][:]
    ['a', 'a!', 'a!', 'b', 'b!', 'b!']
    """
    if not isinstance(dataset, datasets.Dataset):
        raise SettingError(
            f"augment_dataset takes a datasets.Dataset, not a {type(dataset).__name__}. Pass the training split of "
            "several splits; augment a stream while training: AugmentingCollator."
        )
    if copies < 1 or batch_size < 1 or not augmentations:
        raise SettingError(
            f"augment_dataset: {len(augmentations)} augmentations, copies={copies}, batch_size={batch_size}. Each is "
            "at least 1."
        )
    if any(checked(augmentation).acts_on == "batch" for augmentation in augmentations):
        raise SettingError(
            'augment_dataset: an augmentation with acts_on="batch" changes collated batches. Use one that acts on '
            "examples, or AugmentingCollator."
        )
    make = _Copies(augmentations, copies, keep_original, seed)
    return dataset.map(make, batched=True, with_indices=True, batch_size=batch_size, features=dataset.features)


class _Copies:
    """The function for `map`, called with examples and their indices."""

    def __init__(self, augmentations: Sequence[AnyAugmentation], copies: int, keep_original: bool, seed: int) -> None:
        self.augmentations = augmentations
        self.copies = copies
        self.keep_original = keep_original
        self.seed = seed

    def __call__(self, columns: Mapping[str, list[Any]], indices: list[int]) -> dict[str, list[Any]]:
        names = list(columns)
        examples: list[Example] = [dict(zip(names, row, strict=True)) for row in zip(*columns.values(), strict=True)]
        versions: list[list[Example]] = [examples] if self.keep_original else []
        for copy in range(self.copies):
            with seeded("copy", self.seed, copy, indices[0], examples):
                versions.append(before_collation(self.augmentations, [dict(example) for example in examples]))
        rows = [version[i] for i in range(len(examples)) for version in versions]
        return {name: [row[name] for row in rows] for name in names}
