"""Warnings for a teacher that contradicts the labels, is smaller than its student, or worse than it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional as F

from hf_distill import Distiller, Ensemble, ModelTeacher, MovingAverage, TeacherCache
from hf_distill.label_agreement import ROWS, LabelAgreement
from hf_distill.signals import Signals
from hf_distill.tasks import TASKS
from hf_distill.vocabulary import HeadAlignment
from tests.heads import HEADS
from tests.trainer.tiny import bert, make, messages_with, padded

UNKNOWN = "The teacher does not know these labels"
CLASSES = 3


def rows(count: int, *, of: int = CLASSES) -> list[dict[str, Any]]:
    """Return examples whose first token encodes their label."""
    return [{"input_ids": [1 + i % of, 5 + i % 7, 9], "labels": i % of} for i in range(count)]


def knowing(model: Any, *, answers: tuple[int, ...] = (0, 1, 2)) -> Any:
    """Return the model, predicting answers[i] for label i."""
    table = torch.tensor(answers)
    seen: dict[str, Any] = {}
    model.register_forward_pre_hook(lambda _, __, given: seen.update(ids=given["input_ids"]), with_kwargs=True)

    def answer(_: Any, __: Any, logits: Any) -> Any:
        return logits * 0 + 5 * F.one_hot(table[seen["ids"][:, 0] - 1], logits.shape[-1])

    model.classifier.register_forward_hook(answer)
    return model


def trained(folder: Any, teacher: Any, **given: Any) -> Any:
    settings = {"max_steps": 40, "per_device_train_batch_size": 8, "train_dataset": rows(400), **given}
    trainer = make(folder, settings.pop("student", None) or bert(), teacher, **settings)
    trainer.train()
    return trainer


@pytest.mark.parametrize("alpha", [0.5, 1.0])
@pytest.mark.parametrize("answers", [(1, 2, 0), (1, 0, 0), (2, 2, 2)], ids=["cycled", "exchanged", "one-class"])
def test_a_teacher_with_permuted_labels_gives_one_warning(tmp_path, log, answers, alpha: float) -> None:
    given = {"alpha": alpha, "train_sampling_strategy": "sequential"}
    trained(tmp_path, knowing(bert(seed=1), answers=answers), **given)
    [message] = messages_with(log, UNKNOWN)
    right = {(1, 2, 0): "0.0%", (1, 0, 0): "0.0%", (2, 2, 2): "33."}[answers]
    assert f"in the first {ROWS} labelled rows its choice is the label in {right}" in message
    assert "33." in message.split("and ")[1]  # the rate by chance
    for cause in ("config.label2id", "label_matching='by_index'", "not trained on this task", "exchanged"):
        assert cause in message


def test_a_correct_teacher_gives_no_warning(tmp_path, log) -> None:
    trained(tmp_path, knowing(bert(seed=1)))
    assert not messages_with(log, UNKNOWN)


def test_labels_matched_by_name_give_no_warning(tmp_path, log) -> None:
    names = {"student": ["a", "b", "c"], "teacher": ["c", "a", "b"]}
    maps = {
        who: {"label2id": {n: i for i, n in enumerate(listed)}, "id2label": dict(enumerate(listed))}
        for who, listed in names.items()
    }
    student, teacher = bert(**maps["student"]), knowing(bert(seed=1, **maps["teacher"]), answers=(1, 2, 0))
    trained(tmp_path / "a", teacher, student=student)
    assert not messages_with(log, UNKNOWN)
    trained(tmp_path / "b", teacher, student=bert(**maps["student"]), label_matching="by_index")
    assert len(messages_with(log, UNKNOWN)) == 1


def test_predicting_the_majority_class_is_chance(tmp_path, log) -> None:
    """Nine of ten labels are 0, which the teacher always predicts: 90 % accuracy is chance."""
    data = [{"input_ids": [1 + (i % 10 == 0), 5 + i % 7], "labels": int(i % 10 == 0)} for i in range(400)]
    trained(tmp_path, knowing(bert(seed=1), answers=(0, 0, 0)), train_dataset=data)
    [message] = messages_with(log, UNKNOWN)
    assert "is the label in 8" in message or "is the label in 9" in message


def test_the_check_waits_for_enough_labels(tmp_path, log) -> None:
    """One in eight rows has a label: 256 labels after 256 steps."""
    data = [{**row, "labels": row["labels"] if i % 8 == 0 else -100} for i, row in enumerate(rows(400))]
    given = {"train_sampling_strategy": "sequential", "train_dataset": data}
    trained(tmp_path / "a", knowing(bert(seed=1), answers=(1, 2, 0)), max_steps=100, **given)
    assert not messages_with(log, UNKNOWN)
    trained(tmp_path / "b", knowing(bert(seed=1), answers=(1, 2, 0)), max_steps=300, **given)
    [message] = messages_with(log, UNKNOWN)
    assert f"in the first {ROWS} labelled rows" in message


def test_no_warning_without_labels_or_teacher(tmp_path, log) -> None:
    bare = [{"input_ids": row["input_ids"]} for row in rows(400)]
    trained(tmp_path / "a", knowing(bert(seed=1), answers=(1, 2, 0)), alpha=1.0, train_dataset=bare)
    trained(tmp_path / "b", None, alpha=0.0)
    assert not messages_with(log, UNKNOWN)


def test_no_warning_for_a_teacher_that_is_trained(tmp_path, log) -> None:
    trained(tmp_path / "a", MovingAverage())
    trained(tmp_path / "b", Ensemble([MovingAverage(), bert(seed=1)]))
    assert not messages_with(log, UNKNOWN)
    trained(tmp_path / "c", Ensemble([knowing(bert(seed=s), answers=(1, 2, 0)) for s in (1, 2)]))
    assert len(messages_with(log, UNKNOWN)) == 1


@pytest.mark.parametrize("answers", [(0, 1, 2), (1, 2, 0)])
def test_a_cached_teacher_is_checked(tmp_path, log, answers) -> None:
    teacher = knowing(bert(seed=1), answers=answers)
    cache = TeacherCache.build(teacher, rows(400), tmp_path / "cache", data_collator=padded, progress=False)
    trained(tmp_path, cache)
    assert len(messages_with(log, UNKNOWN)) == (answers != (0, 1, 2))


KINDS = ("classification", "token_classification", "multiple_choice", "span")
FEW_CLASSES = [name for name, head in HEADS.items() if head.kind in KINDS and name != "bert_multi_label"]


@pytest.mark.parametrize("knows", [True, False])
@pytest.mark.parametrize("name", FEW_CLASSES)
def test_every_head_with_few_classes_is_checked(log, name: str, knows: bool) -> None:
    """Predictions made from the labels, or from another example's labels."""
    head = HEADS[name]
    model, agreement = head.make(), LabelAgreement(ModelTeacher(head.make(seed=1)))
    task, labelled = TASKS[head.kind].from_model(model), 0
    for seed in range(80):
        batch = head.batch(8, seed)
        with torch.no_grad():
            student = task.read(model(**batch), batch, HeadAlignment(), teacher=False)
        targets = task.targets(batch)
        assert targets is not None
        labelled += int((targets >= 0).sum())
        chosen = targets if knows else targets.roll(1 if head.kind != "span" else 2)
        logits = F.one_hot(chosen.clamp(min=0), student.shape[-1]).float().view(student.shape)
        agreement.add(task, batch, Signals(student), Signals(logits))
        agreement.warn_if_chance()
    assert labelled > 2 * ROWS
    # Alternating labels always differ from the neighbour's: worse than any chance.
    assert len(messages_with(log, UNKNOWN)) == (not knows)


