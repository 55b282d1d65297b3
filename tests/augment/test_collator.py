"""The collator: draws depend only on seed, epoch and batch; which model sees which batch; invalid settings."""

from __future__ import annotations

import pickle
import random
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader
from transformers import DataCollatorForLanguageModeling, DataCollatorWithPadding

from hf_distill.augment import Augmentation, AugmentingCollator, Noise, WordReplacement
from hf_distill.augment.augmentation import digest, seeded
from hf_distill.errors import DataError, SettingError
from hf_distill.trainer.collators import TeacherInputsCollator
from tests.augment.making import Draws, NoPredictions, whole_words
from tests.trainer.tiny import examples, padded

WORDS = 23


def replacing(**settings: Any) -> WordReplacement:
    table = torch.randn(WORDS, 6, generator=torch.Generator().manual_seed(0))
    return WordReplacement(whole_words(), embeddings=table, **{"probability": 0.5, "same_length": True, **settings})


def drawn(loader: Any) -> list[list[float]]:
    return [batch["drawn"].tolist() for batch in loader]


def test_draws_depend_only_on_seed_epoch_and_batch() -> None:
    features = examples(4)

    def rolls(features=features, *, seed: int = 0, epoch: int = 0) -> list[float]:
        collate = AugmentingCollator(padded, Draws(), seed=seed)
        collate.set_epoch(epoch)
        return collate(features)["drawn"].tolist()

    found = [rolls(), rolls(seed=1), rolls(epoch=1), rolls(epoch=2), rolls(features[:3]), rolls(features[::-1])]
    assert rolls() == found[0]
    everything = [one for some in found for one in some]
    assert len(set(everything)) == len(everything)  # the examples of a batch differ too
    twins = rolls([features[0], features[0]])
    assert twins[0] != twins[1]


def test_draws_do_not_depend_on_earlier_calls() -> None:
    collate = AugmentingCollator(padded, Draws())
    first = collate(examples(4))["drawn"]
    torch.rand(5)
    collate(examples(2))
    assert torch.equal(collate(examples(4))["drawn"], first)
    assert torch.equal(pickle.loads(pickle.dumps(collate))(examples(4))["drawn"], first)


@pytest.mark.parametrize("workers", [{"num_workers": 2}, {"num_workers": 2, "persistent_workers": True}])
def test_workers_draw_the_same_as_this_process(workers) -> None:
    """In later epochs too, whose number must reach persistent workers."""

    def epochs(**settings: Any) -> list[list[list[float]]]:
        collate = AugmentingCollator(padded, Draws())
        loader = DataLoader(examples(8), batch_size=2, collate_fn=collate, **settings)  # type: ignore[arg-type] # a list
        found = []
        for epoch in range(3):
            collate.set_epoch(epoch)
            found.append(drawn(loader))
        return found

    here = epochs()
    assert epochs(**workers) == here
    everything = [x for epoch in here for batch in epoch for x in batch]
    assert len(set(everything)) == len(everything) == 24


def test_the_training_random_state_does_not_change() -> None:
    def state() -> tuple[Any, ...]:
        return random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()

    def all_of_them(example: dict[str, Any]) -> dict[str, Any]:
        drawn.append((random.random(), np.random.rand(), torch.rand(()).item()))
        return example

    drawn: list[tuple[float, ...]] = []
    before = state()
    collate = AugmentingCollator(padded, Augmentation(all_of_them, moves_positions=False))
    collate(examples(2))
    assert state() == before
    random.random(), np.random.rand(), torch.rand(())
    collate(examples(2))
    assert drawn[:2] == drawn[2:] and drawn[0] != drawn[1]  # all three generators are seeded
    before = state()
    with pytest.raises(ZeroDivisionError), seeded(1):
        torch.rand(3)
        raise ZeroDivisionError
    assert state() == before


