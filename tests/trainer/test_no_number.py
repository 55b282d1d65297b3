"""NaN or infinity of a teacher is reported, with example, row and micro-batch, before an optimizer step."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from hf_distill import AttentionMatch, HiddenMatch, TeacherError
from hf_distill.functional import DIVERGENCES
from tests.heads import HEADS
from tests.trainer.tiny import assert_same_bits, bert, examples, make, padded, weights


class Poisoned(nn.Module):
    """A classifier head that sets one row's logit to NaN or infinity."""

    def __init__(self, head: nn.Module, *, marked: int, column: int, value: float) -> None:
        super().__init__()
        self.head = head
        self.marked, self.column, self.value = marked, column, value
        self.ids: Any = None

    def forward(self, hidden: Any) -> Any:
        logits = self.head(hidden).clone()
        marked = (self.ids == self.marked).any(-1) if logits.dim() == 2 else self.ids == self.marked
        logits[..., self.column] = torch.where(marked, self.value, logits[..., self.column])
        return logits


def poisoned(model: Any, *, marked: int, value: float) -> Any:
    """Return the model, with `value` in its logits wherever token `marked` occurs."""
    model.classifier = Poisoned(model.classifier, marked=marked, column=1, value=value)

    def look(_: Any, __: Any, given: dict[str, Any]) -> None:
        model.classifier.ids = given["input_ids"]

    model.register_forward_pre_hook(look, with_kwargs=True)
    return model


MARK = 22  # a token id that only one of the examples keeps


def marked_examples(at: int, **more: Any) -> list[dict[str, Any]]:
    made = [{**e, "input_ids": [1 + i % 21 for i in e["input_ids"]], **more} for e in examples()]
    made[at]["input_ids"][1] = MARK
    return made


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_nonfinite_teacher_logit_names_the_example(tmp_path, value: float) -> None:
    """Example 5 of eight is the second of micro-batch 2: reported before any optimizer step."""
    student, teacher = bert(), poisoned(bert(seed=1), marked=MARK, value=value)
    settings = {
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 4,
        "train_sampling_strategy": "sequential",
    }
    trainer = make(tmp_path, student, teacher, train_dataset=marked_examples(5), **settings)
    with pytest.raises(TeacherError) as raised:
        trainer.train()
    for word in (
        f"hold {value}",
        "example 1, row 0 of it",
        "micro-batch 2 of 4",
        "1 such rows",
        "No step was made",
        "teacher_dtype=",
    ):
        assert word in str(raised.value), (word, str(raised.value))
    assert trainer.state.global_step == 0
    assert_same_bits(weights(student), weights(bert()))


def test_a_nonfinite_token_logit_names_the_token(tmp_path) -> None:
    student = bert("TokenClassification")
    teacher = poisoned(bert("TokenClassification", seed=1), marked=MARK, value=float("nan"))
    data = [{**e, "labels": [0] * len(e["input_ids"])} for e in marked_examples(2)]

    def collate(features: Any) -> Any:
        longest = max(len(f["input_ids"]) for f in features)
        batch = padded([{"input_ids": f["input_ids"]} for f in features])
        return {
            **batch,
            "labels": torch.tensor([f["labels"] + [-100] * (longest - len(f["labels"])) for f in features]),
        }

    trainer = make(
        tmp_path, student, teacher, train_dataset=data, data_collator=collate, train_sampling_strategy="sequential"
    )
    with pytest.raises(TeacherError, match=r"hold nan in example 2, row 1 of it \(micro-batch 0 of 1"):
        trainer.train()
    assert_same_bits(weights(student), weights(bert("TokenClassification")))


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_every_divergence_reports_it(tmp_path, divergence: str) -> None:
    student, teacher = bert(), poisoned(bert(seed=1), marked=MARK, value=float("nan"))
    trainer = make(tmp_path, student, teacher, train_dataset=marked_examples(0), divergence=divergence)
    with pytest.raises(TeacherError, match="teacher's logits hold nan"):
        trainer.train()
    assert_same_bits(weights(student), weights(bert()))


def test_minus_infinity_is_a_blocked_column(tmp_path) -> None:
    student, teacher = bert(), poisoned(bert(seed=1), marked=MARK, value=float("-inf"))
    make(tmp_path, student, teacher, train_dataset=marked_examples(3)).train()
    assert all(torch.isfinite(value).all() for value in weights(student).values())


def test_nan_in_a_row_that_does_not_count_is_ignored(tmp_path) -> None:
    """L3: token 22 has no label."""
    head = HEADS["bert_tokens"]
    student = head.make(seed=0)
    teacher = poisoned(head.make(seed=1), marked=39, value=float("nan"))
    data = head.examples(8)
    for example in data:
        example["input_ids"] = [i % 38 for i in example["input_ids"][:-1]] + [39]  # the last has label -100
    make(tmp_path, student, teacher, train_dataset=data, data_collator=head.collate).train()
    assert all(torch.isfinite(value).all() for value in weights(student).values())


# Activations: the logits may be finite or not computed.


@pytest.mark.parametrize("alpha", [0.5, 0.0, None])
@pytest.mark.parametrize(
    ("objective", "place", "what"),
    [
        (HiddenMatch, "bert.encoder.layer.1", "hidden"),
        (AttentionMatch, "bert.encoder.layer.1.attention.self.query", "attention"),
    ],
)
def test_a_nonfinite_teacher_activation(tmp_path, alpha: float | None, objective: Any, place: str, what: str) -> None:
    """At the second position of the last block: the head uses the first, so all logits are finite."""
    student, teacher = bert(num_hidden_layers=2), bert(seed=1, num_hidden_layers=2)
    second = torch.arange(20)[:, None] == 1
    teacher.get_submodule(place).register_forward_hook(lambda _, __, x: x.masked_fill(second[: x.shape[1]], torch.inf))
    assert teacher(**padded(examples())).logits.isfinite().all()
    trainer = make(tmp_path, student, teacher, objectives=objective([(1, 1)]), alpha=alpha)
    message = rf"the teacher's {what} of block 1 hold inf \(micro-batch 0 of 1\)\. No step was made\. .*teacher_dtype="
    with pytest.raises(TeacherError, match=message):
        trainer.train()
    assert_same_bits(weights(student), weights(bert(num_hidden_layers=2)))
