"""Unusual models: forwards that only pass arguments on, compiled models, plain modules."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification

from hf_distill import DataError, Distiller, ModelTeacher, TeacherError
from hf_distill.tasks import Task
from tests.heads import HEADS, VOCABULARY
from tests.trainer.tiny import assert_moved, make, softened_kl, weights

HEAD = HEADS["bert_single_label"]
T = 2.0


class PassesOn(BertForSequenceClassification):
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return super().forward(*args, **kwargs)


class PassesKeywordsOn(BertForSequenceClassification):
    def forward(self, **inputs: Any) -> Any:
        return super().forward(**inputs)


class Wrapper(nn.Module):
    """Its forward names no argument."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.config = inner.config

    def forward(self, **inputs: Any) -> Any:
        return self.inner(**inputs)


class Plain(nn.Module):
    """A bag of words without config and base class."""

    def __init__(self, seed: int, labels: int = 3) -> None:
        super().__init__()
        weight = torch.randn(VOCABULARY, labels, generator=torch.Generator().manual_seed(seed))
        self.bag = nn.EmbeddingBag.from_pretrained(weight, freeze=False)

    def forward(self, input_ids: Tensor, attention_mask: Any = None, labels: Any = None) -> dict[str, Tensor]:
        logits = self.bag(input_ids)
        if labels is None:
            return {"logits": logits}
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


class OwnTask(Task):
    """Accepts any rows, paired by their width."""

    kind = "classification"
    matched_by = "width"
    needs_same_inputs = False


def subclass(kind: Any, seed: int) -> Any:
    model = kind(BertConfig(**HEAD.settings))
    model.load_state_dict(HEAD.make(seed).state_dict())
    return model


def compiled(seed: int) -> Any:
    return torch.compile(HEAD.make(seed), backend="eager")


def compiled_in_place(seed: int) -> Any:
    model = HEAD.make(seed)
    model.compile(backend="eager")
    return model


MADE = {
    "forward(*args, **kwargs)": lambda seed: subclass(PassesOn, seed),
    "forward(**inputs)": lambda seed: subclass(PassesKeywordsOn, seed),
    "compiled": compiled,
    "compiled in place": compiled_in_place,
}


def expected_terms() -> dict[str, float]:
    """Return the terms of the two underlying models, from transformers and the definition."""
    batch = HEAD.batch(4)
    with torch.no_grad():
        ours = HEAD.make(0)(**batch)
        batch.pop("labels")
        theirs = HEAD.make(1)(**batch)
    return {"labels": ours.loss.item(), "logits": softened_kl(ours.logits, theirs.logits, T).mean().item()}


def terms(student: Any, teacher: Any, **settings: Any) -> dict[str, float]:
    found = Distiller(student, teacher, temperature=T, **settings)(student, HEAD.batch(4))
    found.loss.backward()
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in student.parameters())
    return {name: value.item() for name, value in found.terms.items()}


@pytest.mark.parametrize("name", MADE)
def test_wrapped_students_give_the_same_terms(name: str) -> None:
    assert terms(MADE[name](0), HEAD.make(1)) == pytest.approx(expected_terms(), rel=1e-5)


@pytest.mark.parametrize("name", MADE)
def test_wrapped_teachers_give_the_same_terms(name: str) -> None:
    teacher = MADE[name](1)
    assert terms(HEAD.make(0), teacher) == pytest.approx(expected_terms(), rel=1e-5)
    assert not any(p.requires_grad for p in teacher.parameters())


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name == "compiled in place" else ()) for name in MADE]
)
def test_wrapped_models_in_the_trainer(tmp_path, name: str) -> None:
    student = MADE[name](0)
    given = {"remove_unused_columns": False, "per_device_train_batch_size": 4, "max_steps": 1, "logging_steps": 1}
    trainer = make(
        tmp_path, student, MADE[name](1), train_dataset=HEAD.examples(4), data_collator=HEAD.collate, temperature=T,
        eval_dataset=HEAD.examples(4), evaluate_with_teacher=True, **given,
    )  # fmt: skip
    before = trainer.evaluate()
    assert before["eval_divergence"] == pytest.approx(expected_terms()["logits"], rel=1e-4)
    trainer.train()
    logged = {key.removeprefix("loss/"): value for key, value in trainer.state.log_history[-2].items() if "/" in key}
    assert logged == pytest.approx(expected_terms(), rel=1e-4)


def test_a_wrapper_without_named_arguments_gets_the_students_inputs() -> None:
    assert terms(HEAD.make(0), Wrapper(HEAD.make(1))) == pytest.approx(expected_terms(), rel=1e-5)
    student = Wrapper(HEAD.make(0))
    assert terms(student, HEAD.make(1), task="classification") == pytest.approx(expected_terms(), rel=1e-5)


def test_teacher_columns_do_not_reach_a_wrapped_student() -> None:
    student, batch = MADE["forward(**inputs)"](0), HEAD.batch(4)
    batch["teacher_input_ids"] = batch["input_ids"].flip(1)
    Distiller(student, HEAD.make(1))(student, batch)  # its inner forward would reject an unknown name


def test_a_missing_input_is_named() -> None:
    teacher = MADE["forward(*args, **kwargs)"](1)
    batch = HEAD.batch(4)
    batch["words"] = batch.pop("input_ids")
    distiller = Distiller(HEAD.make(0), teacher)
    with pytest.raises(DataError, match=r"the teacher \(PassesOn\) needs input_ids, the batch has"):
        distiller.teacher(distiller.task, batch, distiller.logits_match.needs)


