"""Finding the teacher's tokenizer, comparing it with the student's, and checking the ids that the teacher embeds."""

from __future__ import annotations

import copy
import json
import logging
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import torch
from transformers import ByT5Tokenizer

from hf_distill import DataError, Distiller, ModelTeacher, TeacherError
from hf_distill.students import inherit
from hf_distill.students.narrow.narrow import narrow
from hf_distill.students.trimming import trim_vocabulary
from hf_distill.teachers.load import find_tokenizer
from tests.heads import HEADS, VOCABULARY
from tests.teachers.reading import inputs_of
from tests.tiny_tokenizers import tokenizer
from tests.trainer.tiny import make, softened_kl

VOCABULARIES = ("bert_masked_lm", "gpt2_causal_lm", "t5_seq2seq")
POSITIONS = ("bert_tokens", "bert_span", "bert_multiple_choice")
LOGGER = "hf_distill.teachers.model"


def swapped() -> Any:
    """Return a tokenizer with two swapped words: the same width, other tokens."""
    return tokenizer({f"w{i}": i for i in range(VOCABULARY)} | {"w3": 4, "w4": 3})


def saved(folder: Path, name: str, beside: Any = None) -> str:
    """Save a teacher, with or without a tokenizer."""
    HEADS[name].make(1).save_pretrained(folder)
    if beside is not None:
        beside.save_pretrained(folder)
    return str(folder)


def in_the_cache(cache: Path, monkeypatch: pytest.MonkeyPatch, name: str, beside: Any = None) -> str:
    """Put a model into the local Hub cache, from which `from_pretrained` loads without a network."""
    commit = "0" * 40
    repository = cache / "models--somebody--teacher"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit, encoding="utf-8")
    saved(repository / "snapshots" / commit, name, beside)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    return "somebody/teacher"


def build(folder: Path, name: str, teacher: Any, **settings: Any) -> Any:
    given = {"processing_class": tokenizer(), "data_collator": HEADS[name].collate, "train_dataset": None}
    return make(folder, HEADS[name].make(0), teacher, **{**given, **settings})


# Hub ids.


@pytest.mark.parametrize("name", [*VOCABULARIES, *POSITIONS])
def test_the_tokenizer_of_a_hub_id_is_compared(tmp_path, monkeypatch, name: str) -> None:
    teacher = in_the_cache(tmp_path / "cache", monkeypatch, name, swapped())
    with pytest.raises(TeacherError, match=r"2 tokens have other ids, 'w3' is 3 for the student and 4"):
        build(tmp_path, name, teacher)


@pytest.mark.parametrize("name", VOCABULARIES)
def test_a_hub_id_with_the_same_tokenizer(tmp_path, monkeypatch, caplog, name: str) -> None:
    teacher = in_the_cache(tmp_path / "cache", monkeypatch, name, tokenizer())
    with caplog.at_level(logging.WARNING, LOGGER):
        build(tmp_path, name, teacher)
    assert not caplog.records


WITHOUT = ("gpt2_causal_lm", "bert_masked_lm", "bert_tokens", "t5_seq2seq", "marian_seq2seq")


@pytest.mark.parametrize("name", [*WITHOUT, "wav2vec2_ctc_mean", "whisper_seq2seq", "wav2vec2_audio_class"])
def test_a_hub_id_without_a_tokenizer(tmp_path, monkeypatch, caplog, name: str) -> None:
    """transformers would return an empty tokenizer of the model's class, which must not count."""
    teacher = in_the_cache(tmp_path / "cache", monkeypatch, name)
    assert find_tokenizer(teacher) is None
    with caplog.at_level(logging.WARNING, LOGGER):
        build(tmp_path, name, teacher)
    if HEADS[name].kind in ("causal_lm", "masked_lm", "seq2seq", "ctc"):
        assert "teacher's tokenizer is not known" in caplog.text


@pytest.mark.parametrize("kind", ["BertTokenizer", "GPT2Tokenizer", "Wav2Vec2CTCTokenizer"])
def test_a_folder_with_tokenizer_settings_but_no_vocabulary(tmp_path, kind: str) -> None:
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": kind}), encoding="utf-8")
    assert find_tokenizer(tmp_path) is None


def test_a_byte_level_tokenizer_needs_no_vocabulary_file(tmp_path) -> None:
    ByT5Tokenizer().save_pretrained(tmp_path)
    found = find_tokenizer(tmp_path)
    assert found is not None and found("a")["input_ids"] == ByT5Tokenizer()("a")["input_ids"]


