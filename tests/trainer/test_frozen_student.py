"""An untrainable student raises before the first step: it was a teacher before, or its class has no loss."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor

from hf_distill import Distiller, SettingError
from hf_distill.objectives import HiddenMatch
from tests.trainer.tiny import assert_moved, bert, examples, make, padded, weights

BATCH = padded(examples(4))


@pytest.mark.parametrize("which", ["the model", "a copy of it"])
@pytest.mark.parametrize("where", ["trainer", "loop"])
def test_a_former_teacher_raises_as_student(tmp_path, which: str, where: str) -> None:
    """Students that were frozen as teachers earlier."""
    used = bert(seed=1)
    make(tmp_path / "first", bert(), used)  # freezes it
    student = used if which == "the model" else copy.deepcopy(used)
    words = r"student \(BertForSequenceClassification\) has no trainable parameter.*frozen.*requires_grad_\(True\)"
    with pytest.raises(SettingError, match=words):
        if where == "trainer":
            make(tmp_path / "second", student, bert(seed=2)).train()
        else:
            Distiller(student, bert(seed=2))(student, BATCH)
    student.requires_grad_(True)
    before = weights(student)
    make(tmp_path / "third", student, bert(seed=2)).train()
    assert_moved(weights(student), before)


def test_a_frozen_student_can_be_evaluated(tmp_path) -> None:
    student = bert().requires_grad_(False)
    trainer = make(tmp_path, student, bert(seed=1), eval_dataset=examples(4), evaluate_with_teacher=True)
    assert trainer.evaluate()["eval_divergence"] > 0
    with torch.no_grad():
        assert Distiller(student, bert(seed=1))(student, BATCH).loss > 0


def test_a_learned_projection_is_enough_to_train() -> None:
    student = bert().requires_grad_(False)
    distiller = Distiller(student, bert(seed=1, hidden_size=8), objectives=HiddenMatch("last"), alpha=None)
    distiller(student, BATCH).loss.backward()


# Classes with a head for a teacher (distillation token).


def deit(kind: str, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    config = hf.DeiTConfig(
        image_size=8, patch_size=4, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        num_labels=3,
    )  # fmt: skip
    return getattr(hf, kind)(config)


def levit(kind: str, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    config = hf.LevitConfig(
        image_size=32, num_labels=3, hidden_sizes=[16, 16, 16], num_attention_heads=[2, 2, 2], depths=[1, 1, 1],
        key_dim=[4, 4, 4],
    )  # fmt: skip
    return getattr(hf, kind)(config)


ROWS = [{"pixel_values": torch.full((3, 8, 8), 0.1 * i), "labels": i % 3} for i in range(4)]
HEADS = {"DeiT": (deit, 8), "Levit": (levit, 32)}


@pytest.mark.parametrize("name", HEADS)
def test_labels_raise_for_classes_with_a_distillation_head(tmp_path, name: str) -> None:
    build, size = HEADS[name]
    two, one = f"{name}ForImageClassificationWithTeacher", f"{name}ForImageClassification"
    words = rf"{two} has a head for labels and a head for a teacher.*Train {one} instead.*alpha=1"
    with pytest.raises(SettingError, match=words):
        make(tmp_path, build(two), build(one), train_dataset=ROWS, data_collator=hf.default_data_collator)
    images = {"pixel_values": torch.randn(4, 3, size, size), "labels": torch.tensor([0, 1, 2, 0])}
    with pytest.raises(SettingError, match=words):
        Distiller(build(two), build(one))(build(two), images)


@pytest.mark.parametrize("name", HEADS)
def test_at_alpha_1_the_mean_of_both_heads_is_trained(name: str) -> None:
    build, size = HEADS[name]
    student = build(f"{name}ForImageClassificationWithTeacher")
    images = {"pixel_values": torch.randn(4, 3, size, size)}
    Distiller(student, build(f"{name}ForImageClassification", 1), alpha=1.0)(student, images).loss.backward()
    heads = [p.grad for n, p in student.named_parameters() if "classifier" in n and n.endswith("weight")]
    assert len([g for g in heads if g is not None and g.abs().sum() > 0]) >= 2


def test_such_a_teacher_predicts_the_mean_of_both_heads() -> None:
    teacher, student = deit("DeiTForImageClassificationWithTeacher"), deit("DeiTForImageClassification", 1)
    images = {"pixel_values": torch.randn(4, 3, 8, 8)}
    with torch.no_grad():
        outputs = teacher.eval()(**images)
    found = Distiller(student, teacher, alpha=1.0).teacher_signals(images).predictions()
    assert torch.allclose(found, (outputs.cls_logits + outputs.distillation_logits) / 2, atol=1e-6)


def test_a_custom_loss_can_use_the_labels(tmp_path) -> None:
    """As in DeiT's paper, only one head is trained on labels."""

    def of_labels(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
        return torch.nn.functional.cross_entropy(outputs["cls_logits"], labels)

    student = deit("DeiTForImageClassificationWithTeacher")
    before = weights(student)
    make(
        tmp_path, student, deit("DeiTForImageClassification", 1), train_dataset=ROWS, max_steps=1,
        data_collator=hf.default_data_collator, compute_loss_func=of_labels, label_names=["labels"],
    ).train()  # fmt: skip
    assert_moved(weights(student), before)
