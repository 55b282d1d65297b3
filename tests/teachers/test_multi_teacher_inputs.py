"""Ensembles whose members have their own tokenizers: each gets its own columns, and the student none of them."""

from __future__ import annotations

import pickle
from typing import Any

import pytest
import torch
from datasets import Dataset

from hf_distill import DataError, SettingError
from hf_distill.teachers import Dense, Ensemble, TeacherCache
from hf_distill.teachers.base import teacher_inputs
from hf_distill.trainer.collators import SeveralInputsCollator
from tests.hub.tiny import tokenizer
from tests.teachers.reading import WORDS, inputs_of, of_another_tokenizer
from tests.tiny_tokenizers import tokenizer as counting
from tests.trainer.tiny import bert, examples, make, padded, softened_kl, update_difference, weights


def rows(**columns: list[Any]) -> Dataset:
    made = {"teacher_text": list(WORDS), **columns}
    return Dataset.from_list(
        [{**one, **{name: values[i] for name, values in made.items()}} for i, one in enumerate(examples())]
    )


def test_each_member_gets_its_own_columns(tmp_path) -> None:
    """The first has the student's ids, the second its tokenizer's ids, the third another text."""
    others = [text[::-1] if " " not in text else text.split(" ")[-1] for text in WORDS]
    student, teachers = bert().double(), [bert(seed=1).double(), of_another_tokenizer().double()]
    teachers.append(bert(seed=4, vocab_size=11).double())
    ours, theirs = inputs_of(student), [inputs_of(teacher) for teacher in teachers]
    start, expected = weights(student), bert().double()
    make(
        tmp_path, student, Ensemble(teachers), teacher_processing_class=[None, tokenizer(), tokenizer()],
        train_dataset=rows(teacher_2_text=others), alpha=1.0, temperature=3.0, max_steps=1,
        per_device_train_batch_size=8, train_sampling_strategy="sequential",
    ).train()  # fmt: skip
    batch = padded(examples(labels=None))
    read = [batch, *(dict(tokenizer()(texts, padding=True, return_tensors="pt")) for texts in (list(WORDS), others))]
    for (given,), wanted in zip((ours, *theirs), (batch, *read), strict=True):
        assert {"input_ids", "attention_mask"} <= set(given) and not any(k.startswith("teacher_") for k in given)
        assert all(torch.equal(given[name], wanted[name]) for name in ("input_ids", "attention_mask"))
    with torch.no_grad():
        outputs = [teacher(**inputs).logits for teacher, inputs in zip(teachers, read, strict=True)]
    mean = torch.stack([(logits / 3.0).softmax(-1) for logits in outputs]).mean(0)
    softened_kl(expected(**batch).logits, 3.0 * mean.log(), 3.0).mean().backward()
    with torch.no_grad():
        for parameter in expected.parameters():
            if parameter.grad is not None:
                parameter -= 0.1 * parameter.grad
    assert update_difference(weights(student), weights(expected), start) < 1e-6


def test_a_cached_member_with_its_own_tokenizer(tmp_path) -> None:
    """Built from the teacher's tokenized text, and found in the ensemble by its own columns."""
    teachers = [bert(seed=1), of_another_tokenizer()]
    read = tokenizer()(list(WORDS))
    data = [{name: values[i] for name, values in read.items()} for i in range(len(WORDS))]
    cache = TeacherCache.build(
        teachers[1], data, tmp_path / "cache", student=bert(), processing_class=tokenizer(), store=Dense("float32"),
        progress=False,
    )  # fmt: skip
    trained = []
    for number, second in enumerate((teachers[1], cache)):
        trainer = make(
            tmp_path / str(number), bert(), Ensemble([teachers[0], second]), train_dataset=rows(),
            teacher_processing_class=[None, tokenizer()],
        )  # fmt: skip
        assert ("teacher_cached_1_logits" in next(iter(trainer.get_train_dataloader()))) == (number == 1)
        trainer.train()
        trained.append(weights(trainer.model))
    for name, value in trained[0].items():
        torch.testing.assert_close(trained[1][name], value, rtol=1e-5, atol=1e-6)


def test_numbered_columns_replace_shared_ones() -> None:
    shared = {"input_ids": 0, "teacher_input_ids": 1, "teacher_attention_mask": 2, "teacher_cached_1_logits": 3}
    batch = {**shared, "teacher_1_input_ids": 4}
    assert teacher_inputs(batch, 1) == {"input_ids": 0, "teacher_input_ids": 4, "teacher_cached_1_logits": 3}
    assert teacher_inputs(batch, 0) == shared


def test_tokenized_numbered_columns(tmp_path) -> None:
    """Of equal length they need no processor. A member without columns gets the student's."""
    ready = rows(teacher_1_input_ids=[[2, 5 + i % 6, 3] for i in range(8)]).remove_columns("teacher_text")
    teachers = [bert(seed=1), of_another_tokenizer()]
    seen = inputs_of(teachers[1])
    trainer = make(tmp_path, bert(), Ensemble(teachers), train_dataset=ready, teacher_processing_class=[None, None])
    trainer.train()
    assert all(given["input_ids"].shape[1] == 3 for given in seen) and len(seen) == 2
    assert isinstance(pickle.loads(pickle.dumps(trainer.data_collator)), SeveralInputsCollator)


def test_invalid_columns_raise(tmp_path) -> None:
    two = [bert(seed=1), of_another_tokenizer()]
    with pytest.raises(SettingError, match=r"is a list of 1 for 2 teachers"):
        make(tmp_path, bert(), Ensemble(two), teacher_processing_class=[tokenizer()], train_dataset=rows())
    with pytest.raises(SettingError, match=r"is a list of 2, which is for an Ensemble"):
        make(tmp_path, bert(), bert(seed=1), teacher_processing_class=[tokenizer(), None], train_dataset=rows())
    trainer = make(
        tmp_path, bert(), Ensemble(two), processing_class=counting(23), teacher_processing_class=[None, tokenizer()]
    )
    with pytest.raises(DataError, match=r"teacher 1 of the Ensemble: .* may misread the student's input_ids"):
        trainer.train()
