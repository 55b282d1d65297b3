"""Stages that are not valid raise before any training, with a message that says what to do."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from transformers import BertTokenizer

import hf_distill.runs.stages as module
from hf_distill import AttentionMatch, HiddenMatch, SettingError, TeacherError
from hf_distill.presets import Stage
from hf_distill.runs import train_in_stages
from tests.runs.tiny_stages import arguments, run, stages, student, teacher
from tests.trainer.tiny import assert_same_bits, examples, padded, weights

ALPHA = {"alpha": 1.0}


def assert_raises(
    folder: Path, message: str, listed: Any, error: type[Exception] = SettingError, **keywords: Any
) -> None:
    """The run must raise before it trains or writes anything."""
    model = student()
    before = weights(model)
    with pytest.raises(error, match=message):
        run(folder, model, listed, **keywords)
    assert_same_bits(weights(model), before)
    assert not list(folder.rglob("begun.json"))


@pytest.mark.parametrize(
    ("listed", "message"),
    [
        ([], "pass a Preset, or one or more Stage("),
        ([Stage("a"), Stage("b"), Stage("a")], "two stages are called 'a'; the stages are a, b, a. Rename one"),
        ([Stage("a/b")], "'a/b': it names a folder. Use letters"),
        ([HiddenMatch()], "pass a Preset, or one or more Stage("),
        ([Stage("a", (), {"temprature": 2.0})], "stage 'a': there is no argument 'temprature'. Did you mean 'temperat"),
        ([Stage("a", (), {"output_dir": "x"})], "output_dir= does not belong here: each stage has a folder"),
        ([Stage("a", (), {"teacher_dtype": "float32"})], "the teacher is loaded once; set it in args"),
        ([Stage("a", (), ALPHA), Stage("b", (), {"alpha": 2.0})], "stage 'b': alpha=2: must lie in"),
        ([Stage("a", (), ALPHA, {"optimizers": (None, None)})], "optimizers= does not belong here: each stage makes"),
        ([Stage("a", (), ALPHA, {"train_dtaset": []})], "stage 'a': there is no keyword 'train_dtaset'. Did you mean"),
        ([Stage("a", (), ALPHA), Stage("b", (), {"alpha": None})], "stage 'b': alpha=None is a loss of the object"),
        ([Stage("a", (), ALPHA), Stage("b", [HiddenMatch([(0, 9)])])], "stage 'b': HiddenMatch: layers: teacher layer"),
    ],
)  # fmt: skip
def test_invalid_stages(tmp_path, listed: Any, message: str) -> None:
    assert_raises(tmp_path, re.escape(message), listed)


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"objectives": [HiddenMatch()]}, "train_in_stages: objectives= does not belong here: give each Stage"),
        ({"model_init": student}, "model_init= does not belong here: pass model="),
        ({"data_colator": padded}, "there is no keyword 'data_colator'. Did you mean 'data_collator'"),
        ({"resume_from_checkpoint": "checkpoint-1"}, "resume_from_checkpoint='checkpoint-1'. Pass True or False"),
        ({"trainer_class": dict}, "Pass DistillationTrainer, Seq2SeqDistillationTrainer"),
    ],
)  # fmt: skip
def test_invalid_keywords(tmp_path, keywords: dict[str, Any], message: str) -> None:
    assert_raises(tmp_path, re.escape(message), stages(), **keywords)


def test_the_student_must_be_a_model(tmp_path) -> None:
    with pytest.raises(SettingError, match=r"model is a str. Pass the student itself"):
        train_in_stages(stages(), model="bert", args=arguments(tmp_path))


def test_a_stage_without_the_teacher_that_it_needs(tmp_path) -> None:
    assert_raises(tmp_path, "stage 'inside': hidden .*there is no teacher. Pass", stages(), teacher_model=None)


def test_a_later_stage_that_cannot_match_the_heads(tmp_path) -> None:
    listed = [Stage("first", (), ALPHA), Stage("scores", [AttentionMatch("even")], {"alpha": None})]
    four = student(seed=1, num_attention_heads=4)
    assert_raises(
        tmp_path, "stage 'scores': AttentionMatch: the student has 2 attention heads", listed, teacher_model=four
    )


def test_the_student_as_its_own_teacher_is_an_error(tmp_path) -> None:
    model = student()
    with pytest.raises(TeacherError, match="stage 'inside': "):
        run(tmp_path, model, teacher_model=model)


def test_an_earlier_call_is_not_overwritten(tmp_path) -> None:
    run(tmp_path, student(), stages(max_steps=1)[:1])
    with pytest.raises(SettingError, match=r"holds stages of an earlier call: 1-inside\. Pass resume"):
        run(tmp_path, student(), stages(max_steps=1)[:1])


@pytest.mark.parametrize(
    ("changed", "settings", "message"),
    [
        (Stage("inside", [HiddenMatch("even", weight=3.0)], {"alpha": None, "max_steps": 1}), {}, "objectives was ["),
        (Stage("inside", [HiddenMatch("last", weight=2.0)], {"alpha": None, "max_steps": 1}), {}, "is [\"2 × hidden"),
        (Stage("inside", [HiddenMatch("even", weight=2.0)], {"alpha": 0.5, "max_steps": 1}), {}, "alpha was None, is"),
        (stages(max_steps=1)[0], {"seed": 3}, "seed was 42, is 3"),
        (stages(max_steps=1, warmup_steps=1)[0], {}, "warmup_steps was 0, is 1"),
        (Stage("inner", [HiddenMatch()], {"alpha": None}), {}, "holds 1-inside, and the stages now are 1-inner"),
    ],
)  # fmt: skip
def test_a_changed_stage_is_not_resumed(tmp_path, changed: Stage, settings: Any, message: str) -> None:
    begun = [Stage("inside", [HiddenMatch("even", weight=2.0)], {"alpha": None, "max_steps": 1})]
    run(tmp_path, student(), begun)
    with pytest.raises(SettingError) as refusal:
        run(tmp_path, student(), [changed, stages()[1]], settings=settings, resume_from_checkpoint=True)
    assert message.replace('"', "'") in str(refusal.value).replace('"', "'")
    assert not (tmp_path / "out" / "2-logits").exists()


def test_a_stage_that_has_not_begun_may_change(tmp_path) -> None:
    run(tmp_path, student(), stages(max_steps=1)[:1])
    later = Stage("later", (), {"alpha": 1.0, "max_steps": 1})
    given = {"model": student(), "teacher_model": teacher(), "train_dataset": examples(8), "data_collator": padded}
    args = arguments(tmp_path, logging_steps=5)
    result = train_in_stages([stages(max_steps=1)[0], later], args=args, resume_from_checkpoint=True, **given)
    assert [one.how for one in result.stages] == ["finished before", "trained"]


def test_another_tokenizer_is_an_error_as_in_the_trainer(tmp_path, monkeypatch) -> None:
    """The tokenizer is looked for where the teacher is named: that name need not be a folder."""
    names = []

    def other_tokenizer(name: str) -> Any:
        names.append(name)
        return words(first="b")

    teacher().save_pretrained(tmp_path / "teacher")
    loaded = module.load_teacher(tmp_path / "teacher", "classification", dtype=None)
    loaded.config._name_or_path = "org/teacher"  # of the Hub
    monkeypatch.setattr(module, "load_teacher", lambda *_, **__: loaded)
    monkeypatch.setattr(module, "find_tokenizer", other_tokenizer)
    mine = {"teacher_model": "org/teacher", "processing_class": words(first="a")}
    assert_raises(
        tmp_path, "stage 'inside': student and teacher have different tokenizers", stages(), TeacherError, **mine
    )
    assert names == ["org/teacher"]


def words(first: str) -> Any:
    letters = [first, *(letter for letter in "abcdefghijklmnop" if letter != first)]
    return BertTokenizer(
        vocab={word: i for i, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters])}
    )