@pytest.mark.parametrize("name", [name for name in HEADS if name not in FEW_CLASSES])
def test_other_heads_are_not_checked(tmp_path, log, name: str) -> None:
    """Random teachers for language models, regression, and multi-label."""
    head = HEADS[name]
    alpha = 1.0 if head.kind == "embedding" else 0.5
    make(
        tmp_path, head.make(), head.make(seed=1), alpha=alpha, train_dataset=head.examples(320),
        data_collator=head.collate, per_device_train_batch_size=80, max_steps=4, learning_rate=0.0,
    ).train()  # fmt: skip
    assert not messages_with(log, UNKNOWN)


def test_a_custom_loop_checks_the_teacher(log) -> None:
    student = bert()
    distiller = Distiller(student, knowing(bert(seed=1), answers=(1, 2, 0)))
    for _ in range(ROWS // 32 + 2):
        distiller(student, padded(rows(32)))
    assert len(messages_with(log, UNKNOWN)) == 1


# Sizes.


def test_a_smaller_teacher_gives_one_warning(tmp_path, log) -> None:
    make(tmp_path / "a", bert(num_hidden_layers=3), bert(seed=1)).train()
    [message] = messages_with(log, "fewer than the student's")
    assert "model and teacher_model are exchanged" in message
    sizes = [sum(p.numel() for p in bert(num_hidden_layers=layers).parameters()) for layers in (1, 3)]
    assert f"The teacher has {sizes[0]:,} weights, fewer than the student's {sizes[1]:,}" in message


@pytest.mark.parametrize(
    "teacher",
    [
        lambda: bert(seed=1),
        lambda: bert(seed=1, num_hidden_layers=2),
        MovingAverage,
        lambda: Ensemble([bert(seed=s) for s in (1, 2)]),
    ],
    ids=["equal", "larger", "the-student-itself", "several"],
)
def test_other_teachers_give_no_size_warning(tmp_path, log, teacher: Any) -> None:
    make(tmp_path, bert(), teacher())
    assert not messages_with(log, "fewer than the student's")


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # PEFT asks by that name
def test_adapters_do_not_make_a_student_larger(tmp_path, log) -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["query"], modules_to_save=["classifier"], task_type="SEQ_CLS")
    make(tmp_path, peft.get_peft_model(bert(), config), bert(seed=1))
    assert not messages_with(log, "fewer than the student's")


