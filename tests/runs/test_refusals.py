"""What cannot be run in stages is refused before anything is trained, with the way out."""

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


def refused(folder: Path, message: str, listed: Any, error: type[Exception] = SettingError, **keywords: Any) -> None:
    """Nothing is trained and nothing is written then."""
    model = student()
    before = weights(model)
    with pytest.raises(error, match=message):
        run(folder, model, listed, **keywords)
    assert_same_bits(weights(model), before)
    assert not list(folder.rglob("begun.json"))


@pytest.mark.parametrize(
    ("listed", "message"),
    [
        ([], "no stages. Give a Preset, or Stage"),
        ([Stage("a"), Stage("b"), Stage("a")], "two stages are called 'a'; the stages are a, b, a. Rename one"),
        ([Stage("a/b")], "'a/b': it names a folder. Use letters"),
        ([HiddenMatch()], "is no Stage. Give Stage"),
        ([Stage("a", (), {"temprature": 2.0})], "stage 'a': there is no argument 'temprature'. Did you mean 'temperat"),
        ([Stage("a", (), {"output_dir": "x"})], "output_dir= does not go here: each stage has a folder"),
        ([Stage("a", (), {"teacher_dtype": "float32"})], "the teacher is loaded once; set it in args"),
        ([Stage("a", (), ALPHA), Stage("b", (), {"alpha": 2.0})], "stage 'b': alpha=2: must lie in"),
        ([Stage("a", (), ALPHA, {"optimizers": (None, None)})], "optimizers= does not go here: every stage makes"),
        ([Stage("a", (), ALPHA, {"train_dtaset": []})], "stage 'a': there is no keyword 'train_dtaset'. Did you mean"),
        ([Stage("a", (), ALPHA), Stage("b", (), {"alpha": None})], "stage 'b': alpha=None is a loss of the object"),
        ([Stage("a", (), ALPHA), Stage("b", [HiddenMatch([(0, 9)])])], "stage 'b': HiddenMatch: layers: teacher layer"),
    ],
)  # fmt: skip
def test_stages_that_cannot_be(tmp_path, listed: Any, message: str) -> None:
    refused(tmp_path, re.escape(message), listed)


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"objectives": [HiddenMatch()]}, "train_in_stages: objectives= does not go here: give each Stage"),
        ({"model_init": student}, "model_init= does not go here: pass model="),
        ({"data_colator": padded}, "there is no keyword 'data_colator'. Did you mean 'data_collator'"),
        ({"resume_from_checkpoint": "checkpoint-1"}, "resume_from_checkpoint='checkpoint-1'. True or False"),
        ({"trainer_class": dict}, "Give DistillationTrainer, Seq2SeqDistillationTrainer"),
    ],
)  # fmt: skip
def test_keywords_that_cannot_be(tmp_path, keywords: dict[str, Any], message: str) -> None:
    refused(tmp_path, re.escape(message), stages(), **keywords)


def test_a_model_must_be_one(tmp_path) -> None:
    with pytest.raises(SettingError, match=r"model is a str. Give the student itself"):
        train_in_stages(stages(), model="bert", args=arguments(tmp_path))


def test_a_stage_that_needs_a_teacher_says_so(tmp_path) -> None:
    refused(tmp_path, "stage 'inside': hidden .*there is no teacher. Pass", stages(), teacher_model=None)


def test_heads_that_differ_in_a_later_stage(tmp_path) -> None:
    listed = [Stage("first", (), ALPHA), Stage("scores", [AttentionMatch("even")], {"alpha": None})]
    four = student(seed=1, num_attention_heads=4)
    refused(tmp_path, "stage 'scores': AttentionMatch: the student has 2 attention heads", listed, teacher_model=four)


def test_the_student_as_its_own_teacher(tmp_path) -> None:
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
def test_a_stage_that_was_begun_must_be_what_it_was(tmp_path, changed: Stage, settings: Any, message: str) -> None:
    begun = [Stage("inside", [HiddenMatch("even", weight=2.0)], {"alpha": None, "max_steps": 1})]
    run(tmp_path, student(), begun)
    with pytest.raises(SettingError) as refusal:
        run(tmp_path, student(), [changed, stages()[1]], settings=settings, resume_from_checkpoint=True)
    assert message.replace('"', "'") in str(refusal.value).replace('"', "'")
    assert not (tmp_path / "out" / "2-logits").exists()


def test_what_is_not_begun_may_change(tmp_path) -> None:
    run(tmp_path, student(), stages(max_steps=1)[:1])
    later = Stage("later", (), {"alpha": 1.0, "max_steps": 1})
    given = {"model": student(), "teacher_model": teacher(), "train_dataset": examples(8), "data_collator": padded}
    args = arguments(tmp_path, logging_steps=5)
    result = train_in_stages([stages(max_steps=1)[0], later], args=args, resume_from_checkpoint=True, **given)
    assert [one.how for one in result.stages] == ["finished before", "trained"]


def test_a_teacher_of_another_tokenizer_is_refused_as_the_trainer_refuses_it(tmp_path, monkeypatch) -> None:
    """The tokenizer is looked for where the teacher is named: that name need not be a folder."""
    asked = []

    def other_tokenizer(name: str) -> Any:
        asked.append(name)
        return words(first="b")

    teacher().save_pretrained(tmp_path / "teacher")
    loaded = module.load_teacher(tmp_path / "teacher", "classification", dtype=None)
    loaded.config._name_or_path = "org/teacher"  # of the Hub
    monkeypatch.setattr(module, "load_teacher", lambda *_, **__: loaded)
    monkeypatch.setattr(module, "find_tokenizer", other_tokenizer)
    mine = {"teacher_model": "org/teacher", "processing_class": words(first="a")}
    refused(tmp_path, "stage 'inside': student and teacher have different tokenizers", stages(), TeacherError, **mine)
    assert asked == ["org/teacher"]


def words(first: str) -> Any:
    letters = [first, *(letter for letter in "abcdefghijklmnop" if letter != first)]
    return BertTokenizer(
        vocab={word: i for i, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters])}
    )
