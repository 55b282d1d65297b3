"""Every public class says which paper it comes from, and shows its settings."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Iterator
from typing import Any

import pytest
from torch import nn

import hf_distill
from hf_distill.augment import Augmentation, AugmentingCollator, Noise, OnPolicy, SpecAugment
from hf_distill.functional import PROPERTIES
from hf_distill.functional.features import DISTANCE_PROPERTIES
from hf_distill.functional.similarity import SIMILARITY_PROPERTIES
from hf_distill.hub.card import BIBTEX
from hf_distill.objectives import OBJECTIVES, Objective
from hf_distill.presets import PRESETS
from hf_distill.runs import Chain, Link
from hf_distill.teachers import Ensemble, MovingAverage, RDropTeacher, Snapshot, Specialists, Teacher, TemporalEnsemble


def public_classes() -> Iterator[type]:
    """Yield each class that the package or a module of it exports, once."""
    names = ["hf_distill", *(module.name for module in pkgutil.walk_packages(hf_distill.__path__, "hf_distill."))]
    modules = [importlib.import_module(name) for name in names if not name.endswith("__main__")]
    exported = [getattr(module, name) for module in modules for name in getattr(module, "__all__", ())]
    yield from dict.fromkeys(value for value in exported if inspect.isclass(value))


CLASSES = list(public_classes())
PRESETS_MADE = [make(3, 6) if name == "pkd" else make() for name, make in PRESETS.items()]
CATALOGUES = (PROPERTIES, DISTANCE_PROPERTIES, SIMILARITY_PROPERTIES)


@pytest.mark.parametrize("kind", CLASSES, ids=lambda kind: kind.__name__)
def test_the_paper_of_a_class_is_in_the_bibliography(kind: type) -> None:
    assert getattr(kind, "paper", None) in {None, *BIBTEX}


def test_every_objective_and_preset_and_catalogued_function_has_a_paper() -> None:
    for stated in (*OBJECTIVES.values(), *PRESETS_MADE, *(p for each in CATALOGUES for p in each.values())):
        assert stated.paper in BIBTEX, stated


def test_every_entry_of_the_bibliography_is_used() -> None:
    stated: list[Any] = [*CLASSES, *PRESETS_MADE, *(p for each in CATALOGUES for p in each.values())]
    assert {getattr(one, "paper", None) for one in stated} - {None} == set(BIBTEX)


@pytest.mark.parametrize("kind", CLASSES, ids=lambda kind: kind.__name__)
def test_a_class_has_a_repr(kind: type) -> None:
    assert kind.__repr__ is not object.__repr__
    if issubclass(kind, (Teacher, Objective)) and inspect.signature(kind).parameters:
        assert kind.__repr__ not in (Teacher.__repr__, Objective.__repr__), "it does not show its settings"


SHOWN: dict[str, object] = {
    "MovingAverage(decay=0.5)": MovingAverage(decay=0.5),
    "Snapshot(every=3)": Snapshot(every=3),
    "RDropTeacher(seed=4)": RDropTeacher(seed=4),
    "TemporalEnsemble(momentum=0.5, key='row')": TemporalEnsemble(momentum=0.5, key="row"),
    "Ensemble(2 teachers, mean='logits', weights='best')": Ensemble(["a", "b"], mean="logits", weights="best"),
    "Specialists([[0, 2]], most_probable=1)": Specialists("a", {(0, 2): "b"}),
    "LogitsMatch('dist', divergence_kwargs={'intra_weight': 0}, temperature=2)": OBJECTIVES["logits"](
        "dist", divergence_kwargs={"intra_weight": 0}
    ),
    "OnPolicy(student_share=0.5, max_new_tokens=4, sampling_temperature=2, seed=0)": OnPolicy(
        max_new_tokens=4, sampling_temperature=2.0
    ),
    "Noise(white, snr_db=(1.0, 2.0), acts_on='example')": Noise(snr_db=(1.0, 2.0)),
    "SpecAugment(freq_width=27, num_freq_masks=2, time_width=100, max_time_share=1, num_time_masks=2, "
    "acts_on='batch')": SpecAugment(acts_on="batch"),
    "Augmentation(sorted, moves_positions=True, acts_on='example')": Augmentation(sorted, moves_positions=True),
    "AugmentingCollator(builtin_function_or_method, Noise(white, snr_db=(5.0, 30.0), acts_on='example'), "
    "student_only=False, seed=1, views=None)": AugmentingCollator(sorted, Noise(), seed=1),
}


@pytest.mark.parametrize("text", SHOWN)
def test_a_repr_shows_the_settings(text: str) -> None:
    assert repr(SHOWN[text]) == text


def test_a_chain_shows_its_links() -> None:
    text = repr(Chain([Link("small", nn.Identity)], keep="last"))
    assert text.startswith("Chain([Link(name='small', ") and text.endswith("keep='last')")
