"""Law L4 over processes: two gloo processes give the update and the logged losses of one, for every head."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed.launch import two_processes
from tests.heads import HEADS
from tests.trainer.drop_in_steps import UNKNOWN, own_forward, rising_alpha
from tests.trainer.each_once import EVALUATIONS, evaluated
from tests.trainer.not_finite import FAULTS
from tests.trainer.steps import asked_teacher, in_double, inside_steps, one_step
from tests.trainer.tiny import assert_same_bits, bert, update_difference, weights
from tests.trainer.two_processes import EVALUATED, WHOLE_BATCHES, cases, inside_cases


@pytest.fixture(scope="module")
def from_two(tmp_path_factory) -> dict[str, Any]:
    """Return the results of two processes, started once for all heads."""
    path = tmp_path_factory.mktemp("two") / "found.pt"
    two_processes(Path(__file__).with_name("two_processes.py"), str(path))
    loaded = torch.load(path)
    assert loaded["processes"] == 2
    return loaded


@pytest.fixture(scope="module")
def from_one(tmp_path_factory) -> dict[Any, Any]:
    """Results of one batch of eight in this process, by head, alpha and variant, computed on demand."""
    return {"folder": tmp_path_factory.mktemp("one")}


@pytest.mark.parametrize("case", cases(), ids=lambda case: "-".join(map(str, case)))
def test_two_processes_give_the_update_of_one(from_two, from_one, case) -> None:
    name, alpha, _, _, variant = case
    head = HEADS[name]
    same = (name, alpha, variant)
    if same not in from_one:
        whole = {"micro_batch": 8, "accumulation": 1}
        from_one[same] = one_step(from_one["folder"], head, alpha=alpha, variant=variant, **whole)
    expected, expected_logs = from_one[same]
    state, logged = from_two["found"][case]
    assert update_difference(state, expected, weights(head.make(seed=0).double())) < 1e-6
    assert set(logged) == set(expected_logs) and "loss" in logged
    assert logged == pytest.approx(expected_logs, rel=1e-4)


@pytest.mark.parametrize(("name", "count"), EVALUATED)
def test_two_processes_evaluate_the_teacher_like_one(from_two, tmp_path, name: str, count: int) -> None:
    """Even if the examples do not divide: duplicates added by the sampler are not counted."""
    expected = asked_teacher(tmp_path, HEADS[name], count=count)
    found = from_two["evaluated"][name, count]
    for figure in ("eval_divergence", "eval_teacher_agreement"):
        assert found[figure] == pytest.approx(expected[figure], rel=1e-6)


@pytest.mark.parametrize("name", WHOLE_BATCHES)
def test_two_processes_evaluate_the_mean_of_the_models_losses(from_two, tmp_path, name: str) -> None:
    """Whether or not the model uses `num_items_in_batch`, as in one process."""
    head, found = HEADS[name], from_two["evaluated"][name, 6]
    student, rows = head.make(seed=0).double().eval(), head.examples(6)
    with torch.no_grad():
        losses = [student(**in_double(head, batch)).loss.item() for batch in (rows[:3], rows[3:])]
    assert found["eval_loss"] == pytest.approx(sum(losses) / 2, rel=1e-6)
    assert found == pytest.approx(asked_teacher(tmp_path, head, count=6), rel=1e-6)


@pytest.mark.parametrize("case", inside_cases(), ids=lambda case: "-".join(map(str, case)))
def test_two_processes_train_projections_like_one(from_two, tmp_path, case) -> None:
    """Three clipped steps: the norm covers student and projections, over all processes.

    With alpha=None the head is unused, for which DDP would wait. If examples are coupled, one process gets
    the same micro-batches.
    """
    name, kind, alpha, optim = case
    head, found = HEADS[name], from_two["inside"][case]
    cut = {"micro_batch": 2, "accumulation": 4} if kind == "similarity" else {"micro_batch": 8, "accumulation": 1}
    expected = inside_steps(tmp_path, head, kind=kind, alpha=alpha, optim=optim, **cut)
    start = weights(head.make(0, layers=2).double())
    assert update_difference(found["student"], expected["student"], start) < 1e-6
    of_first, of_second = (learned[case] for learned in from_two["learned"])
    assert_same_bits(of_second, of_first)
    assert set(of_first) == set(expected["learned"])
    for matrix, value in expected["learned"].items():
        assert (of_first[matrix] - value).abs().max() < 1e-6 * value.abs().max()
    assert len(found["logged"]) == len(expected["logged"]) == 3
    for ours, theirs in zip(found["logged"], expected["logged"], strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5)
    assert all(entry["grad_norm"] > 0.1 for entry in expected["logged"] if kind == "projected")  # clipping is active


def test_a_teacher_sharded_by_fsdp2_gives_the_same_predictions(from_two) -> None:
    """The student's wrapping policy is unchanged, and Accelerate lists no further model."""
    kept = {"policy kept": True, "training": False, "models": 0}
    assert from_two["sharded"] == {"difference": 0.0, "sharded": True, **kept}