@pytest.mark.parametrize("right", ["given", "found"])
def test_an_explicit_tokenizer_takes_precedence(tmp_path, right: str) -> None:
    path = saved(tmp_path / "teacher", "gpt2_causal_lm", swapped() if right == "given" else tokenizer())
    if right == "given":
        build(tmp_path, "gpt2_causal_lm", path, teacher_processing_class=tokenizer())
        return
    with pytest.raises(TeacherError, match="2 tokens have other ids"):
        build(tmp_path, "gpt2_causal_lm", path, teacher_processing_class=swapped())


# Model objects.


@pytest.mark.parametrize("name", [*VOCABULARIES, *POSITIONS])
def test_the_tokenizer_of_a_model_loaded_from_a_folder_is_found(tmp_path, name: str) -> None:
    model = HEADS[name].model_class.from_pretrained(saved(tmp_path / "teacher", name, swapped()))
    with pytest.raises(TeacherError, match="2 tokens have other ids"):
        build(tmp_path, name, model)
    with pytest.raises(TeacherError, match="2 tokens have other ids"):
        Distiller(HEADS[name].make(0), model, processing_class=tokenizer())
    same = HEADS[name].model_class.from_pretrained(saved(tmp_path / "same", name, tokenizer()))
    build(tmp_path, name, same)


def test_a_classifier_with_another_tokenizer_requires_its_own_inputs(tmp_path) -> None:
    """At sequence level another tokenizer is allowed with teacher columns."""
    name = "bert_single_label"
    model = HEADS[name].model_class.from_pretrained(saved(tmp_path / "teacher", name, swapped()))
    trainer = build(tmp_path, name, model, train_dataset=HEADS[name].examples(4))
    with pytest.raises(DataError, match=r"may misread.*different tokenizers: 2 tokens have other ids.*teacher_text"):
        trainer.train()


def test_an_unknown_tokenizer_gives_one_warning(caplog) -> None:
    head = HEADS["gpt2_causal_lm"]
    with caplog.at_level(logging.WARNING, LOGGER):
        distiller = Distiller(head.make(0), head.make(1), processing_class=tokenizer())
        distiller(head.make(0), head.batch(4))
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "was not compared with the student's" in caplog.text and "teacher_processing_class=" in caplog.text


def test_no_warning_if_the_comparison_is_done_or_not_needed(caplog) -> None:
    head = HEADS["gpt2_causal_lm"]
    with caplog.at_level(logging.WARNING, LOGGER):
        Distiller(head.make(0), head.make(1))
        Distiller(head.make(0), ModelTeacher(head.make(1), processing_class=tokenizer()), processing_class=tokenizer())
    assert not caplog.records


def test_the_tokenizer_of_a_processor_is_used() -> None:
    class Processor:
        tokenizer = swapped()

    head = HEADS["gpt2_causal_lm"]
    with pytest.raises(TeacherError, match="2 tokens have other ids"):
        Distiller(head.make(0), ModelTeacher(head.make(1), processing_class=Processor()), processing_class=tokenizer())


# Ids that the teacher cannot embed.

MORE = {"added": ["<user>", "<bot>"]}  # ids 40 and 41


@pytest.mark.parametrize("name", ["bert_single_label", "bert_regression", "bert_embedding"])
def test_ids_beyond_the_teachers_embeddings_raise_at_sequence_level(name: str) -> None:
    head = HEADS[name]
    student, teacher = head.make(0, vocab_size=42), head.make(1)
    batch = head.batch(4)
    batch["input_ids"][0, 0] = 41
    distiller = Distiller(
        student, ModelTeacher(teacher, processing_class=tokenizer()), alpha=1.0, processing_class=tokenizer(**MORE)
    )
    with pytest.raises(DataError, match=r"makes ids up to 41, the teacher embeds 40.*teacher_text"):
        distiller(student, batch)
    given = {"teacher_input_ids": batch["input_ids"].clamp(max=39), "teacher_attention_mask": batch["attention_mask"]}
    seen = inputs_of(teacher)
    assert distiller(student, {**batch, **given}).loss > 0
    assert int(seen[-1]["input_ids"].max()) < 40


@pytest.mark.parametrize("name", POSITIONS)
def test_ids_beyond_the_teachers_embeddings_raise_at_token_level(name: str) -> None:
    head = HEADS[name]
    with pytest.raises(TeacherError, match=r"makes ids up to 41, the teacher embeds 40"):
        Distiller(
            head.make(0, vocab_size=42),
            ModelTeacher(head.make(1), processing_class=tokenizer()),
            processing_class=tokenizer(**MORE),
        )


