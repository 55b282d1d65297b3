"""Augmentation in a training: the batch each model sees, resume bit for bit, evaluation on clean data."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from hf_distill import HiddenMatch
from hf_distill.augment import Augmentation, AugmentingCollator, Noise, SpecAugment, WordReplacement
from hf_distill.errors import SettingError
from tests.augment.making import NoPredictions, masked_lm, whole_words
from tests.heads import HEADS
from tests.trainer.steps import dropout_of
from tests.trainer.test_resume import RUN
from tests.trainer.tiny import assert_moved, assert_same_bits, bert, examples, make, padded, softened_kl, weights

WORDS = 23


def replacing(**settings: Any) -> WordReplacement:
    return WordReplacement(whole_words(), masked_lm=masked_lm(WORDS), **{"probability": 0.5, **settings})


def shown_to(model: Any) -> list[dict[str, Tensor]]:
    """Record the inputs of every forward of this model from now on."""
    seen: list[dict[str, Tensor]] = []

    def write_down(module: Any, positional: Any, keywords: dict[str, Any]) -> None:
        seen.append({name: value.clone() for name, value in keywords.items() if isinstance(value, Tensor)})

    model.register_forward_pre_hook(write_down, with_kwargs=True)
    return seen


def in_order(batches: list[dict[str, Tensor]], features: Any) -> list[dict[str, Tensor]]:
    """Return the clean batches of the same examples, found by their distinct labels."""
    by_label = {one["labels"]: one for one in features}
    return [padded([by_label[label] for label in batch["labels"].tolist()]) for batch in batches]


def distinct(count: int = 8) -> list[dict[str, Any]]:
    return [{**one, "labels": i} for i, one in enumerate(examples(count))]


@pytest.mark.parametrize("student_only", [False, True])
def test_student_and_teacher_receive_the_intended_batches(tmp_path, student_only: bool) -> None:
    student, teacher = bert(num_labels=8), bert(seed=1, num_labels=8)
    by_student, by_teacher = shown_to(student), shown_to(teacher)
    collate = AugmentingCollator(padded, replacing(), student_only=student_only)
    make(tmp_path, student, teacher, train_dataset=distinct(), data_collator=collate, max_steps=4, alpha=0.5).train()
    assert len(by_student) == len(by_teacher) == 4
    for clean, mine, theirs in zip(in_order(by_student, distinct()), by_student, by_teacher, strict=True):
        assert not torch.equal(mine["input_ids"], clean["input_ids"])
        assert torch.equal(mine["attention_mask"], clean["attention_mask"])
        expected = clean if student_only else mine
        assert torch.equal(theirs["input_ids"], expected["input_ids"])
        assert torch.equal(theirs["attention_mask"], expected["attention_mask"])
    seen = {tuple(row.tolist()) for batch in by_student for row in batch["input_ids"]}
    assert len(seen) > 12  # of 16: the second epoch has different words


def test_the_loss_compares_the_two_views(tmp_path) -> None:
    student, teacher = bert(num_labels=8), bert(seed=1, num_labels=8)
    before = bert(num_labels=8)
    by_student, by_teacher = shown_to(student), shown_to(teacher)
    collate = AugmentingCollator(padded, replacing(), student_only=True)
    settings = {"max_steps": 1, "alpha": 1.0, "temperature": 2.0, "logging_steps": 1}
    trainer = make(tmp_path, student, teacher, train_dataset=distinct(), data_collator=collate, **settings)
    trainer.train()
    with torch.no_grad():
        rows = before(**by_student[0]).logits
        target = bert(seed=1, num_labels=8)(**by_teacher[0]).logits
        other = bert(seed=1, num_labels=8)(
            input_ids=by_student[0]["input_ids"], attention_mask=by_student[0]["attention_mask"]
        )
    expected = float(softened_kl(rows, target, 2.0).mean())
    assert trainer.state.log_history[0]["loss"] == pytest.approx(expected, rel=1e-4)
    assert float(softened_kl(rows, other.logits, 2.0).mean()) != pytest.approx(expected, rel=1e-2)


@pytest.mark.parametrize("at", [1, 2, 3, 4])
def test_a_resumed_run_equals_the_uninterrupted_run(tmp_path, at: int) -> None:
    """With dropout; the epoch has 11 examples, so step 3 ends it and step 4 begins the next."""

    def collate() -> AugmentingCollator:
        return AugmentingCollator(padded, replacing(), seed=3)

    given = {"train_dataset": examples(11), "alpha": 0.5, **RUN}
    whole = make(tmp_path / "whole", bert(dropout=0.3), bert(seed=1), data_collator=collate(), **given)
    whole.train()
    resumed = make(tmp_path / "resumed", bert(seed=5, dropout=0.3), bert(seed=1), data_collator=collate(), **given)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "out" / f"checkpoint-{at}"))
    assert_same_bits(weights(resumed.model), weights(whole.model))
    if at == 1:  # check once that the augmentation and its seed have an effect
        for name, other in (("plain", padded), ("seed", AugmentingCollator(padded, replacing(), seed=4))):
            otherwise = make(tmp_path / name, bert(dropout=0.3), bert(seed=1), data_collator=other, **given)
            otherwise.train()
            assert_moved(weights(otherwise.model), weights(whole.model))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_resumed_run_with_sound_and_workers_equals_the_uninterrupted_run(tmp_path, workers: int) -> None:
    """The student's noise is the same whether this process or a worker makes it."""
    head = HEADS["wav2vec2_ctc_mean"]
    found = []
    for name, many, checkpoint in (("whole", workers, None), ("resumed", workers, "checkpoint-3"), ("here", 0, None)):
        collate = AugmentingCollator(head.collate, Noise(snr_db=(0.0, 10.0)), student_only=True)
        settings = {**RUN, "max_steps": 4, "alpha": 0.5, "data_collator": collate, "dataloader_num_workers": many}
        student = head.make(seed=0 if checkpoint is None else 5, **dropout_of(head, 0.3))
        trainer = make(tmp_path / name, student, head.make(seed=1), train_dataset=head.examples(8), **settings)
        path = None if checkpoint is None else str(tmp_path / "whole" / "out" / checkpoint)
        trainer.train(resume_from_checkpoint=path)
        found.append(weights(trainer.model))
    assert_same_bits(found[1], found[0])
    assert_same_bits(found[2], found[0])


