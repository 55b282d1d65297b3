"""No optimizer step is made on a loss or gradient that is not finite; the message names term, example and cause.

Teachers with NaN: `test_no_number`. Several processes: `test_two_processes`.
"""

from __future__ import annotations

import logging
import math
from itertools import product
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import Trainer, TrainingArguments

from hf_distill import (
    DataError,
    DistillationArguments,
    DistillationTrainer,
    Distiller,
    Seq2SeqDistillationArguments,
    Seq2SeqDistillationTrainer,
    TeacherCache,
    TeacherError,
    TrainingError,
)
from hf_distill.finite import FiniteCheck
from hf_distill.tasks import CTC
from hf_distill.teachers.cache import Dense
from tests.heads import HEADS
from tests.trainer.not_finite import deaf, sounds
from tests.trainer.tiny import arguments, assert_moved, assert_same_bits, bert, examples, make, padded, weights

ORDER = {"train_sampling_strategy": "sequential", "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
CTC_HEADS = ["wav2vec2_ctc_mean", "hubert_ctc_sum"]


def raised_by(folder: Any, student: Any, teacher: Any, kind: type[Exception], **given: Any) -> str:
    """Return the message of the error in the first step; the student must be unchanged."""
    start = weights(student)
    trainer = make(folder, student, teacher, **given)
    with pytest.raises(kind) as raised:
        trainer.train()
    assert trainer.state.global_step == 0
    assert_same_bits(weights(student), start)
    return str(raised.value)


@pytest.mark.parametrize("alpha", [0.5, 0.01])
@pytest.mark.parametrize("name", CTC_HEADS)
def test_a_label_longer_than_its_frames_is_named(tmp_path, name: str, alpha: float) -> None:
    """30 equal letters need 59 frames, with 29 blanks between them."""
    head = HEADS[name]
    data = sounds(head, 8, wrong=3, fault="labels")
    message = raised_by(
        tmp_path, head.make(), head.make(seed=1), DataError,
        train_dataset=data, data_collator=head.collate, alpha=alpha, **ORDER,
    )  # fmt: skip
    batch = head.collate(data[2:4])
    frames = int(CTC.from_model(head.make()).keep(batch).view(2, -1)[1].sum())
    for words in (
        "the loss is inf in micro-batch 1 of 2 (the term labels is inf)",
        f"the labels of example 1 need 59 frames (one a label, and a blank between equal neighbours), and its input "
        f"makes {frames}.",
        "student.config.ctc_zero_infinity=True",
        "No step was made.",
    ):
        assert words in message, (words, message)


@pytest.mark.parametrize("filtered", [False, True])
@pytest.mark.parametrize("alpha", [0.0, 0.5])
def test_evaluation_names_labels_that_need_more_frames(tmp_path, caplog, alpha: float, filtered: bool) -> None:
    head = HEADS["wav2vec2_ctc_mean"]
    data = sounds(head, 8, wrong=3, fault="labels")
    trainer = make(
        tmp_path, head.make(), head.make(seed=1), train_dataset=data, eval_dataset=data, data_collator=head.collate,
        alpha=alpha, per_device_eval_batch_size=2, logging_nan_inf_filter=filtered,
    )  # fmt: skip
    with caplog.at_level(logging.WARNING, "hf_distill.trainer.evaluation"):
        assert math.isinf(trainer.evaluate()["eval_loss"]) is not filtered
        trainer.evaluate()
    (record,) = caplog.records
    assert record.getMessage().startswith("In a batch of the evaluation the labels of example 1 need 59 frames")


def test_a_long_label_with_a_cached_teacher(tmp_path) -> None:
    head = HEADS["wav2vec2_ctc_mean"]
    data = sounds(head, 8, wrong=3, fault="labels")
    cache = TeacherCache.build(
        head.make(seed=1), data, tmp_path / "cache", data_collator=head.collate, store=Dense(), progress=False
    )
    message = raised_by(
        tmp_path, head.make(), cache, DataError, train_dataset=data, data_collator=head.collate, **ORDER
    )  # fmt: skip
    assert "micro-batch 1 of 2 (the term labels is inf): the labels of example 1 need 59 frames" in message


def test_a_long_label_in_a_custom_loop() -> None:
    """Nine equal letters need 17 frames; there are 10."""
    task = CTC(lambda samples: samples // 100)
    batch = {"input_values": torch.randn(2, 1000), "labels": torch.tensor([[1, 2, 3] + [-100] * 6, [4] * 9])}
    assert task.frames(batch).tolist() == [10, 10] and task.frames_needed(batch).tolist() == [3, 17]
    fault = task.label_fault(batch)
    assert fault is not None and "example 1 need 17 frames" in fault and "its input makes 10" in fault


def test_required_frames_agree_with_torch() -> None:
    """For every label of up to four letters out of two, on up to eight frames: torch's loss is infinite or not."""
    for length in range(5):
        for letters in product((1, 2), repeat=length):
            needed = int(CTC(lambda x: x).frames_needed({"labels": torch.tensor([[*letters, -100]])}))
            for frames in range(1, 9):
                rows, lengths = torch.zeros(frames, 1, 3).log_softmax(-1), torch.tensor([frames])
                loss = nn.functional.ctc_loss(rows, torch.tensor([letters]), lengths, torch.tensor([length]))
                assert bool(loss.isinf()) == (needed > frames), (letters, frames)


def test_required_frames_with_ignored_and_blank_labels() -> None:
    config = HEADS["wav2vec2_ctc_mean"].make().config  # its padding, 0, is also its blank
    labels = torch.tensor([[4, -100, 4, 0, 0, 4], [0, 5, 6, -100, -100, -100]])
    assert CTC(lambda x: x, config=config).frames_needed({"labels": labels}).tolist() == [5, 2]


@pytest.mark.parametrize("alpha", [0.0, 0.5])
@pytest.mark.parametrize("name", CTC_HEADS)
def test_zeroed_infinite_losses_are_counted_in_the_log(tmp_path, name: str, alpha: float) -> None:
    head = HEADS[name]
    data = sounds(head, 8, wrong=3, fault="labels") + sounds(head, 8, wrong=0, fault="labels")
    student = head.make(ctc_zero_infinity=True)
    start = weights(student)
    trainer = make(
        tmp_path, student, head.make(seed=1), alpha=alpha, train_dataset=data, data_collator=head.collate,
        logging_steps=2, **{**ORDER, "learning_rate": 1e-3, "max_steps": 4},
    )  # fmt: skip
    trainer.train()
    logged = [entry["ctc_labels_too_long"] for entry in trainer.state.log_history if "loss" in entry]
    assert logged == [1, 1] and all(isinstance(count, int) for count in logged)  # one in the first eight, and another
    assert_moved(weights(student), start)
    assert all(torch.isfinite(value).all() for value in weights(student).values())


def test_other_heads_do_not_log_that_count(tmp_path) -> None:
    trainer = make(tmp_path, bert(), bert(seed=1), logging_steps=1)
    trainer.train()
    assert not any("ctc" in key for entry in trainer.state.log_history for key in entry)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_nonfinite_input_is_named_before_a_forward(tmp_path, value: float) -> None:
    head = HEADS["wav2vec2_ctc_mean"]
    data = head.examples(8)
    data[2]["input_values"][5] = value
    message = raised_by(
        tmp_path, head.make(), head.make(seed=1), DataError, train_dataset=data, data_collator=head.collate, **ORDER
    )
    assert (
        f"micro-batch 1 of 2 (the term labels is nan, the term logits is nan): input_values of example 0 holds {value}"
        in message
    )
    assert "1 of the 2 examples" in message and "Repair these examples" in message


def test_a_nonfinite_label_is_named(tmp_path) -> None:
    head = HEADS["bert_regression"]
    data = head.examples(8)
    data[1]["labels"] = float("inf")  # NaN would be a missing label, which the data check reports first
    message = raised_by(
        tmp_path, head.make(), head.make(seed=1), DataError, train_dataset=data, data_collator=head.collate, **ORDER
    )
    assert "micro-batch 0 of 2 (the term labels is inf): labels of example 1 holds inf" in message


class Overflow(nn.Module):
    """A block whose last layer overflows for examples with a certain token."""

    def __init__(self, model: Any, place: str, token: int) -> None:
        super().__init__()
        model.register_forward_pre_hook(self.look, with_kwargs=True)
        model.get_submodule(place).register_forward_hook(self.answer)
        self.token, self.marked = token, torch.tensor(False)

    def look(self, _: Any, __: Any, given: dict[str, Any]) -> None:
        self.marked = (given["input_ids"] == self.token).any(-1)

    def answer(self, _: Any, __: Any, hidden: Any) -> Any:
        return torch.where(self.marked.view(-1, *[1] * (hidden.dim() - 1)), torch.inf, hidden)


OVERFLOWS = {
    "bert_single_label": ("bert.encoder.layer.0.output", {}),
    "bert_span": ("bert.encoder.layer.0.output", {}),
    "gpt2_causal_lm": ("transformer.ln_f", {}),
    "llama_causal_lm": ("model.norm", {"fused_loss": True}),
    "t5_seq2seq": ("decoder.final_layer_norm", {"fused_loss": True}),
}


@pytest.mark.parametrize("alpha", [0.5, 1.0])
@pytest.mark.parametrize("name", OVERFLOWS)
def test_an_overflow_of_the_student_names_the_example(tmp_path, name: str, alpha: float) -> None:
    """With and without whole logits; only the third of four examples has token 39."""
    head, (place, settings) = HEADS[name], OVERFLOWS[name]
    data = [{**e, "input_ids": [min(i, 38) for i in e["input_ids"]]} for e in head.examples(4)]
    data[2]["input_ids"][1] = 39
    student = head.make()
    Overflow(student, place, 39)
    message = raised_by(
        tmp_path, student, head.make(seed=1), TrainingError,
        train_dataset=data, data_collator=head.collate, alpha=alpha, **ORDER, **settings,
    )  # fmt: skip
    assert "in micro-batch 1 of 2 (the term" in message and "for example 0 alone, the student's " in message
    assert "No step was made. The teacher's values and the inputs are finite. Causes: overflow" in message


def test_nonfinite_weights_are_named(tmp_path) -> None:
    student = bert()
    student.classifier.bias.data[1] = torch.inf
    message = raised_by(tmp_path, student, bert(seed=1), TrainingError)
    named = len(list(student.parameters()))
    assert (
        f"1 of the student's {named} weights hold NaN or inf, the first is classifier.bias. They did before" in message
    )


def root(outputs: Any, labels: Any, num_items_in_batch: Any = None) -> torch.Tensor:
    """A loss of 0 with an infinite gradient: a square root at 0."""
    gap = outputs["logits"] - outputs["logits"].detach()
    return torch.sqrt(gap.pow(2).sum())


@pytest.mark.parametrize("max_grad_norm", [0.0, 1.0])
def test_a_nonfinite_gradient_with_a_finite_loss(tmp_path, max_grad_norm: float) -> None:
    message = raised_by(
        tmp_path, bert(), bert(seed=1), TrainingError, compute_loss_func=root, max_grad_norm=max_grad_norm
    )
    assert "the norm of the gradient is nan" in message and "every term of the loss is finite" in message
    assert "No step was made" in message and "set_detect_anomaly" in message


def test_a_nonfinite_loss_with_a_finite_gradient(tmp_path) -> None:
    """The weights would survive, but the step raises because its other terms would be lost."""

    def far(outputs: Any, labels: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        return outputs["logits"].sum() + torch.inf

    message = raised_by(tmp_path, bert(), bert(seed=1), TrainingError, compute_loss_func=far)
    assert "the loss is inf in micro-batch 0 of 1 (the term labels is inf)" in message


def test_seq2seq_trainer_raises_on_nonfinite_weights(tmp_path) -> None:
    head = HEADS["t5_seq2seq"]
    student = head.make()
    student.lm_head.weight.data[3] = torch.inf
    start = weights(student)
    trainer = Seq2SeqDistillationTrainer(
        model=student, teacher_model=head.make(seed=1), args=arguments(tmp_path, Seq2SeqDistillationArguments),
        train_dataset=head.examples(8), data_collator=head.collate,
    )  # fmt: skip
    with pytest.raises(TrainingError, match=r"weights hold NaN or inf, the first is shared\.weight"):
        trainer.train()
    assert_same_bits(weights(student), start)


# Trainings that equal Trainer's.


def trained_by(trainer_class: Any, kind: Any, folder: Any, **more: Any) -> tuple[Any, dict[str, torch.Tensor]]:
    head = HEADS["wav2vec2_ctc_mean"]
    student = head.make()
    trainer = trainer_class(
        model=student, args=arguments(folder, kind, logging_steps=1, max_steps=3, **more),
        train_dataset=sounds(head, 8, wrong=3, fault="labels"), data_collator=head.collate,
    )  # fmt: skip
    trainer.train()
    return trainer, weights(student)


def test_without_a_teacher_it_equals_trainer_and_warns_once(tmp_path, caplog) -> None:
    _, theirs = trained_by(Trainer, TrainingArguments, tmp_path / "theirs")
    with caplog.at_level(logging.WARNING, logger="hf_distill"):
        trainer, ours = trained_by(DistillationTrainer, DistillationArguments, tmp_path / "ours", alpha=0.0)
    assert trainer.state.global_step == 3
    assert all(torch.equal(ours[name].isnan(), theirs[name].isnan()) for name in theirs)
    assert any(value.isnan().any() for value in ours.values())
    message = [record.getMessage() for record in caplog.records if "weights are lost" in record.getMessage()]
    assert len(message) == 1
    assert "the norm of the gradient is nan" in message[0] and "this is Trainer's training, which goes on" in message[0]
    assert message[0].endswith("Examples whose labels need more frames than they have, since the last log: 1.")


# The gradient scaler of fp16.


def scaled(folder: Any, student: Any, teacher: Any, **given: Any) -> Any:
    trainer = make(folder, student, teacher, **given)
    trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    return trainer


def test_steps_skipped_by_the_scaler_do_not_raise(tmp_path) -> None:
    """An overflow in the first step: it is skipped, the scale is halved, and the run continues."""
    student = bert()
    start, overflows = weights(student), iter([True, False])
    student.classifier.register_forward_hook(lambda _, __, logits: logits * (torch.inf if next(overflows) else 1.0))
    seen = []
    trainer = scaled(tmp_path, student, bert(seed=1), max_steps=2, train_dataset=examples(8))
    original = trainer._maybe_log_save_evaluate

    def look(*given: Any, **more: Any) -> Any:
        seen.append(weights(student))
        return original(*given, **more)

    trainer._maybe_log_save_evaluate = look
    trainer.train()
    assert_same_bits(seen[0], start)
    assert_moved(seen[1], start)
    assert trainer.accelerator.scaler.get_scale() == 2.0


def test_faults_of_teacher_or_labels_raise_under_a_scaler(tmp_path) -> None:
    head = HEADS["wav2vec2_ctc_mean"]
    for fault, kind, words in (
        ("labels", DataError, "example 1 need 59 frames"),
        ("input", DataError, "input_values of example 1 holds nan"),
        ("teacher", TeacherError, "the teacher's logits hold nan in example 1"),
    ):
        student, teacher = head.make(), deaf(head.make(seed=1))
        data = sounds(head, 4, wrong=1, fault=fault)
        given = {"train_dataset": data, "data_collator": head.collate, "train_sampling_strategy": "sequential"}
        trainer = scaled(tmp_path, student, teacher, **given)
        with pytest.raises(kind, match=words):
            trainer.train()
        assert_same_bits(weights(student), weights(head.make()))


# Custom loops.


def test_a_custom_loop_is_checked(tmp_path) -> None:
    head = HEADS["wav2vec2_ctc_mean"]
    student = head.make().train()
    distiller = Distiller(student, head.make(seed=1))
    good, bad = head.batch(2), head.collate(sounds(head, 2, wrong=0, fault="labels"))
    counts = distiller.begin_step([good, bad])
    distiller(student, good, counts).loss.backward()
    with pytest.raises(DataError, match=r"micro-batch 1 of 2 \(the term labels is inf\): the labels of example 0 need"):
        distiller(student, bad, counts)
    with pytest.raises(DataError, match="micro-batch 0 of 1"):
        distiller(student, bad)


def test_a_loss_without_backward_does_not_raise() -> None:
    student = bert()
    student.classifier.bias.data[1] = torch.nan
    distiller = Distiller(student, bert(seed=1))
    with torch.no_grad():
        assert distiller(student, padded(examples())).loss.isnan()
    with pytest.raises(TrainingError, match="weights hold NaN"):
        distiller(student, padded(examples()))


def test_a_custom_loop_with_labels_alone_is_checked() -> None:
    student = bert()
    student.classifier.bias.data[1] = torch.nan
    with pytest.raises(TrainingError, match=r"the loss is nan in micro-batch 0 of 1 \(the term labels is nan\)"):
        Distiller(student, alpha=0)(student, padded(examples()))


# The cost of the check.


class Synchronisations(TorchDispatchMode):
    """Counts operations that make a CPU wait for an accelerator by reading a tensor's value."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += function is torch.ops.aten._local_scalar_dense.default
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("accumulation", [1, 4])
def test_the_check_synchronizes_once_per_step(tmp_path, monkeypatch, accumulation: int) -> None:
    settings = {"per_device_train_batch_size": 8 // accumulation, "gradient_accumulation_steps": accumulation}
    found, original = [], FiniteCheck.__init__
    for checks in (True, False):

        def init(self: Any, *given: Any, at: Any = "loss", _checks: bool = checks) -> None:
            original(self, *given, at=at if _checks else "off")

        monkeypatch.setattr(FiniteCheck, "__init__", init)
        trainer = make(tmp_path, bert(), bert(seed=1), max_steps=6, train_dataset=examples(48), **settings)
        with Synchronisations() as seen:
            trainer.train()
        found.append(seen.count)
    assert found[0] - found[1] == 6
