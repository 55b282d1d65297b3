"""`fused_loss=True` equals the plain path: same terms, same gradients. One process.

The plain path is the reference; comparisons are in fp64 unless a test says otherwise.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers as tf

from hf_distill import (
    BaseModelTeacher,
    Distiller,
    Ensemble,
    HiddenMatch,
    ModelTeacher,
    MovingAverage,
    TeacherError,
)
from hf_distill.signals import Needs, Signals, SparseRows
from hf_distill.teachers.quantised import quantise_dynamically
from tests.heads import HEADS, IGNORED, VOCABULARY
from tests.tiny_tokenizers import tokenizer
from tests.trainer.logit_free import LARGE, assert_same, both, pair

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # PEFT's


@pytest.mark.parametrize("name", LARGE)
def test_divergence_alone_and_labels_alone(name: str) -> None:
    student, teacher, batch = pair(name)
    assert_same(both(student, teacher, batch, alpha=1.0))
    assert_same(both(student, None, batch, alpha=0.0))
    if HEADS[name].kind != "seq2seq":  # its decoder inputs come from the labels
        unlabelled = {key: value for key, value in batch.items() if key != "labels"}
        assert_same(both(student, teacher, unlabelled, alpha=1.0))


@pytest.mark.parametrize("name", LARGE)
def test_no_rows_give_zero(name: str) -> None:
    student, teacher, batch = pair(name)
    silent = {**batch, "labels": torch.full_like(batch["labels"], IGNORED)}
    _, (fused, gradients) = both(student, teacher, silent, alpha=0.5)
    assert fused.loss == 0 and not any(gradient.any() for gradient in gradients.values())


def test_left_padding_with_a_label_that_is_not_distilled() -> None:
    student, teacher, batch = pair("llama_causal_lm")
    flipped = {key: value.flip(1) for key, value in batch.items()}
    found = both(student, teacher, flipped)
    assert_same(found)
    distiller = Distiller(student, teacher)
    counts = distiller.begin_step([flipped]).denominators
    assert counts["labels"] > counts["logits"]  # otherwise the test is meaningless


@pytest.mark.parametrize(("ours", "theirs"), [(VOCABULARY + 3, VOCABULARY), (VOCABULARY, VOCABULARY + 5)])
@pytest.mark.parametrize("name", ["llama_causal_lm", "bert_masked_lm"])
def test_padded_vocabularies(name: str, ours: int, theirs: int) -> None:
    """The labels' term covers the student's whole head, the divergence the columns of both."""
    student, teacher = (HEADS[name].make(seed, vocab_size=v).double() for seed, v in ((1, ours), (2, theirs)))
    teaching = ModelTeacher(teacher, processing_class=tokenizer(VOCABULARY))
    assert_same(both(student.train(), teaching, pair(name)[2], processing_class=tokenizer(VOCABULARY)))
    assert teaching.alignment.student is not None or ours == VOCABULARY  # otherwise the test is meaningless


SCALED = {
    "gemma2": (tf.Gemma2Config, {"head_dim": 8, "final_logit_softcapping": 2.0}),
    "cohere": (tf.CohereConfig, {"logit_scale": 0.25}),
    "granite": (tf.GraniteConfig, {"logits_scaling": 8.0}),
    "falcon_h1": (
        tf.FalconH1Config,
        {"lm_head_multiplier": 0.25, "mamba_d_ssm": 16, "mamba_n_heads": 2, "mamba_d_head": 8, "mamba_d_state": 4},
    ),
}


@pytest.mark.parametrize("name", SCALED)
def test_soft_caps_and_scales_of_logits(name: str) -> None:
    """Student and teacher have different values."""
    kind, knobs = SCALED[name]
    settings = {**HEADS["llama_causal_lm"].settings, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    made = []
    for seed, factor in ((1, 1.0), (2, 1.5)):
        own = {key: value * factor if isinstance(value, float) else value for key, value in knobs.items()}
        torch.manual_seed(seed)
        model = tf.AutoModelForCausalLM.from_config(kind(**{**settings, **own}))
        made.append(model.double().train())
    assert_same(both(*made, pair("llama_causal_lm")[2]))


class Listing(ModelTeacher):
    """A sparse teacher of its k likeliest columns; optionally one fewer in every other row, or weighted samples."""

    def __init__(self, model: Any, k: int, *, fewer: bool = False, weighted: bool = False) -> None:
        super().__init__(model)
        self._k, self._fewer, self._weighted = k, fewer, weighted

    def __call__(self, task: Any, batch: Any, needs: Needs) -> Signals:
        logits = super().__call__(task, batch, Needs(logits=True)).predictions()
        log_p = (logits / needs.temperature).log_softmax(-1)
        kept, ids = log_p.topk(self._k, -1)
        if self._fewer:
            ids[:, ::2, -1] = -1
            kept = kept.masked_fill(ids < 0, -torch.inf)
        tail = (1 - kept.exp().sum(-1)).clamp(min=0).log()
        weights = 0.5 + kept.exp() if self._weighted else None
        return Signals(None, sparse=SparseRows(ids, kept, tail, needs.temperature, weights))


@pytest.mark.parametrize("name", ["t5_seq2seq", "bert_masked_lm"])
def test_kinds_of_teacher(name: str) -> None:
    student, teacher, batch = pair(name)
    other = HEADS[name].make(3).double()
    assert_same(both(student, Ensemble([teacher, other]), batch))
    assert_same(both(student, MovingAverage(), batch, alpha=0.3))
    for k in (5, VOCABULARY):
        assert_same(both(student, Listing(teacher, k), batch, temperature=3.0))
    assert_same(both(student, Listing(teacher, 5, fewer=True), batch, temperature=3.0, divergence="reverse_kl"))
    assert_same(both(student, Listing(teacher, 5, weighted=True), batch, temperature=3.0))
    with_hidden = [HiddenMatch([(0, 0)], weight=0.5)]
    assert_same(both(student, teacher, batch, objectives=with_hidden))


def test_a_base_model_teacher_shares_the_students_head() -> None:
    import peft

    base = copy.deepcopy(pair("llama_causal_lm")[0])
    student = peft.get_peft_model(
        base, peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    )
    assert_same(both(student.double().train(), BaseModelTeacher(), pair("llama_causal_lm")[2]))


@pytest.mark.filterwarnings("ignore:torch.ao.quantization:DeprecationWarning")
def test_a_quantised_teacher_is_measured_with_whole_logits_first() -> None:
    """Afterwards its logits are not made."""
    head = HEADS["llama_causal_lm"]
    student, teacher, batch = head.make(1).train(), quantise_dynamically(head.make(2)), head.batch(4)
    first, later = (Distiller(student, teacher, fused_loss=True)(student, batch).terms for _ in range(2))
    assert teacher.agreement is not None and teacher.agreement.rows > 0
    expected = Distiller(student, teacher)(student, batch).terms
    for found in (first, later):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_nan_of_the_teacher_is_named() -> None:
    student, teacher, batch = pair("bert_masked_lm")
    broken = copy.deepcopy(teacher)
    with torch.no_grad():
        broken.cls.predictions.bias[3] = torch.nan
    with pytest.raises(TeacherError, match="the teacher's logits hold nan in example 0"):
        Distiller(student, broken, fused_loss=True)(student, batch)
