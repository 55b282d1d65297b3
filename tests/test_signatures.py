"""The signatures of what users construct say which values each setting takes, so that a schema can be made of them."""

from __future__ import annotations

import dataclasses
import inspect
import typing
from collections.abc import Callable, Iterator
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import pytest

import hf_distill
from hf_distill import objectives, presets, students
from hf_distill._types import OneOf
from hf_distill.functional import DISTANCES, DIVERGENCES, SIMILARITIES
from hf_distill.trainer.arguments import DistillationSettings

CONSTRUCTED: dict[str, Callable[..., Any]] = {
    **{name: getattr(objectives, name) for name in objectives.__all__ if inspect.isclass(getattr(objectives, name))},
    **{f"presets.{name}": function for name, function in vars(presets).items() if inspect.isfunction(function)
       and function.__module__ == presets.__name__ and not name.startswith("_")},
    **{f"students.{name}": getattr(students, name) for name in ("inherit", "narrow", "fresh", "trim_vocabulary")},
    "Distiller": hf_distill.Distiller,
    "DistillationArguments": DistillationSettings,
}  # fmt: skip
# Settings that are free text: names that users give, paths of modules, columns, names that are loaded or parsed.
FREE_TEXT = {"name", "student_stack", "teacher_stack", "stack", "task", "label_names", "alpha", "divergence_kwargs"}
FREE_TEXT |= {"teacher_model", "teacher_quantization", "teacher_device_map", "texts"}


def settings() -> Iterator[tuple[str, str, Any]]:
    """Yield the callable's name, the setting's name and its type."""
    for name, constructed in CONSTRUCTED.items():
        function = constructed.__init__ if inspect.isclass(constructed) else constructed
        hints = get_type_hints(function, include_extras=True)
        if dataclasses.is_dataclass(constructed):
            hints = get_type_hints(constructed, include_extras=True)
            hints = {field.name: hints[field.name] for field in dataclasses.fields(constructed)}
        yield from ((name, setting, hint) for setting, hint in hints.items() if setting != "return")


def alternatives(hint: Any) -> list[Any]:
    if get_origin(hint) in (Union, UnionType):
        return [x for part in get_args(hint) for x in alternatives(part)]
    return [hint]


SETTINGS = {f"{name}.{setting}": (setting, hint) for name, setting, hint in settings()}


@pytest.mark.parametrize("name", SETTINGS)
def test_text_is_one_of_a_list(name: str) -> None:
    setting, hint = SETTINGS[name]
    for part in alternatives(hint):
        if part is str:
            assert setting in FREE_TEXT, f"{name}: str does not say what is allowed"
        if get_origin(part) in (dict, typing.get_origin(typing.Mapping)) and setting not in FREE_TEXT:
            assert Any not in get_args(part), f"{name}: {part} does not say what it takes"


@pytest.mark.parametrize(
    ("name", "catalogue"),
    [
        ("HiddenMatch.distance", DISTANCES),
        ("SimilarityMatch.distance", SIMILARITIES),
        ("DistillationArguments.divergence", DIVERGENCES),
        ("Distiller.divergence", DIVERGENCES),
    ],
)
def test_catalogues_are_named_in_the_signature(name: str, catalogue: dict[str, Any]) -> None:
    found = [part for part in alternatives(SETTINGS[name][1]) if get_origin(part) is Annotated]
    (names,) = found
    text, one_of = get_args(names)
    assert text is str and isinstance(one_of, OneOf) and one_of.choices is catalogue


def test_objectives_accept_every_value_of_their_signatures() -> None:
    tried = 0
    for name in objectives.__all__:
        kind = getattr(objectives, name)
        if not inspect.isclass(kind) or not issubclass(kind, objectives.Objective) or kind is objectives.Objective:
            continue
        required = [p for p in inspect.signature(kind).parameters.values() if p.default is p.empty and p.kind < 2]
        given = {parameter.name: [0] for parameter in required}
        for setting, hint in get_type_hints(kind.__init__, include_extras=True).items():
            for part in alternatives(hint):
                choices = get_args(part) if get_origin(part) is Literal else ()
                if get_origin(part) is Annotated:
                    choices = tuple(get_args(part)[1].choices)
                for choice in choices:
                    kind(**given, **{setting: choice})
                    tried += 1
    assert tried > 20