def test_an_augmentation_without_effect_leaves_the_training_unchanged(tmp_path) -> None:
    """Although it draws random numbers: dropout and shuffling continue from their own state."""
    found = []
    for name, collate in (
        ("with", AugmentingCollator(padded, NoPredictions(), student_only=True)),
        ("without", padded),
    ):
        settings = {"data_collator": collate, "max_steps": 4, "alpha": 0.5}
        trainer = make(tmp_path / name, bert(dropout=0.3), bert(seed=1), **settings)
        trainer.train()
        found.append(weights(trainer.model))
    assert_same_bits(*found)


def test_each_epoch_is_augmented_differently_without_shuffling(tmp_path) -> None:
    """Each batch recurs in every epoch, and only the epoch's number distinguishes them."""
    student = bert()
    seen = shown_to(student)
    collate = AugmentingCollator(padded, replacing(probability=1.0))
    settings = {"per_device_train_batch_size": 1, "max_steps": 12, "train_dataset": examples(3)}
    make(tmp_path, student, bert(seed=1), data_collator=collate, **settings).train()
    texts = {tuple(batch["input_ids"][0].tolist()) for batch in seen}
    assert len(seen) == 12 and len(texts) >= 11  # not three; two draws may coincide


def test_evaluation_uses_clean_data(tmp_path) -> None:
    """During training and after it; for `predict` too."""
    found = []
    for name, collate in (("with", AugmentingCollator(padded, replacing(probability=1.0))), ("without", padded)):
        student = bert()
        seen = shown_to(student)
        trainer = make(tmp_path / name, student, bert(seed=1), data_collator=collate, eval_dataset=examples(6))
        trainer.evaluate()
        trainer.predict(examples(5))
        found.append([batch["input_ids"] for batch in seen])
        trainer.train()
        assert trainer.data_collator is collate
        seen.clear()
        trainer.evaluate()
        assert torch.equal(seen[0]["input_ids"], found[-1][0])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True)) and len(found[0]) == len(found[1]) > 1


