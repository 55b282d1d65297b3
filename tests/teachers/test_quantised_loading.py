"""Quantised and distributed teachers from arguments: how they are loaded, errors, and a training."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BitsAndBytesConfig, HfArgumentParser

from hf_distill import DistillationArguments, ModelTeacher, SettingError, TeacherError
from hf_distill.teachers import as_teacher
from hf_distill.teachers import quantised as module
from hf_distill.teachers.quantised import QuantisedTeacher, as_setting, is_dynamic
from hf_distill.trainer.publishing import teacher_facts
from tests.trainer.tiny import QUIET, bert, make, update_difference, weights

FOUR_BITS = {"quant_method": "bitsandbytes", "load_in_4bit": True}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    bert(seed=2).save_pretrained(tmp_path / "teacher")
    return tmp_path / "teacher"


def test_a_training_with_an_int8_teacher(tmp_path: Path, folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    """From a folder or a model: the same teacher, whose agreement is measured once; the student learns from it."""
    trained = []
    for teacher in (str(folder), bert(seed=2)):
        student = bert(seed=1)
        trainer = make(tmp_path / type(teacher).__name__, student, teacher, teacher_quantization="int8_dynamic")
        with caplog.at_level(logging.WARNING):
            trainer.train()
        assert isinstance(trainer.distiller.teacher, QuantisedTeacher) and is_dynamic(trainer.distiller.teacher.model)
        assert trainer.distiller.teacher.agreement.same_choice > 0.9
        trained.append(weights(student))
    assert update_difference(*trained, weights(bert(seed=1))) < 0.01  # rounding may move an activation by 1 in 255
    assert caplog.text.count("Teacher, int8_dynamic, against its full precision: KL") == 2
    plain = bert(seed=1)
    make(tmp_path / "plain", plain, bert(seed=2)).train()
    assert any(not torch.equal(value, trained[0][name]) for name, value in weights(plain).items())


def test_the_card_does_not_count_packed_weights(tmp_path: Path) -> None:
    trainer = make(tmp_path, bert(), bert(seed=2), teacher_quantization="int8_dynamic")
    (facts,) = teacher_facts(trainer)
    assert facts.class_name == "BertForSequenceClassification" and facts.parameters is None


def test_a_device_map_applies_at_load_time(tmp_path: Path, folder: Path) -> None:
    trainer = make(tmp_path, bert(), str(folder), teacher_device_map={"": "cpu"}, teacher_dtype="float32")
    trainer.train()
    teacher = trainer.distiller.teacher
    assert type(teacher) is ModelTeacher and getattr(teacher.model, "hf_device_map", None) in ({"": "cpu"}, None)


def test_options_passed_to_from_pretrained(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without bitsandbytes: a stand-in records the options."""
    asked: list[dict[str, Any]] = []

    def load(path: Any, kind: str, **options: Any) -> Any:
        asked.append(options)
        return bert(seed=2)

    monkeypatch.setattr(module, "load_teacher", load)
    teacher = as_teacher(folder, "classification", quantization=FOUR_BITS, device_map="auto", dtype="bfloat16")
    assert isinstance(teacher, QuantisedTeacher) and teacher._how == "bitsandbytes"
    (options,) = asked
    assert (
        isinstance(options["quantization_config"], BitsAndBytesConfig) and options["quantization_config"].load_in_4bit
    )
    assert options["device_map"] == "auto" and options["dtype"] == "bfloat16"
    parameters = sum(parameter.numel() for parameter in bert().parameters())
    assert teacher._full_bytes == 4 * parameters
    assert teacher._full is not None
    teacher._full()
    assert asked[1] == {}  # the checkpoint's own precision, on the CPU


def test_a_missing_library_is_named(folder: Path) -> None:
    try:
        import bitsandbytes  # noqa: F401
    except ImportError:
        with pytest.raises(TeacherError, match=r"cannot be loaded: .*bitsandbytes"):
            as_teacher(folder, "classification", quantization=FOUR_BITS)
    else:
        assert is_quantised(as_teacher(folder, "classification", quantization=FOUR_BITS))


def is_quantised(teacher: Any) -> bool:
    return bool(teacher.model.is_quantized)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("int4", "teacher_quantization='int4': allowed are 'int8_dynamic', a quantization config of transformers"),
        ({"load_in_4bit": True}, 'or that as a dict with "quant_method"'),
        (8, "teacher_quantization=8: allowed are"),
    ],
)
def test_invalid_quantisations_raise(given: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(SettingError, match=message):
        DistillationArguments(str(tmp_path), teacher_quantization=given, **QUIET)


def test_an_unknown_method_raises(folder: Path) -> None:
    with pytest.raises(SettingError, match=r"teacher_quantization=\{'quant_method': 'wishes'\}: "):
        as_teacher(folder, "classification", quantization={"quant_method": "wishes"})


def test_load_options_for_a_loaded_teacher_raise(folder: Path) -> None:
    model, teacher = bert(), ModelTeacher(bert())
    for given, settings, message in (
        (model, {"quantization": FOUR_BITS}, "teacher_model is a BertForSequenceClassification.*can become 'int8_dyn"),
        (teacher, {"quantization": "int8_dynamic"}, "teacher_quantization is for a teacher that is loaded here"),
        (model, {"device_map": "auto"}, "teacher_device_map='auto' is for a teacher that is loaded here"),
        (folder, {"quantization": "int8_dynamic", "device_map": "auto"}, "which stays on the CPU"),
    ):
        with pytest.raises(SettingError, match=message):
            as_teacher(given, "classification", **settings)


def test_quantisation_arguments_are_plain_data(tmp_path: Path) -> None:
    """As a config object, as a dict, and as JSON on the command line."""
    config = BitsAndBytesConfig(load_in_8bit=True)
    args = DistillationArguments(str(tmp_path), teacher_quantization=config, **QUIET)
    written = json.loads(args.to_json_string())["teacher_quantization"]
    assert written["quant_method"] == "bitsandbytes" and written["load_in_8bit"] is True
    assert as_setting(written) == written == as_setting(config)
    line = ["--output_dir", str(tmp_path), "--teacher_quantization", json.dumps(FOUR_BITS)]
    line += ["--teacher_device_map", '{"": 0}', "--report_to", "none", "--use_cpu"]
    (parsed,) = HfArgumentParser(DistillationArguments).parse_args_into_dataclasses(line)
    assert parsed.teacher_quantization == FOUR_BITS and parsed.teacher_device_map == {"": 0}
    line[3] = "int8_dynamic"
    (parsed,) = HfArgumentParser(DistillationArguments).parse_args_into_dataclasses(line)
    assert parsed.teacher_quantization == "int8_dynamic"
