"""A teacher that does not know the labels, or is smaller than its student, is noticed; and a student that passes it."""

from __future__ import annotations

import logging
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
from tests.trainer.tiny import bert, make, padded

UNKNOWN = "The teacher does not know these labels"
CLASSES = 3


@pytest.fixture
def log(caplog: Any) -> Any:
    caplog.set_level(logging.WARNING, logger="hf_distill")
    return caplog


def said(log: Any, words: str) -> list[str]:
    return [record.getMessage() for record in log.records if words in record.getMessage()]


def rows(count: int, *, of: int = CLASSES) -> list[dict[str, Any]]:
    """Examples whose first token says their label."""
    return [{"input_ids": [1 + i % of, 5 + i % 7, 9], "labels": i % of} for i in range(count)]


def knowing(model: Any, *, answers: tuple[int, ...] = (0, 1, 2)) -> Any:
    """The model, whose choice for label i is answers[i]."""
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
def test_a_teacher_with_another_numbering_is_noticed_once(tmp_path, log, answers, alpha: float) -> None:
    given = {"alpha": alpha, "train_sampling_strategy": "sequential"}
    trained(tmp_path, knowing(bert(seed=1), answers=answers), **given)
    [message] = said(log, UNKNOWN)
    right = {(1, 2, 0): "0.0%", (1, 0, 0): "0.0%", (2, 2, 2): "33."}[answers]
    assert f"in the first {ROWS} labelled rows its choice is the label in {right}" in message
    assert "33." in message.split("and ")[1]  # by chance
    for cause in ("config.label2id", "label_matching='by_index'", "not trained on this task", "exchanged"):
        assert cause in message


def test_a_teacher_that_knows_them_is_not(tmp_path, log) -> None:
    trained(tmp_path, knowing(bert(seed=1)))
    assert not said(log, UNKNOWN)


def test_labels_in_another_order_that_are_matched_by_name_are_known(tmp_path, log) -> None:
    names = {"student": ["a", "b", "c"], "teacher": ["c", "a", "b"]}
    maps = {
        who: {"label2id": {n: i for i, n in enumerate(listed)}, "id2label": dict(enumerate(listed))}
        for who, listed in names.items()
    }
    student, teacher = bert(**maps["student"]), knowing(bert(seed=1, **maps["teacher"]), answers=(1, 2, 0))
    trained(tmp_path / "a", teacher, student=student)
    assert not said(log, UNKNOWN)
    trained(tmp_path / "b", teacher, student=bert(**maps["student"]), label_matching="by_index")
    assert len(said(log, UNKNOWN)) == 1


def test_a_majority_class_counts_as_nothing(tmp_path, log) -> None:
    """Nine of ten labels are 0, and the teacher always says so: right in 90 %, which is chance."""
    data = [{"input_ids": [1 + (i % 10 == 0), 5 + i % 7], "labels": int(i % 10 == 0)} for i in range(400)]
    trained(tmp_path, knowing(bert(seed=1), answers=(0, 0, 0)), train_dataset=data)
    [message] = said(log, UNKNOWN)
    assert "is the label in 8" in message or "is the label in 9" in message


def test_few_labels_are_waited_for(tmp_path, log) -> None:
    """One row in eight has a label: 256 of them are there after 256 steps."""
    data = [{**row, "labels": row["labels"] if i % 8 == 0 else -100} for i, row in enumerate(rows(400))]
    given = {"train_sampling_strategy": "sequential", "train_dataset": data}
    trained(tmp_path / "a", knowing(bert(seed=1), answers=(1, 2, 0)), max_steps=100, **given)
    assert not said(log, UNKNOWN)
    trained(tmp_path / "b", knowing(bert(seed=1), answers=(1, 2, 0)), max_steps=300, **given)
    [message] = said(log, UNKNOWN)
    assert f"in the first {ROWS} labelled rows" in message


def test_without_labels_or_without_a_teacher_nothing_is_said(tmp_path, log) -> None:
    bare = [{"input_ids": row["input_ids"]} for row in rows(400)]
    trained(tmp_path / "a", knowing(bert(seed=1), answers=(1, 2, 0)), alpha=1.0, train_dataset=bare)
    trained(tmp_path / "b", None, alpha=0.0)
    assert not said(log, UNKNOWN)


def test_a_teacher_that_training_changes_knows_nothing_yet(tmp_path, log) -> None:
    trained(tmp_path / "a", MovingAverage())
    trained(tmp_path / "b", Ensemble([MovingAverage(), bert(seed=1)]))
    assert not said(log, UNKNOWN)
    trained(tmp_path / "c", Ensemble([knowing(bert(seed=s), answers=(1, 2, 0)) for s in (1, 2)]))
    assert len(said(log, UNKNOWN)) == 1