@pytest.mark.parametrize("case", EVALUATIONS, ids=lambda case: "-".join(map(str, case)))
def test_two_processes_evaluate_each_example_once(from_two, tmp_path, case) -> None:
    """For any size: metrics, losses and predictions, also of the teacher, equal those of one process."""
    expected, found = evaluated(tmp_path, *case), from_two["each_once"][case]
    for part in ("evaluated", "predicted"):
        assert (found[part] is None) == (expected[part] is None)
        if expected[part] is not None:
            assert found[part] == pytest.approx(expected[part], rel=1e-6)
    metrics = found["evaluated"]
    assert "eval_loss" in metrics
    if case[2] != "loss_alone":
        assert metrics["eval_examples"] == metrics["eval_predicted"] == case[1]
    taught = case[2] not in ("generates", "alpha_zero", "loss_alone", "batch_metrics")
    assert ("eval_teacher_examples" in metrics) == taught


@pytest.mark.parametrize("size", range(1, 10))
def test_the_loss_of_two_processes_is_the_mean_over_examples(from_two, size: int) -> None:
    """Computed example by example, without padding."""
    head = HEADS["bert_single_label"]
    student, losses, labels = head.make(seed=0).double().eval(), [], []
    for example in head.examples(size):
        with torch.no_grad():
            losses.append(student(**head.collate([example])).loss.item())
        labels.append(example["labels"])
    found = from_two["each_once"]["bert_single_label", size, "plain"]
    for part, prefix in (("evaluated", "eval"), ("predicted", "test")):
        assert found[part][f"{prefix}_loss"] == pytest.approx(sum(losses) / size, rel=1e-6)
        assert found[part][f"{prefix}_labels"] == sum(labels)


@pytest.mark.parametrize("size", [1, 5, 6, 7])
def test_the_loss_of_seq2seq_trainer_is_the_mean_over_batches(from_two, size: int) -> None:
    """As in `Seq2SeqTrainer` in one process: a last batch of one has the weight of a batch of two."""
    head = HEADS["t5_seq2seq"]
    student, data = head.make(seed=0).double().eval(), head.examples(size)
    with torch.no_grad():
        losses = [student(**in_double(head, data[at : at + 2])).loss.item() for at in range(0, size, 2)]
    found = from_two["each_once"]["t5_seq2seq", size, "generates"]["evaluated"]
    assert found["eval_loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-6)
    assert found["eval_examples"] == size


@pytest.mark.parametrize("fault", FAULTS, ids="-".join)
def test_an_error_in_one_process_is_raised_in_all(from_two, fault: tuple[str, str]) -> None:
    """Example 1 of process 1's second micro-batch is faulty: no process makes a step, and none waits forever."""
    (ours, ours_kept), (theirs, theirs_kept) = (from_two["raised"][fault][rank] for rank in (0, 1))
    assert ours == theirs and ours_kept and theirs_kept
    words = {
        "labels": ("DataError: process 1: ", "micro-batch 1 of 2", "example 1 need 59 frames"),
        "input": ("DataError: process 1: ", "micro-batch 1 of 2", "input_values of example 1 holds nan"),
        "teacher": ("TeacherError: process 1: ", "micro-batch 1 of 2", "teacher's logits hold nan in example 1"),
        "gradient": ("TrainingError: the norm of the gradient is nan",),
        "unclipped": ("TrainingError: the norm of the gradient is nan",),
    }[fault[1]]
    assert ours.startswith(words[0]) and all(word in ours for word in words), ours


@pytest.mark.parametrize("name", UNKNOWN)
def test_two_processes_train_an_unknown_class_like_trainer(from_two, name: str) -> None:
    """At alpha=0, with accumulation and evaluation, bit for bit."""
    theirs, ours = from_two["drop_in"][name]
    assert_same_bits(ours[0], theirs[0])
    assert ours[1:] == theirs[1:] and len(theirs[1]) == 2


def test_two_processes_over_a_base_trainer_without_gradient_in_its_outputs(from_two, tmp_path) -> None:
    """DDP gets two forwards and one backward; the update equals that of one process."""
    (found, loss), (expected, expected_loss) = from_two["drop_in"]["own_forward"], own_forward(tmp_path, 8)
    assert loss == pytest.approx(expected_loss, rel=1e-6)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-6, atol=1e-8)


def test_two_processes_load_a_teacher_when_alpha_rises(from_two, tmp_path) -> None:
    (found, losses), (expected, expected_losses) = from_two["drop_in"]["rising_alpha"], rising_alpha(tmp_path, 8)
    assert losses == pytest.approx(expected_losses, rel=1e-6)
    assert update_difference(found, expected, weights(bert().double())) < 1e-6
