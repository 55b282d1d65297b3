"""TopK: exact if k is the vocabulary, else over k + 1 outcomes, compared with a reference; temperatures; errors."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from hf_distill import Distiller, SettingError, TeacherError
from hf_distill.schedules import linear
from hf_distill.teachers import CachedTeacher, Dense, TopK
from hf_distill.teachers.cache.build import default_store
from tests.heads import HEADS, VOCABULARY
from tests.laws import measuring as m
from tests.teachers.cache.built import build, gradient, made, shuffled
from tests.tiny_tokenizers import tokenizer

LANGUAGE = [name for name, head in HEADS.items() if head.kind in ("masked_lm", "causal_lm", "seq2seq", "ctc")]
ALL = TopK(VOCABULARY, temperatures=(1.0,), dtype="float32")


@pytest.mark.parametrize("name", LANGUAGE)
@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_l11_all_columns_equal_the_live_teacher_at_any_temperature(
    tmp_path: Path, name: str, temperature: float
) -> None:
    head, teacher, examples, cached = made(tmp_path, name, store=ALL)
    student, batch = head.make(1), head.collate(shuffled(examples, 6))
    settings = {"alpha": 1.0, "temperature": temperature}
    loss, expected = gradient(Distiller(student, teacher, **settings), student, batch)
    found, of_cached = gradient(Distiller(student, cached, **settings), student, batch)
    assert found == pytest.approx(loss, rel=1e-5) and m.difference(of_cached, expected) < 1e-5
    answered = cached.wrap_collator(head.collate)(shuffled(examples, 6))
    assert gradient(Distiller(student, cached, **settings), student, answered)[0] == pytest.approx(loss, rel=1e-5)


def merged(rows: Tensor, order: Tensor, k: int) -> Tensor:
    """Return the probabilities of the first k columns of the order, and the sum of all others, in float64."""
    sorted_rows = rows.double().softmax(-1).gather(-1, order)
    return torch.cat([sorted_rows[:, :k], sorted_rows[:, k:].sum(-1, keepdim=True)], -1)


@pytest.mark.parametrize("name", ["llama_causal_lm", "bart_seq2seq", "wav2vec2_ctc_mean"])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_the_loss_is_over_k_plus_one_outcomes(tmp_path: Path, name: str, temperature: float) -> None:
    """KL of merged distributions, computed from the live teacher's rows, sorted and summed in float64."""
    k = 5
    head, teacher, examples, cached = made(tmp_path, name, store=TopK(k, dtype="float32"))
    student, batch = head.make(1), head.collate(examples[:6])
    live = Distiller(student, teacher, alpha=1.0, temperature=temperature)
    prepared, task = live.prepare(batch), live.task
    with torch.no_grad():
        ours = task.select(student.eval()(**live.student_inputs(prepared, labels=False)).logits, prepared)
    theirs = task.select(live.teacher_signals(prepared).predictions(), prepared)
    kept = task.kept_rows(prepared)
    ours, theirs = ours[kept] / temperature, theirs[kept] / temperature
    order = theirs.argsort(-1, descending=True)
    p, q = merged(theirs, order, k), merged(ours, order, k)
    expected = temperature**2 * (p * (p.log() - q.log())).sum(-1)
    expected = expected.sum() if task.sums_over_examples else expected.mean()
    stored = Distiller(student.train(), cached, alpha=1.0, temperature=temperature)
    assert stored(student, batch).loss.item() == pytest.approx(expected.item(), rel=1e-4)
    whole = live(student, batch).loss.item()
    assert 0 < expected < whole * (1 - 1e-3)  # merging outcomes reduces the divergence


def test_equal_models_have_zero_loss_and_gradient(tmp_path: Path) -> None:
    """L1: the teacher equals the student, and the cache has only three columns."""
    head, _, examples, cached = made(tmp_path, "llama_causal_lm", store=TopK(3, dtype="float32"))
    student = head.make(2)
    loss, of_student = gradient(Distiller(student, cached, alpha=1.0), student, head.collate(examples[:6]))
    assert abs(loss) < 1e-6 and of_student.norm() < 1e-5
    other = head.make(1)
    assert gradient(Distiller(other, cached, alpha=1.0), other, head.collate(examples[:6]))[1].norm() > 1e-2


@pytest.mark.parametrize("divergence", ["reverse_kl", "jensen_shannon", "skewed_forward_kl", "total_variation"])
def test_other_divergences_over_merged_outcomes(tmp_path: Path, divergence: str) -> None:
    head, teacher, examples, cached = made(tmp_path, "llama_causal_lm", store=ALL)
    student, batch = head.make(1), head.collate(examples[:6])
    settings = {"alpha": 1.0, "divergence": divergence}
    loss, expected = gradient(Distiller(student, teacher, **settings), student, batch)
    found, of_cached = gradient(Distiller(student, cached, **settings), student, batch)
    assert found == pytest.approx(loss, rel=1e-4) and m.difference(of_cached, expected) < 1e-4


