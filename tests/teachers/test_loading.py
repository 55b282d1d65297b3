"""Teachers from a folder: Auto class of the student's head, dtype, labels; errors for other checkpoints."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from hf_distill import SettingError, TeacherError
from hf_distill.teachers.load import load_teacher
from tests.heads import HEADS, of_each_kind
from tests.hub.tiny import tokenizer
from tests.trainer.steps import NO_LOSS
from tests.trainer.tiny import assert_moved, assert_same_bits, bert, make, update_difference, weights

# peft asks transformers for it by the old name
OLD_NAME = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
NAMES = {"label2id": {"neg": 0, "mid": 1, "pos": 2}, "id2label": {0: "neg", 1: "mid", 2: "pos"}}


def saved(folder: Path, model: Any, *, with_tokenizer: Any = None) -> str:
    path = folder / "teacher"
    model.save_pretrained(path)
    if with_tokenizer is not None:
        with_tokenizer.save_pretrained(path)
    return str(path)


def model_of(trainer: Any) -> Any:
    return trainer.distiller.teacher.model


@pytest.mark.parametrize("name", of_each_kind(8))
def test_a_loaded_teacher_equals_the_saved_model(tmp_path, name: str) -> None:
    head = HEADS[name]
    path = saved(tmp_path, head.make(seed=1))
    found = []
    for teacher in (path, head.make(seed=1)):
        student = head.make(seed=0)
        trainer = make(
            tmp_path, student, teacher, train_dataset=head.examples(8), data_collator=head.collate,
            alpha=1.0 if name in NO_LOSS else 0.5,
        )  # fmt: skip
        assert type(model_of(trainer)) is head.model_class
        assert_same_bits(weights(model_of(trainer)), weights(head.make(seed=1)))
        trainer.train()
        found.append(weights(student))
    # Up to rounding: loaded weights have other memory addresses, which may change the order of sums.
    assert update_difference(*found, weights(head.make(seed=0))) < 1e-4


def test_path_objects_and_relative_folders(tmp_path, monkeypatch) -> None:
    saved(tmp_path, bert(seed=1))
    monkeypatch.chdir(tmp_path)
    for path in (Path("teacher"), "teacher", "./teacher", tmp_path / "teacher"):
        trainer = make(tmp_path, bert(), path)
        assert_same_bits(weights(model_of(trainer)), weights(bert(seed=1)))


@pytest.mark.parametrize(
    ("kept_in", "asked", "expected"),
    [
        ("float32", None, torch.float32),
        ("bfloat16", None, torch.bfloat16),
        ("bfloat16", "auto", torch.bfloat16),
        ("bfloat16", "float32", torch.float32),
        ("float32", "bfloat16", torch.bfloat16),
        ("float32", "float16", torch.float16),
    ],
)
def test_teacher_dtype_from_a_folder(tmp_path, kept_in: str, asked: str | None, expected: torch.dtype) -> None:
    path = saved(tmp_path, bert(seed=1).to(getattr(torch, kept_in)))
    student = bert()
    trainer = make(tmp_path, student, path, teacher_dtype=asked)
    assert {p.dtype for p in model_of(trainer).parameters()} == {expected}
    trainer.train()
    assert {p.dtype for p in student.parameters()} == {torch.float32}
    assert_moved(weights(student), weights(bert()))


def test_teacher_dtype_of_a_model_object(tmp_path) -> None:
    trainer = make(tmp_path, bert(), bert(seed=1), teacher_dtype="bfloat16")
    assert {p.dtype for p in model_of(trainer).parameters()} == {torch.bfloat16}
    with pytest.raises(SettingError, match="teacher_dtype='int8'"):
        load_teacher(saved(tmp_path, bert(seed=1)), "classification", dtype="int8")


# Errors.


def test_a_checkpoint_without_the_heads_weights_raises(tmp_path) -> None:
    path = Path(saved(tmp_path, bert(seed=1)))
    tensors = load_file(path / "model.safetensors")
    kept = {name: value for name, value in tensors.items() if not name.startswith("classifier")}
    save_file(kept, path / "model.safetensors", metadata={"format": "pt"})
    words = r"not trained for classification: its checkpoint lacks classifier\.bias, classifier\.weight.*random numbers"
    with pytest.raises(TeacherError, match=words):
        make(tmp_path, bert(), str(path))


def test_a_bare_encoder_for_a_classifier_raises(tmp_path) -> None:
    path = saved(tmp_path, HEADS["bert_embedding"].make(seed=1))
    with pytest.raises(TeacherError, match=r"BertModel.*embedding head.*classification"):
        make(tmp_path, bert(), path)


def test_a_folder_with_another_head_raises(tmp_path) -> None:
    path = saved(tmp_path, bert("TokenClassification", seed=1))
    with pytest.raises(TeacherError, match=r"BertForTokenClassification.*token_classification head"):
        make(tmp_path, bert(), path)


def test_an_architecture_without_the_head_raises(tmp_path) -> None:
    path = saved(tmp_path, HEADS["vit_image_class"].make(seed=1))
    (config,) = Path(path).glob("config.json")
    settings = json.loads(config.read_text())
    del settings["architectures"]
    config.write_text(json.dumps(settings))
    with pytest.raises(TeacherError, match=r"ViTConfig, for which transformers has no token_classification head"):
        make(tmp_path, bert("TokenClassification"), path)


def spoil(path: Path, how: str) -> Path:
    if how == "a file":
        return path / "config.json"
    if how == "an empty folder":
        (path.parent / "empty").mkdir()
        return path.parent / "empty"
    if how == "no weights":
        (path / "model.safetensors").unlink()
    elif how == "weights cut short":
        whole = (path / "model.safetensors").read_bytes()
        (path / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    elif how == "no model's config":
        (path / "config.json").write_text('{"model_type": "nothing-of-the-kind"}')
    elif how == "no JSON":
        (path / "config.json").write_text("{")
    elif how == "weights of another size":
        settings = json.loads((path / "config.json").read_text())
        settings.update(hidden_size=32)
        (path / "config.json").write_text(json.dumps(settings))
    return path


@pytest.mark.parametrize(
    "how",
    [
        "a file",
        "an empty folder",
        "no weights",
        "weights cut short",
        "no model's config",
        "no JSON",
        "weights of another size",
    ],
)
def test_broken_folders_give_a_teacher_error_with_the_path(tmp_path, how: str) -> None:
    path = spoil(Path(saved(tmp_path, bert(seed=1))), how)
    there = sorted(tmp_path.rglob("*"))
    student = bert().train()
    with pytest.raises(TeacherError) as raised:
        make(tmp_path, student, str(path))
    assert str(path) in str(raised.value)
    assert sorted(tmp_path.rglob("*")) == there
    assert all(p.requires_grad for p in student.parameters()) and student.training


# Labels and tokenizers of a folder.


def permuted(model: Any, order: list[int]) -> Any:
    """Return the same classifier with its labels in another order, in its config too."""
    names = [model.config.id2label[i] for i in order]
    with torch.no_grad():
        model.classifier.weight.copy_(model.classifier.weight[order].clone())
        model.classifier.bias.copy_(model.classifier.bias[order].clone())
    model.config.label2id = {name: i for i, name in enumerate(names)}
    model.config.id2label = dict(enumerate(names))
    return model


@pytest.mark.parametrize("head", ["SequenceClassification", "TokenClassification"])
@pytest.mark.parametrize("order", [[2, 0, 1], [0, 2, 1]])
def test_law_l12_the_order_of_the_teachers_labels_changes_nothing(tmp_path, head: str, order: list[int]) -> None:
    tagged = HEADS["bert_tokens"]
    small = {"vocab_size": 40, **NAMES}
    data = tagged.examples(8) if head == "TokenClassification" else HEADS["bert_single_label"].examples(8)
    found = []
    for teacher in (bert(head, seed=1, **small), permuted(bert(head, seed=1, **small), order)):
        student = bert(head, **small)
        given = {"train_dataset": data, "data_collator": tagged.collate}
        if head == "SequenceClassification":
            given["data_collator"] = HEADS["bert_single_label"].collate
        path = saved(tmp_path, teacher)
        make(tmp_path, student, path, **given).train()
        found.append(weights(student))
    assert update_difference(found[1], found[0], weights(bert(head, **small))) < 1e-5


def test_different_label_names_raise_with_the_path(tmp_path) -> None:
    path = saved(tmp_path, bert(seed=1, **NAMES))
    with pytest.raises(TeacherError, match=r"label names differ.*LABEL_0.*neg, mid, pos.*label_matching"):
        make(tmp_path, bert(), path)
    make(tmp_path, bert(), path, label_matching="by_index").train()


def test_the_tokenizer_in_the_folder_is_compared(tmp_path) -> None:
    small = {"vocab_size": 11}
    words = tokenizer()
    words.add_tokens(["extra"])
    path = saved(tmp_path, bert("MaskedLM", seed=1, vocab_size=12), with_tokenizer=words)
    trainer = make(tmp_path, bert("MaskedLM", **small), path, processing_class=tokenizer(), train_dataset=None)
    assert trainer.distiller.teacher.alignment.teacher == 11  # the column that only the teacher has is excluded
    with pytest.raises(TeacherError, match="different width"):
        make(tmp_path, bert("MaskedLM", **small), path, train_dataset=None)


# Adapters.


@pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"
)  # peft asks by the old name
def test_a_folder_with_a_peft_adapter_raises(tmp_path) -> None:
    """The error suggests two equivalent solutions."""
    peft = pytest.importorskip("peft")
    base = tmp_path / "base"
    bert(seed=1).save_pretrained(base)
    config = peft.LoraConfig(r=2, target_modules=["query"], modules_to_save=["classifier"], task_type="SEQ_CLS")
    model = peft.get_peft_model(type(bert()).from_pretrained(base), config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.add_(0.5 if "lora_B" in name else 0.1)
    path = tmp_path / "adapter"
    model.save_pretrained(path)
    with pytest.raises(TeacherError, match=r"holds a PEFT adapter.*Pass the model, or merge it first"):
        load_teacher(path, "classification")
    merged = tmp_path / "merged"
    model.merge_and_unload().save_pretrained(merged)
    again = peft.PeftModel.from_pretrained(type(bert()).from_pretrained(base), path)
    found = []
    for teacher in (str(merged), again):
        student = bert()
        make(tmp_path, student, teacher, alpha=1.0).train()
        found.append(weights(student))
    for name, value in found[0].items():
        torch.testing.assert_close(value, found[1][name])


@pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"
)  # peft asks by the old name
def test_a_peft_model_as_teacher_is_completely_frozen(tmp_path) -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["query"], modules_to_save=["classifier"], task_type="SEQ_CLS")
    teacher = peft.get_peft_model(bert(seed=1), config)
    before = weights(teacher)
    make(tmp_path, bert(), teacher).train()
    assert_same_bits(weights(teacher), before)
    assert not any(p.requires_grad or p.grad is not None for p in teacher.parameters())
