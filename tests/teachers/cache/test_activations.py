"""Activations in a cache: objectives train as with the live teacher; stored layers, size estimates, and errors."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from hf_distill import (
    AttentionMatch,
    CosineEmbedding,
    Distiller,
    HiddenMatch,
    RelationMatch,
    SettingError,
    SimilarityMatch,
    TeacherError,
)
from hf_distill.signals import ActivationKey
from hf_distill.teachers import CachedTeacher, Ensemble, TeacherCache, shards
from hf_distill.teachers.cache import BuildOptions, KeepActivations
from tests.heads import HEADS
from tests.laws import measuring as m
from tests.teachers.cache.built import build, contents, shuffled
from tests.trainer.tiny import assert_moved, bert, examples, make, padded, update_difference, weights

NAME = "bert_tokens"


def deep(name: str = NAME, **settings: Any) -> tuple[Any, Any, list]:
    """Return a student of two layers, a wider teacher of three, and examples."""
    head = HEADS[name]
    return head.make(1, layers=2), head.make(2, layers=3, width=24, **settings), head.examples(12)


def kept(folder: Path, objectives: Any = None, name: str = NAME, **changed: Any) -> TeacherCache:
    student, teacher, some = deep(name)
    settings = {"student": student, "objectives": objectives, "activation_dtype": "float32"}
    return build(folder, HEADS[name], teacher, some, **{**settings, **changed})


@pytest.mark.parametrize(
    ("name", "objective", "axis"),
    [
        ("bert_tokens", HiddenMatch("skip", embeddings=True), "input"),
        ("bert_tokens", HiddenMatch("last", pooling="first"), "vectors"),
        ("bert_tokens", SimilarityMatch(), "vectors"),
        ("bert_multiple_choice", RelationMatch(), "input"),
        ("llama_causal_lm", CosineEmbedding(), "input"),
        ("bart_seq2seq", HiddenMatch("even"), "decoder"),
        ("t5_seq2seq", HiddenMatch("even", side="encoder"), "input"),
        ("whisper_seq2seq", HiddenMatch("last", side="encoder"), "all"),
        ("wav2vec2_audio_class", HiddenMatch("last"), "frames"),
        ("wav2vec2_audio_class", SimilarityMatch(pooling="last"), "vectors"),
        ("vit_image_class", HiddenMatch("last", pooling="last"), "vectors"),
        ("vit_image_class", HiddenMatch("even"), "all"),
    ],
    ids=lambda value: value if isinstance(value, str) else value.default_name,
)
def test_l11_cached_activations_equal_the_live_ones(tmp_path: Path, name: str, objective: Any, axis: str) -> None:
    """With other batches, another order, and more padding; looked up by the collator or by the loss."""
    head, (student, teacher, some) = HEADS[name], deep(name)
    cache = kept(tmp_path, objective, name, predictions=False, store=None)
    assert {one.along for one in cache.activations.kept} == {axis}
    live, stored = (
        Distiller(student, one, alpha=None, objectives=objective, seed=0) for one in (teacher, CachedTeacher(cache))
    )
    part = shuffled(some, 5)
    plain = head.collate(part, head.longest + 3 if head.pads else None)
    found = [m.step(distiller, student, [plain]) for distiller in (live, stored)]
    found.append(m.step(stored, student, [stored.teacher.wrap_collator(head.collate)(part)]))
    assert found[0][0] > 1e-4
    for loss, gradient in found[1:]:
        assert loss == pytest.approx(found[0][0], rel=1e-5, abs=1e-7)
        assert m.difference(gradient, found[0][1]) < 1e-5


def test_training_equals_training_with_the_live_teacher(tmp_path: Path) -> None:
    """With single examples, whose forward does not depend on the order: shuffled, two epochs, accumulated."""
    some, matched = examples(8), [HiddenMatch("last"), SimilarityMatch(distance="angle_relations")]
    teacher, start = bert(seed=1, num_hidden_layers=2), weights(bert())
    given = {"data_collator": padded, "progress": False, "batch_size": 1, "student": bert(), "objectives": matched}
    whole = BuildOptions(activation_dtype="float32")
    cached = CachedTeacher(TeacherCache.build(teacher, some, tmp_path / "cache", **given, options=whole))
    half = CachedTeacher(TeacherCache.build(teacher, some, tmp_path / "half", **given))
    run = {"max_steps": 8, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 2, "alpha": None}
    trained = []
    for number, one in enumerate((teacher, cached, half)):
        trainer = make(tmp_path / str(number), bert(), one, train_dataset=some, objectives=HiddenMatch("last"), **run)
        trainer.train()
        trained.append(weights(trainer.model))
    assert_moved(trained[0], start)
    assert update_difference(trained[1], trained[0], start) < 1e-5
    apart = max((trained[2][name] - value).abs().max().item() for name, value in trained[0].items())
    assert 0 < apart < 1e-3
    batch = next(iter(make(tmp_path / "b", bert(), cached, objectives=HiddenMatch("last")).get_train_dataloader()))
    assert {name for name in batch if name.startswith("teacher_")} == {
        "teacher_cached_logits",
        "teacher_cached_largest",
        "teacher_cached_hidden_1",
    }


def test_stored_hidden_states_equal_those_of_transformers(tmp_path: Path) -> None:
    """At every position of every example, without padding."""
    head, (_, teacher, some) = HEADS[NAME], deep()
    reads = [("hidden", -1), ("hidden", 0), "last_hidden", ActivationKey("values", 2)]
    cache = kept(tmp_path, KeepActivations(*reads), student=None, activation_dtype="bfloat16")
    assert [one.field for one in cache.activations.kept] == ["hidden_embeddings", "hidden_0", "last_hidden", "values_2"]
    batch = head.collate(some)
    with torch.no_grad():
        outputs = teacher.eval()(**batch, output_hidden_states=True)
    found, real = cache.look_up(batch), batch["attention_mask"].bool()
    for field, expected in (
        ("hidden_embeddings", outputs.hidden_states[0]),
        ("hidden_0", outputs.hidden_states[1]),
        ("last_hidden", outputs.hidden_states[3]),
    ):
        laid = found[f"teacher_cached_{field}"]
        assert laid.dtype == torch.bfloat16 and (laid[~real] == 0).all()
        torch.testing.assert_close(laid[real].float(), expected[real], rtol=2**-8, atol=1e-6)
    assert cache.dataset().column_names[-1] == "values_2"
    student = HEADS[NAME].make(1, layers=2)
    stored = Distiller(student, CachedTeacher(cache), alpha=None, objectives=CosineEmbedding(), seed=0)
    live = Distiller(student, teacher, alpha=None, objectives=CosineEmbedding(), seed=0)
    assert stored(student, batch).loss.item() == pytest.approx(live(student, batch).loss.item(), rel=1e-2)  # bfloat16
    # 24 numbers of 2 bytes, for four positions.
    assert sum(map(len, cache.dataset()["hidden_0"])) == int(real.sum()) * 24


def test_the_size_is_logged_before_the_build(tmp_path: Path) -> None:
    messages: list[str] = []
    kept(tmp_path, [HiddenMatch([(0, 0), (1, 2)]), SimilarityMatch(layers=[(0, 1)])], announce=messages.append)
    # Blocks 0 and 2 whole, and the mean of block 1: 24 numbers of 4 bytes; three logits of 4. 12 examples of 7.1
    # positions: 12 · (7.1 · (12 + 192) + 96 + 44 + 2 · 4) = 19.2 kB.
    inside = (
        r", and activations of 192 bytes at each of 7\.1 tokens, and activations of 96 bytes at each of 1\.0 vectors; "
    )
    assert re.search(
        rf"about 19\.\d kB in all: 12 examples of 7\.1 positions, 12 bytes a position{inside}", messages[0]
    )
    shards = sum(path.stat().st_size for path in tmp_path.glob("*.arrow"))
    assert 19_000 < shards < 24_000  # plus Arrow's headers


def test_a_resumed_build_has_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    objective = HiddenMatch("even", embeddings=True)
    kept(tmp_path / "whole", objective)
    written, real = [], shards.write_arrow

    def write(path: Path, columns: Any) -> None:
        if len(written) == 1:
            raise KeyboardInterrupt
        written.append(path)
        real(path, columns)

    monkeypatch.setattr(shards, "write_arrow", write)
    with pytest.raises(KeyboardInterrupt):
        kept(tmp_path / "cut", objective)
    monkeypatch.setattr(shards, "write_arrow", real)
    with pytest.raises(ValueError, match=r"holds an unfinished cache of something else: activations\.kept"):
        kept(tmp_path / "cut", HiddenMatch("first"))
    kept(tmp_path / "cut", objective)
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (
            HiddenMatch([(0, 0)]),
            r"does not hold hidden of block 0 of 'bert.encoder.layer', only hidden",
        ),
        (
            RelationMatch(),
            r"does not hold keys of block 2 of .*objectives=, student=\), or use the live teacher",
        ),
        (
            AttentionMatch("last"),
            r"keeps no attention maps: they take length² numbers for each head.* Use RelationMatch",
        ),
        (HiddenMatch([(1, 2)]), r"holds hidden of block 2 \(first position of each example\), and .* every position"),
        (
            SimilarityMatch(layers=[(1, 2)]),
            r"\(first position of each example\), and an objective compares the mean",
        ),
    ],
)
def test_activations_missing_from_the_cache_raise_before_the_first_step(
    tmp_path: Path, asked: Any, message: str
) -> None:
    cache = kept(tmp_path, HiddenMatch([(1, 2)], pooling="first"))
    with pytest.raises(TeacherError, match=message):
        Distiller(HEADS[NAME].make(1, layers=2, width=24), CachedTeacher(cache), objectives=asked)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (
            {"objectives": HiddenMatch("even"), "student": None},
            r"depend on the student. Pass student=, or name",
        ),
        (
            {"objectives": AttentionMatch("last", heads="grouped")},
            r"keeps no attention maps: they take length²",
        ),
        (
            {"objectives": KeepActivations(("hidden", 3))},
            r"\('hidden', 3, None, None\): the teacher has blocks 0 to 2 \(-1",
        ),
        ({"objectives": KeepActivations("logits")}, r"'logits' cannot be kept. Allowed: hidden, last_hidden, queries"),
        (
            {"objectives": KeepActivations("last_hidden"), "activation_dtype": "int8"},
            r"activation_dtype='int8': allowed are float16, bfloat16, fl",
        ),
        ({"predictions": False, "store": None}, r"predictions=False keeps nothing without objectives="),
        (
            {"predictions": False, "objectives": KeepActivations("last_hidden")},
            r"has no effect, because predictions=False",
        ),
    ],
)
def test_invalid_activations_to_store_raise(tmp_path: Path, changed: dict, message: str) -> None:
    with pytest.raises(SettingError, match=message):
        kept(tmp_path / "new", **changed)
    assert not (tmp_path / "new").exists()


def test_float16_overflow_and_missing_logits_raise(tmp_path: Path) -> None:
    student, teacher, some = deep()
    with torch.no_grad():
        teacher.bert.encoder.layer[2].output.LayerNorm.bias[0] = 1e5
    given = {"student": student, "objectives": KeepActivations(("hidden", 2)), "predictions": False, "store": None}
    with pytest.raises(SettingError, match=r"hidden of block 2 reach 1e\+05, float16 ends at 65504. Pass"):
        build(tmp_path / "half", HEADS[NAME], teacher, some, **given)
    cache = build(tmp_path / "whole", HEADS[NAME], teacher, some, activation_dtype="bfloat16", **given)
    with pytest.raises(SettingError, match=r"holds no predictions: it was built with predictions=False. .*alpha=None"):
        Distiller(student, CachedTeacher(cache))
    with pytest.raises(TeacherError, match="needs the activations of the teacher"):
        Distiller(student, Ensemble([CachedTeacher(cache), teacher]), alpha=None, objectives=HiddenMatch([(0, 2)]))
    kept_of_it = cache.look_up(HEADS[NAME].collate(some))["teacher_cached_hidden_2"].float()
    assert kept_of_it.isfinite().all() and kept_of_it.max() > 9e4
