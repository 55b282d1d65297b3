"""A saved config describes the training: multi-label, regression, label names; the user's own settings stay."""

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
    """Return the config of a student after training and saving."""
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
def test_the_teachers_multi_label_type_is_saved(tmp_path: Path, name: str, cached: bool) -> None:
    head = HEADS[name]
    student, teacher, data = head.make(0), head.make(1, problem_type=SEVERAL), head.examples(8, labelled=False)
    if cached:
        settings = {"student": student, "data_collator": head.collate, "progress": False}
        teacher = CachedTeacher(TeacherCache.build(teacher, data, tmp_path / "cache", **settings))
    assert student.config.problem_type is None
    found = saved(tmp_path, student, teacher, train_dataset=data, data_collator=head.collate)
    assert found.problem_type == SEVERAL


def test_a_pipeline_applies_the_trained_function(tmp_path: Path) -> None:
    """A sigmoid for each label, where it used to apply a softmax."""
    saved(
        tmp_path, bert(vocab_size=40), bert(seed=1, vocab_size=40, problem_type=SEVERAL), train_dataset=equal_lengths()
    )
    served = pipeline("text-classification", model=str(tmp_path / "saved"), tokenizer=tokenizer(), top_k=None)
    found = {one["label"]: one["score"] for one in served(["w3 w4"])[0]}
    with torch.no_grad():
        logits = served.model(**tokenizer()("w3 w4", return_tensors="pt")).logits[0]
    expected = torch.sigmoid(logits.double()).tolist()
    assert [found[f"LABEL_{i}"] for i in range(3)] == pytest.approx(expected, rel=1e-5)
    assert abs(sum(expected) - 1) > 0.05  # so that a softmax would be visible


@pytest.mark.parametrize("alpha", [0.5, 1.0])
def test_the_multi_label_type_of_the_labels_is_saved(tmp_path: Path, alpha: float) -> None:
    """Even without weight: their type selected the divergence."""
    data = [{**row, "labels": [float(i % 2), 1.0, 0.0]} for i, row in enumerate(equal_lengths())]
    found = saved(tmp_path, bert(), bert(seed=1), train_dataset=data, alpha=alpha)
    assert found.problem_type == SEVERAL


@pytest.mark.parametrize("labelled", [True, False])
def test_a_pipeline_returns_regression_values_unchanged(tmp_path: Path, labelled: bool) -> None:
    """For a single output a pipeline applies the sigmoid unless the config says regression."""
    shape = {"num_labels": 1, "vocab_size": 40}
    data = equal_lengths(**({"labels": 0.5} if labelled else {}))
    alpha = 0.5 if labelled else 1.0
    found = saved(tmp_path, bert(**shape), bert(seed=1, **shape), train_dataset=data, alpha=alpha)
    assert found.problem_type == "regression"
    served = pipeline("text-classification", model=str(tmp_path / "saved"), tokenizer=tokenizer())
    with torch.no_grad():
        expected = served.model(**tokenizer()("w3 w4", return_tensors="pt")).logits.item()
    assert served("w3 w4")[0]["score"] == pytest.approx(expected, rel=1e-5)


def test_a_single_label_config_is_unchanged(tmp_path: Path) -> None:
    """A pipeline already handles it, and transformers sets the type at a labelled step."""
    for theirs in (None, ONE):
        teacher = bert(seed=1, problem_type=theirs)
        assert saved(tmp_path, bert(), teacher, train_dataset=equal_lengths()).problem_type is None


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("name", ["bert_single_label", "bert_tokens"])
def test_a_student_without_names_gets_the_teachers(tmp_path: Path, name: str, cached: bool) -> None:
    head = HEADS[name]
    student, teacher, data = head.make(0), head.make(1, **NAMED), head.examples(8)
    if cached:
        settings = {"student": student, "data_collator": head.collate, "progress": False}
        teacher = CachedTeacher(
            TeacherCache.build(teacher, data, tmp_path / "c", **settings), label_matching="by_index"
        )
    found = saved(tmp_path, student, teacher, train_dataset=data, data_collator=head.collate, label_matching="by_index")
    assert found.id2label == NAMED["id2label"] and found.label2id == NAMED["label2id"]


def test_names_set_by_the_user_are_kept(tmp_path: Path) -> None:
    own = {"id2label": dict(enumerate("abc")), "label2id": {"a": 0, "b": 1, "c": 2}}
    found = saved(
        tmp_path, bert(**own), bert(seed=1, **NAMED), train_dataset=equal_lengths(), label_matching="by_index"
    )
    assert found.id2label == own["id2label"] and found.label2id == own["label2id"]


@pytest.mark.parametrize("given", ["id2label", "label2id"])
def test_the_missing_one_of_id2label_and_label2id_is_added(tmp_path: Path, given: str) -> None:
    """The loss uses whichever has names; a pipeline uses one of them."""
    student = bert()
    setattr(student.config, given, NAMED[given])
    found = saved(tmp_path, student, bert(seed=1, **NAMED), train_dataset=equal_lengths())
    assert found.id2label == NAMED["id2label"] and found.label2id == NAMED["label2id"]


def classes(**changed: Any) -> Dataset:
    return Dataset.from_list(equal_lengths(label=1)).cast_column("label", ClassLabel(names=NAMES))


@pytest.mark.parametrize(
    ("alpha", "expected"), [(0.5, NAMED["id2label"]), (1.0, UNNAMED), (0.0, UNNAMED)], ids=["both", "teacher", "labels"]
)
def test_names_of_the_dataset_are_saved(tmp_path: Path, alpha: float, expected: dict[int, str]) -> None:
    """If labels and teacher are both trained on and neither model has names. At alpha=0 the run equals Trainer's; at
    alpha=1 the labels are not used."""
    found = saved(tmp_path, bert(), bert(seed=1), train_dataset=classes(), alpha=alpha)
    assert found.id2label == expected


def test_the_teachers_names_take_precedence_over_the_datasets(tmp_path: Path) -> None:
    named = {"id2label": dict(enumerate("xyz")), "label2id": {"x": 0, "y": 1, "z": 2}}
    found = saved(
        tmp_path, bert(), bert(seed=1, **named), train_dataset=classes(), alpha=0.5, label_matching="by_index"
    )
    assert found.id2label == named["id2label"]


def test_the_config_is_unchanged_before_training_and_at_alpha_0(tmp_path: Path) -> None:
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
        return (outputs["logits"][:, 0] - labels).square().mean()  # so that the model does not set the type itself

    plain = bert(num_labels=1)
    teacher, data = bert(seed=1, num_labels=1), equal_lengths(labels=0.5)
    make(tmp_path, plain, teacher, alpha=0.0, train_dataset=data, compute_loss_func=squared, data_collator=None).train()
    assert plain.config.problem_type is None


def test_a_custom_loop_writes_the_config() -> None:
    student = bert()
    distiller = Distiller(student, bert(seed=1, problem_type=SEVERAL), alpha=1.0)
    assert student.config.problem_type is None
    distiller(student, {"input_ids": torch.tensor([[1, 2, 3]])})
    assert student.config.problem_type == SEVERAL


def test_each_student_of_a_search_gets_the_config(tmp_path: Path) -> None:
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
