"""Caches with Sampled and Hybrid: unbiased losses of the stored rows, laws, resume, training, errors."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from hf_distill import Distiller, SettingError
from hf_distill.schedules import linear
from hf_distill.teachers import shards
from hf_distill.teachers.cache import CachedTeacher, Hybrid, Sampled, TeacherCache
from tests.heads import HEADS, VOCABULARY
from tests.laws import measuring as m
from tests.teachers.cache.built import build, contents, gradient, left_padded, made, shuffled
from tests.teachers.cache.test_interrupted import Quota
from tests.trainer.tiny import make, update_difference, weights

NAME = "llama_causal_lm"
STORES = [Sampled(6), Sampled(6, proposal_power=0.5), Hybrid(3, 4, dtype="float32")]
KINDS = ["sampled", "with_weights", "hybrid"]


@pytest.fixture(scope="module", params=range(3), ids=KINDS)
def cache(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple:
    """Return a head, a teacher, sixty examples and their cache."""
    head, store = HEADS[NAME], STORES[request.param]
    teacher, examples = head.make(2), head.examples(60)
    folder = tmp_path_factory.mktemp(store.name)
    return head, teacher, examples, CachedTeacher(build(folder, head, teacher, examples, store=store, batch_size=6))


def per_row(cached: CachedTeacher, teacher: Any, student: Any, batch: dict) -> tuple[Tensor, Tensor, float]:
    """Return for each row that counts Σ w (log p - log q) in float64, by hand from the stored fields and the student's
    rows; the dense KL; and the library's loss."""
    live, stored = (Distiller(student, one, alpha=1.0, temperature=1.0) for one in (teacher, cached))
    prepared, task = live.prepare(batch), live.task
    with torch.no_grad():
        ours = task.select(student.eval()(**live.student_inputs(prepared, labels=False)).logits, prepared)
    theirs = task.select(live.teacher_signals(prepared).predictions(), prepared)
    sparse = stored.teacher_signals(prepared).sparse
    ids, weights_, log_p = (
        task.select(x, prepared)[task.kept_rows(prepared)]
        for x in (sparse.ids, sparse.weights, sparse.log_probabilities)
    )
    ours, theirs = (x[task.kept_rows(prepared)].double().log_softmax(-1) for x in (ours, theirs))
    found = []
    for q, listed, weight, p in zip(ours, ids.tolist(), weights_.tolist(), log_p.tolist(), strict=True):
        terms = zip(listed, weight, p, strict=True)
        found.append(math.fsum(w * (lp - q[i].item()) for i, w, lp in terms if i >= 0))
    dense = (theirs.exp() * (theirs - ours)).sum(-1)
    loss = stored(student.train(), batch).loss.item()
    return torch.tensor(found, dtype=torch.float64), dense, loss


def test_the_loss_is_that_of_the_stored_rows_and_unbiased(cache: tuple) -> None:
    """Rows are drawn independently, so (Σ differences) / sqrt(Σ differences²) is nearly standard normal: within 4."""
    head, teacher, examples, cached = cache
    found, dense, loss = per_row(cached, teacher, head.make(1), head.collate(examples))
    assert loss == pytest.approx(found.mean().item(), rel=1e-5)
    apart = found - dense
    assert len(apart) > 200 and (apart**2).sum() > 1e-3
    assert abs(apart.sum() / (apart**2).sum().sqrt()) < 4
    assert (apart**2).mean().sqrt() / len(apart) ** 0.5 < 0.1 * dense.mean()  # the test is sensitive enough


def test_order_padding_batches_and_collator_change_nothing(cache: tuple) -> None:
    """L3 and the keys: the same rows in other batches, with more or left padding, or looked up by the collator."""
    head, _, examples, cached = cache
    student, some = head.make(1), shuffled(examples, 7)
    stored = Distiller(student, cached, alpha=1.0, temperature=1.0)
    loss, expected = gradient(stored, student, head.collate(some))
    for batch in (
        head.collate(some[::-1]),
        head.collate(some, head.longest + 3),
        left_padded(some),
        cached.wrap_collator(head.collate)(some),
    ):
        found, of_batch = gradient(stored, student, batch)
        assert found == pytest.approx(loss, rel=1e-5) and m.difference(of_batch, expected) < 1e-5


def test_no_rows_give_zero(cache: tuple) -> None:
    """L2."""
    head, _, examples, cached = cache
    student, batch = head.make(1), head.collate(examples[:3])
    batch["labels"] = torch.full_like(batch["labels"], -100)
    loss, found = gradient(Distiller(student, cached, alpha=1.0, temperature=1.0), student, batch)
    assert loss == 0 and (found == 0).all()


def test_accumulation_in_the_trainer_changes_nothing(cache: tuple, tmp_path: Path) -> None:
    """L4: one batch of eight is 2 x 4 and 8 x 1."""
    head, _, examples, cached = cache
    start, trained = weights(head.make(1).double()), []
    for number, micro_batch in enumerate((8, 2, 1)):
        trainer = make(
            tmp_path / str(number),
            head.make(1).double(),
            cached,
            train_dataset=examples[:8],
            data_collator=head.collate,
            alpha=1.0,
            temperature=1.0,
            max_steps=1,
            per_device_train_batch_size=micro_batch,
            gradient_accumulation_steps=8 // micro_batch,
        )
        trainer.train()
        trained.append(weights(trainer.model))
    assert all(update_difference(cut, trained[0], start) < 1e-6 for cut in trained[1:])