# Plain modules.


def plain_terms(student: Any, teacher: Any) -> dict[str, float]:
    """Return the terms by hand, for any two models."""
    batch = HEAD.batch(4)
    labels = batch.pop("labels")
    with torch.no_grad():
        ours, theirs = student(**batch)["logits"], teacher(**batch)["logits"]
    own = nn.functional.cross_entropy(ours, labels).item()
    return {"labels": own, "logits": softened_kl(ours, theirs, T).mean().item()}


def by_index(model: Any) -> ModelTeacher:
    return ModelTeacher(model, label_matching="by_index")


def test_a_plain_teacher_with_a_bert_student() -> None:
    student, teacher = HEAD.make(0), Plain(1)
    assert terms(student, by_index(teacher)) == pytest.approx(plain_terms(student, teacher), rel=1e-4)


def test_a_bert_teacher_with_a_plain_student() -> None:
    student, teacher = Plain(0), HEAD.make(1)
    found = terms(student, by_index(teacher), task="classification")
    assert found == pytest.approx(plain_terms(student, teacher), rel=1e-4)


@pytest.mark.parametrize("own_task", [True, False])
def test_two_plain_modules_in_the_trainer(tmp_path, own_task: bool) -> None:
    student, teacher = Plain(0), Plain(1)
    task = OwnTask() if own_task else "classification"
    given = teacher if own_task else by_index(teacher)
    expected = plain_terms(student, teacher)
    assert terms(student, given, task=task) == pytest.approx(expected, rel=1e-4)
    start = weights(student)
    trainer = make(
        tmp_path, student, given, task=task, train_dataset=HEAD.examples(4), data_collator=HEAD.collate,
        max_steps=1, logging_steps=1, remove_unused_columns=False, temperature=T,
    )  # fmt: skip
    trainer.train()
    assert_moved(weights(student), start)
    logged = trainer.state.log_history[0]
    assert {name: logged[f"loss/{name}"] for name in expected} == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("side", ["student", "teacher"])
def test_a_model_without_a_config_requires_matching_by_index(side: str) -> None:
    student, teacher = (Plain(0), HEAD.make(1)) if side == "student" else (HEAD.make(0), Plain(1))
    with pytest.raises(TeacherError, match=r"Plain has no config, so its labels have no names.*by_index"):
        Distiller(student, teacher, task="classification")


def test_a_plain_teacher_with_another_number_of_labels_raises() -> None:
    student = HEAD.make(0)
    with pytest.raises(TeacherError, match="equally many columns"):
        Distiller(student, by_index(Plain(1, labels=4)))(student, HEAD.batch(4))


def test_a_plain_teacher_over_a_vocabulary() -> None:
    """Its head is unknown: rows are compared unchanged, and their width is checked at the first step."""

    class Tokens(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.table = nn.Embedding(VOCABULARY, width)

        def forward(self, input_ids: Tensor) -> dict[str, Tensor]:
            return {"logits": self.table(input_ids)}

    head = HEADS["llama_causal_lm"]
    student, teacher, batch = head.make(0), Tokens(VOCABULARY), head.batch(4)
    found = Distiller(student, teacher, temperature=T, alpha=1.0)(student, batch).terms["logits"].item()
    kept = (batch["labels"][:, 1:] != -100) & batch["attention_mask"][:, :-1].bool()
    with torch.no_grad():
        ours = student(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1][kept]
        theirs = teacher(batch["input_ids"])["logits"][:, :-1][kept]
    assert found == pytest.approx(softened_kl(ours, theirs, T).mean().item(), rel=1e-4)
    with pytest.raises(TeacherError, match="equally many columns"):
        Distiller(student, Tokens(VOCABULARY + 1), alpha=1.0)(student, batch)


class OwnNames(Plain):
    """Its forward names its input `x`, but its `main_input_name`, if any, is the default."""

    def forward(self, x: Tensor, labels: Any = None) -> dict[str, Tensor]:  # type: ignore[override]  # on purpose
        return super().forward(x, labels=labels)


@pytest.mark.parametrize("own_column", [False, True])
@pytest.mark.parametrize("has_name", [False, True])
def test_the_main_input_is_taken_from_forward(has_name: bool, own_column: bool) -> None:
    """Not `input_ids`, which is only the default of `main_input_name`."""
    student, teacher = OwnNames(0), OwnNames(1)
    if has_name:
        teacher.main_input_name = "input_ids"
    batch = {"x": torch.arange(8).view(4, 2), "labels": torch.tensor([0, 1, 2, 0])}
    if own_column:
        batch["teacher_x"] = batch["x"].flip(1)
    output = Distiller(student, by_index(teacher), temperature=T, task="classification")(student, batch)
    with torch.no_grad():
        theirs = teacher(batch["teacher_x" if own_column else "x"])["logits"]
        expected = softened_kl(student(batch["x"])["logits"], theirs, T).mean().item()
    assert output.terms["logits"].item() == pytest.approx(expected, rel=1e-4)
    with pytest.raises(DataError, match=r"the teacher \(OwnNames\) needs x, the batch has \['y'\]"):
        by_index(teacher)._inputs({"y": batch["x"]})
