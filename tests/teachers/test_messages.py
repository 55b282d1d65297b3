"""Error messages for each cause: outputs without logits, forwards of other libraries, heads judged by their class."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn
from transformers.modeling_outputs import SequenceClassifierOutput

from hf_distill import (
    CosineEmbedding,
    DataError,
    DistillationTrainer,
    Distiller,
    Ensemble,
    HiddenMatch,
    ModelTeacher,
    SettingError,
    SimilarityMatch,
    TeacherCache,
    TeacherError,
)
from hf_distill.tasks import Embedding, Task
from hf_distill.tasks.base import output_named
from hf_distill.tasks.infer import main_input_of
from tests.heads import HEADS
from tests.trainer.tiny import arguments, examples, padded

SIZES = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
IDS = {"input_ids": torch.tensor([[1, 5, 2]])}


def bert(seed: int = 0, **settings: Any) -> Any:
    torch.manual_seed(seed)
    return hf.BertModel(hf.BertConfig(vocab_size=20, **{**SIZES, **settings})).eval()


def clip() -> Any:
    text = {"vocab_size": 50, "max_position_embeddings": 8, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    vision = {"image_size": 32, "patch_size": 8}
    return hf.CLIPModel(
        hf.CLIPConfig(text_config={**text, **SIZES}, vision_config={**vision, **SIZES}, projection_dim=8)
    )


def dpr() -> Any:
    return hf.DPRQuestionEncoder(hf.DPRConfig(vocab_size=20, **SIZES)).eval()


# Missing outputs.


@pytest.mark.parametrize(
    ("make", "batch", "held"),
    [
        (clip, {**IDS, "pixel_values": torch.randn(1, 3, 32, 32)}, "image_embeds, logits_per_image, logits_per_text,"),
        (dpr, IDS, "pooler_output"),
    ],
    ids=["CLIPModel", "DPRQuestionEncoder"],
)
def test_the_error_for_other_outputs_lists_their_fields(make: Any, batch: Any, held: str) -> None:
    """The error used to suggest leaving out use_liger_kernel, which was not set."""
    student, teacher = make(), make()
    with pytest.raises(DataError) as raised:
        Distiller(student, teacher, alpha=1.0)(student, batch)
    message = str(raised.value)
    assert f"the student ({type(student).__name__}): its output (" in message and held in message
    assert "and no last_hidden_state, which this task reads" in message and "hf_distill.tasks.Task" in message
    assert "liger" not in message


def test_the_error_attributes_the_output_to_the_teacher() -> None:
    class Own(Embedding):
        """A custom Task, so that the teacher's class is not checked."""

    student = bert()
    with pytest.raises(DataError, match=r"the teacher \(DPRQuestionEncoder\): its output \(DPRQuestionEncoderOutput\)"):
        Distiller(student, dpr(), alpha=1.0, task=Own())(student, IDS)


@pytest.mark.parametrize(
    ("outputs", "words"),
    [
        (
            SequenceClassifierOutput(loss=torch.zeros(())),
            r"holds loss, and its field logits is empty\. .*liger",
        ),
        (SequenceClassifierOutput(), "holds nothing, and its field logits is empty"),
        ((torch.zeros(1, 2),), "returned a tuple, which has no names, and logits is read. Set return_dict=True"),
        (torch.zeros(1, 2), 'returned a Tensor, which has no names, and logits is read. Wrap it to .*{"logits": ...}'),
        ({"scores": torch.zeros(1, 2)}, r"its output \(dict\) holds scores, and no logits, which this task reads"),
    ],
    ids=["fused loss", "nothing", "tuple", "tensor", "another name"],
)
def test_each_cause_has_its_own_message(outputs: Any, words: str) -> None:
    with pytest.raises(DataError, match=words):
        output_named("logits", outputs)


