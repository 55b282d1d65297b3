"""Caches of teachers that are not a single model, and caches as ensemble members: L11, tolerances, errors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from hf_distill import DataError, Distiller, SettingError, TeacherError
from hf_distill.objectives import UniversalLogitMatch
from hf_distill.teachers import (
    CachedTeacher,
    Dense,
    Ensemble,
    KeepActivations,
    ModelTeacher,
    MovingAverage,
    Specialists,
    TeacherCache,
    TopK,
    fingerprints,
    quantise_dynamically,
)
from tests.heads import HEADS
from tests.laws import measuring as m
from tests.teachers.asking import NAME as SERVED
from tests.teachers.asking import WORDS, distiller_of, served
from tests.teachers.cache.built import build, contents, shuffled
from tests.teachers.completions_server import serving
from tests.trainer.tiny import assert_moved, bert, examples, make, padded, weights


def losses(live: Distiller, stored: Distiller, student: Any, batch: dict) -> tuple[float, float, float]:
    """Return both losses and the distance of their gradients."""
    found = []
    for distiller in (live, stored):
        student.zero_grad(set_to_none=True)
        loss = distiller(student, batch).loss
        loss.backward()
        found.append((loss.item(), m.gradient_of(student)))
    return found[0][0], found[1][0], m.difference(found[1][1], found[0][1])


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("bert_single_label", {"weights": [3, 1, 1]}),
        ("bert_multi_label", {}),
        ("bert_span", {}),
        ("bert_tokens", {"weights": "best"}),
        ("bart_seq2seq", {"weights": "entropy"}),
        ("llama_causal_lm", {"mean": "logits"}),
        ("bert_embedding", {}),
        ("wav2vec2_ctc_mean", {}),
    ],
)
def test_l11_a_cached_ensemble_equals_the_live_one(tmp_path: Path, name: str, settings: dict) -> None:
    """With other batches, another order, and more padding."""
    head, bound = HEADS[name], settings.get("mean") != "logits" and name != "bert_embedding"
    student, three, some = head.make(1), [head.make(seed) for seed in (2, 3, 4)], head.examples(12)
    at = {"temperature": 3.0} if bound else {}
    cache = build(tmp_path, head, Ensemble(three, **settings), some, student=student, **at)
    assert [one["class"] for one in cache.manifest["teacher"]["members"]] == [type(three[0]).__name__] * 3
    given = {"alpha": 1.0, "temperature": 3.0}
    live = Distiller(student, Ensemble(three, **settings), **given)
    stored = Distiller(student, CachedTeacher(cache), **given)
    expected, found, apart = losses(live, stored, student, head.collate(shuffled(some, 5), head.longest + 2))
    assert found == pytest.approx(expected, rel=1e-5, abs=1e-7) and expected > 1e-3 and apart < 2e-5
    if bound:
        with pytest.raises(
            SettingError, match=r"temperature=2: the cache holds the predictions of the Ensemble for temperature 3"
        ):
            Distiller(student, CachedTeacher(cache), alpha=1.0, temperature=2.0)


def test_predictions_that_depend_on_labels_are_keyed_by_them(tmp_path: Path) -> None:
    head = HEADS["bert_single_label"]
    some = head.examples(6)
    other = [{**one, "labels": (one["labels"] + 1) % 3} for one in some]
    ensemble = Ensemble([head.make(2), head.make(3)], weights="labels")
    cache = build(tmp_path, head, ensemble, some, temperature=2.0)
    assert cache.columns == ("input_ids", "labels")
    assert cache.has(head.collate(some)).all() and not cache.has(head.collate(other)).any()
    plain = build(tmp_path / "plain", head, Ensemble([head.make(2), head.make(3)]), some, temperature=2.0)
    assert plain.columns == ("input_ids",) and plain.has(head.collate(other)).all()


def test_cached_specialists_match_labels_in_another_order(tmp_path: Path) -> None:
    """Stored in the label order of the student at build time, and matched by name for another student."""
    names = {"id2label": dict(enumerate("abc")), "label2id": {"a": 0, "b": 1, "c": 2}}
    moved = {"id2label": dict(enumerate("cab")), "label2id": {"c": 0, "a": 1, "b": 2}}
    head = HEADS["bert_single_label"]
    some, student = head.examples(8), head.make(1, **names)
    special = Specialists(head.make(2, **names), {("a", "c"): head.make(3)})
    cache = build(tmp_path, head, special, some, student=student, temperature=2.0)
    other, batch = head.make(5, **moved), head.collate(some)
    given = {"alpha": 1.0, "temperature": 2.0}
    expected, found, apart = losses(
        Distiller(other, special, **given), Distiller(other, CachedTeacher(cache), **given), other, batch
    )
    assert found == pytest.approx(expected, rel=1e-5) and apart < 1e-5


def test_a_cached_quantised_teacher(tmp_path: Path) -> None:
    """Its predictions, its agreement with full precision, and the fingerprint of its weights."""
    head = HEADS["bert_tokens"]
    student, full, some = head.make(1), head.make(2), head.examples(8)
    teacher = quantise_dynamically(full)
    cache = build(tmp_path, head, teacher, some)
    expected, found, _ = losses(
        Distiller(student, quantise_dynamically(full), alpha=1.0),
        Distiller(student, CachedTeacher(cache), alpha=1.0),
        student,
        head.collate(some[:3]),  # the batch of the build: activation scales depend on the whole batch
    )
    assert found == pytest.approx(expected, rel=1e-5)
    assert "the same choice in" in cache.manifest["measured"]["agreement_with_full_precision"]
    with torch.no_grad():
        row = full.bert.encoder.layer[0].output.dense.weight[0]
        row.copy_(row.flip(0))  # the same scale, different numbers
    assert fingerprints.weights_fingerprint(quantise_dynamically(full).model) != cache.manifest["teacher"]["weights"]


def test_a_cached_served_teacher_stores_its_listed_tokens(tmp_path: Path) -> None:
    """Its likeliest tokens and the tail, without further requests; missing rows raise."""
    head = HEADS[SERVED]
    whole = head.examples(6)
    some = [{**one, "labels": [*one["labels"][:-1], -100]} for one in whole]
    with serving(m.teacher_of(SERVED), WORDS) as server:
        cache = build(
            tmp_path,
            head,
            served(server),
            some,
            student=m.student_of(SERVED),
            processing_class=WORDS,
            temperature=1.0,
            store=None,
        )
        live = distiller_of(served(server))
        batch = head.collate(some[:4])
        expected, gradient = m.step(live, m.student_of(SERVED), [batch])
        asked = len(server.asked)
        stored = distiller_of(CachedTeacher(cache))
        found, of_stored = m.step(stored, m.student_of(SERVED), [batch])
        assert len(server.asked) == asked
    assert cache.store.name == "top_k_from_server" and server.url not in "".join(
        p.read_text() for p in tmp_path.glob("*.json")
    )
    assert found == pytest.approx(expected, rel=2e-3) and m.difference(of_stored, gradient) < 5e-3  # float16
    with pytest.raises(SettingError, match="temperature=2: the cache keeps some columns at temperature 1"):
        distiller_of(CachedTeacher(cache), temperature=2.0)
    with pytest.raises(TeacherError, match=r"was not queried for 4 of the rows that count in this batch"):
        stored(m.student_of(SERVED), head.collate(whole[:4]))


def test_unsupported_teachers_raise_at_the_build(tmp_path: Path) -> None:
    head = HEADS["bert_single_label"]
    some, two = head.examples(3), [head.make(2), head.make(3)]
    for teacher, given, error, message in (
        (
            Ensemble(two),
            {},
            SettingError,
            r"the Ensemble predicts for one temperature only: pass temperature=",
        ),
        (Ensemble(two), {"temperature": 2.0, "student": None}, SettingError, r"has no head of its own.*Pass student="),
        (
            Ensemble(two, mean="logits"),
            {"temperature": 2.0},
            SettingError,
            r"temperature=2: .* the same at every temperature",
        ),
        (head.make(2), {"temperature": 2.0}, SettingError, r"temperature=2: a model's logits are kept and softened"),
        (MovingAverage(), {"temperature": 2.0}, TeacherError, r"MovingAverage changes while the student is trained"),
        (
            Ensemble(two),
            {"temperature": 2.0, "teacher_dtype": "bfloat16"},
            SettingError,
            r"Give the teachers of this Ensemble",
        ),
        (
            Ensemble(two),
            {"temperature": 2.0, "objectives": KeepActivations(("hidden", 0))},
            TeacherError,
            r"this teacher shows none",
        ),
    ):
        with pytest.raises(error, match=message):
            build(tmp_path / "new", head, teacher, some, **given)
    assert not (tmp_path / "new").exists()
    cached = CachedTeacher(build(tmp_path / "one", head, two[0], some))
    with pytest.raises(TeacherError, match="the CachedTeacher is a cache already"):
        build(tmp_path / "new", head, cached, some)


# Caches in an ensemble.


def caches_of(folder: Path, teachers: list[Any], some: list, **changed: Any) -> list[CachedTeacher]:
    """Built one after the other, so that only one teacher has to be in memory."""
    settings = {"data_collator": padded, "progress": False, "batch_size": 4, **changed}
    return [
        CachedTeacher(TeacherCache.build(one, some, folder / str(number), **settings))
        for number, one in enumerate(teachers)
    ]


def test_an_ensemble_of_caches_trains_like_the_live_ensemble(tmp_path: Path) -> None:
    """Each cache adds its own columns to the batch; a live model may be a member too."""
    some, teachers, start = examples(11), [bert(seed=1), bert(seed=2), bert(seed=3)], weights(bert())
    caches = caches_of(tmp_path, teachers, some, store=Dense("float32"))
    trained = []
    for number, three in enumerate((teachers, caches, [caches[0], teachers[1], str(tmp_path / "2")])):
        trainer = make(tmp_path / f"run{number}", bert(), Ensemble(three, weights=[1, 2, 3]), train_dataset=some)
        batch = next(iter(trainer.get_train_dataloader()))
        found = {name for name in batch if name.startswith("teacher_")}
        assert found == [set(), {f"teacher_cached_{n}_logits" for n in range(3)}, {
            "teacher_cached_0_logits", "teacher_cached_2_logits"}][number]  # fmt: skip
        trainer.train()
        trained.append(weights(trainer.model))
    assert_moved(trained[0], start)
    for one in trained[1:]:
        for name, value in trained[0].items():
            torch.testing.assert_close(one[name], value, rtol=1e-5, atol=1e-6)
    assert not any(teacher._looked_up for teacher in caches)  # the training process looked nothing up


def test_nested_ensembles_wrap_the_collator_once(tmp_path: Path) -> None:
    some = examples(6)
    one, two, three = caches_of(tmp_path, [bert(seed=n) for n in (1, 2, 3)], some)
    ensemble = Ensemble([Ensemble([one, two]), three])
    with pytest.raises(SettingError, match="make the Distiller first"):
        ensemble.wrap_collator(padded)
    distiller = Distiller(bert(), ensemble)
    collator = ensemble.wrap_collator(padded)
    assert ensemble.wrap_collator(collator) is collator
    batch = collator(some)
    slots = {name.removeprefix("teacher_cached_") for name in batch if name.startswith("teacher_")}
    assert slots == {f"{slot}_{field}" for slot in ("0_0", "0_1", "1") for field in ("logits", "largest")}
    plain = {name: value for name, value in batch.items() if not name.startswith("teacher_")}
    assert distiller(bert(), batch).loss.item() == pytest.approx(distiller(bert(), plain).loss.item(), rel=1e-6)


def test_sparse_members_of_an_ensemble_raise(tmp_path: Path) -> None:
    """Before the first step: the mean needs all columns."""
    head = HEADS["llama_causal_lm"]
    some, teacher = head.examples(4), head.make(2)
    cached = CachedTeacher(build(tmp_path, head, teacher, some, store=TopK(5)))
    with pytest.raises(SettingError, match=r"teacher 1 \(CachedTeacher\(store=TopK\(.* gives some of its columns"):
        Distiller(head.make(1), Ensemble([head.make(3), cached]))
    whole = build(tmp_path / "whole", head, Ensemble([teacher, head.make(3)]), some, store=TopK(40), temperature=1.0)
    given = {"alpha": 1.0, "temperature": 1.0}
    student = head.make(1)
    live = Distiller(student, Ensemble([teacher, head.make(3)]), **given)
    expected, found, _ = losses(live, Distiller(student, CachedTeacher(whole), **given), student, head.collate(some))
    assert found == pytest.approx(expected, rel=1e-2)  # float16


def test_a_resumed_ensemble_build_has_the_same_bytes(tmp_path: Path) -> None:
    """An ensemble's fingerprint is stable across runs; that of other teachers is not."""
    head = HEADS["bert_single_label"]
    some = head.examples(14)

    def ensemble(seed: int = 3) -> Ensemble:
        return Ensemble([head.make(2), ModelTeacher(head.make(seed))])

    build(tmp_path / "whole", head, ensemble(), some, temperature=2.0)

    class Stops(list):
        def __getitem__(self, index: Any) -> Any:
            if index == 9 and self.left == 0:
                raise KeyboardInterrupt
            self.left -= index == 9
            return super().__getitem__(index)

    stopping = Stops(some)
    stopping.left = 1  # the size estimate comes first
    with pytest.raises(KeyboardInterrupt):
        build(tmp_path / "cut", head, ensemble(), stopping, temperature=2.0)
    assert (tmp_path / "cut" / "shard-00000.arrow").is_file()
    with pytest.raises(DataError, match=r"holds an unfinished cache of something else: teacher\.members"):
        build(tmp_path / "cut", head, ensemble(4), some, temperature=2.0)
    build(tmp_path / "cut", head, ensemble(), some, temperature=2.0)
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")


