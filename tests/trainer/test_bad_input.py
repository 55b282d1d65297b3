"""Bad input: the message has the value, what is allowed, and what to do; models and folders stay unchanged."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from datasets import Dataset
from torch import nn
from transformers import TrainingArguments

from hf_distill import DataError, DistillationArguments, DistillationTrainer, SettingError, TeacherError
from tests.heads import HEADS
from tests.hub import tiny as tiny_hub
from tests.hub.tiny import tokenizer
from tests.trainer.refusals import refused
from tests.trainer.tiny import arguments, assert_same_bits, bert, examples, make, weights


def training_models(**changed: Any) -> tuple[Any, Any]:
    """Return models in training mode with gradients, as after `from_config`: a careless `freeze` would change them."""
    return bert().train(), bert(seed=1, **changed).train()


@pytest.mark.parametrize("kind", [DistillationArguments, TrainingArguments])
def test_alpha_above_zero_without_a_teacher(tmp_path, kind: Any) -> None:
    student, _ = training_models()
    words = ("alpha is 0.5", "no teacher", "teacher_model=", "alpha=0")
    with refused(tmp_path, SettingError, *words, models=(student,)):
        make(tmp_path, student, args=arguments(tmp_path, kind))


def test_a_rising_alpha_without_a_teacher(tmp_path) -> None:
    with refused(tmp_path, SettingError, "no teacher", "teacher_model="):
        make(tmp_path, bert(), alpha=0.0, alpha_schedule="linear", alpha_end=0.5)


def test_evaluation_with_a_missing_teacher(tmp_path) -> None:
    with refused(tmp_path, SettingError, "evaluate_with_teacher=True needs a teacher", "teacher_model="):
        make(tmp_path, bert(), alpha=0.0, evaluate_with_teacher=True)


@pytest.mark.parametrize("alpha", [-0.1, 1.5, float("nan"), float("inf")])
def test_alpha_outside_zero_to_one(tmp_path, alpha: float) -> None:
    with refused(tmp_path, SettingError, f"alpha={alpha:g}", "[0, 1]", "labels"):
        arguments(tmp_path, alpha=alpha)


@pytest.mark.parametrize("temperature", [0.0, -2.0, float("nan"), float("inf")])
def test_temperature_not_above_zero(tmp_path, temperature: float) -> None:
    with refused(tmp_path, SettingError, f"temperature={temperature:g}", "above 0"):
        arguments(tmp_path, temperature=temperature)


def test_an_invalid_value_set_after_construction(tmp_path) -> None:
    """`args.alpha = 2` bypasses the arguments' checks and is found at the construction of the trainer."""
    student, teacher = training_models()
    args = arguments(tmp_path)
    args.alpha = 2.0
    with refused(tmp_path, SettingError, "alpha=2", "[0, 1]", models=(student, teacher)):
        make(tmp_path, student, teacher, args=args)


@pytest.mark.parametrize("head", ["TokenClassification", "QuestionAnswering", "MaskedLM", "MultipleChoice"])
def test_a_teacher_with_another_kind_of_head(tmp_path, head: str) -> None:
    student, teacher = bert().train(), bert(head, seed=1).train()
    words = (f"BertFor{head}", "head", "classification", "Fine-tune a teacher")
    with refused(tmp_path, TeacherError, *words, models=(student, teacher)):
        make(tmp_path, student, teacher)


def test_different_label_sets(tmp_path) -> None:
    student, teacher = training_models()
    student.config.label2id = {"neg": 0, "mid": 1, "pos": 2}
    student.config.id2label = {0: "neg", 1: "mid", 2: "pos"}
    teacher.config.label2id = {"bad": 0, "mid": 1, "good": 2}
    teacher.config.id2label = {0: "bad", 1: "mid", 2: "good"}
    words = ("label names differ", "{neg, mid, pos}", "{bad, mid, good}", "label2id", 'label_matching="by_index"')
    with refused(tmp_path, TeacherError, *words, models=(student, teacher)):
        make(tmp_path, student, teacher)
    make(tmp_path, student, teacher, label_matching="by_index").train()  # the suggested solution


