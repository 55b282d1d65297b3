"""DistillationArguments: command line, files, JSON round trip; invalid values raise."""

from __future__ import annotations

import json
from typing import Any

import pytest
from transformers import HfArgumentParser, Seq2SeqTrainingArguments, TrainingArguments

from hf_distill import DistillationArguments, Seq2SeqDistillationArguments, SettingError
from tests.trainer.tiny import arguments, bert, make

BOTH = pytest.mark.parametrize("kind", [DistillationArguments, Seq2SeqDistillationArguments])
OWN = {
    "temperature": 3.0,
    "alpha": 0.25,
    "divergence": "jensen_shannon",
    "divergence_kwargs": {"beta": 0.3},
    "temperature_schedule": "linear",
    "temperature_end": 1.0,
    "alpha_schedule": "cosine",
    "alpha_end": 0.75,
    "teacher_dtype": "bfloat16",
    "evaluate_with_teacher": True,
    "label_matching": "by_index",
    "projection_learning_rate": 0.01,
    "teacher_quantization": {"quant_method": "bitsandbytes", "load_in_4bit": True},
    "teacher_device_map": {"": "cpu"},
    "fused_loss": True,
}
QUIET = {"report_to": "none", "use_cpu": True}


def test_argument_classes_derive_from_those_of_transformers() -> None:
    assert issubclass(DistillationArguments, TrainingArguments)
    assert issubclass(Seq2SeqDistillationArguments, Seq2SeqTrainingArguments)


@BOTH
def test_it_adds_only_its_own_settings(kind: Any) -> None:
    base = Seq2SeqTrainingArguments if issubclass(kind, Seq2SeqTrainingArguments) else TrainingArguments
    added = set(kind.__dataclass_fields__) - set(base.__dataclass_fields__)
    assert added == set(OWN)
    assert all(kind.__dataclass_fields__[name].metadata["help"] for name in added)


@BOTH
def test_parsing_the_command_line(tmp_path, kind: Any) -> None:
    line = ["--output_dir", str(tmp_path), "--report_to", "none", "--use_cpu", "true"]
    for name, value in OWN.items():
        line += [f"--{name}", json.dumps(value) if isinstance(value, dict) else str(value)]
    (found,) = HfArgumentParser(kind).parse_args_into_dataclasses(line)
    assert {name: getattr(found, name) for name in OWN} == OWN
    (defaults,) = HfArgumentParser(kind).parse_args_into_dataclasses(line[:6])
    assert (defaults.alpha, defaults.temperature, defaults.divergence) == (0.5, 2.0, None)


@BOTH
@pytest.mark.parametrize("as_text", [False, True], ids=["object", "text"])
def test_parsing_a_json_file(tmp_path, kind: Any, as_text: bool) -> None:
    settings = {**OWN, **QUIET, "output_dir": str(tmp_path)}
    if as_text:
        settings["divergence_kwargs"] = json.dumps(settings["divergence_kwargs"])
    (tmp_path / "settings.json").write_text(json.dumps(settings))
    (found,) = HfArgumentParser(kind).parse_json_file(tmp_path / "settings.json")
    assert {name: getattr(found, name) for name in OWN} == OWN


@BOTH
def test_json_round_trip(tmp_path, kind: Any) -> None:
    args = kind(output_dir=str(tmp_path), **QUIET, **OWN)
    written = json.loads(args.to_json_string())
    assert {name: written[name] for name in OWN} == OWN
    assert {name: args.to_dict()[name] for name in OWN} == OWN
    again = kind(output_dir=str(tmp_path), **QUIET, **{name: written[name] for name in OWN})
    assert json.loads(again.to_json_string()).items() >= {name: written[name] for name in OWN}.items()
    json.dumps(args.to_sanitized_dict())  # the form for loggers


def test_parsing_a_dict(tmp_path) -> None:
    (found,) = HfArgumentParser(DistillationArguments).parse_dict({"output_dir": str(tmp_path), **QUIET, **OWN})
    assert found.divergence_kwargs == {"beta": 0.3}


