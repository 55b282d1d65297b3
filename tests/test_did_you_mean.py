"""Errors for unknown names suggest the closest existing name, wherever a name is checked."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import pickle
from collections.abc import Callable
from typing import Any

import pytest

from hf_distill import (
    AttentionMatch,
    Chain,
    DistillationArguments,
    DistillationTrainer,
    Distiller,
    Ensemble,
    ExitMatch,
    HiddenMatch,
    LayerMap,
    Link,
    Seq2SeqDistillationArguments,
    SettingError,
    SimilarityMatch,
)
from hf_distill.blend import SETTING_ALIASES
from hf_distill.errors import check_keywords, did_you_mean
from hf_distill.functional import DISTANCES, DIVERGENCE_ALIASES, DIVERGENCES, SIMILARITIES, Terms
from hf_distill.functional.features import DISTANCE_ALIASES
from hf_distill.functional.similarity import SIMILARITY_ALIASES
from hf_distill.layer_map import resolved_map
from hf_distill.objectives import LogitsMatch
from hf_distill.objectives.hidden import Projections
from hf_distill.presets import pkd
from hf_distill.schedules import _ALSO_CALLED, SCHEDULES, make_schedule
from hf_distill.students.narrow.narrow import narrow
from hf_distill.tasks import TASKS, Embedding, TokenClassification, make_task
from hf_distill.tasks.infer import TASK_ALIASES
from hf_distill.tasks.regression import POOLING, POOLING_ALIASES
from hf_distill.teachers.cache import Dense, Hybrid, TopK
from hf_distill.teachers.load import DTYPE_ALIASES, DTYPES, as_dtype
from hf_distill.teachers.served import ServedTeacher
from hf_distill.vocabulary import match_labels
from tests.trainer.tiny import arguments, bert, examples, make, padded

DATA = [padded(examples())]
QUIET = {"report_to": "none", "use_cpu": True}


def arguments_with(**settings: Any) -> Any:
    return DistillationArguments("out", **QUIET, **settings)


# Every place that checks a catalogue name: a call, and its suggestion.
PLACES: dict[str, tuple[Callable[[], Any], str]] = {
    "divergence, kl": (lambda: LogitsMatch("kl"), "forward_kl"),
    "divergence, mse": (lambda: LogitsMatch("mse"), "mean_squared_error"),
    "divergence, misspelt": (lambda: LogitsMatch("jenson_shanon"), "jensen_shannon"),
    "divergence, of the arguments": (lambda: arguments_with(divergence="JSD"), "jensen_shannon"),
    "divergence, without logits": (lambda: Terms("reverse-kl"), "reverse_kl"),
    "divergence's setting": (lambda: LogitsMatch("jensen_shannon", divergence_kwargs={"bta": 0.3}), "beta"),
    "distance": (lambda: compared(HiddenMatch(distance="mse")), "mean_squared"),
    "distance's setting": (
        lambda: compared(HiddenMatch(distance="smooth_l1", distance_kwargs={"Beta": 1.0})),
        "beta",
    ),
    "positions": (lambda: HiddenMatch(pooling="cls"), "first"),
    "projection": (lambda: Projections({"a": (4, 4)}, kind="liner", seed=0), "linear"),
    "attention": (lambda: AttentionMatch(distance="score"), "scores"),
    "similarity": (lambda: SimilarityMatch(distance="cka"), "centered_kernel_alignment"),
    "pooling of examples": (lambda: SimilarityMatch(pooling="average"), "mean"),
    "pooling of exits": (lambda: ExitMatch([0], pooling="avg"), "mean"),
    "pooling of embeddings": (lambda: Embedding("CLS"), "first"),
    "side": (lambda: compared(HiddenMatch("last", side="encodr")), "encoder"),
    "layers": (lambda: resolved_map("evn", 2, 4), "even"),
    "objective": (lambda: Distiller(bert(), bert(seed=1), objectives="HiddenMach"), "HiddenMatch"),
    "task": (lambda: make_task(bert(), "ner"), "token_classification"),
    "task, misspelt": (lambda: make_task(bert(), "clasification"), "classification"),
    "rows": (lambda: TokenClassification("labeled"), "labelled"),
    "schedule": (lambda: make_schedule("alpha", "cos", 0.0, 1.0), "cosine"),
    "schedule, of the arguments": (lambda: arguments_with(alpha_schedule="liner", alpha_end=1.0), "linear"),
    "dtype of a teacher": (lambda: as_dtype("bf16"), "bfloat16"),
    "dtype, of the arguments": (lambda: arguments_with(teacher_dtype="fp16"), "float16"),
    "quantisation": (lambda: arguments_with(teacher_quantization="int8"), "int8_dynamic"),
    "dtype of a cache": (lambda: Dense("half"), "float16"),
    "dtype of the likeliest": (lambda: TopK(2, dtype="fp32"), "float32"),
    "dtype of samples": (lambda: Hybrid(2, 2, temperature=1.0, dtype="flot16"), "float16"),
    "label matching": (lambda: arguments_with(label_matching="name"), "by_name"),
    "label matching of two heads": (lambda: match_labels(bert().config, bert().config, matching="index"), "by_index"),
    "mean of an ensemble": (lambda: Ensemble([bert(), bert()], mean="logit"), "logits"),
    "weights of an ensemble": (lambda: Ensemble([bert(), bert()], weights="confident"), "confidence"),
    "api of a server": (lambda: ServedTeacher("http://localhost", "x", processing_class=None, api="vlm"), "vllm"),
    "variant of a preset": (lambda: pkd(2, 4, variant="skipp"), "skip"),
    "what a chain keeps": (lambda: Chain([Link("a", model=bert)], keep="bst"), "best"),
    "width of a narrower student": (lambda: narrow(bert(), hidden=8, width="project", data=DATA), "projection"),
    "importance": (lambda: narrow(bert(), hidden=8, importance="activaton", heads=1, data=DATA), "activation"),
}  # fmt: skip


def compared(objective: Any) -> Any:
    return Distiller(bert(), bert(seed=1), objectives=objective)


def proposal(name: str) -> str:
    return f"Did you mean {name!r}?"


@pytest.mark.parametrize("place", PLACES)
def test_the_closest_name_is_suggested(place: str) -> None:
    call, meant = PLACES[place]
    with pytest.raises(SettingError) as raised:
        call()
    assert str(raised.value).endswith(proposal(meant)), str(raised.value)


@pytest.mark.parametrize(
    "call", [lambda: LogitsMatch("zzz"), lambda: make_task(bert(), "zzz"), lambda: as_dtype("zzz")]
)
def test_distant_names_give_no_suggestion(call: Callable[[], Any]) -> None:
    with pytest.raises(SettingError) as raised:
        call()
    assert "Did you mean" not in str(raised.value)


ALIASES = {
    "divergences": (DIVERGENCE_ALIASES, DIVERGENCES),
    "distances": (DISTANCE_ALIASES, DISTANCES),
    "similarities": (SIMILARITY_ALIASES, SIMILARITIES),
    "tasks": (TASK_ALIASES, TASKS),
    "schedules": (_ALSO_CALLED, SCHEDULES),
    "dtypes": (DTYPE_ALIASES, DTYPES),
    "pooling": (POOLING_ALIASES, POOLING),
    "settings": (SETTING_ALIASES, DistillationArguments.__dataclass_fields__),
}


@pytest.mark.parametrize("name", ALIASES)
def test_aliases_point_to_existing_names(name: str) -> None:
    aliases, known = ALIASES[name]
    assert set(aliases.values()) <= set(known)
    assert not set(aliases) & set(known)
    for alias in aliases:
        assert alias == alias.lower() and "-" not in alias and " " not in alias, "it is looked up in this spelling"


@pytest.mark.parametrize(
    ("given", "expected"),
    [(3, ""), (None, ""), ("", ""), ("Forward-KL", " Did you mean 'forward_kl'?"), ("zzz", "")],
)
def test_did_you_mean(given: Any, expected: str) -> None:
    assert did_you_mean(given, ["forward_kl"]) == expected


# Keywords: Python's own error, with a suggestion.

KEYWORDS: dict[str, tuple[Callable[[], Any], str]] = {
    "temprature": (lambda: arguments_with(temprature=2.0), r"Did you mean 'temperature'"),
    "T": (lambda: Seq2SeqDistillationArguments("out", T=2.0), r"Did you mean 'temperature'"),
    "kd_alpha": (lambda: arguments_with(kd_alpha=0.5), r"Did you mean 'alpha'"),
    "of Trainer's": (lambda: arguments_with(learning_rte=0.5), r"Did you mean 'learning_rate'"),
    "of the trainer": (lambda: arguments_with(teacher_model=1), r"DistillationTrainer\(teacher_model=\.\.\.\)"),
    "nothing near": (lambda: arguments_with(zzz=1), r"unexpected keyword argument 'zzz'\.$"),
    "distiller": (lambda: Distiller(bert(), None, temprature=1.0), r"Distiller\(\) .*Did you mean 'temperature'"),
    "distiller's teacher": (lambda: Distiller(bert(), teacher=bert()), r"Did you mean 'teacher_model'"),
}


@pytest.mark.parametrize("name", KEYWORDS)
def test_an_unknown_keyword_gives_a_suggestion(name: str) -> None:
    call, words = KEYWORDS[name]
    with pytest.raises(TypeError, match=words):
        call()


OF_THE_TRAINER = {
    "techer_model": r"Did you mean 'teacher_model'",
    "teacher": r"Did you mean 'teacher_model'",
    "tokenizer": r"Did you mean 'processing_class'",
    "train_datset": r"Did you mean 'train_dataset'",
    "temperature": r"temperature is a setting: pass args=",
    "kd_alpha": r"alpha is a setting: pass args=",
}


@pytest.mark.parametrize("name", OF_THE_TRAINER)
def test_an_unknown_trainer_keyword_gives_a_suggestion(tmp_path, name: str) -> None:
    with pytest.raises(TypeError, match=rf"unexpected keyword argument '{name}'.*{OF_THE_TRAINER[name]}"):
        DistillationTrainer(
            model=bert(), teacher_model=bert(seed=1), args=arguments(tmp_path), train_dataset=examples(), **{name: 1}
        )


@pytest.mark.parametrize(("name", "meant"), [("teacher", "teacher_model"), ("view", "on_policy")])
def test_misspelt_teacher_keywords_are_reported_before_the_missing_teacher(tmp_path, name: str, meant: str) -> None:
    """Otherwise the error would only say that the teacher is missing."""
    with pytest.raises(TypeError, match=rf"unexpected keyword argument '{name}'\. Did you mean '{meant}'"):
        DistillationTrainer(model=bert(), args=arguments(tmp_path), train_dataset=examples(), **{name: bert(seed=1)})
    assert not (tmp_path / "out").exists()


def test_other_type_errors_of_a_base_trainer_are_unchanged(tmp_path) -> None:
    with pytest.raises(TypeError, match=r"cannot unpack non-iterable NoneType object$"):
        make(tmp_path, bert(), bert(seed=1), optimizers=None)


def test_arguments_can_be_copied_pickled_and_replaced() -> None:
    made = arguments_with(temperature=3.0, alpha=0.25)
    for other in (copy.copy(made), copy.deepcopy(made), pickle.loads(pickle.dumps(made)), dataclasses.replace(made)):
        assert (type(other), other.temperature, other.alpha) == (DistillationArguments, 3.0, 0.25)


def test_signatures_are_those_of_the_constructors() -> None:
    """For `help` and editors."""
    assert list(inspect.signature(Distiller).parameters)[:2] == ["student", "teacher_model"]
    assert {"output_dir", "alpha"} <= set(inspect.signature(DistillationArguments).parameters)


def test_constructors_with_kwargs_are_not_checked() -> None:
    class Own(DistillationArguments):
        def __init__(self, folder: str, **more: Any) -> None:
            self.name = more.pop("name")
            super().__init__(output_dir=folder, **QUIET, **more)

    assert Own("out", name="mine").name == "mine"
    check_keywords(lambda **keywords: None, ("whatever",), called="any")


def test_layer_maps_are_not_checked_as_names() -> None:
    assert resolved_map(LayerMap.even(1, 2), 1, 2) == LayerMap.even(1, 2)
