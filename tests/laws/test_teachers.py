"""L4, L9 to L12 for every kind of teacher in `teacher_rows.py`: training code does not depend on the kind."""

from __future__ import annotations

import inspect
import random
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from hf_distill import Distiller, TeacherError, teachers
from hf_distill.functional.rows import in_full_precision
from hf_distill.teachers.cache.stores import STORES
from tests.heads import HEADS
from tests.laws import measuring as m
from tests.laws.making_teachers import NAMES, Place, TeacherCase
from tests.laws.teacher_rows import STORES_WITHOUT_ROWS, TEACHER_ROWS, TeacherRow
from tests.laws.teacher_runs import TOGETHER, three_steps, trainer_of
from tests.trainer.tiny import assert_moved, assert_same_bits, update_difference, weights

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # PEFT's
EVERY = [(kind, head) for kind, row in TEACHER_ROWS.items() for head in row.heads]
STATE = "distill_teacher.safetensors"


@pytest.fixture
def placed(tmp_path: Path) -> Any:
    """Make `Place`s for teachers; their servers are stopped afterwards."""
    with ExitStack() as stack:
        yield lambda head, **changed: Place(head, tmp_path, stack, **changed)


def distiller_of(row: TeacherRow, made: TeacherCase, **settings: Any) -> Distiller:
    given = {"alpha": 1.0, "temperature": row.temperature, "processing_class": made.processor, **settings}
    distiller = Distiller(made.student, made.teacher, **given)
    made.once_fitted()
    return distiller


def test_every_kind_of_teacher_has_a_row() -> None:
    exported = {name: getattr(teachers, name) for name in teachers.__all__}
    kinds = {name for name, one in exported.items() if inspect.isclass(one) and issubclass(one, teachers.Teacher)}
    assert kinds - {"Teacher"} == {row.of for row in TEACHER_ROWS.values()}
    assert set(STORES) <= {row.store for row in TEACHER_ROWS.values() if row.store} | set(STORES_WITHOUT_ROWS)


# L11, and independence of the batch.


@pytest.mark.parametrize(("kind", "head"), EVERY)
def test_predictions_are_exact_and_do_not_depend_on_the_batch(placed: Any, kind: str, head: str) -> None:
    """From the definition of the divergence and the models in evaluation mode, although they are set to
    training mode with dropout; in another order than the cache was built, and with more padding."""
    row, place = TEACHER_ROWS[kind], placed(head, teachers_dropout=0.4)
    made = row.make(place)
    if row.nothing_fixed:
        assert made.says is None
        return
    distiller = distiller_of(row, made)
    some = random.Random(3).sample(place.examples, 5)
    for pad_to in (None, HEADS[head].longest + 3):
        for model in made.models:
            model.train()
        batch = HEADS[head].collate(some, pad_to)
        loss, gradient = m.step(distiller, made.student, [batch])
        expected, by_hand = defined(distiller, made, batch, row.temperature)
        assert loss == pytest.approx(expected, rel=row.tolerance) and abs(expected) > 1e-3
        assert m.difference(gradient, by_hand) < row.tolerance


def defined(distiller: Distiller, made: TeacherCase, batch: dict[str, Tensor], t: float) -> tuple[float, Tensor]:
    """Return T² KL(p ‖ q), the mean over rows that count, and its gradient."""
    task, inputs = distiller.task, {name: batch[name] for name in ("input_ids", "attention_mask")}
    assert made.says is not None
    p, logits = made.says(inputs, t), made.student(**inputs).logits
    p, logits = task.select(p, batch), task.select(in_full_precision(logits), batch)
    keep = task.kept_rows(batch)
    if keep is not None:
        p, logits = p[keep], logits[keep]
    terms = torch.where(p > 0, p * (p.log() - (logits / t).log_softmax(-1)), 0.0)
    loss = t**2 * terms.sum(-1).mean()
    made.student.zero_grad(set_to_none=True)
    loss.backward()
    return loss.item(), m.gradient_of(made.student)


# L9 and L10.

RUN = {"max_steps": 4, "save_strategy": "steps", "save_steps": 1, "optim": "adamw_torch", "learning_rate": 0.01}
RUN |= {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}