def test_token_labels_are_kept_for_both_models(tmp_path) -> None:
    head = HEADS["bert_tokens"]
    student, teacher = head.make(seed=0), head.make(seed=1)
    by_student, by_teacher = shown_to(student), shown_to(teacher)
    tokens = student.config.vocab_size
    table = torch.randn(tokens, 4)
    replace = WordReplacement(whole_words(tokens), embeddings=table, probability=0.5)
    features = head.examples(8)
    collate = AugmentingCollator(head.collate, replace)
    make(tmp_path, student, teacher, train_dataset=features, data_collator=collate, alpha=0.5).train()
    clean = {tuple(one["labels"]): one["input_ids"] for one in features}
    for mine, theirs in zip(by_student, by_teacher, strict=True):
        assert torch.equal(mine["input_ids"], theirs["input_ids"])
        for ids, labels, mask in zip(mine["input_ids"], mine["labels"], mine["attention_mask"], strict=True):
            length = int(mask.sum())
            was = clean[tuple(labels[:length].tolist())]
            assert len(was) == length and not ids[length:].any()
            assert 0 < sum(a != b for a, b in zip(was, ids.tolist(), strict=False)) < length or length < 5


def test_word_replacement_for_the_student_alone_raises_for_token_heads(tmp_path) -> None:
    """Even without labels that would reveal the head."""
    collate = AugmentingCollator(padded, replacing(), student_only=True)
    with pytest.raises(SettingError, match="rows that are tokens"):
        make(
            tmp_path,
            bert("TokenClassification"),
            bert("TokenClassification", seed=1),
            data_collator=collate,
            alpha=1.0,
            train_dataset=None,
        )


def test_word_replacement_for_the_student_alone_raises_with_objectives_on_positions(tmp_path) -> None:
    """Even for a classifier, whose logits alone could be compared."""
    collate = AugmentingCollator(padded, replacing(), student_only=True)
    make(tmp_path, bert(), bert(seed=1), data_collator=collate)
    with pytest.raises(SettingError, match="rows that are tokens"):
        make(tmp_path, bert(), bert(seed=1), data_collator=collate, objectives=HiddenMatch())


def test_whisper_sees_masked_features_and_its_teacher_clean_features(tmp_path) -> None:
    head = next(one for one in HEADS.values() if "input_features" in one.examples(1)[0])
    student, teacher = head.make(seed=0), head.make(seed=1)
    by_student, by_teacher = shown_to(student), shown_to(teacher)
    augment = SpecAugment(freq_width=2, time_width=3, value=9.0)
    collate = AugmentingCollator(head.collate, augment, student_only=True)
    make(
        tmp_path, student, teacher, train_dataset=head.examples(4), data_collator=collate, max_steps=1, alpha=0.5
    ).train()
    mine, theirs = by_student[0]["input_features"], by_teacher[0]["input_features"]
    masked = mine == 9.0
    assert masked.any() and not (theirs == 9.0).any()
    assert torch.equal(mine[~masked], theirs[~masked])


def test_a_custom_augmentation_function(tmp_path) -> None:
    """Both models see its result, although it removes words."""
    student, teacher = bert(), bert(seed=1)
    by_student, by_teacher = shown_to(student), shown_to(teacher)
    shorter = Augmentation(lambda one: {**one, "input_ids": one["input_ids"][:-1]}, moves_positions=True)
    make(tmp_path, student, teacher, data_collator=AugmentingCollator(padded, shorter), max_steps=1, alpha=0.5).train()
    lengths = sorted(len(one["input_ids"]) - 1 for one in examples())
    assert torch.equal(by_student[0]["input_ids"], by_teacher[0]["input_ids"])
    assert set(by_student[0]["attention_mask"].sum(1).tolist()) <= set(lengths)
