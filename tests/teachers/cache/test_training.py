"""Training with a cached teacher: the trainer, L10, workers, evaluation, default collators, a custom loop."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from torch.utils.data import DataLoader
from transformers import default_data_collator

from hf_distill import DataError, Distiller
from hf_distill.teachers import CachedTeacher, TeacherCache
from tests.heads import HEADS
from tests.teachers.cache.built import build, made
from tests.trainer.tiny import assert_moved, assert_same_bits, bert, examples, make, padded, weights

RUN = {
    "max_steps": 6,
    "save_strategy": "steps",
    "save_steps": 3,
    "optim": "adamw_torch",
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "learning_rate": 0.01,
}


def cache_of(folder: Path, teacher: Any, some: list, **changed: Any) -> CachedTeacher:
    settings = {"data_collator": padded, "progress": False, "batch_size": 4, **changed}
    return CachedTeacher(TeacherCache.build(teacher, some, folder, **settings))


def test_l10_a_resumed_run_equals_the_uninterrupted_run(tmp_path: Path) -> None:
    cached = cache_of(tmp_path / "cache", bert(seed=1), examples(11))
    given = {"train_dataset": examples(11), **RUN}
    whole = make(tmp_path / "whole", bert(dropout=0.3), cached, **given)
    before = weights(whole.model)
    whole.train()
    resumed = make(tmp_path / "resumed", bert(seed=5, dropout=0.3), CachedTeacher(tmp_path / "cache"), **given)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "out" / "checkpoint-3"))
    assert_same_bits(weights(resumed.model), weights(whole.model))
    assert_moved(weights(whole.model), before)


def test_lookup_in_the_collator_or_in_the_loss(tmp_path: Path) -> None:
    """The training is the same."""
    cached = cache_of(tmp_path / "cache", bert(seed=1), examples(11))
    given = {"train_dataset": examples(11), "max_steps": 4}
    plain = make(tmp_path / "plain", bert(), cached, **given)
    plain.data_collator = padded
    plain.train()
    assert cached._looked_up
    wrapped = make(tmp_path / "wrapped", bert(), cached, data_collator=cached.wrap_collator(padded), **given)
    cached._looked_up = False
    wrapped.train()
    assert not cached._looked_up
    assert_same_bits(weights(wrapped.model), weights(plain.model))


def test_a_cache_folder_as_teacher_model_with_workers(tmp_path: Path) -> None:
    """The trainer recognizes a cache, and its data loader looks predictions up."""
    live = cache_of(tmp_path / "cache", bert(seed=1), examples(11))
    given = {"train_dataset": examples(11), "max_steps": 3}
    trained = []
    for number, one in enumerate((str(tmp_path / "cache"), live.cache, live)):
        trainer = make(tmp_path / str(number), bert(), one, dataloader_num_workers=number, **given)
        assert "teacher_cached_logits" in next(iter(trainer.get_train_dataloader()))
        assert "teacher_cached_logits" not in next(iter(trainer.get_eval_dataloader(examples(2))))
        trainer.train()
        trained.append(weights(trainer.model))
    assert_same_bits(trained[1], trained[0])
    assert_same_bits(trained[2], trained[0])


def test_a_cached_teacher_trains_like_the_live_teacher(tmp_path: Path) -> None:
    teacher, start = bert(seed=1), weights(bert())
    cached = cache_of(tmp_path / "cache", teacher, examples(11), store=None)  # float16
    trained = []
    for number, one in enumerate((teacher, cached)):
        trainer = make(tmp_path / str(number), bert(), one, train_dataset=examples(11), max_steps=4, alpha=1.0)
        trainer.train()
        trained.append(weights(trainer.model))
    apart = torch.sqrt(sum(((trained[0][k] - trained[1][k]).double() ** 2).sum() for k in start))
    moved = torch.sqrt(sum(((trained[0][k] - start[k]).double() ** 2).sum() for k in start))
    assert apart / moved < 2e-3


def test_evaluation_without_cached_examples(tmp_path: Path) -> None:
    cached = cache_of(tmp_path / "cache", bert(seed=1), examples(8))
    others = [{"input_ids": [9, 8, 7], "labels": 1}]
    given = {"eval_dataset": others, "data_collator": cached.wrap_collator(padded)}
    assert make(tmp_path, bert(), cached, **given).evaluate()["eval_loss"] > 0
    with pytest.raises(DataError, match="1 of the 1 examples of a batch are not in the teacher's cache"):
        make(tmp_path, bert(), cached, evaluate_with_teacher=True, **given).evaluate()
    known = {**given, "eval_dataset": examples(8)}
    measured = make(tmp_path, bert(), cached, evaluate_with_teacher=True, **known).evaluate()
    live = make(tmp_path, bert(), bert(seed=1), evaluate_with_teacher=True, eval_dataset=examples(8)).evaluate()
    assert measured["eval_divergence"] == pytest.approx(live["eval_divergence"], rel=1e-2)


def test_a_dataset_with_extra_columns_filtered_and_shuffled(tmp_path: Path) -> None:
    """A `datasets.Dataset` with an unused text column, later filtered and shuffled."""
    some = [{**one, "text": f"example {number}"} for number, one in enumerate(examples(12))]
    data = datasets.Dataset.from_list(some)
    cached = cache_of(tmp_path / "cache", bert(seed=1), data)
    part = data.filter(lambda one: one["labels"] != 1).shuffle(seed=3)
    trainer = make(tmp_path, bert(), cached, train_dataset=part, data_collator=cached.wrap_collator(padded))
    assert trainer.train().global_step == 2


def test_the_default_collator_is_that_of_trainer(tmp_path: Path) -> None:
    """Images need no padding."""
    head = HEADS["vit_image_class"]
    some = head.examples(6)
    cached = CachedTeacher(TeacherCache.build(head.make(2), some, tmp_path, progress=False))
    assert cached.cache.manifest["preprocessing"]["collator"] == "default_data_collator"
    batch = default_data_collator(some[::-1])
    expected = Distiller(head.make(1), head.make(2), alpha=1.0)(head.make(1), batch).loss.item()
    found = Distiller(head.make(1), cached, alpha=1.0)(head.make(1), batch).loss.item()
    assert found == pytest.approx(expected, rel=1e-2)


def test_a_cached_teacher_in_a_custom_loop(tmp_path: Path) -> None:
    head, teacher, some, cached = made(tmp_path, "bert_tokens")
    student = head.make(1)
    distiller, live = Distiller(student, cached, alpha=0.5), Distiller(student, teacher, alpha=0.5)
    loader: Any = DataLoader(
        some, batch_size=4, shuffle=True, collate_fn=cached.wrap_collator(head.collate), num_workers=2
    )
    for batch in loader:
        plain = {name: value for name, value in batch.items() if not name.startswith("teacher_")}
        assert set(distiller.student_inputs(batch)) == set(plain)
        assert distiller(student, batch).loss.item() == pytest.approx(live(student, plain).loss.item(), rel=1e-5)


def test_the_build_loads_a_teacher_from_a_folder(tmp_path: Path) -> None:
    teacher = bert(seed=1)
    teacher.save_pretrained(tmp_path / "teacher")
    some = examples(4)
    cache = TeacherCache.build(
        str(tmp_path / "teacher"), some, tmp_path / "cache", student=bert(), data_collator=padded, progress=False
    )
    assert CachedTeacher(cache, teacher=teacher).cache is cache
    assert cache.manifest["teacher"]["name"] == "(local path)"
    assert str(tmp_path) not in "".join(path.read_text() for path in cache.path.glob("*.json"))


def test_duplicate_examples_and_a_partial_last_batch(tmp_path: Path) -> None:
    """The dataset fills neither the last batch nor the last shard."""
    head = HEADS["bert_tokens"]
    teacher, some = head.make(2), head.examples(7)
    some = [*some, some[2], some[0], some[2]]
    cached = CachedTeacher(build(tmp_path, head, teacher, some))
    assert len(cached.cache) == 10
    batch = cached.wrap_collator(head.collate)(some[2:])
    expected = Distiller(head.make(1), teacher, alpha=1.0)(head.make(1), head.collate(some[2:])).loss.item()
    assert Distiller(head.make(1), cached, alpha=1.0)(head.make(1), batch).loss.item() == pytest.approx(
        expected, rel=1e-5
    )
