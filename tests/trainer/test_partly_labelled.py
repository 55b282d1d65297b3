"""Examples without a label are distilled; alpha=1 trains without labels, for every head that can."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from datasets import Dataset

from hf_distill import DataError
from tests.heads import HEADS, Head
from tests.trainer.tiny import (
    assert_moved,
    assert_same_bits,
    bert,
    examples,
    make,
    padded,
    softened_kl,
    update_difference,
    weights,
)

UNLABELLED = -100


def partly(count: int = 8) -> list[dict[str, Any]]:
    """Return examples of which every second has a label."""
    return [{**e, "labels": e["labels"] if i % 2 == 0 else UNLABELLED} for i, e in enumerate(examples(count))]


def test_the_labels_term_covers_labelled_examples_and_the_teachers_all(tmp_path) -> None:
    data = partly()
    student, teacher = bert().double(), bert(seed=1).double()
    start = weights(student)
    settings = {"alpha": 0.75, "temperature": 3.0, "max_steps": 1, "per_device_train_batch_size": 8}
    make(tmp_path, student, teacher, train_dataset=data, **settings).train()
    expected = bert().double()
    batch = padded(data)
    labels = batch.pop("labels")
    known = labels != UNLABELLED
    logits, theirs = expected(**batch).logits, teacher(**batch).logits
    own = -logits.log_softmax(-1)[known].gather(1, labels[known, None]).mean()
    (0.25 * own + 0.75 * softened_kl(logits, theirs, 3.0).sum() / 8).backward()
    with torch.no_grad():
        for parameter in expected.parameters():
            if parameter.grad is not None:
                parameter -= 0.1 * parameter.grad
    assert update_difference(weights(student), weights(expected), start) < 1e-6


@pytest.mark.parametrize("name", [name for name, head in HEADS.items() if head.may_ignore])
def test_partly_labelled_batches_of_every_head(tmp_path, name: str) -> None:
    """With two micro-batches, one of which has no label: the same update."""
    head = HEADS[name]
    data = [{**e, "labels": e["labels"] if i < 3 else UNLABELLED} for i, e in enumerate(head.examples(8))]

    def collate(features: Any) -> Any:
        return {k: v.double() if v.is_floating_point() else v for k, v in head.collate(features).items()}

    found = []
    for micro_batch, accumulation in ((8, 1), (2, 4)):
        student = head.make(seed=0).double()
        cut = {"per_device_train_batch_size": micro_batch, "gradient_accumulation_steps": accumulation}
        given = {"train_dataset": data, "data_collator": collate, "train_sampling_strategy": "sequential"}
        make(tmp_path, student, head.make(seed=1).double(), max_steps=1, **cut, **given).train()
        found.append(weights(student))
        assert all(torch.isfinite(x).all() for x in found[-1].values())
    assert update_difference(found[1], found[0], weights(head.make(seed=0).double())) < 1e-6


def test_a_step_without_labels_uses_the_teacher_alone(tmp_path) -> None:
    none = [{**e, "labels": UNLABELLED} for e in examples(4)]
    found = []
    for alpha, data in ((0.5, none), (1.0, examples(4, labels=None))):
        student = bert().double()
        make(
            tmp_path, student, bert(seed=1).double(), alpha=alpha, learning_rate=0.1 / alpha, train_dataset=data
        ).train()
        found.append(weights(student))
    assert update_difference(found[0], found[1], weights(bert().double())) < 1e-6


def test_a_step_without_labels_logs_a_labels_loss_of_0(tmp_path) -> None:
    none = [{**e, "labels": UNLABELLED} for e in examples(4)]
    trainer = make(tmp_path, bert(), bert(seed=1), train_dataset=none, logging_steps=1, max_steps=1)
    trainer.train()
    assert trainer.state.log_history[0]["loss/labels"] == 0.0
    assert trainer.state.log_history[0]["loss/logits"] > 0


def learns_from_inputs_alone(head: Head) -> bool:
    """Without labels a decoder's inputs are unknown; other heads are distilled on attended positions."""
    return head.kind != "seq2seq"


