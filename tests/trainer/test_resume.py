"""Law L10: a resumed run equals the uninterrupted run bit for bit; the best checkpoint is the one that is loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from hf_distill import SettingError
from hf_distill.learned import STATE_FILE
from tests.heads import HEADS
from tests.trainer.steps import NO_LOSS, OBJECTIVES_OF, dropout_of
from tests.trainer.tiny import assert_moved, assert_same_bits, bert, examples, make, weights

SCHEDULES = {
    "alpha": 0.2,
    "alpha_schedule": "linear",
    "alpha_end": 0.9,
    "temperature": 4.0,
    "temperature_schedule": "cosine",
    "temperature_end": 1.0,
}
RUN = {
    "max_steps": 6,
    "save_strategy": "steps",
    "save_steps": 1,
    "logging_steps": 2,
    "optim": "adamw_torch",
    "lr_scheduler_type": "linear",
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "learning_rate": 0.01,
}


def losses(trainer: Any) -> list[dict[str, float]]:
    names = ("step", "loss", "loss/labels", "loss/logits", "alpha", "temperature", "grad_norm")
    return [{k: e[k] for k in names if k in e} for e in trainer.state.log_history if "loss" in e]


@pytest.mark.parametrize("at", [2, 3, 4])
def test_a_resumed_run_equals_the_uninterrupted_run(tmp_path, at: int) -> None:
    """Step 3 lies between two logs, 2 and 4 on them; the epoch has 11 examples, so its last step is smaller."""
    given = {"train_dataset": examples(11), **RUN, **SCHEDULES}
    whole = make(tmp_path / "whole", bert(dropout=0.3), bert(seed=1), **given)
    whole.train()
    checkpoint = tmp_path / "whole" / "out" / f"checkpoint-{at}"
    resumed = make(tmp_path / "resumed", bert(seed=5, dropout=0.3), bert(seed=1), **given)
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert_same_bits(weights(resumed.model), weights(whole.model))
    assert_moved(weights(whole.model), load_file(checkpoint / "model.safetensors"))
    # Sums since the last log are not in a checkpoint, as in `Trainer`.
    after = at + 2 if at % 2 == 0 else at + 3
    assert [e for e in losses(resumed) if e["step"] >= after] == [e for e in losses(whole) if e["step"] >= after]


@pytest.mark.parametrize("name", HEADS)
def test_every_head_resumes_bit_for_bit(tmp_path, name: str) -> None:
    head = HEADS[name]
    settings = {**RUN, "max_steps": 3, **({"alpha": 1.0} if name in NO_LOSS else SCHEDULES)}
    given = {"train_dataset": head.examples(8), "data_collator": head.collate, **settings}
    dropout = dropout_of(head, 0.3)
    whole = make(tmp_path / "whole", head.make(**dropout), head.make(seed=1), **given)
    whole.train()
    resumed = make(tmp_path / "resumed", head.make(seed=5, **dropout), head.make(seed=1), **given)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "out" / "checkpoint-1"))
    assert_same_bits(weights(resumed.model), weights(whole.model))


INSIDE = [("bert_tokens", kind) for kind in OBJECTIVES_OF]
INSIDE += [("t5_seq2seq", "projected")]
INSIDE += [
    pytest.param(name, "projected", marks=pytest.mark.slow)
    for name in ("llama_causal_lm", "wav2vec2_ctc_mean", "vit_image_class")
]


def with_objectives(folder: Path, name: str, kind: str | None, *, seed: int = 0, **settings: Any) -> Any:
    """Two layers with dropout, matched with three through projections, trained by AdamW."""
    head = HEADS[name]
    given = {"train_dataset": head.examples(8), "data_collator": head.collate, **RUN, "max_steps": 3, **settings}
    student, teacher = head.make(seed, layers=2, **dropout_of(head, 0.3)), head.make(1, layers=3, width=24)
    return make(folder, student, teacher, objectives=OBJECTIVES_OF[kind]() if kind else None, **given)


@pytest.mark.parametrize(("name", "kind"), INSIDE)
def test_projections_are_resumed(tmp_path, name: str, kind: str) -> None:
    whole = with_objectives(tmp_path / "whole", name, kind)
    whole.train()
    checkpoint = tmp_path / "whole" / "out" / "checkpoint-1"
    resumed = with_objectives(tmp_path / "resumed", name, kind, seed=5)
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert_same_bits(weights(resumed.model), weights(whole.model))
    learned = weights(whole.distiller.learned.module)
    assert_same_bits(weights(resumed.distiller.learned.module), learned)
    assert (checkpoint / STATE_FILE).is_file() == bool(learned)
    assert bool(learned) == (kind in ("projected", "scheduled", "lower_block"))
    if learned:
        assert_moved(learned, load_file(checkpoint / STATE_FILE))


def test_a_checkpoint_without_projections_raises(tmp_path) -> None:
    with_objectives(tmp_path, "bert_tokens", None, max_steps=1).train()
    checkpoint = tmp_path / "out" / "checkpoint-1"
    assert not (checkpoint / STATE_FILE).exists()
    again = with_objectives(tmp_path / "again", "bert_tokens", "lower_block")
    with pytest.raises(SettingError) as raised:
        again.train(resume_from_checkpoint=str(checkpoint))
    message = str(raised.value)
    assert message.startswith(f"{checkpoint} has no distill_state.safetensors") and "save_only_model=True" in message
    assert "(hidden.matrices.0_0.weight)" in message  # the missing parameter
    assert message.endswith("Resume from another checkpoint, or start anew from its model.")


def test_a_checkpoint_with_projections_of_other_objectives_raises(tmp_path) -> None:
    with_objectives(tmp_path, "bert_tokens", "lower_block", max_steps=1).train()
    checkpoint = tmp_path / "out" / "checkpoint-1"
    again = with_objectives(tmp_path / "again", "bert_tokens", "projected")
    with pytest.raises(SettingError, match=r"does not fit the objectives of this run, which learn .*cosine\."):
        again.train(resume_from_checkpoint=str(checkpoint))


def test_projections_without_objectives_raise(tmp_path) -> None:
    with_objectives(tmp_path, "bert_tokens", "lower_block", max_steps=1).train()
    again = with_objectives(tmp_path / "again", "bert_tokens", None)
    with pytest.raises(
        SettingError, match=r"was saved with objectives that learn \(it has distill_state\.safetensors\), and"
    ):
        again.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-1"))


def test_a_damaged_file_of_projections_raises(tmp_path) -> None:
    with_objectives(tmp_path, "bert_tokens", "lower_block", max_steps=1).train()
    checkpoint = tmp_path / "out" / "checkpoint-1"
    (checkpoint / STATE_FILE).write_bytes(b"half of it")
    with pytest.raises(SettingError, match=r"distill_state\.safetensors is damaged .* Resume from another ch"):
        with_objectives(tmp_path / "again", "bert_tokens", "lower_block").train(resume_from_checkpoint=str(checkpoint))


def test_resume_from_the_last_checkpoint(tmp_path) -> None:
    make(tmp_path, bert(), bert(seed=1), **{**RUN, "max_steps": 2}).train()
    again = make(tmp_path, bert(seed=5), bert(seed=1), **{**RUN, "max_steps": 3})
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 3
    assert (Path(again.args.output_dir) / "checkpoint-3").is_dir()


def test_the_best_model_by_a_custom_metric_is_loaded(tmp_path) -> None:
    """Its best evaluation is the second; the loss would have selected another."""
    marks = iter([0.1, 0.9, 0.3, 0.2])
    trainer = make(
        tmp_path,
        bert(),
        bert(seed=1),
        eval_dataset=examples(4),
        compute_metrics=lambda _: {"mark": next(marks)},
        load_best_model_at_end=True,
        metric_for_best_model="mark",
        greater_is_better=True,
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        max_steps=4,
    )
    trainer.train()
    assert trainer.state.best_metric == 0.9
    best = Path(trainer.state.best_model_checkpoint)
    assert best.name == "checkpoint-2"
    kept = load_file(best / "model.safetensors")
    assert_same_bits({name: kept[name] for name in trainer.model.state_dict()}, weights(trainer.model))
    assert_moved(load_file(best.with_name("checkpoint-4") / "model.safetensors"), kept)


def test_projections_of_the_best_model_are_loaded_with_it(tmp_path) -> None:
    marks = iter([0.9, 0.1])
    best = {"load_best_model_at_end": True, "metric_for_best_model": "mark", "greater_is_better": True}
    trainer = with_objectives(
        tmp_path, "bert_tokens", "lower_block", max_steps=2, eval_strategy="steps", eval_steps=1,
        eval_dataset=HEADS["bert_tokens"].examples(4), compute_metrics=lambda _: {"mark": next(marks)}, **best,
    )  # fmt: skip
    trainer.train()
    first, last = (load_file(tmp_path / "out" / f"checkpoint-{step}" / STATE_FILE) for step in (1, 2))
    assert_same_bits(weights(trainer.distiller.learned.module), first)
    assert_moved(last, first)


@pytest.mark.parametrize("name", ["vit_image_class", "t5_seq2seq", "wav2vec2_ctc_mean"])
def test_the_best_model_of_other_architectures_is_loaded(tmp_path, name: str) -> None:
    """Some are saved under other tensor names than in memory."""
    head, marks, seen = HEADS[name], iter([0.9, 0.1]), []
    student = head.make(seed=0)

    def mark(_: Any) -> dict[str, float]:
        seen.append(weights(student))
        return {"mark": next(marks)}

    make(
        tmp_path,
        student,
        head.make(seed=1),
        train_dataset=head.examples(8),
        eval_dataset=head.examples(2),
        data_collator=head.collate,
        compute_metrics=mark,
        load_best_model_at_end=True,
        metric_for_best_model="mark",
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        max_steps=2,
    ).train()
    assert_same_bits(weights(student), seen[0])
    assert_moved(seen[1], seen[0])


def test_the_best_model_by_agreement_with_the_teacher(tmp_path) -> None:
    trainer = make(
        tmp_path,
        bert(),
        bert(seed=4),
        eval_dataset=examples(8, labels=None),
        train_dataset=examples(8, labels=None),
        alpha=1.0,
        evaluate_with_teacher=True,
        load_best_model_at_end=True,
        metric_for_best_model="divergence",
        greater_is_better=False,
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        max_steps=3,
    )
    trainer.train()
    measured = [e["eval_divergence"] for e in trainer.state.log_history if "eval_divergence" in e]
    assert len(measured) == 3 and trainer.state.best_metric == min(measured)
