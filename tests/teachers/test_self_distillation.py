"""Self-distillation: moving averages by the formula, snapshots, adapters switched off, resume bit for bit."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import peft
import pytest
import torch
from accelerate.utils import DistributedType
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file
from transformers import TrainerCallback

from hf_distill import Distiller, SettingError, TeacherError
from hf_distill.signals import Needs
from hf_distill.teachers import BaseModelTeacher, Ensemble, MovingAverage, Snapshot
from tests.heads import HEADS
from tests.laws import measuring as m
from tests.trainer.steps import in_double
from tests.trainer.tiny import assert_moved, assert_same_bits, bert, examples, make, weights

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # PEFT's
RUN = {"max_steps": 4, "save_strategy": "steps", "save_steps": 1, "optim": "adamw_torch", "learning_rate": 0.01}


class Keep(TrainerCallback):
    """Records the student's weights after each step."""

    def __init__(self) -> None:
        self.kept: list[dict[str, torch.Tensor]] = []

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        self.kept.append(weights(model))


def test_the_moving_average_follows_its_formula(tmp_path) -> None:
    """d = min(0.6, 1 - 1 / (step + 1)): 1/2, 0.6, 0.6, starting from the initial student."""
    student, teacher, keep = bert(), MovingAverage(decay=0.6), Keep()
    expected = weights(student)
    trainer = make(tmp_path, student, teacher, max_steps=3, callbacks=[keep])
    trainer.train()
    for decay, now in zip((0.5, 0.6, 0.6), keep.kept, strict=True):
        expected = {name: decay * value + (1 - decay) * now[name] for name, value in expected.items()}
    found = weights(teacher.model)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value)
    assert_moved(found, weights(bert()))
    assert not any(p.requires_grad for p in teacher.model.parameters()) and not teacher.model.training


def test_a_decay_of_zero_copies_the_student(tmp_path) -> None:
    """Then the teacher equals the current student: the divergence of a step's first micro-batch is 0."""
    teacher = MovingAverage(decay=0.0)
    trainer = make(tmp_path, bert(), teacher, alpha=0.5, max_steps=3, logging_steps=1)
    trainer.train()
    assert [e["loss/logits"] for e in trainer.state.log_history if "loss" in e] == pytest.approx([0, 0, 0], abs=1e-6)
    assert_same_bits(weights(teacher.model), weights(trainer.model))


def test_half_precision_students_are_averaged_in_fp32() -> None:
    student = bert().to(torch.bfloat16)
    teacher = MovingAverage(decay=0.999)
    Distiller(student, teacher)
    assert {p.dtype for p in teacher.model.parameters()} == {torch.float32}
    before = weights(teacher.model)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(1.0)
    for _ in range(3):
        teacher.on_step(student)
    assert_moved(weights(teacher.model), before)


@pytest.mark.parametrize("at", [1, 2, 3])
def test_a_resumed_average_equals_the_uninterrupted_one(tmp_path, at: int) -> None:
    given = {**RUN, "train_dataset": examples(8), "temperature": 3.0}
    whole = make(tmp_path / "whole", bert(dropout=0.3), MovingAverage(decay=0.9), **given)
    whole.train()
    checkpoint = tmp_path / "whole" / "out" / f"checkpoint-{at}"
    assert "steps" in load_file(checkpoint / "distill_teacher.safetensors")
    resumed = make(tmp_path / "resumed", bert(seed=5, dropout=0.3), MovingAverage(decay=0.9), **given)
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert_same_bits(weights(resumed.model), weights(whole.model))
    assert_same_bits(weights(resumed.distiller.teacher.model), weights(whole.distiller.teacher.model))


def test_a_checkpoint_without_the_average_raises(tmp_path) -> None:
    make(tmp_path / "plain", bert(), bert(seed=1), **RUN).train()
    trainer = make(tmp_path / "own", bert(), MovingAverage(), **RUN)
    with pytest.raises(SettingError, match=r"has no distill_teacher\.safetensors, which holds the moving teacher"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "plain" / "out" / "checkpoint-1"))


