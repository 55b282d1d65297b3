"""Teachers with other inputs than the student: another tokenizer, or another forward."""

from __future__ import annotations

import inspect
import pickle
from functools import partial
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import DataCollatorWithPadding

from hf_distill import DataError
from tests.heads import HEADS
from tests.hub.tiny import tokenizer
from tests.teachers.reading import WORDS, inputs_of, of_another_tokenizer
from tests.trainer.tiny import (
    as_stream,
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


def with_text() -> list[dict[str, Any]]:
    return [{**example, "teacher_text": text} for example, text in zip(examples(), WORDS, strict=True)]


def as_dataset(rows: list[dict[str, Any]]) -> Dataset:
    return Dataset.from_dict({name: [row[name] for row in rows] for name in rows[0]})


KINDS = {"list": list, "datasets": as_dataset, "stream": as_stream}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("remove_unused_columns", [True, False])
def test_a_text_column_is_tokenized_for_the_teacher(tmp_path, kind: str, remove_unused_columns: bool) -> None:
    student, teacher = bert().double(), of_another_tokenizer().double()
    ours, theirs = inputs_of(student), inputs_of(teacher)
    start, expected = weights(student), bert().double()
    make(
        tmp_path, student, teacher, teacher_processing_class=tokenizer(), train_dataset=KINDS[kind](with_text()),
        alpha=1.0, temperature=3.0, max_steps=1, per_device_train_batch_size=8, train_sampling_strategy="sequential",
        remove_unused_columns=remove_unused_columns,
    ).train()  # fmt: skip
    read = tokenizer()(list(WORDS), padding=True, return_tensors="pt")
    assert [set(given) for given in ours] == [{"input_ids", "attention_mask"}]
    assert torch.equal(theirs[0]["input_ids"], read["input_ids"])
    assert torch.equal(theirs[0]["attention_mask"], read["attention_mask"])
    batch = padded(examples(labels=None))
    logits = expected(**batch).logits
    softened_kl(logits, teacher(**read).logits.detach(), 3.0).mean().backward()
    with torch.no_grad():
        for parameter in expected.parameters():
            if parameter.grad is not None:
                parameter -= 0.1 * parameter.grad
    assert update_difference(weights(student), weights(expected), start) < 1e-6


def trained(folder: Any, rows: Any, **changed: Any) -> dict[str, torch.Tensor]:
    student = bert()
    make(
        folder, student, of_another_tokenizer(), train_dataset=rows, train_sampling_strategy="sequential", **changed
    ).train()  # fmt: skip
    assert_moved(weights(student), weights(bert()))
    return weights(student)


@pytest.mark.parametrize("kind", KINDS)
def test_tokenized_columns_are_padded_by_the_teachers_tokenizer(tmp_path, kind: str) -> None:
    read = tokenizer()(list(WORDS))
    ready = [
        {**e, "teacher_input_ids": ids, "teacher_attention_mask": mask}
        for e, ids, mask in zip(examples(), read["input_ids"], read["attention_mask"], strict=True)
    ]
    processor = {"teacher_processing_class": tokenizer()}
    found = trained(tmp_path, KINDS[kind](ready), **processor)
    assert_same_bits(found, trained(tmp_path, with_text(), **processor))


def test_tokenized_columns_of_equal_length_need_no_processor(tmp_path) -> None:
    ready = as_dataset([{**e, "teacher_input_ids": [2, 5 + i % 6, 3]} for i, e in enumerate(examples())])
    processed = trained(tmp_path, ready, teacher_processing_class=tokenizer())
    assert_same_bits(trained(tmp_path, ready), processed)


@pytest.mark.parametrize("kind", ["list", "datasets"])
def test_text_columns_without_a_tokenizer_raise(tmp_path, kind: str) -> None:
    with pytest.raises(DataError, match=r"teacher_text, which only the teacher's processor can read\. Pass"):
        trained(tmp_path, KINDS[kind](with_text()))


def test_examples_with_different_columns_raise(tmp_path) -> None:
    processor = {"teacher_processing_class": tokenizer()}
    rows = with_text()
    with pytest.raises(DataError, match=r"one example of a batch has the columns .* for the teacher, another \[\]"):
        trained(tmp_path, [*rows[:-1], {k: v for k, v in rows[-1].items() if k != "teacher_text"}], **processor)
    with pytest.raises(DataError, match=r"teacher_text: None in an example\. Give each a value"):
        trained(tmp_path, as_dataset([*rows[:-1], {**rows[-1], "teacher_text": None}]), **processor)


def test_pairs_of_texts(tmp_path) -> None:
    rows = as_dataset([{**row, "teacher_text_pair": row["teacher_text"][::-1]} for row in with_text()])
    teacher = of_another_tokenizer()
    seen = inputs_of(teacher)
    make(
        tmp_path, bert(), teacher, train_dataset=rows, teacher_processing_class=tokenizer(), max_steps=1,
        per_device_train_batch_size=8, train_sampling_strategy="sequential",
    ).train()  # fmt: skip
    read = tokenizer()(list(WORDS), [text[::-1] for text in WORDS], padding=True, return_tensors="pt")
    assert torch.equal(seen[0]["input_ids"], read["input_ids"])


def test_teacher_columns_with_the_default_collator(tmp_path) -> None:
    """Trainer's default collator must not receive columns that it cannot pad."""
    small = {"vocab_size": 11}
    rows = as_dataset([{**row, "input_ids": [1 + i % 10 for i in row["input_ids"]]} for row in with_text()])
    student, teacher = bert(**small), bert(seed=1, **small)
    trainer = make(
        tmp_path, student, teacher, train_dataset=rows, data_collator=None, processing_class=tokenizer(),
        teacher_processing_class=tokenizer(),
    )  # fmt: skip
    assert isinstance(trainer.data_collator.collator, DataCollatorWithPadding)
    trainer.train()
    assert_moved(weights(student), weights(bert(**small)))


@pytest.mark.parametrize("ask", [False, True])
def test_evaluation_and_prediction_with_teacher_columns(tmp_path, ask: bool) -> None:
    student, teacher = bert(), of_another_tokenizer()
    ours, theirs = inputs_of(student), inputs_of(teacher)
    trainer = make(
        tmp_path, student, teacher, eval_dataset=as_dataset(with_text()[:5]), evaluate_with_teacher=ask,
        teacher_processing_class=tokenizer(), per_device_eval_batch_size=2, temperature=3.0,
    )  # fmt: skip
    for metrics, prefix in ((trainer.evaluate(), "eval"), (trainer.predict(with_text()[:5]).metrics, "test")):
        assert f"{prefix}_loss" in metrics
        assert (f"{prefix}_divergence" in metrics) == ask
    assert len(theirs) == (6 if ask else 0)
    assert all(not name.startswith("teacher_") for given in ours for name in given)
    if ask:
        read = tokenizer()(list(WORDS[:5]), padding=True, return_tensors="pt")
        with torch.no_grad():
            logits = student(**padded(examples(5, labels=None))).logits
            expected = softened_kl(logits, teacher(**read).logits, 3.0).mean().item()
        assert metrics["test_divergence"] == pytest.approx(expected, rel=1e-4)


# The same tokenizer, another forward.


def with_types(head: Any) -> tuple[list[dict[str, Any]], Any]:
    rows = head.examples(8)
    made = [{**row, "token_type_ids": [i % 2 for i, _ in enumerate(row["input_ids"])]} for row in rows]

    def collate(features: Any) -> Any:
        batch = head.collate([{k: v for k, v in f.items() if k != "token_type_ids"} for f in features])
        if "token_type_ids" in features[0]:
            longest = batch["input_ids"].shape[1]
            types = [f["token_type_ids"] + [0] * (longest - len(f["token_type_ids"])) for f in features]
            batch["token_type_ids"] = torch.tensor(types)
        return batch

    return made, collate


@pytest.mark.parametrize("remove_unused_columns", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_token_types_reach_only_the_model_that_accepts_them(tmp_path, kind: str, remove_unused_columns: bool) -> None:
    """A DistilBERT student, which does not accept them, with a BERT teacher, which does."""
    distilbert, teacher_head = HEADS["distilbert_single_label"], HEADS["bert_single_label"]
    rows, collate = with_types(distilbert)
    student, teacher = distilbert.make(seed=0), teacher_head.make(seed=1)
    ours, theirs = inputs_of(student), inputs_of(teacher)
    make(
        tmp_path, student, teacher, train_dataset=KINDS[kind](rows), eval_dataset=rows, data_collator=collate,
        remove_unused_columns=remove_unused_columns, eval_strategy="steps", eval_steps=1, evaluate_with_teacher=True,
    ).train()  # fmt: skip
    assert "token_type_ids" not in inspect.signature(student.forward).parameters
    assert ours and all("token_type_ids" not in given for given in ours)
    assert theirs and all(given["token_type_ids"].sum() > 0 for given in theirs)


def test_token_types_for_the_student_alone(tmp_path) -> None:
    distilbert, student_head = HEADS["distilbert_single_label"], HEADS["bert_single_label"]
    rows, collate = with_types(student_head)
    student, teacher = student_head.make(seed=0), distilbert.make(seed=1)
    ours, theirs = inputs_of(student), inputs_of(teacher)
    make(tmp_path, student, teacher, train_dataset=rows, data_collator=collate).train()
    assert all("token_type_ids" in given for given in ours)
    assert theirs and all("token_type_ids" not in given for given in theirs)


def test_labels_never_reach_the_teacher(tmp_path) -> None:
    for name in ("bert_single_label", "bert_span", "t5_seq2seq", "llama_causal_lm", "wav2vec2_ctc_mean"):
        head = HEADS[name]
        teacher = head.make(seed=1)
        seen = inputs_of(teacher)
        make(
            tmp_path, head.make(seed=0), teacher, train_dataset=head.examples(8), data_collator=head.collate
        ).train()  # fmt: skip
        assert seen and not any({"labels", "start_positions", "end_positions"} & set(given) for given in seen)


# Missing columns and processors.


@pytest.mark.parametrize("column", ["teacher_text", "teacher_audio", "teacher_image"])
def test_raw_columns_without_a_processor_raise(tmp_path, column: str) -> None:
    rows = as_dataset([{**example, column: "x"} for example in examples()])
    trainer = make(tmp_path, bert(), bert(seed=1), train_dataset=rows)
    with pytest.raises(DataError, match=rf"{column}, which only the teacher's processor can read.*teacher_processing"):
        trainer.train()


def test_tokenized_columns_of_unequal_length_without_a_processor_raise(tmp_path) -> None:
    rows = as_dataset([{**example, "teacher_input_ids": [2] * (1 + i)} for i, example in enumerate(examples())])
    trainer = make(tmp_path, bert(), of_another_tokenizer(), train_dataset=rows)
    with pytest.raises(DataError, match=r"teacher_input_ids: rows of different lengths.*teacher_processing_class="):
        trainer.train()


def test_attributes_of_the_users_collator_are_available(tmp_path) -> None:
    """Such as its tokenizer; the collator can also be sent to a worker process."""
    words = tokenizer()
    collator = DataCollatorWithPadding(words)
    trainer = make(tmp_path, bert(), bert(seed=1), data_collator=collator, teacher_processing_class=tokenizer())
    assert trainer.data_collator.tokenizer is words
    assert pickle.loads(pickle.dumps(trainer.data_collator)).tokenizer.get_vocab() == words.get_vocab()
    with pytest.raises(AttributeError):
        _ = trainer.data_collator.nothing_of_the_kind
    assert partial(trainer.data_collator)  # callable, as any collator