def test_different_numbers_of_labels(tmp_path) -> None:
    student, teacher = training_models(num_labels=4)
    words = ("different numbers of labels", "student 3", "teacher 4", "num_labels=")
    with refused(tmp_path, TeacherError, *words, models=(student, teacher)):
        make(tmp_path, student, teacher)


def renamed_tokenizer() -> Any:
    """Return a tokenizer of the same size with two swapped words."""
    words = tiny_hub.WORDS
    words[5], words[6] = words[6], words[5]
    try:
        return tokenizer()
    finally:
        words[5], words[6] = words[6], words[5]


@pytest.mark.parametrize("head", ["TokenClassification", "QuestionAnswering", "MaskedLM"])
def test_different_tokenizers_at_token_level(tmp_path, head: str) -> None:
    small = {"vocab_size": 11}
    student, teacher = bert(head, **small).train(), bert(head, seed=1, **small).train()
    words = (
        "different tokenizers",
        "2 tokens have other ids",
        "'put' is 5 for the student and 6 for the teacher",
        "Use a teacher",
    )
    processors = {"processing_class": tokenizer(), "teacher_processing_class": renamed_tokenizer()}
    with refused(tmp_path, TeacherError, *words, models=(student, teacher)):
        make(tmp_path, student, teacher, **processors)


@pytest.mark.parametrize("head", ["TokenClassification", "QuestionAnswering", "MaskedLM"])
def test_vocabularies_of_different_sizes_at_token_level(tmp_path, head: str) -> None:
    student, teacher = bert(head).train(), bert(head, seed=1, vocab_size=40).train()
    with refused(tmp_path, TeacherError, "23", "40", "processing_class=", models=(student, teacher)):
        make(tmp_path, student, teacher)


def unlabelled() -> Dataset:
    return Dataset.from_dict({"input_ids": [example["input_ids"] for example in examples()]})


def test_an_unlabelled_dataset_with_alpha_below_one(tmp_path) -> None:
    """Found before training if the dataset has column names and the collator is transformers' own."""
    student, teacher = training_models()
    words = ("alpha < 1 weighs labels", "no labels in ['input_ids']", "alpha=1")
    with refused(tmp_path, DataError, *words, models=(student, teacher)):
        make(tmp_path, student, teacher, train_dataset=unlabelled(), data_collator=None)


@pytest.mark.parametrize("data", [unlabelled(), examples(labels=None)], ids=["datasets", "list"])
def test_an_unlabelled_batch_with_alpha_below_one(tmp_path, data: Any) -> None:
    """The collator might add labels; that it does not is known at the first batch, before any step."""
    student, teacher = training_models()
    trainer = make(tmp_path, student, teacher, train_dataset=data)
    with pytest.raises(DataError, match=r"alpha < 1 weighs labels.*no labels in.*alpha=1"):
        trainer.train()
    assert_same_bits(weights(student), weights(bert()))


def test_an_unlabelled_dataset_for_spans_names_both_columns(tmp_path) -> None:
    with refused(tmp_path, DataError, "no start_positions and end_positions", "alpha=1"):
        make(
            tmp_path,
            bert("QuestionAnswering"),
            bert("QuestionAnswering", seed=1),
            train_dataset=unlabelled(),
            data_collator=None,
        )


@pytest.mark.parametrize("path", ["./nowhere", "a/b/nowhere", "/nowhere/at/all", "~/nowhere-at-all"])
def test_a_missing_teacher_path(tmp_path, path: str) -> None:
    student, _ = training_models()
    with refused(tmp_path, TeacherError, path, "no such folder", "save_pretrained", "Hub id", models=(student,)):
        make(tmp_path, student, path)


def test_an_unavailable_hub_id(tmp_path) -> None:
    student, _ = training_models()
    with refused(tmp_path, TeacherError, "nobody/nothing-of-the-kind", "cannot be loaded", models=(student,)):
        make(tmp_path, student, "nobody/nothing-of-the-kind")


def test_an_object_that_is_not_a_teacher(tmp_path) -> None:
    with refused(tmp_path, TeacherError, "teacher_model is a int", "a model, a folder or Hub id"):
        make(tmp_path, bert(), 7)


def test_the_same_object_as_student_and_teacher(tmp_path) -> None:
    student, _ = training_models()
    with refused(tmp_path, TeacherError, "same object", "copy.deepcopy", models=(student,)):
        make(tmp_path, student, student)
    make(tmp_path, student, copy.deepcopy(student)).train()  # the suggested solution