REFUSED = [
    ({"alpha": -0.1}, ("alpha=-0.1", "[0, 1]")),
    ({"alpha": 1.1}, ("alpha=1.1", "[0, 1]", "teacher's term")),
    ({"alpha": "half"}, ("alpha", "number")),
    ({"temperature": 0}, ("temperature=0", "above 0")),
    ({"temperature": -1.0}, ("temperature=-1", "above 0")),
    ({"temperature": "warm"}, ("temperature", "number")),
    ({"temperature": None}, ("temperature", "number")),
    ({"divergence": "kl"}, ("divergence='kl'", "allowed are forward_kl, reverse_kl")),
    ({"divergence": "jensen_shannon", "divergence_kwargs": {"beta": 2.0}}, ("beta=2.0", "[0, 1]")),
    ({"divergence": "jensen_shannon", "divergence_kwargs": {"gamma": 2.0}}, ("no setting gamma", "takes beta")),
    ({"divergence": "jensen_shannon", "divergence_kwargs": {"beta": "x"}}, ("divergence_kwargs", "beta")),
    (
        {"divergence": "forward_kl", "divergence_kwargs": {"beta": 0.5}},
        ("forward_kl has no setting beta", "no settings"),
    ),
    ({"divergence_kwargs": {"beta": 0.5}}, ("divergence_kwargs", "need a divergence")),
    ({"divergence": "jensen_shannon", "divergence_kwargs": "beta=0.5"}, ("divergence_kwargs='beta=0.5'", "JSON", "{")),
    ({"alpha_schedule": "linear"}, ("alpha_schedule='linear'", "needs alpha_end")),
    ({"alpha_schedule": "steps", "alpha_end": 1.0}, ("alpha_schedule='steps'", "constant, linear, cosine")),
    ({"alpha_schedule": "linear", "alpha_end": 1.5}, ("alpha=", "[0, 1]")),
    ({"alpha_end": 1.0}, ("constant", "alpha", "linear or cosine")),
    ({"temperature_schedule": "cosine"}, ("temperature_schedule='cosine'", "needs temperature_end")),
    ({"temperature_schedule": "linear", "temperature_end": -1.0}, ("temperature=", "above 0")),
    ({"temperature_schedule": "linear", "temperature_end": 0.0}, ("temperature=0", "above 0")),
    ({"temperature_end": 1.0}, ("constant", "temperature", "linear or cosine")),
    ({"teacher_dtype": "half"}, ("teacher_dtype='half'", "float32, bfloat16, float16")),
    ({"label_matching": "by_luck"}, ("label_matching='by_luck'", "by_name and by_index")),
]


@BOTH
@pytest.mark.parametrize(("settings", "words"), REFUSED, ids=lambda value: str(value)[:60])
def test_invalid_values_raise_at_construction(
    tmp_path, kind: Any, settings: dict[str, Any], words: tuple[str, ...]
) -> None:
    with pytest.raises(SettingError) as raised:
        kind(output_dir=str(tmp_path / "out"), **QUIET, **settings)
    for word in words:
        assert word in str(raised.value), (word, str(raised.value))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("end", [0.5, None])
def test_a_constant_may_repeat_its_value_as_its_end(tmp_path, end: float | None) -> None:
    assert arguments(tmp_path, alpha=0.5, alpha_end=end).alpha_end == end


@pytest.mark.parametrize("alpha", [0, 1, 0.0, 1.0])
def test_the_range_of_alpha_is_closed(tmp_path, alpha: float) -> None:
    assert arguments(tmp_path, alpha=alpha).alpha == alpha


@pytest.mark.parametrize(
    ("settings", "same_as"),
    [
        ({"divergence": "jensen_shannon", "divergence_kwargs": {"beta": 0.0}}, {"divergence": "forward_kl"}),
        ({"divergence": "jensen_shannon", "divergence_kwargs": {"beta": 1.0}}, {"divergence": "reverse_kl"}),
        ({"divergence": None}, {"divergence": "forward_kl"}),
        (
            {"temperature": 3.0, "temperature_schedule": "linear", "temperature_end": 3.0},
            {"temperature": 3.0},
        ),
    ],
)
def test_equivalent_settings_give_the_same_loss(tmp_path, settings: dict[str, Any], same_as: dict[str, Any]) -> None:
    """Two spellings of a setting give the same training, which differs from the default unless it is the default."""
    assert first_loss(tmp_path, **settings) == first_loss(tmp_path, **same_as)


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": 4.0},
        {"alpha": 0.9},
        {"divergence": "reverse_kl"},
        {"divergence": "jensen_shannon", "divergence_kwargs": {"beta": 0.3}},
        {"alpha_schedule": "linear", "alpha_end": 1.0},
        {"temperature_schedule": "cosine", "temperature_end": 9.0},
    ],
    ids=str,
)
def test_law_l8_every_knob_changes_the_loss(tmp_path, settings: dict[str, Any]) -> None:
    assert first_loss(tmp_path, **settings) != first_loss(tmp_path)


def first_loss(folder: Any, **settings: Any) -> list[float]:
    trainer = make(folder, bert(), bert(seed=4), max_steps=2, logging_steps=1, **settings)
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
