"""A model that modifies its inputs does not change other models' inputs: Whisper's SpecAugment zeroes features.

Expected: the student's forward on augmented features, the teacher's on clean features, by hand in float64.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as hf
from torch import Tensor

from hf_distill import Distiller, Ensemble, Seq2SeqDistillationArguments, Seq2SeqDistillationTrainer
from hf_distill.teachers import Peer, RDropTeacher
from hf_distill.teachers.cache import Dense, TeacherCache
from tests.heads import HEADS
from tests.teachers.reading import inputs_of
from tests.trainer.tiny import arguments, make, softened_kl

WHISPER = HEADS["whisper_seq2seq"]
AUGMENTED = {"apply_spec_augment": True, "mask_time_prob": 0.9, "mask_time_length": 5, "mask_feature_prob": 0.2,
             "mask_feature_length": 2}  # fmt: skip


def student_of(seed: int = 1) -> Any:
    return WHISPER.make(seed, **AUGMENTED)


def zeros(given: dict[str, Tensor]) -> float:
    return float((given["input_features"] == 0).float().mean())


def by_hand(student: Any, teacher: Any, batch: dict[str, Tensor], seed: int) -> float:
    """The student draws its masks from the seed, as in the step; the teacher gets the clean features."""
    with torch.no_grad():
        theirs = copy.deepcopy(teacher).double().eval()(
            input_features=batch["input_features"].double(), labels=batch["labels"]
        ).logits  # fmt: skip
        np.random.seed(seed)
        ours = copy.deepcopy(student).train()(
            input_features=batch["input_features"].clone(), labels=batch["labels"]
        ).logits  # fmt: skip
    kept = batch["labels"] != -100
    return float(softened_kl(ours.double()[kept], theirs[kept], 2.0).mean())


def cached(folder: Path, teacher: Any, student: Any) -> Any:
    return TeacherCache.build(
        teacher, WHISPER.examples(4), folder, data_collator=WHISPER.collate, student=student, store=Dense(),
        progress=False,
    )  # fmt: skip


@pytest.mark.parametrize("kind", ["live", "without logits", "cached", "ensemble"])
def test_the_teacher_gets_unmodified_features(tmp_path, kind: str) -> None:
    student, teacher, batch = student_of(), WHISPER.make(2), WHISPER.batch(4)
    before = {name: value.clone() for name, value in batch.items()}
    expected = by_hand(student, teacher, batch, seed=7)
    given = {"cached": lambda: cached(tmp_path, teacher, student), "ensemble": lambda: Ensemble([teacher, teacher])}
    answering = given.get(kind, lambda: teacher)()
    distiller = Distiller(student, answering, alpha=1.0, temperature=2.0, fused_loss=kind == "without logits")
    ours, theirs = inputs_of(student), inputs_of(teacher)
    np.random.seed(7)  # transformers draws the masks with numpy
    found = distiller(student.train(), batch).loss.item()
    assert zeros(ours[-1]) > 0.3 and all(zeros(read) == 0 for read in theirs)
    assert found == pytest.approx(expected, rel=2e-3 if kind == "cached" else 1e-4)
    assert set(batch) == set(before)
    assert all(torch.equal(batch[name], value) for name, value in before.items())


@pytest.mark.parametrize("trainer", ["plain", "seq2seq"])
@pytest.mark.parametrize("source", ["live", "cached"])
def test_the_teacher_gets_unmodified_features_in_training(tmp_path, trainer: str, source: str) -> None:
    """Live and cached teachers train equally: the cache is keyed by unmodified features."""
    student, teacher = student_of(), WHISPER.make(2)
    answering = teacher if source == "live" else cached(tmp_path / "cache", teacher, student)
    theirs = inputs_of(teacher)
    settings = {"alpha": 1.0, "temperature": 2.0, "max_steps": 1, "learning_rate": 0.0, "logging_steps": 1,
                "per_device_train_batch_size": 4, "train_sampling_strategy": "sequential"}  # fmt: skip
    data = {"train_dataset": WHISPER.examples(4), "data_collator": WHISPER.collate}
    if trainer == "plain":
        made: Any = make(tmp_path, student, answering, **data, **settings)
    else:
        args = arguments(tmp_path, Seq2SeqDistillationArguments, **settings)
        made = Seq2SeqDistillationTrainer(model=student, teacher_model=answering, args=args, **data)
    student.register_forward_pre_hook(lambda *_: np.random.seed(7))
    made.train()
    expected = by_hand(student_of(), teacher, WHISPER.batch(4), seed=7)
    assert made.state.log_history[0]["loss"] == pytest.approx(expected, rel=2e-3)
    assert all(zeros(read) == 0 for read in theirs)


def test_rdrop_and_peer_draw_their_own_masks() -> None:
    batch = WHISPER.batch(4)
    before = batch["input_features"].clone()
    student = student_of()
    seen = inputs_of(student)
    Distiller(student, RDropTeacher(), alpha=0.5)(student.train(), batch)
    assert len(seen) == 2 and all(zeros(read) > 0.3 for read in seen)
    assert not torch.equal(seen[0]["input_features"], seen[1]["input_features"])
    assert torch.equal(batch["input_features"], before)
    peer = Peer(student_of(3))
    Distiller(student, peer, alpha=0.5)(student.train(), batch).loss.backward()
    assert torch.equal(batch["input_features"], before)


@pytest.mark.parametrize("name", ["RemBert", "Canine"])
def test_a_model_that_clamps_labels_does_not_change_the_batch(name: str) -> None:
    """Its forward clamps the positions in place; the rows that count are those of the original labels."""
    config = getattr(hf, f"{name}Config")(
        vocab_size=40, hidden_size=16, input_embedding_size=16, output_embedding_size=16, num_hidden_layers=1,
        num_attention_heads=2, intermediate_size=16, max_position_embeddings=64, pad_token_id=0, num_hash_functions=2,
    )  # fmt: skip
    torch.manual_seed(0)
    student, teacher = (getattr(hf, f"{name}ForQuestionAnswering")(config) for _ in range(2))
    batch = {
        "input_ids": torch.randint(1, 40, (2, 32)), "attention_mask": torch.ones(2, 32, dtype=torch.long),
        "start_positions": torch.tensor([3, -1]), "end_positions": torch.tensor([5, 90]),
    }  # fmt: skip
    Distiller(student, teacher, alpha=0.5)(student, batch)
    assert batch["start_positions"].tolist() == [3, -1] and batch["end_positions"].tolist() == [5, 90]
