"""The conformance table of objectives on activations, and the cases of the laws.

The first variant of each runs on every head, and on the encoder of encoder-decoders; the others on a head with masked
positions and on one whose positions all count. `walked` marks the slow cases.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import pytest

from hf_distill.functional.features import DISTANCES
from hf_distill.functional.similarity import SIMILARITIES
from hf_distill.objectives import (
    OBJECTIVES,
    AttentionMatch,
    CosineEmbedding,
    HiddenMatch,
    RelationMatch,
    SimilarityMatch,
)
from tests.heads import HEADS

Maker = Callable[..., Any]


class Knob(NamedTuple):
    """A changed setting: `settings` before the change, `changed` after it, and the properties of the teacher.

    `on`: a head for which it has an effect, or None for any head.
    """

    changed: Mapping[str, Any]
    settings: Mapping[str, Any] = {}
    same_width: bool = False
    on: str | None = None


@dataclass(frozen=True)
class ObjectiveRow:
    """The properties of an objective that the laws need.

    Attributes:
        variants: name → constructor; all its keywords can be overridden.
        knobs: constructor settings → how another value changes the loss (L8).
        not_knobs: constructor settings that do not affect the loss, with the reason.
        couples_examples: why accumulation differs from the large batch (L4), and what holds instead.
        at_equality: variant → its value at equality, and why it is not 0 (L1).
        tested_elsewhere: why the laws of activations do not run on it.
    """

    variants: dict[str, Maker] = field(default_factory=dict)
    knobs: dict[str, Knob] = field(default_factory=dict)
    not_knobs: dict[str, str] = field(default_factory=dict)
    couples_examples: str | None = None
    at_equality: dict[str, tuple[float, str]] = field(default_factory=dict)
    tested_elsewhere: str | None = None


_NAMES = {
    "name": "what the term is called",
    "student_stack": "where the blocks are, for models in which they are not found",
    "teacher_stack": "where the blocks are, for models in which they are not found",
}
_ENCODER_KNOB = Knob({"side": "encoder"}, on="bart_seq2seq")
_DOUBLED = Knob({"weight": 2.0})
_PAIRS = ((0, 0), (1, 2, 0.5), (1, 1, 0.5))  # many to one, with weights

OBJECTIVE_ROWS: dict[str, ObjectiveRow] = {
    "logits": ObjectiveRow(tested_elsewhere="every other law here runs on it"),
    "hidden": ObjectiveRow(
        variants={
            "embeddings": partial(HiddenMatch, layers="even", embeddings=True),
            "embeddings_alone": partial(HiddenMatch, layers=None, embeddings=True),
            "pairs": partial(HiddenMatch, layers=_PAIRS),
            "shared": partial(HiddenMatch, layers="skip", projection="shared"),
            "first": partial(HiddenMatch, layers="last", pooling="first"),
            "last": partial(HiddenMatch, layers="last", pooling="last"),
            **{name: partial(HiddenMatch, layers="first_last", distance=name) for name in DISTANCES},
        },
        knobs={
            "layers": Knob({"layers": "last"}, {"layers": "first"}),
            "distance": Knob({"distance": "cosine"}),
            "distance_kwargs": Knob({"distance_kwargs": {"beta": 0.1}}, {"distance": "smooth_l1"}),
            "projection": Knob({"projection": "linear"}, {"projection": "none"}, same_width=True),
            "pooling": Knob({"pooling": "first"}),
            "embeddings": Knob({"embeddings": True}),
            "weight": _DOUBLED,
            "side": _ENCODER_KNOB,
        },
        not_knobs=_NAMES,
        at_equality={"l1_cosine": (0.31326168751822283, "log(1 + 1/e): the log sigmoid of a cosine of 1")},
    ),
    "cosine": ObjectiveRow(
        variants={"plain": CosineEmbedding},
        knobs={
            "projection": Knob({"projection": "linear"}, {"projection": "none"}, same_width=True),
            "weight": _DOUBLED,
            "side": _ENCODER_KNOB,
        },
        not_knobs=_NAMES,
    ),
    "attention": ObjectiveRow(
        variants={
            "scores": partial(AttentionMatch, layers="even"),
            "probabilities": partial(AttentionMatch, layers="last", distance="probabilities"),
            "swapped": partial(AttentionMatch, layers="last", heads=(1, 0)),
        },
        knobs={
            "layers": Knob({"layers": "last"}, {"layers": "first"}),
            "distance": Knob({"distance": "probabilities"}),
            "heads": Knob({"heads": (1, 0)}),
            "weight": _DOUBLED,
            "side": _ENCODER_KNOB,
        },
        not_knobs=_NAMES,
    ),
    "relations": ObjectiveRow(
        variants={
            "all": RelationMatch,
            "values": partial(RelationMatch, layers=[(0, 0), (1, 2)], relations=("values",)),
            "weighted": partial(RelationMatch, relations={"queries": 2.0, "values": 0.5}, relation_heads=4),
        },
        knobs={
            "layers": Knob({"layers": "first"}),
            "relations": Knob({"relations": {"queries": 1.0, "keys": 1.0, "values": 2.0}}),
            "relation_heads": Knob({"relation_heads": 4}),
            "weight": _DOUBLED,
            "side": _ENCODER_KNOB,
        },
        not_knobs=_NAMES,
    ),
    "similarity": ObjectiveRow(
        variants={name: partial(SimilarityMatch, distance=name) for name in SIMILARITIES},
        knobs={
            "distance": Knob({"distance": "distance_relations"}),
            "layers": Knob({"layers": "first"}),
            "pooling": Knob({"pooling": "first"}),
            "weight": _DOUBLED,
            "side": _ENCODER_KNOB,
        },
        not_knobs=_NAMES,
        couples_examples="each example is compared with the others of its micro-batch; the update is the mean over "
        "micro-batches, weighted by their examples",
    ),
    "exits": ObjectiveRow(
        tested_elsewhere="tests/objectives/test_exits.py: it has no teacher, and heads for classes alone"
    ),
    "universal_logit": ObjectiveRow(
        tested_elsewhere="tests/objectives/test_universal_logit.py: it compares predictions, with a teacher that reads "
        "other inputs"
    ),
}

MASKED_AND_NOT = ("bert_tokens", "vit_image_class")
TWO_SIDED = ("t5_seq2seq", "bart_seq2seq", "whisper_seq2seq")


class Case(NamedTuple):
    head: str
    objective: str
    variant: str
    side: str | None = None

    def make(self, **settings: Any) -> Any:
        """Return a new objective."""
        sided = {"side": self.side} if self.side else {}
        return OBJECTIVE_ROWS[self.objective].variants[self.variant](**{**sided, **settings})

    def __str__(self) -> str:
        return "-".join(part for part in self if part)


def _cases() -> list[Case]:
    made = []
    for objective in OBJECTIVES:
        for index, variant in enumerate(OBJECTIVE_ROWS[objective].variants):
            made += [Case(head, objective, variant) for head in HEADS if index == 0 or head in MASKED_AND_NOT]
            made += [Case(head, objective, variant, "encoder") for head in TWO_SIDED if index == 0]
    return made


def _quick() -> set[Case]:
    """Return the first variants with each task, on one head in turn, and the other variants where some positions
    are masked.

    tests/models covers the architectures.
    """
    chosen = {case for case in INSIDE if case.head == MASKED_AND_NOT[0]}
    for turn, objective in enumerate(OBJECTIVES):
        of_it = [case for case in INSIDE if case.objective == objective]
        groups: dict[Any, list[Case]] = {}
        for case in of_it:
            if case.variant == of_it[0].variant:
                groups.setdefault((HEADS[case.head].kind, case.side), []).append(case)
        chosen |= {cases[turn % len(cases)] for cases in groups.values()}
    return chosen


def walked(cases: Iterable[Case]) -> list[Any]:
    """Return named test parameters; those beyond the quick cases are slow."""
    return [pytest.param(case, marks=() if case in QUICK else pytest.mark.slow, id=str(case)) for case in cases]


INSIDE = _cases()
QUICK = _quick()
APART = [case for case in INSIDE if OBJECTIVE_ROWS[case.objective].couples_examples is None]
COUPLED = [case for case in INSIDE if OBJECTIVE_ROWS[case.objective].couples_examples is not None]
