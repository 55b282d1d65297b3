"""Augmented copies of a dataset: their number and order, and the cache by fingerprint."""

from __future__ import annotations

import datasets
import pytest
import torch

from hf_distill.augment import Augmentation, Noise, WordReplacement, augment_dataset
from hf_distill.errors import SettingError
from tests.augment.making import Counting, Draws, masked_lm, whole_words
from tests.trainer.tiny import examples

WORDS = 23


def replacing(*, seed: int = 0, **settings) -> WordReplacement:
    return WordReplacement(whole_words(), masked_lm=masked_lm(WORDS, seed=seed), **{"probability": 0.5, **settings})


def data(count: int = 6) -> datasets.Dataset:
    columns = {name: [one[name] for one in examples(count)] for name in ("input_ids", "labels")}
    return datasets.Dataset.from_dict(columns).cast_column("labels", datasets.ClassLabel(names=["a", "b", "c"]))


def test_each_example_is_followed_by_its_copies() -> None:
    made = augment_dataset(data(), replacing(), copies=4, batch_size=4)
    assert made.features == data().features
    assert len(made) == 6 * 5
    for i, one in enumerate(data()):
        rows = [made[5 * i + j] for j in range(5)]
        assert rows[0] == one
        assert all(row["labels"] == one["labels"] for row in rows)
        assert all(len(row["input_ids"]) == len(one["input_ids"]) for row in rows)
    texts = {tuple(ids) for ids in made["input_ids"][:]}
    assert len(texts) > 18
    assert len(augment_dataset(data(), replacing(), copies=2, keep_original=False)) == 12


def test_the_default_is_twenty_copies_as_in_the_paper() -> None:
    assert len(augment_dataset(data(2), replacing())) == 2 * 21


def test_the_seed_determines_the_copies() -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = augment_dataset(data(), replacing(), copies=3)
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(3)
    assert augment_dataset(data(), replacing(), copies=3)["input_ids"][:] == first["input_ids"][:]
    assert augment_dataset(data(), replacing(), copies=3, seed=1)["input_ids"][:] != first["input_ids"][:]
    # With fewer copies, they are the first ones.
    fewer = augment_dataset(data(), replacing(), copies=1, keep_original=False)["input_ids"][:]
    assert fewer == first["input_ids"][1::4]


def test_equal_examples_get_different_copies() -> None:
    twins = datasets.Dataset.from_dict({"input_ids": [[1, 2, 3]] * 40})
    drawn = Augmentation(lambda one: {"input_ids": [int(torch.randint(10**9, ()))]}, moves_positions=True)
    made = augment_dataset(twins, drawn, copies=3, keep_original=False, batch_size=8)["input_ids"][:]
    assert len({tuple(ids) for ids in made}) == 120


def test_the_fingerprint_identifies_the_augmented_dataset() -> None:
    """It stays the same after use, which fills caches, and changes with every setting."""
    augment = WordReplacement(whole_words(), embeddings=torch.eye(WORDS), probability=0.5)
    first = augment_dataset(data(), augment, copies=2)._fingerprint
    assert augment_dataset(data(), augment, copies=2)._fingerprint == first
    again = WordReplacement(whole_words(), embeddings=torch.eye(WORDS), probability=0.5)
    assert augment_dataset(data(), again, copies=2)._fingerprint == first
    others = [
        augment_dataset(data(), augment, copies=3),
        augment_dataset(data(), augment, copies=2, seed=1),
        augment_dataset(data(), augment, copies=2, keep_original=False),
        augment_dataset(data(), replacing(), copies=2),
        augment_dataset(data(), replacing(seed=1), copies=2),
        augment_dataset(data(), replacing(probability=0.6), copies=2),
        augment_dataset(data(5), augment, copies=2),
    ]
    assert len({first, *(other._fingerprint for other in others)}) == 1 + len(others)


def test_a_dataset_on_disk_is_read_from_the_cache_the_second_time(tmp_path) -> None:
    data().save_to_disk(tmp_path / "data")
    before = Counting.calls
    for _ in range(2):
        augment_dataset(datasets.load_from_disk(tmp_path / "data"), Counting(), copies=2)
    assert Counting.calls - before == 12


def test_sound_can_be_augmented_offline() -> None:
    waves = datasets.Dataset.from_dict({"input_values": [[0.1, -0.2, 0.3], [0.5, 0.5]], "labels": [[1], [2]]})
    made = augment_dataset(waves, Noise(snr_db=(0.0, 0.0)), copies=2)
    assert made["labels"][:] == [[1]] * 3 + [[2]] * 3
    assert made[0]["input_values"] == waves[0]["input_values"] != made[1]["input_values"] != made[2]["input_values"]


@pytest.mark.parametrize(
    ("arguments", "settings", "message"),
    [
        (([{"input_ids": [1]}], Draws()), {}, r"takes a datasets\.Dataset, not a list"),
        ((datasets.DatasetDict({"train": data()}), Draws()), {}, r"not a DatasetDict.*Pass the training split"),
        ((data(), Draws()), {"copies": 0}, r"1 augmentations, copies=0"),
        ((data(),), {}, r"0 augmentations"),
        ((data(), Noise(acts_on="batch")), {}, r'acts_on="batch" changes collated batches'),
    ],
)
def test_invalid_arguments_raise(arguments, settings, message: str) -> None:
    with pytest.raises(SettingError, match=message):
        augment_dataset(*arguments, **settings)