@pytest.mark.parametrize("name", [name for name, head in HEADS.items() if learns_from_inputs_alone(head)])
def test_a_dataset_without_a_label_column(tmp_path, name: str) -> None:
    head = HEADS[name]
    student, teacher = head.make(seed=0), head.make(seed=1)
    data = head.examples(8, labelled=False)
    trainer = make(
        tmp_path, student, teacher, alpha=1.0, train_dataset=data, data_collator=head.collate, logging_steps=1,
        gradient_accumulation_steps=2, per_device_train_batch_size=2,
    )  # fmt: skip
    trainer.train()
    assert_moved(weights(student), weights(head.make(seed=0)))
    logged = trainer.state.log_history[0]
    assert logged["loss"] == pytest.approx(logged["loss/logits"], rel=1e-4)
    assert "loss/labels" not in logged


@pytest.mark.parametrize("name", [name for name, head in HEADS.items() if head.kind == "seq2seq"])
def test_a_decoder_without_labels_needs_decoder_inputs(tmp_path, name: str) -> None:
    """With them it trains without labels; otherwise the error names them."""
    head = HEADS[name]
    bare = head.examples(8, labelled=False)
    trainer = make(
        tmp_path, head.make(seed=0), head.make(seed=1), alpha=1.0, train_dataset=bare, data_collator=head.collate
    )
    with pytest.raises(DataError, match=r"neither labels nor decoder_input_ids.*generate_completions"):
        trainer.train()
    student = head.make(seed=0)
    given = [{**example, "decoder_input_ids": [1, 5, 6, 7]} for example in bare]
    make(
        tmp_path, student, head.make(seed=1), alpha=1.0, train_dataset=given, data_collator=head.collate
    ).train()  # fmt: skip
    assert_moved(weights(student), weights(head.make(seed=0)))


@pytest.mark.parametrize(
    "name", ["bert_single_label", "vit_image_class", "wav2vec2_audio_class", "distilbert_single_label"]
)
def test_labels_do_not_matter_at_alpha_1(tmp_path, name: str) -> None:
    head = HEADS[name]
    found = []
    for labelled in (True, False):
        student = head.make(seed=0)
        data = head.examples(8, labelled=labelled)
        make(
            tmp_path, student, head.make(seed=1), alpha=1.0, train_dataset=data, data_collator=head.collate
        ).train()  # fmt: skip
        found.append(weights(student))
    assert_same_bits(found[1], found[0])


@pytest.mark.parametrize("problem", ["multi_label_classification", "regression"])
def test_ignored_labels_raise_for_values_and_multi_label(tmp_path, problem: str) -> None:
    several = problem == "multi_label_classification"
    labels = {"num_labels": 3 if several else 1, "problem_type": problem}
    values = [[1.0, 0.0, 1.0] if several else 0.5] * 4
    values[2] = [1.0, -100.0, 0.0] if several else -100.0
    data = [{**e, "labels": value} for e, value in zip(examples(4), values, strict=True)]
    student = bert(**labels)
    given = {"train_dataset": data, "train_sampling_strategy": "sequential"}
    named = r"(example 2 of the batch has label -100|holds \[1.0, -100.0, 0.0\] \(example 2\)).*alpha=1"
    with pytest.raises(DataError, match=named):
        make(tmp_path, student, bert(seed=1, **labels), **given).train()
    assert_same_bits(weights(student), weights(bert(**labels)))


def test_an_unlabelled_dataset_with_column_names_raises_before_training(tmp_path) -> None:
    rows = Dataset.from_dict({"input_ids": [[1, 2, 3]] * 4})
    with pytest.raises(DataError, match=r"alpha < 1 weighs labels.*no labels in.*alpha=1"):
        make(tmp_path, bert(), bert(seed=1), train_dataset=rows, data_collator=None)
    assert not list(tmp_path.iterdir())