def test_the_hash_is_the_same_in_every_process() -> None:
    """A stored value detects a hash that depends on the process, as Python's own does."""
    value = {"text": "good", "ids": [1, 2], "wave": [0.5, -1.0], "array": np.arange(3, dtype=np.int32), "none": None}
    assert digest(value).hex() == "c7fc67c252bf226232d01148fcd376ca"
    others = [
        {**value, "ids": [12]},
        {**value, "ids": [1.0, 2.0]},
        {**value, "wave": [0.5, 1.0]},
        {**value, "array": np.arange(3, dtype=np.int64)},
        {**value, "array": torch.arange(3)},
        {**value, "array": torch.arange(3).bfloat16()},
        {**value, "array": torch.tensor(3)},
        {**value, "none": object()},
        {**value, "none": [object(), "a"]},
        {**value, "none": (True, 1)},
        [value],
    ]
    assert len({digest(one) for one in [value, *others]}) == 1 + len(others)
    assert digest(object()) == digest(object())


def test_both_models_see_the_same_batch_by_default() -> None:
    batch = AugmentingCollator(padded, replacing())(examples(8))
    clean = padded(examples(8))
    assert list(batch) == list(clean)
    assert not torch.equal(batch["input_ids"], clean["input_ids"])
    assert torch.equal(batch["labels"], clean["labels"])
    assert torch.equal(batch["attention_mask"], clean["attention_mask"])
    assert not (batch["input_ids"] * (1 - batch["attention_mask"])).any()  # padding is unchanged


def test_student_only_gives_the_teacher_the_clean_example() -> None:
    features, clean = examples(8), padded(examples(8))
    batch = AugmentingCollator(padded, replacing(), student_only=True)(features)
    assert sorted(batch) == sorted([*clean, "teacher_input_ids", "teacher_attention_mask"])
    assert torch.equal(batch["teacher_input_ids"], clean["input_ids"])
    assert torch.equal(batch["teacher_attention_mask"], clean["attention_mask"])
    both = AugmentingCollator(padded, replacing())(features)
    assert torch.equal(batch["input_ids"], both["input_ids"]) and torch.equal(batch["labels"], clean["labels"])
    assert features == examples(8)


def test_augmentations_run_in_order_before_and_after_collation() -> None:
    def write(name: str) -> Any:
        return lambda shown: {**shown, "log": shown.get("log", "") + name}

    def collate(features: list[dict[str, Any]]) -> dict[str, Any]:
        return {"log": "+".join(one["log"] for one in features)}

    one, two = (Augmentation(write(name), moves_positions=False) for name in "ab")
    whole = Augmentation(write("|c"), moves_positions=True, acts_on="batch")
    several = Augmentation(
        lambda some: [write(str(i))(x) for i, x in enumerate(some)], moves_positions=False, acts_on="examples"
    )
    assert AugmentingCollator(collate, one, whole, several, two)([{}, {}]) == {"log": "a0b+a1b|c"}


def test_a_masking_collator_draws_the_same_masks_for_both_models() -> None:
    """Masked LM: the same positions are masked for both models, and the training's generator advances once."""
    tokenizer = whole_words()
    masking = DataCollatorForLanguageModeling(tokenizer, mlm_probability=0.5)
    features = [{"input_ids": example["input_ids"]} for example in examples(8)]
    torch.manual_seed(4)
    plain, after = masking(features), torch.get_rng_state()
    torch.manual_seed(4)
    batch = AugmentingCollator(masking, NoPredictions(), student_only=True)(features)
    assert torch.equal(torch.get_rng_state(), after)
    for name in ("input_ids", "attention_mask"):
        assert torch.equal(batch[name], plain[name]) and torch.equal(batch[f"teacher_{name}"], plain[name])
    assert torch.equal(batch["labels"], plain["labels"])


def test_evaluation_uses_the_collator_without_augmentation() -> None:
    inner = AugmentingCollator(padded, Draws())
    assert inner.for_evaluation() is padded
    assert AugmentingCollator(inner, Draws()).for_evaluation() is padded


def test_attributes_of_the_wrapped_collator_are_available() -> None:
    tokenizer = whole_words()
    collate = AugmentingCollator(DataCollatorWithPadding(tokenizer), Draws())
    assert collate.tokenizer is tokenizer
    with pytest.raises(AttributeError):
        _ = collate.nothing_of_the_kind


