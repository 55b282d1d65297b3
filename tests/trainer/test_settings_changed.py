"""Settings in `args` that are changed after the trainer was made: followed from the next step on, or refused."""

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
    """Changes settings after the step with this number, as warm-up recipes do."""

    def __init__(self, step: int = 1, **settings: Any) -> None:
        self.step, self.settings = step, settings

    def on_step_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        if state.global_step == self.step:
            for name, value in self.settings.items():
                setattr(args, name, value)


def changed(folder: Any, before: dict[str, Any], after: dict[str, Any], **given: Any) -> list[dict[str, float]]:
    """What each of three steps logs, of a student that stands still."""
    settings = {**STILL, **before}
    trainer = make(folder, bert(), bert(seed=1), callbacks=[Change(**after)], **settings, **given)
    trainer.train()
    return [entry for entry in trainer.state.log_history if "loss" in entry]


def whole_batch() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The logits of student and teacher, and the cross-entropy, in fp64, of all eight examples."""
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
def test_a_change_is_followed_from_the_next_step_on(tmp_path, name: str) -> None:
    before, after = FOLLOWED[name]
    ours, theirs, labels = whole_batch()
    logged = changed(tmp_path, before, after)
    for entry, settings in zip(logged, (before, {**before, **after}, {**before, **after}), strict=True):
        alpha, temperature = settings["alpha"], settings.get("temperature", 2.0)
        divergence = softened_kl(ours, theirs, temperature).mean()
        assert entry["loss"] == pytest.approx(((1 - alpha) * labels + alpha * divergence).item(), rel=1e-5)
        assert ("loss/labels" in entry, "loss/logits" in entry) == (alpha < 1, alpha > 0)
    assert not {"alpha", "temperature"} & set(logged[0])
    for knob in set(after) & {"alpha", "temperature"}:  # a change is seen in the log
        assert [entry[knob] for entry in logged[1:]] == [after[knob]] * 2


def test_the_divergence_and_its_settings_too(tmp_path) -> None:
    ours, theirs, _ = whole_batch()
    after = {"divergence": "jensen_shannon", "divergence_kwargs": {"beta": 0.3}}
    logged = changed(tmp_path, {"alpha": 1.0, "temperature": 1.0}, after)
    p, q = theirs.softmax(-1), ours.softmax(-1)
    mean = 0.3 * p + 0.7 * q
    expected = (0.3 * p * (p / mean).log() + 0.7 * q * (q / mean).log()).sum(-1).mean()
    assert logged[0]["loss"] == pytest.approx(softened_kl(ours, theirs, 1.0).mean().item(), rel=1e-5)
    assert [entry["loss"] for entry in logged[1:]] == pytest.approx([expected.item()] * 2, rel=1e-5)


def test_a_schedule_that_begins_later(tmp_path) -> None:
    """At the step that is followed it is where that moment of the training lies on it."""
    logged = changed(tmp_path, {"alpha": 0.5}, {"alpha_schedule": "linear", "alpha_end": 1.0})
    assert [entry.get("alpha") for entry in logged] == [None, pytest.approx(2 / 3), pytest.approx(5 / 6)]


def test_by_hand_before_the_training_and_a_dict_changed_in_place(tmp_path) -> None:
    """As if the trainer had been made with it; the teacher, not needed until now, is loaded then."""
    args = arguments(tmp_path / "a", alpha=0.0)
    student, teacher = bert(), bert(seed=1)
    data = Dataset.from_dict({name: [row[name] for row in examples()] for name in examples()[0]})
    trainer = make(tmp_path / "a", student, teacher, args=args, train_dataset=data)
    assert teacher.training  # not touched yet
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


def test_with_evaluation_by_the_teacher_turned_on_later(tmp_path) -> None:
    student = bert()
    trainer = make(tmp_path, student, bert(seed=1), alpha=0.0, eval_dataset=examples())
    assert "eval_divergence" not in trainer.evaluate()
    trainer.args.evaluate_with_teacher, trainer.args.temperature = True, 5.0
    ours, theirs, _ = whole_batch()
    expected = softened_kl(ours, theirs, 5.0).mean().item()
    assert trainer.evaluate()["eval_divergence"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("alpha", [0.0, None])
def test_predictions_that_were_not_compared_before_are_paired_then(tmp_path, alpha: float | None) -> None:
    """Objectives alone: the heads, whose labels stand in another order, are paired when alpha asks for them."""
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


def test_the_card_says_what_was_changed(tmp_path) -> None:
    trainer = make(tmp_path, bert(), bert(seed=1), alpha=0.25, callbacks=[Change(alpha=0.75)], **STILL)
    trainer.train()
    trainer.create_model_card()
    assert (
        "alpha = 0.25 → 0.75 (changed during the training)" in (Path(trainer.args.output_dir) / "README.md").read_text()
    )


def test_an_alpha_that_stays_0_asks_nobody(tmp_path) -> None:
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
def test_what_cannot_be_followed_stops_the_training(tmp_path, name: str) -> None:
    after, words = REFUSED[name]
    trainer = make(tmp_path, bert(), bert(seed=1), callbacks=[Change(**after)], **STILL)
    blend = trainer.distiller.blending
    with pytest.raises(SettingError, match=words):
        trainer.train()
    assert trainer.state.global_step == 1
    assert trainer.distiller.blending is blend and blend.alpha(0.0) == 0.5  # as it was


def test_without_any_teacher_to_load(tmp_path) -> None:
    trainer = make(tmp_path, bert(), alpha=0.0, callbacks=[Change(alpha=0.5)], **STILL)
    with pytest.raises(SettingError, match=r"alpha is 0\.5 but there is no teacher"):
        trainer.train()


def test_a_given_distiller_does_not_follow_args(tmp_path) -> None:
    student = bert()
    trainer = make(
        tmp_path, student, distiller=Distiller(student, bert(seed=1)), callbacks=[Change(alpha=0.9)], **STILL
    )
    with pytest.raises(SettingError, match=r"args\.alpha was 0\.5 and is now 0\.9.*trainer\.distiller\.set_blend"):
        trainer.train()


def test_set_blend_refuses_what_it_cannot_serve_and_keeps_the_blend() -> None:
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


def test_a_moving_teacher_is_not_begun_anew(tmp_path) -> None:
    given = {"objectives": HiddenMatch("last"), "callbacks": [Change(alpha=0.5)]}
    trainer = make(tmp_path, bert(), MovingAverage(), alpha=0.0, **given, **STILL)
    with pytest.raises(SettingError, match=r"this MovingAverage were not compared until now.*alpha_schedule"):
        trainer.train()


def test_what_learns_without_a_teacher_is_not_made_anew(tmp_path) -> None:
    """The optimizer holds the parameters of the exits."""
    given = {"objectives": ExitMatch([0]), "callbacks": [Change(alpha=0.5)]}
    trainer = make(tmp_path, bert(num_hidden_layers=2), bert(seed=1), alpha=0.0, **given, **STILL)
    with pytest.raises(SettingError, match=r"objectives that learn are being trained without it.*alpha_schedule"):
        trainer.train()


def test_columns_that_the_running_training_has_dropped(tmp_path) -> None:
    """The teacher reads token types, which a student without them made `Trainer` drop."""
    distil = HEADS["distilbert_single_label"]
    data = Dataset.from_list([{**row, "token_type_ids": [0] * len(row["input_ids"])} for row in distil.examples(8)])
    given = {"train_dataset": data, "data_collator": distil.collate, "callbacks": [Change(alpha=0.5)]}
    trainer = make(tmp_path, distil.make(0), HEADS["bert_single_label"].make(1), alpha=0.0, **given, **STILL)
    with pytest.raises(SettingError, match=r"made without what it reads \(token_type_ids\).*alpha_schedule"):
        trainer.train()


def test_evaluation_of_predictions_that_are_not_compared(tmp_path) -> None:
    trainer = make(tmp_path, bert(), bert(seed=1), alpha=0.0, objectives=HiddenMatch("last"), eval_dataset=examples())
    blending = trainer.distiller.blending
    trainer.args.evaluate_with_teacher = True
    with pytest.raises(SettingError, match="its blend compares no predictions"):
        trainer.evaluate()
    assert trainer.distiller.blending is blending


def test_a_teacher_of_another_class_that_reads_what_the_student_reads(tmp_path) -> None:
    """It could read token types too, but this dataset has none."""
    distil = HEADS["distilbert_single_label"]
    given = {"train_dataset": distil.examples(8), "data_collator": distil.collate, "callbacks": [Change(alpha=0.5)]}
    trainer = make(tmp_path, distil.make(0), HEADS["bert_single_label"].make(1), alpha=0.0, **given, **STILL)
    trainer.train()
    assert "loss/logits" in trainer.state.log_history[1]


def test_a_cache_that_holds_for_one_temperature(tmp_path) -> None:
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


def test_a_view_that_shows_the_students_own_texts_stays_without_labels(tmp_path) -> None:
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