def test_other_temperatures_than_built_raise(tmp_path: Path) -> None:
    head, _, examples, cached = made(tmp_path, "llama_causal_lm", store=TopK(4, temperatures=(1.0, 2.0)))
    student = head.make(1)
    moving = linear(1.0, 2.0)
    for temperature in (3.0, moving):
        with pytest.raises(SettingError, match=r"keeps the 4 likeliest columns .* for temperature 1, 2\. Train at one"):
            Distiller(student, cached, temperature=temperature)
    with pytest.raises(SettingError, match="needs every column"):
        Distiller(student, cached, divergence="mean_squared_error")(student, head.collate(examples[:2]))


def test_padded_columns_are_not_stored(tmp_path: Path) -> None:
    """For a head wider than its tokenizer: padding is neither among the likeliest columns nor in the tail."""
    head, words = HEADS["llama_causal_lm"], tokenizer(VOCABULARY)
    teacher, wide = head.make(2), head.make(2, vocab_size=VOCABULARY + 8)
    with torch.no_grad():
        for narrow, padded in zip(teacher.parameters(), wide.parameters(), strict=True):
            padded.fill_(3.0) if padded.shape != narrow.shape else None
            padded[: narrow.shape[0]].copy_(narrow)
    examples, student = head.examples(6), head.make(1)
    losses = []
    for number, one in enumerate((teacher, wide)):
        cached = CachedTeacher(
            build(tmp_path / str(number), head, one, examples, processing_class=words, store=TopK(4, dtype="float32"))
        )
        assert cached.cache.manifest["predictions"]["columns"] == VOCABULARY
        distiller = Distiller(student, cached, alpha=1.0, processing_class=words)
        losses.append(distiller(student, head.collate(examples)).loss.item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    short = CachedTeacher(build(tmp_path / "short", head, teacher, examples, store=TopK(4)))
    with pytest.raises(TeacherError, match="different width"):
        Distiller(head.make(1, vocab_size=VOCABULARY + 8), short)


def test_bytes_of_a_position(tmp_path: Path) -> None:
    """k ids of 2 bytes, k log-probabilities of 2, and 4 for each temperature; ids of 4 for a large vocabulary."""
    assert sum(field.bytes for field in TopK(64).fields(32_000).values()) == 64 * 4 + 8
    assert sum(field.bytes for field in TopK(64, temperatures=(1.0,)).fields(128_256).values()) == 64 * 6 + 4
    cache = build(
        tmp_path,
        HEADS["llama_causal_lm"],
        HEADS["llama_causal_lm"].make(2),
        HEADS["llama_causal_lm"].examples(12),
        store=TopK(6),
    )
    each = sum(len(column) for column in (cache.dataset()[0]["ids"], cache.dataset()[0]["log_probabilities"]))
    assert each == 12 * cache.dataset()[0]["positions"]


def test_invalid_settings_raise(tmp_path: Path) -> None:
    for wrong, message in (
        ({"k": 0}, "k is at least 1"),
        ({"temperatures": ()}, "at least one temperature"),
        ({"temperatures": (0.0,)}, "above 0"),
        ({"dtype": "bfloat16"}, "allowed are float16, float32"),
    ):
        with pytest.raises(SettingError, match=message):
            TopK(**wrong)
    with pytest.raises(SettingError, match=r"TopK keeps tokens of a vocabulary, and token_classification"):
        made(tmp_path, "bert_tokens", store=TopK(2))


def test_half_precision_of_log_probabilities(tmp_path: Path) -> None:
    """fp16 has 11 bits: a relative error of 2^-11 in log p, so the loss is within about a per mille of float32."""
    losses = []
    for dtype in ("float32", "float16"):
        head, _, examples, cached = made(tmp_path / dtype, "llama_causal_lm", store=TopK(6, dtype=dtype))
        student = head.make(1)
        losses.append(Distiller(student, cached, alpha=1.0)(student, head.collate(examples)).loss.item())
    assert losses[0] != losses[1] and losses[1] == pytest.approx(losses[0], rel=5e-3)


def test_topk_is_the_default_only_for_large_vocabularies() -> None:
    language, classes = (m.task_of(name) for name in ("llama_causal_lm", "bert_single_label"))
    assert default_store(language, 4097) == TopK() and default_store(language, 4096) == Dense()
    assert default_store(classes, 21_000) == Dense()
