"""Settings in `args` changed after construction take effect at the next step, or raise."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import TrainerCallback

from hf_distill import (
    DistillationTrainer,
    Distiller,
    ExitMatch,
    HiddenMatch,
    MovingAverage,
    SettingError,
    TeacherCache,
)
from hf_distill.augment import OnPolicy
from hf_distill.teachers.cache import TopK
from tests.heads import HEADS
from tests.trainer.tiny import (
    arguments,
    assert_same_bits,
    bert,
    examples,
    make,
    never_called,
    padded,
    softened_kl,
    weights,
)

STILL = {"learning_rate": 0.0, "max_steps": 3, "logging_steps": 1, "per_device_train_batch_size": 8}


class Change(TrainerCallback):
    """Changes settings after a certain step, as warm-up recipes do."""

    def __init__(self, step: int = 1, **settings: Any) -> None:
        self.step, self.settings = step, settings

    def on_step_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        if state.global_step == self.step:
            for name, value in self.settings.items():
                setattr(args, name, value)


def changed(folder: Any, before: dict[str, Any], after: dict[str, Any], **given: Any) -> list[dict[str, float]]:
    """Return the logs of three steps of a student that does not change."""
    settings = {**STILL, **before}
    trainer = make(folder, bert(), bert(seed=1), callbacks=[Change(**after)], **settings, **given)
    trainer.train()
    return [entry for entry in trainer.state.log_history if "loss" in entry]


def whole_batch() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return student logits, teacher logits and the cross-entropy of all eight examples, in fp64."""
    batch = padded(examples())
    labels = batch.pop("labels")
    with torch.no_grad():
        ours, theirs = (bert(seed=seed).double().eval()(**batch).logits for seed in (0, 1))
    return ours, theirs, torch.nn.functional.cross_entropy(ours, labels)


FOLLOWED: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "alpha_from_0": ({"alpha": 0.0}, {"alpha": 1.0}),
    "alpha_to_0": ({"alpha": 1.0}, {"alpha": 0.0}),
    "alpha": ({"alpha": 0.25}, {"alpha": 0.75}),
    "temperature": ({"alpha": 0.5}, {"temperature": 6.0}),
    "both": ({"alpha": 0.25}, {"temperature": 6.0, "alpha": 0.5}),
}


@pytest.mark.parametrize("name", FOLLOWED)
def test_a_change_takes_effect_at_the_next_step(tmp_path, name: str) -> None:
    before, after = FOLLOWED[name]
    ours, theirs, labels = whole_batch()
    logged = changed(tmp_path, before, after)
    for entry, settings in zip(logged, (before, {**before, **after}, {**before, **after}), strict=True):
        alpha, temperature = settings["alpha"], settings.get("temperature", 2.0)
        divergence = softened_kl(ours, theirs, temperature).mean()
        assert entry["loss"] == pytest.approx(((1 - alpha) * labels + alpha * divergence).item(), rel=1e-5)
        assert ("loss/labels" in entry, "loss/logits" in entry) == (alpha < 1, alpha > 0)
    assert not {"alpha", "temperature"} & set(logged[0])
    for knob in set(after) & {"alpha", "temperature"}:  # the log shows changes
        assert [entry[knob] for entry in logged[1:]] == [after[knob]] * 2


def test_a_changed_divergence_takes_effect(tmp_path) -> None:
    ours, theirs, _ = whole_batch()
    after = {"divergence": "jensen_shannon", "divergence_kwargs": {"beta": 0.3}}
    logged = changed(tmp_path, {"alpha": 1.0, "temperature": 1.0}, after)
    p, q = theirs.softmax(-1), ours.softmax(-1)
    mean = 0.3 * p + 0.7 * q
    expected = (0.3 * p * (p / mean).log() + 0.7 * q * (q / mean).log()).sum(-1).mean()
    assert logged[0]["loss"] == pytest.approx(softened_kl(ours, theirs, 1.0).mean().item(), rel=1e-5)
    assert [entry["loss"] for entry in logged[1:]] == pytest.approx([expected.item()] * 2, rel=1e-5)


def test_a_schedule_set_later(tmp_path) -> None:
    """The next step takes its value at the current progress."""
    logged = changed(tmp_path, {"alpha": 0.5}, {"alpha_schedule": "linear", "alpha_end": 1.0})
    assert [entry.get("alpha") for entry in logged] == [None, pytest.approx(2 / 3), pytest.approx(5 / 6)]