def test_the_state_of_another_teacher_raises(tmp_path) -> None:
    """Of an ensemble in another order, of another kind of teacher, or for a fixed teacher."""
    short = {**RUN, "max_steps": 1}
    make(tmp_path, bert(), Ensemble([bert(seed=1), MovingAverage()]), **short).train()
    for teacher, message in (
        (
            Ensemble([MovingAverage(), bert(seed=1)]),
            "to another Ensemble. Resume with the same list of teachers",
        ),
        (MovingAverage(), "the saved MovingAverage is of another student"),
        (bert(seed=1), r"saved with a teacher that training changes \(it has distill_teacher\.safetensors\)"),
    ):
        with pytest.raises(SettingError, match=message):
            make(tmp_path / "again", bert(), teacher, **RUN).train(
                resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-1")
            )


def test_the_average_is_not_exported(tmp_path) -> None:
    trainer = make(tmp_path, bert(), MovingAverage(), **RUN)
    trainer.train()
    trainer.save_model(str(tmp_path / "student"))
    assert not list((tmp_path / "student").glob("distill_*"))
    held = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in trainer.model.parameters()}


@pytest.mark.parametrize("decay", [1.0, -0.1, "0.9", None])
def test_an_invalid_decay_raises(decay: Any) -> None:
    with pytest.raises(SettingError, match=r"decay=.*must lie in \[0, 1\)"):
        MovingAverage(decay=decay)


def test_a_moving_average_of_a_sharded_student_raises() -> None:
    distiller = Distiller(bert(), MovingAverage())
    with pytest.raises(SettingError, match=r"MovingAverage with FSDP: no process holds the whole student"):
        distiller.to(SimpleNamespace(distributed_type=DistributedType.FSDP))


# Snapshots.


def test_a_snapshot_is_refreshed_and_resumed(tmp_path) -> None:
    given = {**RUN, "train_dataset": examples(8), "max_steps": 5}
    teacher, keep = Snapshot(every=2), Keep()
    whole = make(tmp_path / "whole", bert(dropout=0.3), teacher, callbacks=[keep], logging_steps=1, **given)
    seen: list[Any] = []
    after = teacher.on_step
    teacher.on_step = lambda student: (after(student), seen.append(weights(teacher.model)))[0]
    whole.train()
    start = weights(bert())
    for found, expected in zip(seen, [start, keep.kept[1], keep.kept[1], keep.kept[3], keep.kept[3]], strict=True):
        assert_same_bits(found, expected)
    assert_moved(seen[4], seen[2])
    resumed = make(tmp_path / "resumed", bert(seed=5, dropout=0.3), Snapshot(every=2), **given)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "out" / "checkpoint-3"))
    assert_same_bits(weights(resumed.model), weights(whole.model))
    assert_same_bits(weights(resumed.distiller.teacher.model), keep.kept[3])


def test_every_must_be_a_whole_number() -> None:
    for every in (0, 1.5, True):
        with pytest.raises(SettingError, match=r"every=.*must be a whole number of at least 1"):
            Snapshot(every=every)


# Adapters switched off.


def adapted(name: str = "llama_causal_lm", dropout: float = 0.0) -> tuple[Any, Any]:
    """Return a LoRA student with nonzero adapters, and its base model alone."""
    base = HEADS[name].make(seed=0).double()
    alone = copy.deepcopy(base)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], lora_dropout=dropout)
        student = peft.get_peft_model(base, config).double()
        for key, parameter in student.named_parameters():
            if "lora_B" in key:
                torch.nn.init.normal_(parameter, std=0.5)
    return student, alone