# A student better than its teacher.

PASSED = "The student has passed its teacher on these labels"


def evaluated(folder: Any, student: Any, teacher: Any, data: Any, **given: Any) -> Any:
    settings = {"evaluate_with_teacher": True, "per_device_eval_batch_size": 16, "eval_dataset": data, **given}
    return make(folder, student, teacher, **settings)


def test_a_student_better_than_its_teacher_gives_a_warning(tmp_path, log) -> None:
    """At the first evaluation: the student is always right, the teacher only about two of three classes."""
    trainer = evaluated(tmp_path, knowing(bert()), knowing(bert(seed=1), answers=(0, 1, 1)), rows(60))
    trainer.evaluate()
    [message] = messages_with(log, PASSED)
    assert (
        "it names 100.0% of 60, the teacher 66.7%" in message and "lower alpha, or train the teacher longer" in message
    )
    trainer.evaluate()
    trainer.evaluate(rows(90))
    assert len(messages_with(log, PASSED)) == 1


def test_unlabelled_rows_do_not_count(tmp_path, log) -> None:
    data = rows(60) + [{**row, "labels": -100} for row in rows(30)]
    evaluated(tmp_path, knowing(bert()), knowing(bert(seed=1), answers=(0, 1, 1)), data).evaluate()
    assert "100.0% of 60," in messages_with(log, PASSED)[0]


@pytest.mark.parametrize(
    ("ours", "theirs", "count"),
    [((0, 1, 2), (0, 1, 2), 60), ((0, 1, 1), (0, 1, 2), 60), ((0, 1, 2), (0, 1, 1), 9)],
    ids=["equal", "worse", "three-rows-might-be-chance"],
)
def test_a_student_that_is_not_better_gives_no_warning(tmp_path, log, ours, theirs, count: int) -> None:
    evaluated(tmp_path, knowing(bert(), answers=ours), knowing(bert(seed=1), answers=theirs), rows(count)).evaluate()
    assert not messages_with(log, PASSED)
