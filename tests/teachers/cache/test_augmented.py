"""Caches of a fixed number of augmented versions: the training finds them; other augmentations raise."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from hf_distill import SettingError
from hf_distill.augment import Augmentation, AugmentingCollator
from hf_distill.teachers import CachedTeacher, Dense, TeacherCache
from tests.trainer.tiny import assert_moved, bert, examples, make, padded, update_difference, weights


def scrambled(example: dict[str, Any]) -> dict[str, Any]:
    """Replace each token with probability one half."""
    ids = example["input_ids"]
    return {**example, "input_ids": [int(torch.randint(1, 23, ())) if torch.rand(()) < 0.5 else i for i in ids]}


def longer(example: dict[str, Any]) -> dict[str, Any]:
    return {**example, "input_ids": [*example["input_ids"], 1 + int(torch.randint(0, 22, ()))]}


CHANGES = Augmentation(scrambled, moves_positions=False)
GROWS = Augmentation(longer, moves_positions=True)


def augmenting(views: int | None = 3, *augmentations: Any, **settings: Any) -> AugmentingCollator:
    return AugmentingCollator(padded, *(augmentations or (CHANGES,)), views=views, **settings)


def built(folder: Path, collator: Any, some: list, **changed: Any) -> TeacherCache:
    settings = {"data_collator": collator, "progress": False, "batch_size": 1, "store": Dense("float32"), **changed}
    return TeacherCache.build(bert(seed=1), some, folder, **settings)


def test_versions_depend_on_the_example_alone() -> None:
    """Not on the other examples, their order or the label; each epoch takes the next version."""
    some, collate = examples(6), augmenting()
    first = collate(some)["input_ids"]
    part = [{**some[4], "labels": 9}, some[1]]
    assert torch.equal(collate(part)["input_ids"][:, :6], first[[4, 1], :6])
    shown = []
    for epoch in range(4):
        collate.set_epoch(epoch)
        shown.append(collate(some)["input_ids"])
    assert torch.equal(shown[3], shown[0]) and torch.equal(shown[0], first)
    assert not torch.equal(shown[0], shown[1]) and not torch.equal(shown[1], shown[2])
    assert not torch.equal(augmenting(seed=1)(some)["input_ids"], first)
    before = torch.get_rng_state()
    collate(some)
    assert torch.equal(torch.get_rng_state(), before)


def test_training_with_cached_versions_equals_the_live_teacher(tmp_path: Path) -> None:
    """Six examples in two versions, over three epochs, shuffled."""
    some, start = examples(6), weights(bert())
    cache = built(tmp_path / "cache", augmenting(2, CHANGES, GROWS), some)
    there = {"views": 2, "seed": 0, "augmentations": ["scrambled", "longer"]}
    assert len(cache) == 12 and cache.manifest["augmentation"] == there
    run = {"max_steps": 15, "per_device_train_batch_size": 1, "train_dataset": some, "learning_rate": 0.02}
    trained = []
    for number, teacher in enumerate((bert(seed=1), CachedTeacher(cache))):
        collator = augmenting(2, CHANGES, GROWS)
        trainer = make(tmp_path / str(number), bert(), teacher, data_collator=collator, **run)
        trainer.train()
        trained.append(weights(trainer.model))
    assert_moved(trained[0], start)
    assert update_difference(trained[1], trained[0], start) < 1e-5


def test_other_augmentations_raise(tmp_path: Path) -> None:
    some = examples(4)
    plain, of_views = built(tmp_path / "plain", padded, some), built(tmp_path / "views", augmenting(2), some)
    for cache, collator, message in (
        (
            plain,
            augmenting(None),
            r"An augmentation changes examples randomly.*AugmentingCollator.*views=4",
        ),
        (
            plain,
            augmenting(2),
            r"makes 2 augmented versions of each example, and the cache was built from the",
        ),
        (
            of_views,
            augmenting(3),
            r"was built from other versions of the examples: views: 2 there, 3 now. Train",
        ),
        (of_views, augmenting(2, seed=1), r"other versions of the examples: seed: 0 there, 1 now"),
        (of_views, augmenting(None), "An augmentation changes examples randomly"),
    ):
        with pytest.raises(SettingError, match=message):
            make(tmp_path, bert(), CachedTeacher(cache), data_collator=collator)
    fewer = CachedTeacher(of_views).wrap_collator(augmenting(1))
    assert "teacher_cached_logits" in fewer(some)
    assert built(tmp_path / "only", augmenting(2, student_only=True), some).manifest["augmentation"] is None


def test_invalid_numbers_of_views_raise() -> None:
    after = Augmentation(lambda batch: batch, moves_positions=False, acts_on="batch")
    for views, augmentation, message in (
        (0, CHANGES, "views=0: must be a whole number of at least 1"),
        (2, after, r"views=2, and .* acts on collated batches, which differ in every epoch"),
    ):
        with pytest.raises(SettingError, match=message):
            augmenting(views, augmentation)
