"""The task is inferred from the model's class: all classes in transformers' tables, PEFT models, subclasses."""

from __future__ import annotations

import inspect
import re
from types import SimpleNamespace
from typing import Any

import pytest
import transformers as hf
from transformers.models.auto import modeling_auto as auto

from hf_distill import Distiller, SettingError
from hf_distill.tasks import TASKS, Classification, Task, infer_task, make_task
from hf_distill.tasks.infer import infer_kind
from tests.heads import HEADS

# By the suffix of the class name; exceptions are listed below.
ENDINGS = {
    "ForCTC": "ctc",
    "ForSequenceClassification": "classification",
    "ForAudioClassification": "classification",
    "ForImageClassification": "classification",
    "ForTokenClassification": "token_classification",
    "ForQuestionAnswering": "span",
    "ForMultipleChoice": "multiple_choice",
    "ForMaskedLM": "masked_lm",
    "ForCausalLM": "causal_lm",
    "LMHeadModel": "causal_lm",
}
IRREGULAR = {
    "BertGenerationDecoder": "causal_lm",
    "ReformerModelWithLMHead": "causal_lm",
    "FlaubertWithLMHeadModel": "masked_lm",
    "XLMWithLMHeadModel": "masked_lm",
    "DeiTForImageClassificationWithTeacher": "classification",
    "LevitForImageClassificationWithTeacher": "classification",
    "PerceiverForImageClassificationLearned": "classification",
    "PerceiverForImageClassificationFourier": "classification",
    "PerceiverForImageClassificationConvProcessing": "classification",
    "FlaubertForQuestionAnsweringSimple": "span",
    "XLMForQuestionAnsweringSimple": "span",
    "XLNetForQuestionAnsweringSimple": "span",
    "EncoderDecoderModel": "seq2seq",
    "SpeechEncoderDecoderModel": "seq2seq",
    "MarianMTModel": "seq2seq",
    "SeamlessM4TForTextToText": "seq2seq",
    "SeamlessM4Tv2ForTextToText": "seq2seq",
    "SeamlessM4TForSpeechToText": "seq2seq",
    "SeamlessM4Tv2ForSpeechToText": "seq2seq",
    "SpeechT5ForSpeechToText": "seq2seq",
}
# Unlike the causal-LM task, their own loss does not shift the labels, so their task is not inferred.
UNSHIFTED = {"XLNetLMHeadModel", "ProphetNetForCausalLM", "CpmAntForCausalLM"}


def tabled(*tables: Any) -> list[str]:
    names: set[str] = set()
    for table in tables:
        for value in table.values():
            names.update((value,) if isinstance(value, str) else value)
    return sorted(names)


WITH_HEADS = tabled(
    auto.MODEL_FOR_CTC_MAPPING_NAMES,
    auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    auto.MODEL_FOR_AUDIO_CLASSIFICATION_MAPPING_NAMES,
    auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES,
    auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES,
    auto.MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES,
    auto.MODEL_FOR_MULTIPLE_CHOICE_MAPPING_NAMES,
)
SEQ2SEQ = {
    **auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    **auto.MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES,
}
COMPOSITE = ("encoder-decoder", "speech-encoder-decoder")  # encoder-decoders whose config needs two others


def named(name: str, **config: Any) -> Any:
    """Return an object of a class with that name, with the config entries that inference uses."""
    settings = {"problem_type": None, "num_labels": 3, "is_encoder_decoder": False, **config}
    made = type(name, (), {})()
    made.config = SimpleNamespace(**settings)
    return made


def expected(name: str) -> str | None:
    if name in IRREGULAR:
        return IRREGULAR[name]
    return next((kind for ending, kind in ENDINGS.items() if name.endswith(ending)), None)


@pytest.mark.parametrize("kind", sorted({*ENDINGS.values()}))
def test_every_class_with_a_head_has_its_task(kind: str) -> None:
    names = [name for name in WITH_HEADS if expected(name) == kind and name not in UNSHIFTED]
    assert len(names) > 10
    assert {name: infer_kind(named(name)) for name in names} == dict.fromkeys(names, kind)


def test_no_class_with_a_head_is_left_unclassified() -> None:
    """The known ones generate text from images or audio; a person has to look at any new name."""
    unnamed = {name for name in WITH_HEADS if expected(name) is None}
    assert all(name.endswith("ForConditionalGeneration") for name in unnamed), unnamed


@pytest.mark.parametrize("kind_of_config", [kind for kind in SEQ2SEQ if kind not in COMPOSITE])
def test_encoder_decoders_are_seq2seq_and_audio_language_models_are_causal(kind_of_config: str) -> None:
    """transformers lists both in the same tables, but only encoder-decoders have decoder inputs."""
    names, config = SEQ2SEQ[kind_of_config], hf.CONFIG_MAPPING[kind_of_config]
    for name in (names,) if isinstance(names, str) else names:
        model = named(name, is_encoder_decoder=config.is_encoder_decoder)
        takes_decoder_inputs = "decoder_input_ids" in _forward_parameters(name)
        assert infer_kind(model) == ("seq2seq" if takes_decoder_inputs else "causal_lm")


