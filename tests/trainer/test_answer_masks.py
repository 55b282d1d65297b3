"""`assistant_masks` and `completion_mask` of causal LMs: the loss over the answers alone, with any collator.

The expected values are computed example by example, unpadded, in fp64.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch import Tensor
from transformers import (
    DataCollatorForLanguageModeling,
    DataCollatorForSeq2Seq,
    DataCollatorWithFlattening,
    DataCollatorWithPadding,
    Trainer,
    TrainingArguments,
)

from hf_distill import DataError, TeacherCache
from hf_distill.trainer.collators import AnswerMaskCollator
from tests.heads import HEADS
from tests.tiny_tokenizers import tokenizer
from tests.trainer.tiny import arguments, make, softened_kl, weights

T = 2.0
MASKS = {"assistant_masks": (0, 0, 1, 1, 0, 1, 1), "completion_mask": (0, 1, 1, 0, 1, 1, 1)}
NAMES = [("assistant_masks",), ("completion_mask",), ("assistant_masks", "completion_mask")]


def rows(*names: str, count: int = 8) -> list[dict[str, Any]]:
    made = []
    for i in range(count):
        length = 4 + i % 4
        row = {"input_ids": [1, 5, 6, 7, i + 4, 8, 9][:length], "attention_mask": [1] * length}
        made.append({**row, **{name: list(MASKS[name][:length]) for name in names}})
    return made


def models(name: str = "llama_causal_lm") -> tuple[Any, Any]:
    return HEADS[name].make(1), HEADS[name].make(2)


def by_hand(data: list[dict[str, Any]], alpha: float, head: str = "llama_causal_lm") -> tuple[float, float, float]:
    """Return loss, cross-entropy and divergence over the tokens that every mask of an example keeps."""
    student, teacher = (model.double().eval() for model in models(head))
    labels, divergences = [], []
    for row in data:
        ids = torch.tensor(row["input_ids"])
        keep = torch.tensor([row[name] for name in MASKS if name in row] or [[1] * len(ids)]).bool().all(0)[1:]
        with torch.no_grad():
            ours, theirs = (model(ids[None]).logits[0, :-1][keep] for model in (student, teacher))
        labels.append(torch.nn.functional.cross_entropy(ours, ids[1:][keep], reduction="none"))
        divergences.append(softened_kl(ours, theirs, T))
    own, apart = torch.cat(labels).mean().item(), torch.cat(divergences).mean().item()
    return (1 - alpha) * own + alpha * apart, own, apart


def first_loss(folder: Any, data: Any, *, alpha: float, head: str = "llama_causal_lm", **given: Any) -> float:
    student, teacher = models(head)
    settings = {"max_steps": 1, "per_device_train_batch_size": 8, "learning_rate": 0.0, "logging_steps": 1, **given}
    settings.setdefault("data_collator", None)
    trainer = make(folder, student, settings.pop("teacher", teacher), alpha=alpha, train_dataset=data, **settings)
    trainer.train()
    return float(trainer.state.log_history[0]["loss"])


def left() -> Any:
    made = tokenizer()
    made.padding_side = "left"
    return made


def with_labels(data: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{**row, "labels": row["input_ids"]} for row in data]


# Ways to make batches: data, and keywords of the trainer.
WAYS: dict[str, Callable[[list[dict[str, Any]]], tuple[Any, dict[str, Any]]]] = {
    "tokenizer": lambda data: (Dataset.from_list(data), {"processing_class": tokenizer()}),
    "left_padding": lambda data: (Dataset.from_list(data), {"processing_class": left()}),
    "list": lambda data: (data, {"processing_class": tokenizer()}),
    "stream": lambda data: (Dataset.from_list(data).to_iterable_dataset(), {"processing_class": tokenizer()}),
    "language_modelling": lambda data: (
        Dataset.from_list(data),
        {"data_collator": DataCollatorForLanguageModeling(tokenizer(), mlm=False)},
    ),
    "labels_of_all_tokens": lambda data: (with_labels(data), {"data_collator": DataCollatorForSeq2Seq(left())}),
    "flattened": lambda data: (
        with_labels(data),
        {"data_collator": DataCollatorWithFlattening(return_tensors="pt"), "remove_unused_columns": False},
    ),
    "accumulated": lambda data: (
        Dataset.from_list(data),
        {"processing_class": tokenizer(), "per_device_train_batch_size": 2, "gradient_accumulation_steps": 4},
    ),
    "without_logits": lambda data: (
        Dataset.from_list(data),
        {"processing_class": tokenizer(), "fused_loss": True},
    ),
    "own_collator": lambda data: (data, {"data_collator": padded_masks, "remove_unused_columns": False}),
}


def padded_masks(features: list[dict[str, Any]]) -> dict[str, Tensor]:
    """A custom collator that pads every column with 0, masks included, and makes no labels."""
    longest = max(len(feature["input_ids"]) for feature in features)
    return {
        name: torch.tensor([feature[name] + [0] * (longest - len(feature[name])) for feature in features])
        for name in features[0]
    }


CASES = [(NAMES[place % len(NAMES)], way) for place, way in enumerate(WAYS)]
CASES += [(names, "tokenizer") for names in NAMES[1:]]


@pytest.mark.parametrize("alpha", [0.5, 1.0])
@pytest.mark.parametrize(("names", "way"), CASES, ids=str)
def test_the_loss_is_over_the_answers_alone(tmp_path, names: tuple[str, ...], way: str, alpha: float) -> None:
    data, given = WAYS[way](rows(*names))
    expected = by_hand(rows(*names), alpha)[0]
    assert expected != pytest.approx(by_hand(rows(), alpha)[0], rel=1e-2)  # ignoring the masks would be visible
    assert first_loss(tmp_path, data, alpha=alpha, **given) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("head", ["gpt2_causal_lm"])
def test_the_loss_is_over_the_answers_for_another_architecture(tmp_path, head: str) -> None:
    data = rows("assistant_masks")
    found = first_loss(tmp_path, data, alpha=0.5, head=head, processing_class=tokenizer())
    assert found == pytest.approx(by_hand(data, 0.5, head)[0], rel=1e-5)


@pytest.mark.parametrize("alpha", [0.5, 1.0])
def test_answer_masks_with_a_cached_teacher(tmp_path, alpha: float) -> None:
    """Built from the same examples with or without masks: it contains every row in both cases."""
    for data in (rows("assistant_masks"), rows()):
        cache = TeacherCache.build(
            models()[1], data, tmp_path / str(len(data[0])), processing_class=tokenizer(), progress=False
        )
        train = Dataset.from_list(rows("assistant_masks"))
        found = first_loss(tmp_path, train, alpha=alpha, teacher=cache, processing_class=tokenizer())
        assert found == pytest.approx(by_hand(rows("assistant_masks"), alpha)[0], rel=1e-3)


def test_data_without_masks_is_unchanged(tmp_path) -> None:
    given = {"data_collator": DataCollatorForLanguageModeling(tokenizer(), mlm=False)}
    assert first_loss(tmp_path, rows(), alpha=0.5, **given) == pytest.approx(by_hand(rows(), 0.5)[0], rel=1e-5)
    student, teacher = models()
    trainer = make(tmp_path, student, teacher, train_dataset=rows(), **given)
    assert trainer.data_collator is given["data_collator"]


def test_an_example_without_an_answer(tmp_path) -> None:
    data = [
        {**row, "assistant_masks": [0] * len(row["input_ids"])} if i == 0 else row
        for i, row in enumerate(rows("assistant_masks"))
    ]
    found = first_loss(tmp_path, data, alpha=0.5, processing_class=tokenizer())
    assert found == pytest.approx(by_hand(data[1:], 0.5)[0], rel=1e-5)


def test_masks_in_the_evaluation_dataset_alone(tmp_path) -> None:
    student, teacher = models()
    given = {"processing_class": tokenizer(), "evaluate_with_teacher": True, "data_collator": None}
    masked = Dataset.from_list(rows("assistant_masks"))
    for named in (True, False):
        datasets = {"eval_dataset": masked} if named else {}
        trainer = make(
            tmp_path, student, teacher, alpha=1.0, train_dataset=Dataset.from_list(rows()), **given, **datasets
        )
        metrics = trainer.evaluate() if named else trainer.evaluate(masked)
        _, own, apart = by_hand(rows("assistant_masks"), 1.0)
        assert metrics["eval_loss"] == pytest.approx(own, rel=1e-5)
        assert metrics["eval_divergence"] == pytest.approx(apart, rel=1e-5)


def test_a_collator_that_uses_the_masks_itself_is_respected(tmp_path) -> None:
    """This collator trains on the prompt instead."""

    def inverted(features: list[dict[str, Any]]) -> dict[str, Tensor]:
        batch = padded_masks(features)
        labels = batch["input_ids"].masked_fill(
            batch.pop("assistant_masks").bool() | (batch["attention_mask"] == 0), -100
        )
        return {**batch, "labels": labels}

    given = {"data_collator": inverted, "remove_unused_columns": False}
    found = first_loss(tmp_path, rows("assistant_masks"), alpha=0.5, **given)
    prompts = [
        {**row, "assistant_masks": [1 - bit for bit in row["assistant_masks"]]} for row in rows("assistant_masks")
    ]
    assert found == pytest.approx(by_hand(prompts, 0.5)[0], rel=1e-5)


def test_alpha_0_ignores_masks_as_trainer_does(tmp_path, caplog) -> None:
    data = Dataset.from_list(rows("assistant_masks"))
    given = {"train_dataset": data, "data_collator": DataCollatorForLanguageModeling(tokenizer(), mlm=False)}
    student, _ = models()
    Trainer(model=student, args=arguments(tmp_path, TrainingArguments), **given).train()
    ours, _ = models()
    with caplog.at_level(logging.WARNING):
        make(tmp_path, ours, alpha=0.0, **given).train()
    assert all(torch.equal(value, weights(ours)[name]) for name, value in weights(student).items())
    assert "has assistant_masks, which is not read: alpha is 0" in caplog.text


BAD: dict[str, tuple[Callable[[dict[str, Any]], dict[str, Any]], str]] = {
    "shorter": (lambda row: {**row, "assistant_masks": [1]}, r"has 4 input_ids, and its assistant_masks has 1 entries"),
    "none": (lambda row: {**row, "assistant_masks": None}, r"has 4 input_ids, and its assistant_masks has none"),
}


@pytest.mark.parametrize("name", BAD)
def test_masks_of_the_wrong_length_raise(tmp_path, name: str) -> None:
    spoil, words = BAD[name]
    data = [spoil(row) if i == 4 else row for i, row in enumerate(rows("assistant_masks"))]
    with pytest.raises(DataError, match=words):
        first_loss(tmp_path, data, alpha=1.0, processing_class=tokenizer())


# The collator alone.


def collated(inner: Any, data: list[dict[str, Any]]) -> Any:
    return AnswerMaskCollator(inner, reads_masks=False)(data)


def test_truncated_tokens_have_truncated_masks() -> None:
    def cut(at: slice) -> Any:
        return lambda features: {"input_ids": torch.tensor([feature["input_ids"][at] for feature in features])}

    data = [{"input_ids": [5, 6, 7, 8], "assistant_masks": [0, 1, 0, 1]}] * 2
    assert collated(cut(slice(3)), data)["labels"].tolist() == [[-100, 6, -100]] * 2
    assert collated(cut(slice(-3, None)), data)["labels"].tolist() == [[6, -100, 8]] * 2


def test_masks_with_shifted_labels() -> None:
    def shifted(features: list[dict[str, Any]]) -> dict[str, Tensor]:
        ids = torch.tensor([feature["input_ids"] for feature in features])
        return {"input_ids": ids, "shift_labels": torch.cat((ids[:, 1:], torch.full_like(ids[:, :1], -100)), 1)}

    batch = collated(shifted, [{"input_ids": [5, 6, 7, 8], "assistant_masks": [0, 1, 0, 1]}])
    assert batch["shift_labels"].tolist() == [[6, -100, 8, -100]] and "labels" not in batch


def test_the_attention_mask_distinguishes_padding_from_tokens() -> None:
    """The example contains the pad token: without the mask either end could be padding."""
    made = tokenizer(padding="w5")
    made.padding_side = "left"
    data = [{"input_ids": [5, 5], "assistant_masks": [0, 1]}, {"input_ids": [5, 5, 5], "assistant_masks": [0, 1, 1]}]
    batch = collated(DataCollatorWithPadding(made), data)
    assert batch["labels"].tolist() == [[-100, -100, 5], [-100, 5, 5]]


def test_a_batch_with_other_tokens_raises() -> None:
    def other(features: list[dict[str, Any]]) -> dict[str, Tensor]:
        return {"input_ids": torch.tensor([[1 + token for token in feature["input_ids"]] for feature in features])}

    with pytest.raises(DataError, match=r"does not hold the tokens of its 2 examples.*-100 where a mask is 0"):
        collated(other, [{"input_ids": [5, 6], "assistant_masks": [0, 1]}] * 2)


def test_examples_that_are_not_dicts_are_left_to_the_collator() -> None:
    assert collated(lambda features: {"input_ids": torch.tensor(features)}, [[1, 2]])["input_ids"].tolist() == [[1, 2]]