@pytest.mark.parametrize("kind", TEACHER_ROWS)
def test_training_changes_only_the_student_and_resumes_bit_for_bit(placed: Any, tmp_path: Path, kind: str) -> None:
    row = TEACHER_ROWS[kind]
    place = placed(row.heads[0], students_dropout=0.3)
    made = row.make(place)
    teachers_weights, students_weights = [weights(model) for model in made.models], weights(made.student)
    whole = trainer_of(tmp_path / "whole", row, place, made, **RUN)
    whole.train()
    assert_moved(weights(made.student), students_weights)
    check_the_teacher_is_apart(row, made, whole, teachers_weights)
    checkpoint = Path(whole.args.output_dir) / "checkpoint-3"
    check_what_is_saved(row, made, whole, checkpoint)
    resumed = trainer_of(tmp_path / "resumed", row, placed(row.heads[0], students_dropout=0.3, seed=5), **RUN)
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert_same_bits(weights(resumed.model), weights(whole.model))
    if row.keeps_state:
        kept, expected = (dict(sorted(one.distiller.teacher.state_dict().items())) for one in (resumed, whole))
        assert_same_bits(kept, expected)


def check_the_teacher_is_apart(
    row: TeacherRow, made: TeacherCase, trainer: Any, before: list[dict[str, Tensor]]
) -> None:
    """L9: not in an optimizer, no gradient, bitwise unchanged. An adapted student's base belongs to the student."""
    held = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in made.student.parameters() if p.requires_grad}
    students = {id(p) for p in made.student.parameters()}
    behind = made.models or tuple(filter(None, [getattr(trainer.distiller.teacher, "model", None)]))
    for model in behind:
        assert not held & {id(p) for p in model.parameters()}
        assert all(p.grad is None for p in model.parameters() if id(p) not in students)
    if row.trained_along is None:
        for model, weights_before in zip(made.models, before, strict=True):
            assert_same_bits(weights(model), weights_before)


def check_what_is_saved(row: TeacherRow, made: TeacherCase, trainer: Any, checkpoint: Path) -> None:
    """L9: the teacher is not exported, and a checkpoint holds only its changing state."""
    exported = checkpoint.parent.parent / "exported"
    trainer.save_model(str(exported))
    trained = hasattr(made.student, "peft_config")
    own = sum(p.numel() for p in made.student.parameters() if p.requires_grad or not trained)
    for folder in (checkpoint, exported):
        found = [load_file(one) for one in folder.glob("*.safetensors") if one.name != STATE]
        assert 0 < sum(tensor.numel() for tensors in found for tensor in tensors.values()) <= own
    assert (checkpoint / STATE).is_file() == row.keeps_state
    assert not (exported / STATE).exists()


# L4.


@pytest.mark.parametrize("kind", TOGETHER)
def test_accumulation_changes_nothing(placed: Any, kind: str) -> None:
    place = placed(TEACHER_ROWS[kind].heads[-1])
    start, whole = three_steps(kind, place, micro_batch=8)
    _, found = three_steps(kind, place, micro_batch=2, parts=4)
    assert update_difference(found, whole, start) < 1e-6


# L12.


@pytest.mark.parametrize("kind", [kind for kind, row in TEACHER_ROWS.items() if not row.not_permuted])
def test_label_order_does_not_matter_and_other_labels_raise(placed: Any, kind: str) -> None:
    row, head = TEACHER_ROWS[kind], TEACHER_ROWS[kind].heads[0]
    batch = HEADS[head].batch(6)
    if row.refuses_order:
        with pytest.raises(TeacherError, match=row.refuses_order):
            distiller_of(row, row.make(placed(head, order=(2, 0, 1))))
    else:
        losses = []
        for order in ((0, 1, 2), (2, 0, 1)):
            made = row.make(placed(head, order=order))
            losses.append(m.step(distiller_of(row, made), made.student, [batch])[0])
        assert losses[1] == pytest.approx(losses[0], rel=max(1e-6, row.tolerance / 100)) and losses[0] > 1e-3
    with pytest.raises(TeacherError, match=r"names differ: student \{cold, warm, hot\}, teacher \{cold, warm, boil"):
        made = row.make(placed(head, names=("cold", "warm", "boiling")))
        distiller_of(row, made)


def test_an_undeclared_label_order_changes_the_loss(placed: Any) -> None:
    """Otherwise the law above would prove nothing."""
    row, losses = TEACHER_ROWS["model"], []
    for order in ((0, 1, 2), (2, 0, 1)):
        made = row.make(placed("bert_single_label", order=order))
        made.teacher.config.id2label, made.teacher.config.label2id = (
            dict(enumerate(NAMES)),
            made.student.config.label2id,
        )
        losses.append(distiller_of(row, made)(made.student, HEADS["bert_single_label"].batch(6)).loss.item())
    assert abs(losses[0] - losses[1]) > 1e-3 * losses[0]
