"""Bad input to `inherit`: the error names what came and what to do."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as hf
from torch import nn

from hf_distill.errors import HfDistillError, SettingError, TeacherError
from hf_distill.layer_map import LayerMap
from hf_distill.students import inherit
from hf_distill.students.building import check_config
from tests.students.models import MODELS

BERT, BART = "BertForMaskedLM", "BartForConditionalGeneration"
WRONG: dict[str, tuple[str, dict[str, Any], str]] = {
    "nothing": (BERT, {}, r"pass layers=, or encoder_layers="),
    "out of range": (BERT, {"layers": [0, 4]}, r"layers: teacher layer 4: out of range. The teacher has 4 layers: 0"),
    "empty": (BERT, {"layers": []}, r"layers: LayerMap: the map is empty"),
    "twice": (BERT, {"layers": [3, -1]}, r"teacher layer 3 is named twice \(as 3 and -1\)"),
    "too many": (BERT, {"layers": 5}, r"5 student layers cannot be taken from 4"),
    "zero": (BERT, {"layers": 0}, r"student_layers=0"),
    "text": (BERT, {"layers": "even"}, r"layers: 'even' is not a number, a list of layers or a LayerMap"),
    "bool": (BERT, {"layers": True}, r"layers: True is not a number"),
    "map of another teacher": (BERT, {"layers": LayerMap.even(2, 6)}, r"for 6 teacher layers; the teacher has 4"),
    "many to one": (
        BERT,
        {"layers": LayerMap.pairs([(0, 1), (0, 2)], 1, 4)},
        r"student layer 0 goes with layers 1, 2 of the teacher; to copy layers it needs exactly one",
    ),
    "a side it has not": (BERT, {"decoder_layers": 2}, r"decoder_layers= fits 0 .*'bert.encoder.layer' \(4 layers\)"),
    "both": (BERT, {"layers": 2, "encoder_layers": 2}, r"not layers, encoder_layers together"),
    "which side": (BART, {"layers": 2}, r"'model.decoder.layers' \(4 layers\)\). Use encoder_layers="),
    "a side of it": (BART, {"decoder_layers": [0, 9]}, r"decoder_layers: teacher layer 9: out of range"),
    "no such stack": (BERT, {"layers": 2, "stack": "bert.layers"}, r"no ModuleList of .*'bert.encoder.layer' \(4 × B"),
    "stack without layers": (BART, {"encoder_layers": 2, "stack": "a"}, r"stack='a' goes with layers=, not with enc"),
    "shared, a side": ("AlbertForMaskedLM", {"encoder_layers": 2}, r"this model has one stack. Pass layers="),
    "no stack to name": (
        "Wav2Vec2ForCTC",
        {"layers": 1, "stack": "wav2vec2.feature_extractor.conv_layers"},
        r"no setting of Wav2Vec2Config that is 2 makes this list longer",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_wrong_arguments(case: str) -> None:
    name, arguments, message = WRONG[case]
    with pytest.raises(HfDistillError, match=message):
        inherit(MODELS[name].make(), **arguments)


class TowerConfig(hf.PreTrainedConfig):
    model_type = "tower"
    floors: int = 3
    rooms: int = 3


class Tower(hf.PreTrainedModel):
    """The setting of its layers has an unusual name, and it has another list of the same length."""

    config_class = TowerConfig

    def __init__(self, config: TowerConfig) -> None:
        super().__init__(config)
        self.rooms = nn.ModuleList([nn.Linear(2, 2) for _ in range(config.rooms)])
        self.storeys = nn.ModuleList([nn.Linear(2, 2) for _ in range(config.floors)])
        self.post_init()


class NoLists(hf.PreTrainedModel):
    config_class = TowerConfig

    def __init__(self, config: TowerConfig) -> None:
        super().__init__(config)
        self.only = nn.Linear(2, 2)
        self.post_init()


def test_a_stack_with_an_unknown_setting_can_be_named() -> None:
    teacher = Tower(TowerConfig())
    with pytest.raises(TeacherError) as caught:
        inherit(teacher, layers=2)
    assert str(caught.value) == (
        "inherit: no layer stack found in Tower. Its lists of modules: 'rooms' (3 × Linear), 'storeys' (3 × Linear). "
        "Name one: inherit(teacher, layers=..., stack='rooms')."
    )
    student = inherit(teacher, layers=[0, -1], stack="storeys")
    assert (student.config.floors, student.config.rooms) == (2, 3)
    assert torch.equal(student.storeys[1].weight, teacher.storeys[2].weight)


class SharingConfig(hf.PreTrainedConfig):
    model_type = "sharing"
    num_layers: int = 3
    layer_kinds: list[str] | None = None


class Kind(nn.Linear):
    def __init__(self, kind: str) -> None:
        super().__init__(2, 2)
        self.kind = kind


class Sharing(hf.PreTrainedModel):
    """One list of kinds controls its layers and another list."""

    config_class = SharingConfig

    def __init__(self, config: SharingConfig) -> None:
        super().__init__(config)
        kinds = config.layer_kinds or ["plain"] * config.num_layers
        self.layers = nn.ModuleList([Kind(kinds[i]) for i in range(config.num_layers)])
        self.others = nn.ModuleList([Kind(kinds[i % len(kinds)]) for i in range(2)])
        self.post_init()


def test_a_cut_that_changes_another_list_is_an_error() -> None:
    teacher = Sharing(SharingConfig(layer_kinds=["a", "b", "c"]))
    assert inherit(teacher, layers=[0, 1]).config.layer_kinds == ["a", "b"]
    with pytest.raises(
        TeacherError, match=r"cutting layers changes others too \(kind is 'c', .* 'b'\): they share a set"
    ):
        inherit(teacher, layers=[0, 2])


class StubbornConfig(SharingConfig):
    kinds: tuple[str, ...] = ("a", "b", "c")

    def __post_init__(self, **kwargs: Any) -> None:
        self.num_layers = len(self.kinds)
        super().__post_init__(**kwargs)


def test_a_config_that_does_not_survive_saving_is_an_error() -> None:
    class Stubborn(Sharing):
        config_class = StubbornConfig

    with pytest.raises(TeacherError, match=r"the student's StubbornConfig does not survive saving: num_layers"):
        inherit(Stubborn(StubbornConfig()), layers=2)


def test_a_model_without_module_lists_is_an_error() -> None:
    with pytest.raises(TeacherError, match="The model has no ModuleList at all"):
        inherit(NoLists(TowerConfig()), layers=2)


def test_a_peft_teacher_must_be_merged() -> None:
    peft = pytest.importorskip("peft", reason="the extra `peft` is not installed")
    lora = peft.LoraConfig(target_modules=["query"], r=2)
    wrapped = peft.get_peft_model(MODELS[BERT].make(), lora)
    with pytest.raises(TeacherError, match=r"\(PeftModel\) has PEFT adapters.*merge_and_unload"):
        inherit(wrapped, layers=2)
    with_adapter = MODELS[BERT].make()
    with_adapter.add_adapter(lora)
    with pytest.raises(TeacherError, match="has PEFT adapters"):
        inherit(with_adapter, layers=2)
    assert inherit(wrapped.merge_and_unload(), layers=2).config.num_hidden_layers == 2


def test_the_teacher_must_be_a_pretrained_model() -> None:
    teacher = MODELS[BERT].make()
    with pytest.raises(TeacherError, match=r"the teacher \(Sequential\) is not a PreTrainedModel"):
        inherit(nn.Sequential(teacher), layers=2)  # type: ignore[arg-type]  # the mistake under test
    with pytest.raises(TeacherError, match=r"the teacher \(str\) is not a PreTrainedModel"):
        inherit("bert-base-uncased", layers=2)  # type: ignore[arg-type]  # the mistake under test


def test_quantised_and_offloaded_teachers_are_errors() -> None:
    teacher = MODELS[BERT].make()
    teacher.is_quantized = True
    with pytest.raises(
        TeacherError, match=r"the teacher \(BertForMaskedLM\) is quantised. Load it without quantization_config"
    ):
        inherit(teacher, layers=2)
    with pytest.raises(TeacherError, match=r"has no floating-point values.*without device_map"):
        inherit(MODELS[BERT].make().to("meta"), layers=2)


def test_teachers_changed_by_hand_are_errors() -> None:
    teacher = MODELS["BertForSequenceClassification"].make()
    teacher.classifier = nn.Linear(16, 5)
    with pytest.raises(TeacherError, match=r"classifier.weight has shape \(3, 16\), but .*\(5, 16\).*replaced"):
        inherit(teacher, layers=2)
    teacher = MODELS[BERT].make()
    teacher.extra = nn.Linear(2, 2)
    with pytest.raises(TeacherError, match=r"the student has no place for extra.weight, extra.bias of the teacher"):
        inherit(teacher, layers=2)
    teacher = MODELS[BERT].make()
    del teacher.bert.encoder.layer[3]
    with pytest.raises(HfDistillError, match=r"no layer stack found"):
        inherit(teacher, layers=2)
    teacher = MODELS[BERT].make()
    teacher.cls.predictions.decoder.weight = nn.Parameter(torch.zeros(40, 16))
    with pytest.raises(TeacherError, match=r"are tied by the config but differ in the teacher"):
        inherit(teacher, layers=2)


def test_a_config_that_fails_its_own_validation() -> None:
    config = hf.Qwen2Config(num_hidden_layers=4)
    config.layer_types = ["full_attention"] * 3
    with pytest.raises(TeacherError, match=r"Qwen2Config does not allow this student: .* \(4\) must be equal to"):
        check_config(config, "inherit")


def test_missing_layers_are_a_setting_error() -> None:
    with pytest.raises(SettingError):
        inherit(MODELS[BERT].make(), layers=[9])