def test_a_weight_shared_by_student_and_teacher(tmp_path) -> None:
    student, teacher = training_models()
    teacher.classifier.weight = student.classifier.weight
    with refused(tmp_path, TeacherError, "share weights", "classifier.weight", models=(student, teacher)):
        make(tmp_path, student, teacher)


def test_data_parallel_suggests_a_command(tmp_path) -> None:
    student, teacher = training_models()
    args = arguments(tmp_path)
    args._n_gpu = 2
    words = ("2 GPUs in one process", "DataParallel", "accelerate launch --num_processes 2")
    with refused(tmp_path, SettingError, *words, models=(student, teacher)):
        make(tmp_path, student, teacher, args=args)


def test_a_dropped_column_that_the_teacher_needs(tmp_path) -> None:
    """A text teacher of a speech student, whose `teacher_` columns were dropped by map()."""
    speech = HEADS["wav2vec2_audio_class"]
    student, teacher = speech.make(seed=0), HEADS["bert_single_label"].make(seed=1)
    trainer = make(tmp_path, student, teacher, train_dataset=speech.examples(8), data_collator=speech.collate)
    with pytest.raises(DataError) as raised:
        trainer.train()
    for word in (
        "BertForSequenceClassification",
        "needs input_ids",
        "teacher_input_ids",
        "teacher_text",
        "remove_unused_columns",
    ):
        assert word in str(raised.value), (word, str(raised.value))
    assert trainer.state.global_step == 0


def test_a_teacher_with_an_unknown_tokenizer_and_no_inputs(tmp_path) -> None:
    student, teacher = bert().train(), bert(seed=1, vocab_size=40).train()
    trainer = make(tmp_path, student, teacher)
    with pytest.raises(DataError) as raised:
        trainer.train()
    for word in ("tokenizers were not compared", "teacher_text", "teacher_input_ids", "teacher_processing_class"):
        assert word in str(raised.value), (word, str(raised.value))
    assert_same_bits(weights(student), weights(bert()))


def test_an_unknown_task(tmp_path) -> None:
    with refused(tmp_path, SettingError, "task='sorting'", "Allowed: classification"):
        make(tmp_path, bert(), bert(seed=1), task="sorting")


class Unknown(nn.Module):
    """Not a transformers model."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 2)


def test_an_unknown_student_class(tmp_path) -> None:
    words = (
        "Unknown",
        "Supported kinds of head",
        "classification",
        "ctc",
        'task="classification"',
        "hf_distill.tasks.Task",
    )
    with refused(tmp_path, SettingError, *words):
        make(tmp_path, Unknown(), bert(seed=1))


def test_a_divergence_of_distributions_for_regression(tmp_path) -> None:
    student, teacher = bert(num_labels=1).train(), bert(seed=1, num_labels=1).train()
    words = ("divergence='forward_kl'", "regression predicts values", "mean_squared_error")
    with refused(tmp_path, SettingError, *words, models=(student, teacher)):
        make(tmp_path, student, teacher, divergence="forward_kl")


def test_a_rejected_teacher_keeps_its_dtype(tmp_path) -> None:
    student, teacher = training_models(num_labels=4)
    with refused(tmp_path, TeacherError, "different numbers of labels", models=(student, teacher)):
        make(tmp_path, student, teacher, teacher_dtype="bfloat16")


def test_an_error_of_trainer_leaves_the_teacher_unchanged(tmp_path) -> None:
    """eval_strategy without an eval_dataset: `Trainer` raises after the teacher was checked."""
    student, teacher = training_models()
    with refused(tmp_path, ValueError, "eval_dataset", models=(student, teacher)):
        make(tmp_path, student, teacher, eval_strategy="steps", eval_steps=1)


def test_the_output_folder_of_another_run_is_unchanged(tmp_path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "kept.txt").write_text("theirs")
    with refused(tmp_path, TeacherError, "head"):
        DistillationTrainer(
            model_init=lambda: bert(),
            teacher_model=bert("MaskedLM", seed=1),
            args=arguments(tmp_path),
            train_dataset=examples(),
        )