def test_teacher_columns_require_student_only() -> None:
    """They are not augmented, so they raise unless the teacher is meant to see the clean example."""
    features = [{**one, "teacher_input_ids": [3, 3, 3]} for one in examples(4)]
    with pytest.raises(DataError, match=r"columns of its own \(teacher_input_ids\), which are not augmented"):
        AugmentingCollator(TeacherInputsCollator(padded), replacing())(features)
    batch = AugmentingCollator(TeacherInputsCollator(padded), replacing(), student_only=True)(features)
    assert torch.equal(batch["teacher_input_ids"], torch.full((4, 3), 3))
    assert "teacher_attention_mask" not in batch  # the student's mask is for other tokens


def labelled_tokens(features: Any) -> dict[str, torch.Tensor]:
    rest = padded([{"input_ids": one["input_ids"]} for one in features])
    longest = rest["input_ids"].shape[1]
    labels = [[*one["labels"], *[-100] * (longest - len(one["labels"]))] for one in features]
    return {**rest, "labels": torch.tensor(labels)}


def of_tokens(count: int = 4) -> list[dict[str, Any]]:
    return [{"input_ids": one["input_ids"], "labels": [1] * len(one["input_ids"])} for one in examples(count)]


def language(features: Any) -> dict[str, torch.Tensor]:
    batch = padded([{"input_ids": one["input_ids"]} for one in features])
    return {**batch, "labels": batch["input_ids"]}


@pytest.mark.parametrize(
    ("collate", "features"),
    [
        (labelled_tokens, of_tokens()),
        (language, examples(4, labels=None)),
        (padded, [{**one, "start_positions": 0, "end_positions": 1} for one in examples(4, labels=None)]),
    ],
    ids=["token labels", "language modelling", "spans"],
)
def test_word_replacement_for_the_student_alone_requires_one_row_per_example(collate, features) -> None:
    with pytest.raises(DataError, match=r"rows that are tokens: .*Leave student_only out"):
        AugmentingCollator(collate, replacing(), student_only=True)(features)
    AugmentingCollator(collate, replacing())(features)  # allowed if both models see it
    AugmentingCollator(collate, NoPredictions(), student_only=True)(features)


def test_seq2seq_labels_are_not_mistaken_for_token_labels() -> None:
    """Even if one example, or a batch of equal lengths, looks as if they were."""
    features = [{"input_ids": [1, 2, 3], "labels": [4, 5, 6]}, {"input_ids": [1, 2, 5], "labels": [4, 5, 7]}]
    batch = AugmentingCollator(padded, replacing(), student_only=True)(features)
    assert torch.equal(batch["teacher_input_ids"], torch.tensor([[1, 2, 3], [1, 2, 5]]))


def moves(example: dict[str, Any]) -> dict[str, Any]:
    return {**example, "input_ids": example["input_ids"][1:]}


def test_augmentations_that_move_positions_apply_to_both_models() -> None:
    crop = Augmentation(moves, moves_positions=True)
    for moving in (crop, replacing(same_length=False)):
        AugmentingCollator(padded, Noise(), moving)
        with pytest.raises(SettingError, match=r"student_only=True, and (moves|WordReplacement) moves positions"):
            AugmentingCollator(padded, Noise(), moving, student_only=True)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: AugmentingCollator(padded), r"at least one augmentation: got function and 0"),
        (lambda: AugmentingCollator(Noise(), moves), r"moves is no augmentation: it lacks moves_positions and acts_on"),
        (lambda: Augmentation(moves, moves_positions=False, acts_on="row"), r"moves: acts_on='row'. It may be example"),  # type: ignore[arg-type] # that is the point
        (lambda: Augmentation("moves", moves_positions=False), r"needs a callable, not a str"),  # type: ignore[arg-type] # that is the point
    ],
)
def test_invalid_settings_raise(make, message: str) -> None:
    with pytest.raises(SettingError, match=message):
        make()


def test_examples_must_be_mappings() -> None:
    with pytest.raises(DataError, match="examples that are mappings of columns, not a list"):
        AugmentingCollator(padded, Draws())([[1, 2]])  # type: ignore[list-item] # that is the point