def test_the_base_model_predicts_and_the_student_is_unchanged() -> None:
    student, alone = adapted(dropout=0.2)
    student.train()
    distiller = Distiller(student, BaseModelTeacher(), alpha=1.0)
    batch = in_double(HEADS["llama_causal_lm"], HEADS["llama_causal_lm"].examples(4))
    modes = [module.training for module in student.modules()]
    trained = [name for name, p in student.named_parameters() if p.requires_grad]
    state = torch.random.get_rng_state()
    found = distiller.teacher_signals(batch, Needs(logits=True)).predictions()
    alone.eval()
    with torch.no_grad():
        expected = alone(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    assert torch.equal(found, expected)
    assert [module.training for module in student.modules()] == modes
    assert [name for name, p in student.named_parameters() if p.requires_grad] == trained
    assert torch.equal(torch.random.get_rng_state(), state)
    with torch.no_grad():
        student.eval()
        with_adapters = student(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    assert (with_adapters - expected).abs().max() > 0.01


def test_adapters_are_restored_after_an_exception() -> None:
    student, _ = adapted()
    student.train()
    distiller = Distiller(student, BaseModelTeacher(), alpha=1.0)
    batch = in_double(HEADS["llama_causal_lm"], HEADS["llama_causal_lm"].examples(2))

    def fail(*_: Any) -> None:
        raise RuntimeError("out of memory")

    handle = student.get_base_model().lm_head.register_forward_pre_hook(fail)
    with pytest.raises(TeacherError, match=r"forward failed.*out of memory"):
        distiller.teacher_signals(batch)
    handle.remove()
    assert all(module.training for module in student.modules())
    adapters = [module for module in student.modules() if isinstance(module, BaseTunerLayer)]
    assert adapters and not any(module.disable_adapters for module in adapters)
    assert any(p.requires_grad for name, p in student.named_parameters() if "lora" in name)


def test_frozen_adapter_parameters_stay_frozen() -> None:
    student, _ = adapted()
    for name, parameter in student.named_parameters():
        parameter.requires_grad_("lora_B" in name)
    trained = {name: p.requires_grad for name, p in student.named_parameters()}
    distiller = Distiller(student, BaseModelTeacher(), alpha=1.0)
    distiller.teacher_signals(in_double(HEADS["llama_causal_lm"], HEADS["llama_causal_lm"].examples(2)))
    assert {name: p.requires_grad for name, p in student.named_parameters()} == trained


def test_it_equals_a_separate_copy_of_the_base_model() -> None:
    """Value and gradient, also with gradient checkpointing, whose backward runs the student again."""
    head = HEADS["llama_causal_lm"]
    batch = in_double(head, head.examples(4))
    student, alone = adapted()
    expected, gradient = m.step(Distiller(student, alone), student, [batch])
    loss, found = m.step(Distiller(student, BaseModelTeacher()), student, [batch])
    assert loss == expected and torch.equal(found, gradient)
    student.get_base_model().activation_checkpointing_enable({"use_reentrant": False})
    student.train()
    loss, found = m.step(Distiller(student, BaseModelTeacher()), student, [batch])
    assert loss == pytest.approx(expected, rel=1e-12) and m.difference(found, gradient) < 1e-10


def test_training_accumulation_and_resume(tmp_path) -> None:
    head = HEADS["llama_causal_lm"]
    given = {**RUN, "train_dataset": head.examples(8), "data_collator": head.collate}

    def student(dropout: float) -> Any:
        return adapted(dropout=dropout)[0].float()

    def trained(folder: str, **changed: Any) -> Any:
        trainer = make(
            tmp_path / folder, student(changed.pop("dropout", 0.0)), BaseModelTeacher(), **{**given, **changed}
        )
        trainer.train(resume_from_checkpoint=changed.get("resume"))
        return weights(trainer.model)

    whole = trained("whole", dropout=0.3)
    resumed = make(tmp_path / "resumed", student(0.3), BaseModelTeacher(), **given)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "out" / "checkpoint-2"))
    assert_same_bits(weights(resumed.model), whole)
    one = trained("one", max_steps=1, optim="sgd", per_device_train_batch_size=8)
    parts = trained("parts", max_steps=1, optim="sgd", per_device_train_batch_size=2, gradient_accumulation_steps=4)
    for name, value in one.items():
        torch.testing.assert_close(parts[name], value, rtol=1e-4, atol=1e-6)
    assert_moved(one, weights(student(0.0)))


def test_a_student_without_adapters_raises() -> None:
    with pytest.raises(TeacherError, match="has no adapters to switch off"):
        Distiller(bert(), BaseModelTeacher())