@pytest.mark.parametrize("answers", [(0, 1, 2), (1, 2, 0)])
def test_a_cached_teacher(tmp_path, log, answers) -> None:
    teacher = knowing(bert(seed=1), answers=answers)
    cache = TeacherCache.build(teacher, rows(400), tmp_path / "cache", data_collator=padded, progress=False)
    trained(tmp_path, cache)
    assert len(said(log, UNKNOWN)) == (answers != (0, 1, 2))


KINDS = ("classification", "token_classification", "multiple_choice", "span")
FEW_CLASSES = [name for name, head in HEADS.items() if head.kind in KINDS and name != "bert_multi_label"]


@pytest.mark.parametrize("knows", [True, False])
@pytest.mark.parametrize("name", FEW_CLASSES)
def test_every_head_of_few_classes(log, name: str, knows: bool) -> None:
    """Choices made from the labels themselves, or from those of another example."""
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
    # Labels that alternate are never those of the neighbour: no chance could be worse.
    assert len(said(log, UNKNOWN)) == (not knows)


@pytest.mark.parametrize("name", [name for name in HEADS if name not in FEW_CLASSES])
def test_other_heads_are_left_alone(tmp_path, log, name: str) -> None:
    """Random teachers of language models, of values, of several labels at once."""
    head = HEADS[name]
    alpha = 1.0 if head.kind == "embedding" else 0.5
    make(
        tmp_path, head.make(), head.make(seed=1), alpha=alpha, train_dataset=head.examples(320),
        data_collator=head.collate, per_device_train_batch_size=80, max_steps=4, learning_rate=0.0,
    ).train()  # fmt: skip
    assert not said(log, UNKNOWN)


def test_a_loop_of_ones_own(log) -> None:
    student = bert()
    distiller = Distiller(student, knowing(bert(seed=1), answers=(1, 2, 0)))
    for _ in range(ROWS // 32 + 2):
        distiller(student, padded(rows(32)))
    assert len(said(log, UNKNOWN)) == 1


# Sizes.


def test_a_teacher_that_is_smaller_is_said_once(tmp_path, log) -> None:
    make(tmp_path / "a", bert(num_hidden_layers=3), bert(seed=1)).train()
    [message] = said(log, "fewer than the student's")
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
def test_others_are_not(tmp_path, log, teacher: Any) -> None:
    make(tmp_path, bert(), teacher())
    assert not said(log, "fewer than the student's")


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # PEFT asks by that name
def test_adapters_do_not_make_a_student_larger(tmp_path, log) -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["query"], modules_to_save=["classifier"], task_type="SEQ_CLS")
    make(tmp_path, peft.get_peft_model(bert(), config), bert(seed=1))
    assert not said(log, "fewer than the student's")


# A student that has passed its teacher.

PASSED = "The student has passed its teacher on these labels"


def evaluated(folder: Any, student: Any, teacher: Any, data: Any, **given: Any) -> Any:
    settings = {"evaluate_with_teacher": True, "per_device_eval_batch_size": 16, "eval_dataset": data, **given}
    return make(folder, student, teacher, **settings)


def test_a_student_that_has_passed_its_teacher_is_said_at_the_first_evaluation(tmp_path, log) -> None:
    """It is right about all; the teacher about two classes of three."""
    trainer = evaluated(tmp_path, knowing(bert()), knowing(bert(seed=1), answers=(0, 1, 1)), rows(60))
    trainer.evaluate()
    [message] = said(log, PASSED)
    assert (
        "it names 100.0% of 60, the teacher 66.7%" in message and "lower alpha, or train the teacher longer" in message
    )
    trainer.evaluate()
    trainer.evaluate(rows(90))
    assert len(said(log, PASSED)) == 1


def test_unlabelled_rows_do_not_count(tmp_path, log) -> None:
    data = rows(60) + [{**row, "labels": -100} for row in rows(30)]
    evaluated(tmp_path, knowing(bert()), knowing(bert(seed=1), answers=(0, 1, 1)), data).evaluate()
    assert "100.0% of 60," in said(log, PASSED)[0]


@pytest.mark.parametrize(
    ("ours", "theirs", "count"),
    [((0, 1, 2), (0, 1, 2), 60), ((0, 1, 1), (0, 1, 2), 60), ((0, 1, 2), (0, 1, 1), 9)],
    ids=["equal", "worse", "three-rows-might-be-chance"],
)
def test_one_that_has_not_is_not(tmp_path, log, ours, theirs, count: int) -> None:
    evaluated(tmp_path, knowing(bert(), answers=ours), knowing(bert(seed=1), answers=theirs), rows(count)).evaluate()
    assert not said(log, PASSED)
