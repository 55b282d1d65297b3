"""`fused_loss=True` trains and evaluates like the plain path: curves of twenty steps, metrics.

One process; several: `tests/distributed`.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from hf_distill import DistillationTrainer
from tests.heads import HEADS, IGNORED, VOCABULARY
from tests.trainer.logit_free import adapted
from tests.trainer.steps import in_double
from tests.trainer.tiny import arguments, assert_moved, weights

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # PEFT's
ACCUMULATED = {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2}
Run = tuple[DistillationTrainer, list[float], dict[str, Tensor]]


def trained(
    folder: Path, name: str, *, double: bool, adapters: bool = False, given: Any = None, **settings: Any
) -> Run:
    """Return the trainer, the losses of twenty steps, and the weights. `given` goes to the trainer."""
    head = HEADS[name]
    student, teacher = head.make(1), head.make(2)
    if double:
        student, teacher = student.double(), teacher.double()
    if adapters:
        student = adapted(student)
    before = weights(student)
    trainer = DistillationTrainer(
        model=student,
        teacher_model=teacher,
        args=arguments(folder, **{"max_steps": 20, "logging_steps": 1, "learning_rate": 0.05, **settings}),
        train_dataset=head.examples(12),
        data_collator=partial(in_double if double else type(head).collate, head, pad_to=head.longest),
        **(given or {}),
    )
    trainer.train()
    assert_moved(weights(student), before)
    return trainer, [entry["loss"] for entry in trainer.state.log_history if "loss" in entry], weights(student)


def assert_same_run(found: Run, expected: Run, *, rtol: float) -> None:
    assert len(expected[1]) == 20 and found[1] == pytest.approx(expected[1], rel=rtol)
    assert len(set(expected[1])) > 10  # the loss changes
    for key, value in expected[2].items():
        torch.testing.assert_close(found[2][key], value, rtol=rtol, atol=0.1 * rtol)


CURVES: dict[str, tuple[str, dict[str, Any]]] = {
    "whisper": ("whisper_seq2seq", ACCUMULATED),
    "scheduled": ("gpt2_causal_lm", {"alpha_schedule": "linear", "alpha_end": 0.1, **ACCUMULATED}),
    "smoothed, clipped, AdamW": (
        "bert_masked_lm",
        {"label_smoothing_factor": 0.1, "max_grad_norm": 0.5, "optim": "adamw_torch", "learning_rate": 0.01},
    ),
    "adapters": ("llama_causal_lm", {"adapters": True, "learning_rate": 0.5, **ACCUMULATED}),
    "adapters, fp32": ("llama_causal_lm", {"adapters": True, "double": False, "learning_rate": 0.5, **ACCUMULATED}),
    "fp32": ("t5_seq2seq", {"double": False, **ACCUMULATED}),
    "checkpointing, fp32": ("gpt2_causal_lm", {"double": False, "activation_checkpointing": True, **ACCUMULATED}),
}


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=pytest.mark.slow if "fp32" in case else ()) for case in CURVES]
)
def test_twenty_steps_give_the_same_curve(tmp_path: Path, case: str) -> None:
    name, settings = CURVES[case]
    settings = {"double": True, **settings}
    expected, found = (trained(tmp_path, name, fused_loss=how, **settings) for how in (False, True))
    assert_same_run(found, expected, rtol=1e-5 if settings["double"] else 1e-4)


# Dynamo checks every tensor with which it continues after a break.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.slow  # test_without_logits_wrapped traces and compiles once
def test_twenty_compiled_steps_give_the_same_curve(tmp_path: Path) -> None:
    """`torch_compile` in the arguments, compared with the uncompiled plain path."""
    compiled = {"torch_compile": True, "torch_compile_backend": "eager"}
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    found = trained(tmp_path, "gpt2_causal_lm", double=True, fused_loss=True, **compiled, **ACCUMULATED)
    assert counters["frames"]["ok"] > 0
    expected = trained(tmp_path, "gpt2_causal_lm", double=True, fused_loss=False, **ACCUMULATED)
    assert_same_run(found, expected, rtol=1e-5)


@pytest.mark.parametrize("name", ["bert_masked_lm", "llama_causal_lm", "whisper_seq2seq"])
def test_evaluation_during_training_has_logits(tmp_path: Path, name: str) -> None:
    """Metrics of whole logits, of preprocessed logits, and of the teacher, between fused steps."""
    head, given_to_metrics = HEADS[name], []

    def kept(logits: Any, labels: Tensor) -> tuple[Tensor, Tensor]:
        logits = logits[0] if isinstance(logits, tuple) else logits
        assert logits.shape == (*labels.shape, VOCABULARY)
        return logits, logits.argmax(-1)

    def measured(prediction: Any) -> dict[str, float]:
        logits, best = prediction.predictions
        given_to_metrics.append(logits)
        return {
            "right": float(
                np.mean(best[prediction.label_ids != IGNORED] == prediction.label_ids[prediction.label_ids != IGNORED])
            )
        }

    found = []
    for fused in (False, True):
        given = {"eval_dataset": head.examples(5), "compute_metrics": measured, "preprocess_logits_for_metrics": kept}
        trainer, *_ = trained(
            tmp_path,
            name,
            double=True,
            given=given,
            fused_loss=fused,
            max_steps=2,
            eval_strategy="steps",
            eval_steps=1,
            per_device_eval_batch_size=2,
            evaluate_with_teacher=True,
        )
        evaluated = [entry for entry in trainer.state.log_history if "eval_loss" in entry]
        found.append([{key: x for key, x in entry.items() if key.count("_per_second") == 0} for entry in evaluated])
    expected, ours = found
    names = {"eval_loss", "eval_right", "eval_teacher_right", "eval_divergence", "eval_teacher_agreement"}
    assert len(expected) == 2 and names <= set(expected[0])
    for one, other in zip(ours, expected, strict=True):
        for key in names:
            assert one[key] == pytest.approx(other[key], rel=1e-6), key
    assert len(given_to_metrics) == 8  # student and teacher, two evaluations, two trainings
    for one, other in zip(given_to_metrics[4:], given_to_metrics[:4], strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)