@pytest.mark.parametrize("name", ["bert_single_label", "bert_tokens"])
def test_padded_embeddings_accept_additional_ids(name: str) -> None:
    """48 rows for 40 tokens: the student's two additional ids have rows, so there is no message."""
    head = HEADS[name]
    student, teacher = head.make(0, vocab_size=42), head.make(1, vocab_size=48)
    distiller = Distiller(
        student,
        ModelTeacher(teacher, processing_class=tokenizer()),
        alpha=1.0,
        temperature=2.0,
        processing_class=tokenizer(**MORE),
    )
    batch = head.batch(4)
    labels = batch.pop("labels")
    with torch.no_grad():
        ours, theirs = student(**batch).logits, teacher(**batch).logits
    kept = labels != -100
    expected = softened_kl(ours[kept], theirs[kept], 2.0).mean().item()
    assert distiller(student, {**batch, "labels": labels}).loss.item() == pytest.approx(expected, rel=1e-4)


# Tokenizers that cannot be compared.


def test_different_embedding_widths_without_tokenizers_raise() -> None:
    head = HEADS["bert_single_label"]
    student, teacher, batch = head.make(0, vocab_size=48), head.make(1), head.batch(4)
    known = {"processing_class=": {}, "teacher_processing_class=": {"processing_class": tokenizer()}}
    for missing, given in known.items():
        distiller = Distiller(student, teacher, alpha=1.0, **given)
        with pytest.raises(
            DataError, match=r"embed 48 and 40 tokens, and their tokenizers were not compared"
        ) as raised:
            distiller(student, batch)
        assert f"pass {missing}" in str(raised.value) and "different tokenizers" not in str(raised.value)
    way_out = Distiller(
        student, ModelTeacher(teacher, processing_class=tokenizer()), alpha=1.0, processing_class=tokenizer()
    )
    assert way_out(student, batch).loss > 0


def test_the_tokenizer_of_a_model_from_the_hub_is_found(tmp_path, monkeypatch, caplog) -> None:
    """It is in the local cache with the weights; nothing is downloaded."""
    name = "gpt2_causal_lm"
    hub_id = in_the_cache(tmp_path / "cache", monkeypatch, name, tokenizer())
    teacher = HEADS[name].model_class.from_pretrained(hub_id)
    with caplog.at_level(logging.WARNING, LOGGER):
        Distiller(HEADS[name].make(0), teacher, processing_class=tokenizer())
    assert not caplog.records
    with pytest.raises(TeacherError, match="2 tokens have other ids"):
        Distiller(HEADS[name].make(0), teacher, processing_class=swapped())


@pytest.mark.parametrize("name", ["gpt2_causal_lm", "bert_masked_lm", "bert_single_label"])
@pytest.mark.parametrize("made", ["inherit", "narrow", "both", "copy"])
def test_a_student_built_from_the_teacher_has_its_tokenizer(caplog, name: str, made: str) -> None:
    teacher = HEADS[name].make(1, layers=2)
    student = inherit(teacher, layers=1) if made in ("inherit", "both", "copy") else teacher
    if made in ("narrow", "both"):
        student = narrow(student, intermediate=16, data=[HEADS[name].batch(4)])
    if made == "copy":
        student, teacher = copy.deepcopy(student), copy.deepcopy(teacher)
    with caplog.at_level(logging.WARNING, LOGGER):
        Distiller(student, teacher, processing_class=tokenizer(), alpha=1.0)
        assert not caplog.records
        Distiller(HEADS[name].make(3), teacher, processing_class=tokenizer(), alpha=1.0)
    assert "was not compared" in caplog.text


def test_trimmed_models_do_not_use_the_tokenizer_of_their_folder(tmp_path, caplog) -> None:
    """Both were cut to the same tokens; the folder has the full tokenizer."""
    name = "bert_single_label"
    whole = HEADS[name].model_class.from_pretrained(saved(tmp_path, name, tokenizer()))
    trimmed = trim_vocabulary(tokenizer(), ["w3 w5 w7 w9 w11"])
    teacher = narrow(whole, vocabulary=trimmed)
    student, batch = inherit(teacher, layers=1), {"input_ids": torch.tensor([[1, 2, 3]])}
    with caplog.at_level(logging.WARNING, LOGGER):
        for one in (student, narrow(whole, vocabulary=trimmed)):
            distiller = Distiller(one, teacher, processing_class=trimmed.tokenizer, alpha=1.0)
            assert distiller(one.train(), batch).loss.isfinite()
    assert not caplog.records


def test_each_teacher_gives_one_warning(tmp_path, caplog) -> None:
    """Although each stage of a training builds its own trainer."""
    head, teacher = HEADS["gpt2_causal_lm"], HEADS["gpt2_causal_lm"].make(1)
    with caplog.at_level(logging.WARNING, LOGGER):
        for _ in range(4):
            Distiller(head.make(0), teacher, processing_class=tokenizer())
    assert len(caplog.records) == 1