@pytest.mark.parametrize("name", ["EncoderDecoderModel", "SpeechEncoderDecoderModel"])
def test_composite_models_are_seq2seq(name: str) -> None:
    assert infer_kind(named(name, is_encoder_decoder=True)) == "seq2seq"


def _forward_parameters(name: str) -> set[str]:
    return set(inspect.signature(getattr(hf, name).forward).parameters)


@pytest.mark.parametrize("name", sorted(UNSHIFTED))
def test_causal_models_that_do_not_shift_labels_are_not_inferred(name: str) -> None:
    with pytest.raises(SettingError, match=name):
        infer_kind(named(name))


BARE = tabled(auto.MODEL_MAPPING_NAMES)


def test_every_bare_encoder_is_an_embedding() -> None:
    names = [name for name in BARE if re.fullmatch(r"\w+(Model|Encoder)", name) and not expected(name)]
    assert len(names) > 100
    assert {name: infer_kind(named(name)) for name in names} == dict.fromkeys(names, "embedding")


GENERATORS = [name for name in BARE if re.search(r"For[A-Z]", name) and name not in tabled(SEQ2SEQ)]


@pytest.mark.parametrize("name", [n for n in GENERATORS if n not in WITH_HEADS])
def test_an_unknown_head_is_not_an_embedding(name: str) -> None:
    """transformers' table of base models also contains models with special heads."""
    with pytest.raises(SettingError, match=f"{name}: this library does not know where it keeps its predictions"):
        infer_kind(named(name))


@pytest.mark.parametrize(
    ("config", "kind"),
    [
        ({"num_labels": 1}, "regression"),
        ({"num_labels": 1, "problem_type": "regression"}, "regression"),
        ({"num_labels": 4, "problem_type": "regression"}, "regression"),
        ({"num_labels": 1, "problem_type": "multi_label_classification"}, "classification"),
        ({"num_labels": 1, "problem_type": "single_label_classification"}, "classification"),
        ({"num_labels": 2}, "classification"),
        ({"num_labels": 5, "problem_type": "multi_label_classification"}, "classification"),
    ],
)
def test_the_config_distinguishes_classification_from_regression(config: dict[str, Any], kind: str) -> None:
    assert infer_kind(named("BertForSequenceClassification", **config)) == kind


@pytest.mark.parametrize("name", HEADS)
def test_every_model_of_the_test_catalogue(name: str) -> None:
    model = HEADS[name].make()
    assert infer_kind(model) == HEADS[name].kind
    assert type(infer_task(model)) is TASKS[HEADS[name].kind]


def test_a_subclass_has_the_task_of_its_base_class() -> None:
    class MyBert(hf.BertForTokenClassification):
        pass

    assert infer_kind(MyBert(HEADS["bert_tokens"].make().config)) == "token_classification"


# peft 0.19 reads an attribute that transformers 5.23 has renamed.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize("name", ["bert_single_label", "gpt2_causal_lm", "t5_seq2seq"])
def test_a_peft_model_has_the_task_of_its_base_model(name: str) -> None:
    peft = pytest.importorskip("peft", reason="an optional extra")
    targets = {"bert_single_label": ["query"], "gpt2_causal_lm": ["c_attn"], "t5_seq2seq": ["q"]}
    fan_in_fan_out = name == "gpt2_causal_lm"  # GPT-2 stores its projections transposed
    config = peft.LoraConfig(r=2, target_modules=targets[name], fan_in_fan_out=fan_in_fan_out)
    student = peft.get_peft_model(HEADS[name].make(1), config)
    assert infer_kind(student) == HEADS[name].kind
    distiller = Distiller(student, HEADS[name].make(2))
    distiller(student, HEADS[name].batch(4)).loss.backward()
    assert any(p.grad is not None and p.grad.any() for p in student.parameters())


def test_the_error_for_an_unknown_class_lists_the_tasks() -> None:
    with pytest.raises(SettingError) as found:
        infer_kind(named("SegformerForSemanticSegmentation"))
    text = str(found.value)
    assert text.startswith("SegformerForSemanticSegmentation: this library does not know where it keeps")
    assert all(kind in text for kind in TASKS)
    assert 'task="classification"' in text and "hf_distill.tasks.Task" in text


def test_task_argument_as_name_object_and_invalid_name() -> None:
    unknown = named("SegformerForSemanticSegmentation")
    assert isinstance(make_task(unknown, "classification"), Classification)
    own = Task()
    assert make_task(unknown, own) is own
    with pytest.raises(SettingError, match=r"task='tagging': no such task. Allowed: classification, regression"):
        make_task(unknown, "tagging")