def test_missing_logits_during_training(tmp_path: Any) -> None:
    """A fused kernel omits them."""

    class Withheld(hf.BertForSequenceClassification):
        def forward(self, input_ids: Any = None, attention_mask: Any = None, labels: Any = None) -> Any:
            found = super().forward(input_ids=input_ids, attention_mask=attention_mask, labels=labels)
            return SequenceClassifierOutput(loss=found.loss)

    config = hf.BertConfig(vocab_size=23, num_labels=3, **SIZES)
    trainer = DistillationTrainer(
        model=Withheld(config),
        teacher_model=hf.BertForSequenceClassification(config),
        args=arguments(tmp_path),
        train_dataset=examples(),
        data_collator=padded,
    )
    with pytest.raises(DataError, match=r"the student \(Withheld\): its output .* logits is empty.*liger"):
        trainer.train()


# Forwards of other libraries.


class Net(nn.Module):
    """Like torchvision's and timm's models."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(3072, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x.flatten(1))


class Named(Net):
    """The same with a keyword that the teacher is called with."""

    def forward(self, pixel_values: Tensor) -> dict[str, Tensor]:  # type: ignore[override]  # what is tried
        return {"logits": super().forward(pixel_values)}


class Sentence(nn.Module):
    """Like an earlier sentence-transformers model."""

    def __init__(self) -> None:
        super().__init__()
        self.body = bert(1)

    def forward(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"sentence_embedding": self.body(**features).pooler_output}


class SentenceTransformer(Sentence):
    def forward(self, input: dict[str, Tensor], **keywords: Any) -> dict[str, Tensor]:  # type: ignore[override]  # as it has it now
        return super().forward(input)


def vit() -> Any:
    return hf.ViTForImageClassification(hf.ViTConfig(image_size=32, patch_size=8, **SIZES))


def test_a_module_without_named_columns_raises() -> None:
    """The error used to require input_ids for images."""
    student, images = vit(), {"pixel_values": torch.randn(2, 3, 32, 32)}
    words = (
        r"the teacher \(Net\) needs x, the batch has \['pixel_values'\]\. .* pass a module whose forward takes columns"
    )
    with pytest.raises(DataError, match=words):
        Distiller(student, ModelTeacher(Net(), label_matching="by_index"), alpha=1.0)(student, images)
    teacher = Named()
    distiller = Distiller(student, ModelTeacher(teacher, label_matching="by_index"), alpha=1.0, temperature=1.0)
    with torch.no_grad():
        s, t = student(**images).logits.double(), teacher(**images)["logits"].double()
    expected = (t.softmax(-1) * (t.log_softmax(-1) - s.log_softmax(-1))).sum(-1).mean().item()
    assert distiller(student, images).loss.item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("teacher", [Sentence, SentenceTransformer])
def test_a_sentence_transformer_raises(teacher: Any) -> None:
    """The error used to require input_ids, which the batch has; its transformers model can be the teacher."""
    student, given = bert(), teacher()
    takes = "features" if teacher is Sentence else "input"
    words = rf"the teacher \({teacher.__name__}\) needs {takes}, .*model\[0\]\.auto_model.*pooling="
    with pytest.raises(DataError, match=words):
        Distiller(student, given, alpha=1.0)(student, IDS)
    found = Distiller(student, given.body, alpha=1.0, task=Embedding(pooling="first"))(student, IDS).loss.item()
    with torch.no_grad():
        s, t = (model(**IDS).last_hidden_state[:, 0].double() for model in (student, given.body))
    assert found == pytest.approx((s - t).square().mean().item(), rel=1e-5)


def test_main_input_name() -> None:
    class Passes(nn.Module):
        def forward(self, **inputs: Any) -> Any: ...

    found = [main_input_of(model) for model in (bert(), vit(), Net(), Named(), Sentence(), Passes())]
    assert found == ["input_ids", "pixel_values", "x", "pixel_values", "features", "input_ids"]


def test_a_missing_column_is_reported() -> None:
    student = bert()
    batch = {"input_ids": IDS["input_ids"], "teacher_attention_mask": torch.ones(1, 3)}
    with pytest.raises(DataError, match=r"the teacher \(ViTModel\) needs pixel_values, .*teacher_pixel_values"):
        teacher = hf.ViTModel(hf.ViTConfig(image_size=32, patch_size=8, **SIZES))
        Distiller(student, teacher, alpha=1.0)(student, batch)


def test_a_plain_image_module_can_be_cached(tmp_path: Any) -> None:
    teacher, images = Named(), torch.randn(3, 3, 32, 32)
    teacher.config = SimpleNamespace(num_labels=2, label2id={"a": 0, "b": 1}, id2label={0: "a", 1: "b"})
    student = vit()
    student.config.label2id, student.config.id2label = {"a": 0, "b": 1}, {0: "a", 1: "b"}
    data = [{"pixel_values": one} for one in images]
    live = Distiller(student, teacher, alpha=1.0)(student, {"pixel_values": images}).loss.item()
    cache = TeacherCache.build(teacher, data, tmp_path / "cache", student=student, progress=False)
    assert Distiller(student, cache, alpha=1.0)(student, {"pixel_values": images}).loss.item() == pytest.approx(
        live, rel=1e-3
    )


# The head's class is checked only if the library inferred the task.


class Pooled(Task):
    kind, matched_by, on_values = "pooled", "width", True

    def read(self, outputs: Any, batch: Any, columns: Any, *, teacher: bool) -> Tensor:
        return outputs["pooler_output"]


@pytest.mark.parametrize("teacher", [bert, dpr])
def test_a_custom_task_accepts_any_class(teacher: Any) -> None:
    student, given = bert(1), teacher()
    found = Distiller(student, given, alpha=1.0, task=Pooled())(student, IDS).loss.item()
    with torch.no_grad():
        s, t = student(**IDS).pooler_output.double(), given(**IDS).pooler_output.double()
    assert found == pytest.approx((s - t).square().mean().item(), rel=1e-5)


def test_built_in_tasks_check_the_class() -> None:
    student, teacher = bert(), HEADS["bert_single_label"].make(vocab_size=20)
    for task in (None, "embedding"):
        with pytest.raises(TeacherError, match=r"\(BertForSequenceClassification\) has a classification head, the"):
            Distiller(student, teacher, alpha=1.0, task=task)
    with pytest.raises(TeacherError, match="has an embedding head, the student needs a teacher for classification"):
        Distiller(teacher, student, alpha=1.0)


# Embeddings of different widths.


def test_the_error_for_embeddings_of_different_widths_lists_solutions() -> None:
    student, teacher = bert(), bert(1, hidden_size=32)
    with pytest.raises(TeacherError) as raised:
        Distiller(student, teacher, alpha=1.0)
    message = str(raised.value)
    assert "embed in different widths (16 and 32)" in message and "alpha=None" in message
    for name in ("SimilarityMatch()", 'HiddenMatch("last")', "CosineEmbedding()"):
        assert name in message
    batch = {"input_ids": torch.tensor([[1, 5, 2], [3, 4, 6]]), "attention_mask": torch.tensor([[1, 1, 1], [1, 1, 0]])}
    for objective in (SimilarityMatch(), HiddenMatch("last"), CosineEmbedding()):
        found = Distiller(student, teacher, alpha=None, objectives=objective, seed=0)(student, batch).loss
        found.backward()
        assert found.item() > 0 and any(p.grad is not None and p.grad.any() for p in student.parameters())


def test_a_distance_of_hidden_states_is_not_a_divergence() -> None:
    with pytest.raises(
        SettingError, match=r"divergence='cosine' is a distance of hidden states.*HiddenMatch\('last', distance='cos"
    ):
        Distiller(bert(), bert(1), alpha=1.0, divergence="cosine")


# Lists of teachers.


@pytest.mark.parametrize("several", [list, tuple])
def test_a_list_of_teachers_suggests_an_ensemble(several: Any) -> None:
    head = HEADS["bert_single_label"]
    teachers = several([head.make(1), head.make(2)])
    with pytest.raises(TeacherError, match=rf"is a {several.__name__} of 2\. .*teacher_model=Ensemble\(\[\.\.\.\]\)"):
        Distiller(head.make(0), teachers)
    student = head.make(0)
    assert Distiller(student, Ensemble(teachers))(student, head.batch(2)).loss.item() > 0
