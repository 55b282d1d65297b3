"""What is saved says what was trained: several labels at once, values, names; what the user said himself stays."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import ClassLabel, Dataset
from transformers import AutoConfig, pipeline

from hf_distill import CachedTeacher, Distiller, TeacherCache
from tests.heads import HEADS
from tests.tiny_tokenizers import tokenizer
from tests.trainer.tiny import arguments, bert, examples, make

ONE, SEVERAL = "single_label_classification", "multi_label_classification"
NAMES = ["bad", "fair", "good"]
NAMED = {"id2label": dict(enumerate(NAMES)), "label2id": {name: number for number, name in enumerate(NAMES)}}
UNNAMED = {0: "LABEL_0", 1: "LABEL_1", 2: "LABEL_2"}


def saved(folder: Path, student: Any, teacher: Any, **changed: Any) -> Any:
    """The config of a student that was trained and saved."""
    changed = {"max_steps": 1, "alpha": 1.0, "data_collator": None, **changed}
    trainer = make(folder, student, teacher, **changed)
    trainer.train()
    trainer.save_model(str(folder / "saved"))
    return AutoConfig.from_pretrained(folder / "saved")


def equal_lengths(count: int = 8, **more: Any) -> list[dict[str, Any]]:
    return [{"input_ids": [1 + (5 * i + 3 * j) % 22 for j in range(4)], **more} for i in range(count)]


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize(
    "name", ["bert_single_label", "distilbert_single_label", "vit_image_class", "wav2vec2_audio_class"]
)
def test_several_labels_at_once_as_the_teacher_says(tmp_path: Path, name: str, cached: bool) -> None:
    head = HEADS[name]
    student, teacher, data = head.make(0), head.make(1, problem_type=SEVERAL), head.examples(8, labelled=False)
    if cached:
        settings = {"student": student, "data_collator": head.collate, "progress": False}
        teacher = CachedTeacher(TeacherCache.build(teacher, data, tmp_path / "cache", **settings))
    assert student.config.problem_type is None
    found = saved(tmp_path, student, teacher, train_dataset=data, data_collator=head.collate)
    assert found.problem_type == SEVERAL


def test_a_pipeline_takes_the_function_that_was_trained(tmp_path: Path) -> None:
    """A sigmoid for each label, where a softmax was served."""
    saved(
        tmp_path, bert(vocab_size=40), bert(seed=1, vocab_size=40, problem_type=SEVERAL), train_dataset=equal_lengths()
    )
    served = pipeline("text-classification", model=str(tmp_path / "saved"), tokenizer=tokenizer(), top_k=None)
    found = {one["label"]: one["score"] for one in served(["w3 w4"])[0]}
    with torch.no_grad():
        logits = served.model(**tokenizer()("w3 w4", return_tensors="pt")).logits[0]
    expected = torch.sigmoid(logits.double()).tolist()
    assert [found[f"LABEL_{i}"] for i in range(3)] == pytest.approx(expected, rel=1e-5)
    assert abs(sum(expected) - 1) > 0.05  # so that a softmax would be seen


@pytest.mark.parametrize("alpha", [0.5, 1.0])
def test_several_labels_at_once_as_the_labels_say(tmp_path: Path, alpha: float) -> None:
    """Also where they weigh nothing: their type chose the divergence."""
    data = [{**row, "labels": [float(i % 2), 1.0, 0.0]} for i, row in enumerate(equal_lengths())]
    found = saved(tmp_path, bert(), bert(seed=1), train_dataset=data, alpha=alpha)
    assert found.problem_type == SEVERAL


@pytest.mark.parametrize("labelled", [True, False])
def test_a_value_is_served_as_it_is(tmp_path: Path, labelled: bool) -> None:
    """Of a head with one output a pipeline takes the sigmoid, where the config does not say that it is a value."""
    shape = {"num_labels": 1, "vocab_size": 40}
    data = equal_lengths(**({"labels": 0.5} if labelled else {}))
    alpha = 0.5 if labelled else 1.0
    found = saved(tmp_path, bert(**shape), bert(seed=1, **shape), train_dataset=data, alpha=alpha)
    assert found.problem_type == "regression"
    served = pipeline("text-classification", model=str(tmp_path / "saved"), tokenizer=tokenizer())
    with torch.no_grad():
        expected = served.model(**tokenizer()("w3 w4", return_tensors="pt")).logits.item()
    assert served("w3 w4")[0]["score"] == pytest.approx(expected, rel=1e-5)


def test_one_label_stays_as_it_was(tmp_path: Path) -> None:
    """A pipeline serves it right without a word, and transformers writes the word at a labelled step."""
    for theirs in (None, ONE):
        teacher = bert(seed=1, problem_type=theirs)
        assert saved(tmp_path, bert(), teacher, train_dataset=equal_lengths()).problem_type is None


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("name", ["bert_single_label", "bert_tokens"])
def test_a_student_without_names_has_its_teachers(tmp_path: Path, name: str, cached: bool) -> None:
    head = HEADS[name]
    student, teacher, data = head.make(0), head.make(1, **NAMED), head.examples(8)
    if cached:
        settings = {"student": student, "data_collator": head.collate, "progress": False}
        teacher = CachedTeacher(
            TeacherCache.build(teacher, data, tmp_path / "c", **settings), label_matching="by_index"
        )
    found = saved(tmp_path, student, teacher, train_dataset=data, data_collator=head.collate, label_matching="by_index")
    assert found.id2label == NAMED["id2label"] and found.label2id == NAMED["label2id"]


def test_names_that_the_user_gave_stay(tmp_path: Path) -> None:
    own = {"id2label": dict(enumerate("abc")), "label2id": {"a": 0, "b": 1, "c": 2}}
    found = saved(
        tmp_path, bert(**own), bert(seed=1, **NAMED), train_dataset=equal_lengths(), label_matching="by_index"
    )
    assert found.id2label == own["id2label"] and found.label2id == own["label2id"]


@pytest.mark.parametrize("given", ["id2label", "label2id"])
def test_a_table_that_was_given_alone_has_its_fellow(tmp_path: Path, given: str) -> None:
    """The loss follows whichever has names; a pipeline reads one of them."""
    student = bert()
    setattr(student.config, given, NAMED[given])
    found = saved(tmp_path, student, bert(seed=1, **NAMED), train_dataset=equal_lengths())
    assert found.id2label == NAMED["id2label"] and found.label2id == NAMED["label2id"]


def classes(**changed: Any) -> Dataset:
    return Dataset.from_list(equal_lengths(label=1)).cast_column("label", ClassLabel(names=NAMES))


@pytest.mark.parametrize(
    ("alpha", "expected"), [(0.5, NAMED["id2label"]), (1.0, UNNAMED), (0.0, UNNAMED)], ids=["both", "teacher", "labels"]
)
def test_the_names_of_the_dataset(tmp_path: Path, alpha: float, expected: dict[int, str]) -> None:
    """Where labels and teacher both train, and neither model has names. At alpha=0 the run is Trainer's; at alpha=1 the
    labels were not looked at."""
    found = saved(tmp_path, bert(), bert(seed=1), train_dataset=classes(), alpha=alpha)
    assert found.id2label == expected


def test_a_teachers_names_come_before_the_datasets(tmp_path: Path) -> None:
    named = {"id2label": dict(enumerate("xyz")), "label2id": {"x": 0, "y": 1, "z": 2}}
    found = saved(
        tmp_path, bert(), bert(seed=1, **named), train_dataset=classes(), alpha=0.5, label_matching="by_index"
    )
    assert found.id2label == named["id2label"]


def test_nothing_is_written_before_the_training_or_by_one_that_is_trainers(tmp_path: Path) -> None:
    student = bert()
    trainer = make(
        tmp_path, student, bert(seed=1, problem_type=SEVERAL), alpha=1.0, train_dataset=examples(labels=None)
    )
    assert student.config.problem_type is None
    trainer.evaluate(examples(labels=None))
    assert student.config.problem_type is None
    trainer.train()
    assert student.config.problem_type == SEVERAL

    def squared(outputs: Any, labels: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        return (outputs["logits"][:, 0] - labels).square().mean()  # so that the head writes nothing itself

    plain = bert(num_labels=1)
    teacher, data = bert(seed=1, num_labels=1), equal_lengths(labels=0.5)
    make(tmp_path, plain, teacher, alpha=0.0, train_dataset=data, compute_loss_func=squared, data_collator=None).train()
    assert plain.config.problem_type is None


def test_in_a_loop_of_ones_own() -> None:
    student = bert()
    distiller = Distiller(student, bert(seed=1, problem_type=SEVERAL), alpha=1.0)
    assert student.config.problem_type is None
    distiller(student, {"input_ids": torch.tensor([[1, 2, 3]])})
    assert student.config.problem_type == SEVERAL


def test_a_new_student_of_a_search_is_written_to_as_well(tmp_path: Path) -> None:
    made: list[Any] = []

    def fresh() -> Any:
        made.append(bert())
        return made[-1]

    given = {"train_dataset": examples(labels=None), "args": arguments(tmp_path, alpha=1.0, max_steps=1)}
    trainer = make(tmp_path, None, bert(seed=1, problem_type=SEVERAL), model_init=fresh, **given)
    for _ in range(2):
        trainer.train()
        assert made[-1].config.problem_type == SEVERAL
    assert len(made) == 3