@pytest.mark.parametrize("name", [NAME, "bart_seq2seq", "wav2vec2_ctc_mean"])
def test_hybrid_of_all_columns_equals_the_live_teacher(tmp_path: Path, name: str) -> None:
    """L11, at temperature 2; and L1, with the student as its own teacher."""
    store = Hybrid(VOCABULARY, 2, temperature=2.0, dtype="float32")
    head, teacher, examples, cached = made(tmp_path, name, store=store)
    student, batch = head.make(1), head.collate(shuffled(examples, 6))
    loss, expected = gradient(Distiller(student, teacher, alpha=1.0), student, batch)
    found, of_cached = gradient(Distiller(student, cached, alpha=1.0), student, batch)
    assert found == pytest.approx(loss, rel=1e-5) and m.difference(of_cached, expected) < 1e-5
    same = head.make(2)
    zero, of_same = gradient(Distiller(same, cached, alpha=1.0), same, batch)
    assert abs(zero) < 1e-5 and of_same.norm() < 1e-4


def test_a_resumed_build_has_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each seed, which the manifest contains, has its own draws."""
    head, examples = HEADS[NAME], HEADS[NAME].examples(20)
    teacher = head.make(2)
    for store in STORES[1:]:
        whole, folder = tmp_path / f"{store.name}-whole", tmp_path / store.name
        build(whole, head, teacher, examples, store=store)
        with monkeypatch.context() as patch:
            patch.setattr(shards, "_open", Quota(6500).open)
            with pytest.raises(ValueError, match=r"the disk is full .*(6|12|18) of 20 examples are kept"):
                build(folder, head, teacher, examples, store=store)
        build(folder, head, teacher, examples, store=store)
        assert contents(folder) == contents(whole)
        assert TeacherCache(folder).manifest["store"] == store.describe()
    seeded = Hybrid(3, 4, dtype="float32", seed=1)
    other = contents(build(tmp_path / "seed", head, teacher, examples, store=seeded).path)
    assert other["shard-00000.arrow"] != contents(folder)["shard-00000.arrow"]
    with pytest.raises(ValueError, match=r"store\.seed: 0 there, 1 now"):
        build(folder, head, teacher, examples, store=seeded)


def test_draws_do_not_depend_on_batches(tmp_path: Path) -> None:
    """Llama's predictions do not depend on padding (up to rounding), so other batches draw the same columns."""
    head, examples = HEADS[NAME], HEADS[NAME].examples(20)
    built = [
        build(tmp_path / str(size), head, head.make(2), data, store=Sampled(6), batch_size=size)
        for size, data in ((3, examples), (5, examples[::-1]))
    ]
    one, other = (cache.look_up(head.collate(examples)) for cache in built)
    same = (one["teacher_cached_ids"] == other["teacher_cached_ids"]).float().mean()
    assert same > 0.995  # a draw at the border of two columns may give either


def test_unsupported_divergences_and_objectives_raise(tmp_path: Path) -> None:
    head, _, examples, cached = made(tmp_path / "a", NAME, store=Sampled(4, temperature=2.0))
    student, batch = head.make(1), head.collate(examples[:3])
    for temperature in (1.0, linear(2.0, 1.0)):
        with pytest.raises(SettingError, match=r"at temperature 2. .* build a cache for temperature 1"):
            Distiller(student, cached, temperature=temperature)
    for divergence in ("reverse_kl", "jensen_shannon", "mean_squared_error"):
        with pytest.raises(SettingError, match=rf"{divergence}' is not linear .* Use forward_kl"):
            Distiller(student, cached, divergence=divergence)(student, batch)
    with pytest.raises(SettingError, match="Hybrid keeps tokens of a vocabulary, and token_classification has none"):
        made(tmp_path / "b", "bert_tokens", store=Hybrid())
    stored = Distiller(student, cached, alpha=1.0)
    with pytest.raises(SettingError, match="this teacher gives only"):
        stored.teacher_signals(stored.prepare(batch)).predictions()


def test_evaluation_with_a_sampled_cache(cache: tuple, tmp_path: Path) -> None:
    """The reported divergence and agreement are close to those of the live teacher."""
    head, teacher, examples, cached = cache
    measured = []
    for number, one in enumerate((teacher, cached)):
        trainer = make(
            tmp_path / str(number),
            head.make(1),
            one,
            eval_dataset=examples,
            data_collator=head.collate,
            evaluate_with_teacher=True,
            temperature=1.0,
            alpha=1.0,
        )
        measured.append(trainer.evaluate())
    live, found = measured
    assert found["eval_divergence"] == pytest.approx(live["eval_divergence"], rel=0.25)
    assert found["eval_teacher_agreement"] == pytest.approx(live["eval_teacher_agreement"], abs=0.1)