def test_a_token_level_teacher_with_another_tokenizer(tmp_path: Path) -> None:
    """UniversalLogitMatch: the cache is keyed by the teacher's texts and stores their positions."""
    head = HEADS["llama_causal_lm"]
    student, teacher = head.make(1, vocab_size=50), head.make(2, bos_token_id=3)
    theirs, ours = head.examples(6, seed=1), head.examples(6)
    for one in theirs:  # whole texts with a start token, which is not part of the answer
        one["input_ids"][0] = 3
        one["labels"] = list(one["input_ids"])
    cache = build(tmp_path, head, teacher, theirs)

    def collate(numbers: list[int]) -> dict:
        own = head.collate([theirs[i] for i in numbers])
        return {**head.collate([ours[i] for i in numbers]), **{f"teacher_{name}": x for name, x in own.items()}}

    live, stored = (
        Distiller(student, one, alpha=None, objectives=UniversalLogitMatch()) for one in (teacher, CachedTeacher(cache))
    )
    for batch in (collate([4, 0, 2]), stored.teacher.wrap_collator(collate)([4, 0, 2])):
        plain = {name: x for name, x in batch.items() if not name.startswith("teacher_cached_")}
        expected, gradient = m.step(live, student, [plain])
        found, of_stored = m.step(stored, student, [batch])
        assert found == pytest.approx(expected, rel=1e-5) and m.difference(of_stored, gradient) < 1e-5
