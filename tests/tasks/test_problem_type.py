"""Single-label or multi-label: decided by the configs and the labels; contradictions raise an error."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from hf_distill import Distiller, TeacherError
from tests.heads import HEADS
from tests.trainer.tiny import make

ONE, SEVERAL = "single_label_classification", "multi_label_classification"
HEAD = HEADS["bert_multi_label"]
T = 2.0


def by_hand(student: Any, teacher: Any, batch: dict[str, Any]) -> float:
    """Return the mean over examples and labels of T² KL between two Bernoulli distributions."""
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    with torch.no_grad():
        q, p = (torch.sigmoid(model(**inputs)["logits"].double() / T) for model in (student, teacher))
    divergence = p * (p.log() - q.log()) + (1 - p) * ((1 - p).log() - (1 - q).log())
    return T**2 * divergence.mean().item()


def logits_term(student: Any, teacher: Any, batch: dict[str, Any], **settings: Any) -> float:
    return Distiller(student, teacher, temperature=T, **settings)(student, batch).terms["logits"].item()


@pytest.mark.parametrize("labelled", [True, False])
@pytest.mark.parametrize(("ours", "theirs"), [(None, SEVERAL), (SEVERAL, None), (SEVERAL, SEVERAL)])
def test_one_config_with_a_problem_type_is_enough(ours: str | None, theirs: str | None, labelled: bool) -> None:
    """A fine-tuned teacher's config has it; a fresh student's config has it only after its first labelled step."""
    student, teacher = HEAD.make(0, problem_type=ours), HEAD.make(1, problem_type=theirs)
    batch = HEAD.batch(4, labelled=labelled)
    alpha = 0.5 if labelled else 1.0
    expected = by_hand(student, teacher, batch)
    assert logits_term(student, teacher, batch, alpha=alpha) == pytest.approx(expected, rel=1e-4)


def test_the_labels_alone_are_enough() -> None:
    student, teacher = HEAD.make(0, problem_type=None), HEAD.make(1, problem_type=None)
    batch = HEAD.batch(4)
    assert logits_term(student, teacher, batch) == pytest.approx(by_hand(student, teacher, batch), rel=1e-4)


@pytest.mark.parametrize(("ours", "theirs"), [(ONE, SEVERAL), (SEVERAL, ONE)])
def test_contradicting_configs_raise(ours: str, theirs: str) -> None:
    with pytest.raises(TeacherError, match=f"student's problem_type is '{ours}', the teacher's '{theirs}'.*of both"):
        Distiller(HEAD.make(0, problem_type=ours), HEAD.make(1, problem_type=theirs))


@pytest.mark.parametrize(("name", "theirs"), [("bert_single_label", SEVERAL), ("bert_multi_label", ONE)])
def test_a_contradiction_during_training_raises(name: str, theirs: str) -> None:
    """From the labels transformers sets a problem type in the student's config that contradicts the teacher's."""
    head = HEADS[name]
    student, teacher = head.make(0, problem_type=None), head.make(1, problem_type=theirs)
    distiller = Distiller(student, teacher)
    with pytest.raises(TeacherError, match="problem_type"):
        distiller(student, head.batch(4))


@pytest.mark.parametrize("theirs", [SEVERAL, ONE])
def test_a_problem_type_set_after_construction_is_used(theirs: str) -> None:
    student, teacher = HEAD.make(0, problem_type=None), HEAD.make(1, problem_type=theirs)
    distiller = Distiller(student, teacher, alpha=1.0, temperature=T)
    student.config.problem_type = SEVERAL
    batch = HEAD.batch(4, labelled=False)
    if theirs == ONE:
        with pytest.raises(TeacherError, match="one predicts one label, the other several at once"):
            distiller(student, batch)
        return
    assert distiller(student, batch).loss.item() == pytest.approx(by_hand(student, teacher, batch), rel=1e-4)


@pytest.mark.parametrize(("ours", "theirs"), [(None, ONE), (ONE, None), (ONE, ONE), (None, None)])
def test_single_label_models_stay_single_label(ours: str | None, theirs: str | None) -> None:
    head = HEADS["bert_single_label"]
    batch = head.batch(4)
    student, teacher = head.make(0, problem_type=ours), head.make(1, problem_type=theirs)
    expected = logits_term(head.make(0), head.make(1), batch)
    assert logits_term(student, teacher, batch) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("labelled", [True, False])
@pytest.mark.parametrize("cut", [(8, 1), (2, 4)], ids=str)
def test_the_trainer_uses_the_problem_type_from_the_first_step(tmp_path, labelled: bool, cut: tuple[int, int]) -> None:
    student, teacher = HEAD.make(0, problem_type=None), HEAD.make(1)
    expected = by_hand(student, teacher, HEAD.batch(8))
    trainer = make(
        tmp_path, student, teacher, train_dataset=HEAD.examples(8, labelled=labelled), data_collator=HEAD.collate,
        alpha=0.5 if labelled else 1.0, temperature=T, max_steps=1, logging_steps=1, evaluate_with_teacher=True,
        per_device_train_batch_size=cut[0], gradient_accumulation_steps=cut[1],
    )  # fmt: skip
    metrics = trainer.evaluate(HEAD.examples(8, labelled=labelled))
    assert metrics["eval_divergence"] == pytest.approx(expected, rel=1e-4)
    trainer.train()
    assert trainer.state.log_history[-2]["loss/logits"] == pytest.approx(expected, rel=1e-4)


def test_labels_decide_the_rows_of_a_student_without_a_config() -> None:
    class Bag(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bag = torch.nn.EmbeddingBag(40, 3)

        def forward(self, input_ids: torch.Tensor, labels: Any = None) -> dict[str, torch.Tensor]:
            logits = self.bag(input_ids)
            if labels is None:
                return {"logits": logits}
            loss = torch.nn.functional.binary_cross_entropy_with_logits(logits, labels)
            return {"loss": loss, "logits": logits}

    student, batch = Bag(), HEAD.batch(4)
    batch.pop("attention_mask")

    class Task(type(Distiller(HEAD.make(0), HEAD.make(1)).task)):
        matched_by = "width"

    found = logits_term(student, HEAD.make(1), batch, task=Task(None))
    assert found == pytest.approx(by_hand(student, HEAD.make(1), batch), rel=1e-4)
