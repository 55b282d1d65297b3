"""Errors of a cache and their messages: damage, other teachers, tokenizers, examples, tasks, collators."""

from __future__ import annotations

import json
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DataCollatorForLanguageModeling, DataCollatorWithFlattening, default_data_collator

from hf_distill import DataError, Distiller, HiddenMatch, SettingError, TeacherError
from hf_distill.augment import Augmentation, AugmentingCollator
from hf_distill.teachers import CachedTeacher, Dense, TeacherCache, fingerprints
from hf_distill.teachers.cache import build as building
from hf_distill.teachers.cache import files
from tests.heads import HEADS
from tests.teachers.cache.built import build, made
from tests.tiny_tokenizers import tokenizer
from tests.trainer.tiny import make

NAME = "bert_tokens"


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-9])


def flip(path: Path) -> None:
    """Flip one bit in the middle."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(bytes(content))


@pytest.mark.parametrize("file", ["shard-00002.arrow", "index.arrow"])
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (cut, r"{file} has [\d,]+ bytes, and the manifest says [\d,]+: it was cut off or changed\. Copy the folder"),
        (flip, r"{file} was changed: its checksum differs"),
        (Path.unlink, r"{file} is missing\. Copy the folder again"),
    ],
)
def test_damaged_files_raise(tmp_path: Path, file: str, damage: Callable[[Path], None], message: str) -> None:
    made(tmp_path, NAME)
    damage(tmp_path / file)
    with pytest.raises(DataError, match=message.format(file=re.escape(file))):
        CachedTeacher(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "manifest.json cannot be read"),
        (b"[]", r"manifest.json cannot be read \(no JSON object"),
        (b'{"format": "another"}', "is of 'another', version None; this version of hf-distill reads 'hf-distill teach"),
        (
            b'{"format": "hf-distill teacher cache", "format_version": 4}',
            "version 4; this version .* Update hf-distill",
        ),
    ],
)
def test_invalid_manifests_raise(tmp_path: Path, content: bytes, message: str) -> None:
    made(tmp_path, NAME)
    (tmp_path / files.MANIFEST).write_bytes(content)
    with pytest.raises(DataError, match=message):
        TeacherCache(tmp_path)


def test_a_folder_without_a_cache_raises(tmp_path: Path) -> None:
    with pytest.raises(
        TeacherError, match=r"holds no teacher cache \(no manifest.json\). Build one: TeacherCache.build"
    ):
        CachedTeacher(tmp_path)
    (tmp_path / "letter.txt").write_text("not mine")
    head = HEADS[NAME]
    with pytest.raises(DataError, match=r"holds other files than a cache. Give a new or an empty folder"):
        build(tmp_path, head, head.make(2), head.examples(4))
    assert [path.name for path in tmp_path.iterdir()] == ["letter.txt"]


def test_another_teacher_raises(tmp_path: Path) -> None:
    head, teacher, _, cached = made(tmp_path, NAME)
    assert CachedTeacher(cached.cache, teacher=head.make(2)).cache is cached.cache
    with torch.no_grad():
        teacher.classifier.bias[0] += 1e-3
    with pytest.raises(
        TeacherError, match=r"built with another teacher: its weights have the fingerprint [0-9a-f]{32}"
    ):
        CachedTeacher(tmp_path, teacher=teacher)


def test_missing_and_altered_examples_raise(tmp_path: Path) -> None:
    head, _, examples, cached = made(tmp_path, NAME)
    distiller = Distiller(head.make(1), cached, alpha=1.0)
    new = head.examples(30)[-2:]
    altered = {**examples[3], "input_ids": [*examples[3]["input_ids"][:-1], 2]}
    for batch, which in (
        ([examples[0], *new], "2 of the 3 .*number 1"),
        ([altered, *examples[:2]], "1 of the 3 .*number 0"),
    ):
        for ask in (lambda some: distiller(head.make(1), head.collate(some)), cached.wrap_collator(head.collate)):
            with pytest.raises(
                DataError, match=rf"{which} of the batch.*It holds 20 examples, identified .* input_ids"
            ):
                ask(batch)
    with pytest.raises(DataError, match=r"augment_dataset\) and build the cache from that, or use the live teacher"):
        cached.wrap_collator(head.collate)(new)
    assert cached.cache.has(head.collate([examples[0], *new])).tolist() == [True, False, False]


def test_another_tokenizer_raises(tmp_path: Path) -> None:
    head = HEADS[NAME]
    ours, theirs = tokenizer(), tokenizer(added=["another"])
    cached = CachedTeacher(build(tmp_path, head, head.make(2), head.examples(4), processing_class=theirs))
    assert Distiller(head.make(1), cached, processing_class=tokenizer(added=["another"])).teacher is cached
    with pytest.raises(
        TeacherError, match=r"another tokenizer or extractor than the student's: tokenizer: .*vocabulary: "
    ):
        Distiller(head.make(1), cached, processing_class=ours)


def test_another_task_or_head_raises(tmp_path: Path) -> None:
    head, *_, cached = made(tmp_path, NAME)
    with pytest.raises(
        TeacherError, match=r"predictions of a token_classification head, the student needs .* masked_lm"
    ):
        Distiller(HEADS["bert_masked_lm"].make(1), cached)
    with pytest.raises(TeacherError, match="label names differ"):
        Distiller(head.make(1, id2label=dict(enumerate("abc")), label2id={"a": 0, "b": 1, "c": 2}), cached)
    *_, of_embedding = made(tmp_path / "embedding", "bert_embedding")
    from hf_distill.tasks.regression import Embedding

    with pytest.raises(TeacherError, match=r"another embedding task: pooling: mean there, first now"):
        Distiller(HEADS["bert_embedding"].make(1), of_embedding, task=Embedding("first"), alpha=1.0)


def test_a_cache_built_with_the_students_decoder_inputs_raises(tmp_path: Path) -> None:
    """Built for a teacher without its own rule for them, or by an earlier version."""
    *_, cached = made(tmp_path, "bart_seq2seq")
    assert cached.cache.manifest["inputs"]["decoder"] is None  # the teacher used its own start token
    Distiller(HEADS["bart_seq2seq"].make(1, decoder_start_token_id=1), cached)
    cached.cache.manifest["inputs"]["decoder"] = [2, 5, 6]
    with pytest.raises(TeacherError, match=r"labels 5, 6, 7 became \[2, 5, 6\] there, the student makes \[1, 5, 6\]"):
        Distiller(HEADS["bart_seq2seq"].make(1, decoder_start_token_id=1), cached)


def test_objectives_without_cached_activations_raise(tmp_path: Path) -> None:
    head, *_, cached = made(tmp_path, NAME)
    with pytest.raises(TeacherError, match=r"the cache holds predictions only\. Build it with .*objectives="):
        Distiller(head.make(1), cached, objectives=HiddenMatch("skip"))


def test_collators_that_draw_at_run_time_raise(tmp_path: Path) -> None:
    head, teacher, examples, cached = made(tmp_path, NAME)
    masks = tokenizer()
    masks.mask_token = "w1"
    masking = DataCollatorForLanguageModeling(masks, mlm=True)
    louder = Augmentation(lambda example: example, moves_positions=False)
    for collator, what in (
        (masking, "DataCollatorForLanguageModeling"),
        (AugmentingCollator(head.collate, louder), "An aug"),
    ):
        for use in (cached.wrap_collator, lambda c: build(tmp_path / "new", head, teacher, examples, data_collator=c)):
            with pytest.raises(SettingError, match=rf"{what}.*changes examples randomly, and a cached teacher"):
                use(collator)

    def drawing(some: list) -> dict:
        batch = head.collate(some)
        return {**batch, "input_ids": torch.randint(3, 9, batch["input_ids"].shape)}

    with pytest.raises(SettingError, match=r"the collator is not deterministic.*augment_dataset"):
        build(tmp_path / "new", head, teacher, examples, data_collator=drawing)
    assert not (tmp_path / "new").exists()


def test_student_only_augmentation_uses_the_cached_clean_example(tmp_path: Path) -> None:
    name = "bert_single_label"
    head, teacher, examples, cached = made(tmp_path, name)

    def other(example: dict) -> dict:
        return {**example, "input_ids": [3] * len(example["input_ids"])}

    augmenting = AugmentingCollator(head.collate, Augmentation(other, moves_positions=False), student_only=True)
    batch = cached.wrap_collator(augmenting)(examples[:5])
    assert (batch["input_ids"][batch["attention_mask"].bool()] == 3).all()
    found = Distiller(head.make(1), cached, alpha=1.0).teacher_signals(batch).predictions()
    with torch.no_grad():
        expected = teacher(**{k: v for k, v in head.collate(examples[:5]).items() if k != "labels"}).logits
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_too_little_disk_space_raises(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    head = HEADS[NAME]
    monkeypatch.setattr(building, "free_bytes", lambda folder: 1000)
    with pytest.raises(
        DataError, match=r"does not fit: about 2\.6 kB in all: 20 examples of 7\.1 positions, 12 bytes a"
    ):
        build(tmp_path / "new", head, head.make(2), head.examples(20))
    assert not (tmp_path / "new").exists()


def test_the_size_is_logged_before_the_build(tmp_path: Path) -> None:
    """20 examples; 4 bytes per logit, three logits per position; key, positions and index take 44 bytes per example."""
    head, messages = HEADS[NAME], []
    examples = head.examples(20)
    positions = sum(len(one["input_ids"]) for one in examples)
    cache = build(tmp_path, head, head.make(2), examples, announce=messages.append)
    assert len(messages) == 1 and re.match(
        rf"The teacher's cache takes about 2\.\d kB in all: 20 examples of {positions / 20:.1f}"
        r" positions, 12 bytes a position; [\d.]+ GB are free at",
        messages[0],
    )
    assert cache.manifest["positions"] == positions


def test_overflow_and_invalid_dtypes_raise(tmp_path: Path) -> None:
    head = HEADS[NAME]
    teacher = head.make(2)
    with torch.no_grad():
        teacher.classifier.bias[0].add_(1e5)
    with pytest.raises(
        SettingError, match=r"logits differ by 1e\+05, float16 ends at 65504. Pass store=Dense\(\"bfloat16\""
    ):
        build(tmp_path, head, teacher, head.examples(4), store=Dense())
    with pytest.raises(SettingError, match=r"logits reach 1e\+05, float16 ends at 65504"):
        build(tmp_path / "as-it-is", head, teacher, head.examples(4), store=Dense(keeps_largest=False))
    with pytest.raises(SettingError, match=r"Dense: dtype='int8': allowed are float16, bfloat16, float32"):
        Dense("int8")


def test_unsupported_sources_of_a_build_raise(tmp_path: Path) -> None:
    head = HEADS[NAME]
    with pytest.raises(DataError, match=r"a dataset with a length and numbered examples, not from a generator"):
        build(tmp_path, head, head.make(2), (one for one in head.examples(3)))
    with pytest.raises(DataError, match="the dataset has no examples"):
        build(tmp_path, head, head.make(2), [])
    with pytest.raises(
        TeacherError, match=r"built from a teacher, not from a builtin_function_or_method. Give a model, a folder"
    ):
        build(tmp_path, head, max, head.examples(3))
    with pytest.raises(SettingError, match="batch_size=0: must be at least 1"):
        build(tmp_path, head, head.make(2), head.examples(3), batch_size=0)


def test_the_head_of_a_folder_comes_from_its_config(tmp_path: Path) -> None:
    """`TeacherCache.build("folder")` needs no argument that config.json determines."""
    for name in (NAME, "llama_causal_lm", "bert_regression"):
        head = HEADS[name]
        head.make(2).save_pretrained(tmp_path / name)
        given = {"data_collator": head.collate, "progress": False}
        cache = TeacherCache.build(str(tmp_path / name), head.examples(3), tmp_path / f"{name} cache", **given)
        assert cache.manifest["task"]["kind"] == head.kind
    config = json.loads((tmp_path / NAME / "config.json").read_text())
    (tmp_path / NAME / "config.json").write_text(json.dumps({**config, "architectures": ["BertForPreTraining"]}))
    with pytest.raises(SettingError, match=r"its config\.json names no class of a known kind\. Pass student= or task="):
        TeacherCache.build(str(tmp_path / NAME), head.examples(3), tmp_path / "another")
    with pytest.raises(TeacherError, match="no such folder"):
        TeacherCache.build(str(tmp_path / "nowhere"), head.examples(3), tmp_path / "another")


def test_a_teacher_split_across_processes_raises(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fingerprints, "DTensor", torch.Tensor)
    head = HEADS["bert_single_label"]
    with pytest.raises(TeacherError, match=r"are sharded \(.*Load it without distributed_config"):
        build(tmp_path / "cache", head, head.make(2), head.examples(3))
    assert not (tmp_path / "cache").exists()


def test_a_teacher_that_depends_on_padding_gives_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """With group norm over time, its predictions for a recording depend on the zeros after it."""
    head = HEADS["wav2vec2_ctc_mean"]
    group = {"feat_extract_norm": "group", "do_stable_layer_norm": False}
    teacher = head.make(2, **group)
    cache = build(tmp_path, head, teacher, head.examples(6), student=head.make(1, **group))
    assert cache.manifest["measured"]["change_by_padding"] > 0.01
    assert "depend on how far its batch is padded: they change by 0." in caplog.text
    assert "in batches of 3 consecutive examples" in caplog.text


def test_another_frame_rate_raises(tmp_path: Path) -> None:
    head, _, examples, cached = made(tmp_path, "wav2vec2_ctc_mean")
    slower = head.make(1, conv_stride=(2, 4))
    distiller = Distiller(slower, cached, alpha=1.0)
    for batch in (head.collate(examples[:3]), cached.wrap_collator(head.collate)(examples[:3])):
        with pytest.raises(TeacherError, match=r"example 0 of the batch has \d+ positions, the cache holds \d+ of it"):
            distiller(slower, batch)


def test_the_lookup_can_be_sent_to_worker_processes(tmp_path: Path) -> None:
    head, _, examples, cached = made(tmp_path, NAME)
    collate = cached.wrap_collator(head.collate)
    collate.collator = max  # a picklable stand-in
    sent = pickle.loads(pickle.dumps(collate))
    sent.collator = head.collate
    collate.collator = head.collate
    there, here = sent(examples[:3]), collate(examples[:3])
    assert torch.equal(there["teacher_cached_logits"], here["teacher_cached_logits"])


def packing(some: list[dict[str, Any]]) -> Any:
    return DataCollatorWithFlattening(return_tensors="pt")(some)


def test_a_packing_collator_raises(tmp_path: Path) -> None:
    """At the build, and at the lookup of a training, in the collator or in the loss."""
    head = HEADS["llama_causal_lm"]
    teacher, some = head.make(2), head.examples(8)
    with pytest.raises(DataError, match=r"makes 1 row\(s\) of 3 examples: it packs them.*a collator that pads"):
        build(tmp_path, head, teacher, some, data_collator=packing)
    cached = CachedTeacher(build(tmp_path, head, teacher, some))
    named = r"the collator packs several examples into a row, and the teacher's cache keeps each example by itself"
    for collate in (cached.wrap_collator(packing), packing):
        with pytest.raises(DataError, match=named):
            Distiller(head.make(1), cached)(head.make(1), collate(some))
    trainer = make(
        tmp_path, head.make(1), cached, train_dataset=some, data_collator=packing, remove_unused_columns=False
    )  # fmt: skip
    with pytest.raises(DataError, match=named):
        trainer.train()


def test_rows_packed_in_advance_are_cached_like_examples(tmp_path: Path) -> None:
    """The error message suggests this."""
    head = HEADS["llama_causal_lm"]
    teacher, student, some = head.make(2), head.make(1), head.examples(8)
    batches = [packing(some[at : at + 4]) for at in (0, 4)]
    rows = [{name: batch[name][0].tolist() for name in ("input_ids", "labels", "position_ids")} for batch in batches]
    cached = CachedTeacher(build(tmp_path, head, teacher, rows, data_collator=default_data_collator, batch_size=1))
    for row in rows[::-1]:
        batch = default_data_collator([row])
        live = Distiller(student, teacher, alpha=1.0)(student, batch).loss.item()
        assert Distiller(student, cached, alpha=1.0)(student, batch).loss.item() == pytest.approx(live, rel=1e-5)
