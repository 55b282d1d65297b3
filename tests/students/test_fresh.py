"""`fresh`: which class is built, which embeddings are copied, and errors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as hf
from torch.testing import assert_close

from hf_distill.errors import HfDistillError, SettingError
from hf_distill.students import fresh
from tests.heads import _BERT, _DISTILBERT, _GPT2, _LLAMA, _VIT
from tests.students.models import MODELS, reported
from tests.tiny_tokenizers import bpe_tokenizer, tokenizer

NAMED = {"id2label": {0: "no", 1: "yes", 2: "maybe"}, "label2id": {"no": 0, "yes": 1, "maybe": 2}}
# The teacher, the config of another architecture, and the expected class.
COUNTERPARTS: list[tuple[str, Any, str]] = [
    ("BertForSequenceClassification", hf.DistilBertConfig(**_DISTILBERT), "DistilBertForSequenceClassification"),
    ("BertForMaskedLM", hf.DistilBertConfig(**_DISTILBERT), "DistilBertForMaskedLM"),
    ("BertForPreTraining", hf.ElectraConfig(**_BERT, embedding_size=8), "ElectraForPreTraining"),
    ("RobertaForTokenClassification", hf.BertConfig(**_BERT), "BertForTokenClassification"),
    ("DistilBertForQuestionAnswering", hf.BertConfig(**_BERT), "BertForQuestionAnswering"),
    ("BertForMultipleChoice", hf.ElectraConfig(**_BERT), "ElectraForMultipleChoice"),
    ("BertModel", hf.DistilBertConfig(**_DISTILBERT), "DistilBertModel"),
    ("LlamaForCausalLM", hf.GPT2Config(**_GPT2), "GPT2LMHeadModel"),
    ("ViTForImageClassification", hf.BeitConfig(**_VIT), "BeitForImageClassification"),
]


@pytest.mark.parametrize(("teacher", "config", "expected"), COUNTERPARTS, ids=lambda value: str(value)[:24])
def test_a_config_is_built_with_the_teachers_head(teacher: str, config: Any, expected: str) -> None:
    student, report = reported(fresh(config, teacher=MODELS[teacher].make(layers=1)))
    assert type(student).__name__ == expected == report.architecture and report.teacher == teacher
    assert report.embeddings == () and set(report.fresh) == {name for name, _ in student.named_parameters()}
    assert not student.training


def test_labels_come_from_the_teacher() -> None:
    teacher = MODELS["BertForSequenceClassification"].make(layers=1, **NAMED)
    student, report = reported(fresh(hf.DistilBertConfig(**_DISTILBERT), teacher=teacher))
    assert student.config.id2label == NAMED["id2label"] and student.config.label2id == NAMED["label2id"]
    assert "The labels are the teacher's" in str(report)
    own = hf.DistilBertConfig(**_DISTILBERT, id2label={0: "a", 1: "b"}, label2id={"a": 0, "b": 1})
    assert fresh(own, teacher=teacher).config.id2label == {0: "a", 1: "b"}


def test_embeddings_are_matched_by_token_not_by_id() -> None:
    """The student's tokenizer has the words in another order, and two words that the teacher's does not have."""
    teacher = MODELS["BertForMaskedLM"].make(layers=1)
    words = {"w0": 0, "new": 1, "w7": 2, "w3": 3, "other": 4, "w39": 5}
    before = fresh_weights(hf.DistilBertConfig(**_DISTILBERT), teacher)
    torch.manual_seed(5)
    student, report = reported(fresh(
        hf.DistilBertConfig(**_DISTILBERT), teacher=teacher, processing_class=tokenizer(words),
        teacher_processing_class=tokenizer()
    ))  # fmt: skip
    ours, theirs = (model.get_input_embeddings().weight for model in (student, teacher))
    assert torch.equal(ours[[0, 2, 3, 5]], theirs[[0, 7, 3, 39]])
    assert torch.equal(ours[[1, 4, 6]], before[[1, 4, 6]])
    assert (report.tokens, report.missing) == (4, 2)
    assert set(report.embeddings) == {"distilbert.embeddings.word_embeddings.weight", "vocab_projector.weight"}
    assert student.vocab_projector.weight is ours and ours.requires_grad
    assert str(report).startswith("DistilBertForMaskedLM: ") and "4 tokens from the teacher, 2 fresh" in str(report)


def fresh_weights(config: Any, teacher: Any) -> torch.Tensor:
    """Return the embeddings that the seed gives."""
    torch.manual_seed(5)
    weight: torch.Tensor = fresh(config, teacher=teacher).get_input_embeddings().weight
    return weight.detach().clone()


def test_reduced_embeddings_preserve_inner_products() -> None:
    """Rows within 8 of 16 directions keep all their inner products. Others get the best approximation of rank 8.

    The best approximation of rank 8 leaves the sum of the squares of the other singular values (Eckart and Young).
    """
    teacher = MODELS["BertForMaskedLM"].make(layers=1)
    rows = teacher.get_input_embeddings().weight
    config = hf.LlamaConfig(**{**_LLAMA, "hidden_size": 8})
    both = {"processing_class": tokenizer(), "teacher_processing_class": tokenizer(), "reduce": "svd"}
    student = hf.LlamaForCausalLM(config)
    assert fresh(student, teacher=teacher, **both) is student
    lost = (rows.double() @ rows.double().T - gram(student)).diagonal().sum()
    assert_close(lost, torch.linalg.svdvals(rows.double())[8:].square().sum())
    with torch.no_grad():
        rows.copy_(torch.randn(40, 8) @ torch.randn(8, 16))
    assert_close(gram(fresh(student, teacher=teacher, **both)), rows.double() @ rows.double().T, rtol=1e-4, atol=1e-4)


def gram(model: Any) -> torch.Tensor:
    rows = model.get_input_embeddings().weight.detach().double()
    return rows @ rows.T


def test_the_teacher_does_not_change() -> None:
    teacher = MODELS["BertForMaskedLM"].make(layers=1).train()
    before = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
    student = hf.BertForMaskedLM(hf.BertConfig(**_BERT)).train()
    same = fresh(student, teacher=teacher, processing_class=tokenizer(), teacher_processing_class=tokenizer())
    assert same is student and student.training and teacher.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in teacher.state_dict().items())
    assert student.get_input_embeddings().weight.data_ptr() != teacher.get_input_embeddings().weight.data_ptr()


WORDS = {"processing_class": tokenizer(), "teacher_processing_class": tokenizer()}
WRONG: dict[str, tuple[Any, dict[str, Any], str]] = {
    "no head": (hf.BertConfig(**_BERT), {"teacher": None}, r"a config does not define the head. Pass teacher="),
    "no counterpart": (hf.ViTConfig(**_VIT), {}, r"no class of ViTConfig has the head of BertForMaskedLM"),
    "a name": ("distilbert", {}, r"the student is a str. Pass a config or a PreTrainedModel"),
    "one tokenizer": (hf.BertConfig(**_BERT), {"processing_class": tokenizer()}, r"=, teacher_.* go together"),
    "tokenizers alone": (hf.BertModel(hf.BertConfig(**_BERT)), {"teacher": None, **WORDS}, r"and teacher= go together"),
    "other kind": (
        hf.BertConfig(**_BERT), {**WORDS, "processing_class": bpe_tokenizer([])},
        r"mark words differently \(student: BPE; teacher: WordLevel\)",
    ),
    "nothing shared": (
        hf.BertConfig(**_BERT), {**WORDS, "processing_class": tokenizer({"x": 0})}, r"share no token",
    ),
    "too few rows": (
        hf.BertConfig(**{**_BERT, "vocab_size": 30}), WORDS, r"ids up to 39, but its embeddings have 30 .* at least 40"
    ),
    "narrower": (hf.ElectraConfig(**_BERT, embedding_size=8), WORDS, r"are 8 wide, the teacher's 16. Pass reduce="),
    "wider": (
        hf.BertConfig(**{**_BERT, "hidden_size": 32}), {**WORDS, "reduce": "svd"}, r"32 wide, .* Use the same width"
    ),
    "reduce": (hf.BertConfig(**_BERT), {"reduce": "pca"}, r"reduce='pca': allowed are 'svd' and None"),
    "no tokens": (hf.ViTModel(hf.ViTConfig(**_VIT)), WORDS, r"the student \(ViTModel\) has no token embeddings"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_wrong_arguments(case: str) -> None:
    student, arguments, message = WRONG[case]
    teacher = MODELS["BertForMaskedLM"].make(layers=1)
    with pytest.raises(HfDistillError, match=message):
        fresh(student, **{"teacher": teacher, **arguments})


def test_an_error_leaves_the_student_unchanged() -> None:
    student = hf.LlamaForCausalLM(hf.LlamaConfig(**{**_LLAMA, "hidden_size": 8}))
    before = student.get_input_embeddings().weight.detach().clone()
    with pytest.raises(SettingError):
        fresh(student, teacher=MODELS["BertForMaskedLM"].make(layers=1), **WORDS)
    assert torch.equal(student.get_input_embeddings().weight, before)