def test_changes_before_training_and_in_place(tmp_path) -> None:
    """As if they had been passed at construction; the teacher, not needed before, is loaded."""
    args = arguments(tmp_path / "a", alpha=0.0)
    student, teacher = bert(), bert(seed=1)
    data = Dataset.from_dict({name: [row[name] for row in examples()] for name in examples()[0]})
    trainer = make(tmp_path / "a", student, teacher, args=args, train_dataset=data)
    assert teacher.training  # not used yet
    args.alpha, args.divergence, args.divergence_kwargs = 0.5, "jensen_shannon", {}
    trainer.train()
    args.divergence_kwargs["beta"] = 0.3
    trainer.train()
    expected = bert()
    same = {"alpha": 0.5, "divergence": "jensen_shannon"}
    again = make(tmp_path / "b", expected, bert(seed=1), train_dataset=data, **same)
    again.train()
    third = make(tmp_path / "c", expected, bert(seed=1), train_dataset=data, **same, divergence_kwargs={"beta": 0.3})
    third.train()
    assert_same_bits(weights(student), weights(expected))


def test_evaluation_with_the_teacher_enabled_later(tmp_path) -> None:
    student = bert()
    trainer = make(tmp_path, student, bert(seed=1), alpha=0.0, eval_dataset=examples())
    assert "eval_divergence" not in trainer.evaluate()
    trainer.args.evaluate_with_teacher, trainer.args.temperature = True, 5.0
    ours, theirs, _ = whole_batch()
    expected = softened_kl(ours, theirs, 5.0).mean().item()
    assert trainer.evaluate()["eval_divergence"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("alpha", [0.0, None])
def test_heads_are_aligned_when_alpha_is_set_later(tmp_path, alpha: float | None) -> None:
    """With objectives alone, heads with different label orders are aligned once alpha needs them."""
    names = {"label2id": {"a": 0, "b": 1, "c": 2}, "id2label": {0: "a", 1: "b", 2: "c"}}
    other = {"label2id": {"a": 2, "b": 0, "c": 1}, "id2label": {2: "a", 0: "b", 1: "c"}}
    student, teacher = bert(**names), bert(seed=1, **other)
    given = {"callbacks": [Change(alpha=0.5)], "objectives": HiddenMatch("last")}
    trainer = make(tmp_path, student, teacher, alpha=alpha, **given, **STILL)
    trainer.train()
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    ours, theirs, _ = whole_batch()
    expected = softened_kl(ours, theirs[:, [2, 0, 1]], 2.0).mean().item()
    assert "loss/logits" not in logged[0]
    assert logged[1]["loss/logits"] == pytest.approx(expected, rel=1e-5)


def test_the_card_lists_changed_settings(tmp_path) -> None:
    trainer = make(tmp_path, bert(), bert(seed=1), alpha=0.25, callbacks=[Change(alpha=0.75)], **STILL)
    trainer.train()
    trainer.create_model_card()
    assert (
        "alpha = 0.25 → 0.75 (changed during the training)" in (Path(trainer.args.output_dir) / "README.md").read_text()
    )


def test_alpha_0_runs_no_teacher_after_other_changes(tmp_path) -> None:
    make(tmp_path, bert(), never_called(bert(seed=1)), alpha=0.0, callbacks=[Change(temperature=5.0)], **STILL).train()


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "alpha": ({"alpha": 2.0}, r"alpha=2: must lie in \[0, 1\]"),
    "temperature": ({"temperature": 0.0}, "temperature=0: must be above 0"),
    "divergence": ({"divergence": "kl"}, "divergence='kl'.*Did you mean 'forward_kl'"),
    "schedule": ({"alpha_schedule": "linear"}, "alpha_schedule='linear' needs alpha_end"),
    "nothing_left": ({"alpha": None}, "alpha=None is a loss of the objectives alone"),
    "teacher_dtype": ({"teacher_dtype": "bfloat16"}, "args.teacher_dtype was None and is now 'bfloat16'.*new trainer"),
    "label_matching": ({"label_matching": "by_index"}, "args.label_matching was 'by_name' and is now 'by_index'"),
    "fused": ({"fused_loss": True}, "args.fused_loss was None and is now True"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_unsupported_changes_stop_the_training(tmp_path, name: str) -> None:
    after, words = REFUSED[name]
    trainer = make(tmp_path, bert(), bert(seed=1), callbacks=[Change(**after)], **STILL)
    blend = trainer.distiller.blending
    with pytest.raises(SettingError, match=words):
        trainer.train()
    assert trainer.state.global_step == 1
    assert trainer.distiller.blending is blend and blend.alpha(0.0) == 0.5  # unchanged


def test_raising_alpha_without_a_teacher_raises(tmp_path) -> None:
    trainer = make(tmp_path, bert(), alpha=0.0, callbacks=[Change(alpha=0.5)], **STILL)
    with pytest.raises(SettingError, match=r"alpha is 0\.5 but there is no teacher"):
        trainer.train()


def test_changing_args_beside_a_passed_distiller_raises(tmp_path) -> None:
    student = bert()
    trainer = make(
        tmp_path, student, distiller=Distiller(student, bert(seed=1)), callbacks=[Change(alpha=0.9)], **STILL
    )
    with pytest.raises(SettingError, match=r"args\.alpha was 0\.5 and is now 0\.9.*trainer\.distiller\.set_blend"):
        trainer.train()


def test_set_blend_raises_and_keeps_the_blend() -> None:
    student = bert()
    distiller = Distiller(student, alpha=0.0)
    with pytest.raises(SettingError, match="there is no teacher"):
        distiller.set_blend(alpha=0.5)
    assert distiller.blending.alpha is not None and distiller.blending.alpha(0.5) == 0.0
    regression = HEADS["bert_regression"]
    distiller = Distiller(regression.make(0), regression.make(1))
    with pytest.raises(SettingError, match="compares distributions"):
        distiller.set_blend(divergence="forward_kl")
    assert distiller.logits_match.name_for(distiller.task) == "mean_squared_error"


def test_enabling_alpha_with_a_running_moving_average_raises(tmp_path) -> None:
    given = {"objectives": HiddenMatch("last"), "callbacks": [Change(alpha=0.5)]}
    trainer = make(tmp_path, bert(), MovingAverage(), alpha=0.0, **given, **STILL)
    with pytest.raises(SettingError, match=r"this MovingAverage were not compared until now.*alpha_schedule"):
        trainer.train()


def test_enabling_alpha_with_learned_exits_raises(tmp_path) -> None:
    """The optimizer holds their parameters."""
    given = {"objectives": ExitMatch([0]), "callbacks": [Change(alpha=0.5)]}
    trainer = make(tmp_path, bert(num_hidden_layers=2), bert(seed=1), alpha=0.0, **given, **STILL)
    with pytest.raises(SettingError, match=r"objectives that learn are being trained without it.*alpha_schedule"):
        trainer.train()


def test_enabling_alpha_after_teacher_columns_were_dropped_raises(tmp_path) -> None:
    """The teacher needs token types, which `Trainer` dropped because the student does not accept them."""
    distil = HEADS["distilbert_single_label"]
    data = Dataset.from_list([{**row, "token_type_ids": [0] * len(row["input_ids"])} for row in distil.examples(8)])
    given = {"train_dataset": data, "data_collator": distil.collate, "callbacks": [Change(alpha=0.5)]}
    trainer = make(tmp_path, distil.make(0), HEADS["bert_single_label"].make(1), alpha=0.0, **given, **STILL)
    with pytest.raises(SettingError, match=r"made without what it reads \(token_type_ids\).*alpha_schedule"):
        trainer.train()


def test_enabling_evaluation_of_predictions_that_are_not_compared(tmp_path) -> None:
    trainer = make(tmp_path, bert(), bert(seed=1), alpha=0.0, objectives=HiddenMatch("last"), eval_dataset=examples())
    blending = trainer.distiller.blending
    trainer.args.evaluate_with_teacher = True
    with pytest.raises(SettingError, match="its blend compares no predictions"):
        trainer.evaluate()
    assert trainer.distiller.blending is blending


def test_a_teacher_of_another_class_with_the_students_columns(tmp_path) -> None:
    """It also accepts token types, but this dataset has none."""
    distil = HEADS["distilbert_single_label"]
    given = {"train_dataset": distil.examples(8), "data_collator": distil.collate, "callbacks": [Change(alpha=0.5)]}
    trainer = make(tmp_path, distil.make(0), HEADS["bert_single_label"].make(1), alpha=0.0, **given, **STILL)
    trainer.train()
    assert "loss/logits" in trainer.state.log_history[1]


def test_changing_the_temperature_of_a_sparse_cache_raises(tmp_path) -> None:
    head = HEADS["llama_causal_lm"]
    given = {"train_dataset": head.examples(8), "data_collator": head.collate}
    store = TopK(2, temperatures=(2.0,))
    cache = TeacherCache.build(
        head.make(1), head.examples(8), tmp_path / "cache", data_collator=head.collate, store=store, progress=False
    )
    trainer = make(tmp_path, head.make(0), cache, callbacks=[Change(temperature=3.0)], **given, **STILL)
    with pytest.raises(SettingError, match="temperature"):
        trainer.train()
    assert trainer.state.global_step == 1


def test_lowering_alpha_with_on_policy_raises(tmp_path) -> None:
    head = HEADS["llama_causal_lm"]
    trainer = DistillationTrainer(
        model=head.make(0, pad_token_id=0),
        teacher_model=head.make(1),
        on_policy=OnPolicy(student_share=1.0, max_new_tokens=2),
        args=arguments(tmp_path, alpha=1.0, **STILL),
        train_dataset=head.examples(8),
        data_collator=head.collate,
        callbacks=[Change(alpha=0.5)],
    )
    with pytest.raises(SettingError, match="alpha < 1 would train on"):
        trainer.train()
