"""The conformance table of teachers: a row for every kind that `hf_distill.teachers` exports, and for every store.

`test_teachers.py` compares it with the exports, so a new kind of teacher without a row fails the suite. If a
law does not hold for a kind, its row gives the reason.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from hf_distill.teachers import Dense, Hybrid, MovingAverage, Sampled, Snapshot, TopK
from tests.heads import VOCABULARY
from tests.laws.making_teachers import (
    LANGUAGE,
    SENTENCES,
    TOKENS,
    Place,
    TeacherCase,
    a_model,
    adapters_off,
    cache_of,
    cached,
    copy_of_student,
    ensemble,
    ensemble_of_caches,
    peer,
    quantised,
    second_pass,
    served,
    specialists,
    temporal,
)


@dataclass(frozen=True)
class TeacherRow:
    """The properties of a kind of teacher that the laws need.

    Attributes:
        of: its name in `hf_distill.teachers`. store: of a cache. heads: one head of each sort that it supports.
        temperature: a supported temperature. tolerance: of its predictions, relative; with `inexact`, the reason.
        nothing_fixed: why its predictions cannot be compared (L11), and which test replaces it.
        trained_along: why its weights change (L9). own_mode: why it is not in evaluation mode (L9).
        keeps_state: whether a checkpoint holds its state (L10).
        batch_matters: why accumulation differs from the large batch (L4).
        not_permuted: why L12 does not apply. refuses_order: its error for other ids of the same names.
        divergence: set if not every divergence is supported.
    """

    of: str
    make: Callable[[Place], TeacherCase]
    heads: tuple[str, ...] = (SENTENCES, TOKENS)
    store: str | None = None
    temperature: float = 2.0
    tolerance: float = 1e-5
    inexact: str | None = None
    nothing_fixed: str | None = None
    trained_along: str | None = None
    own_mode: str | None = None
    keeps_state: bool = False
    batch_matters: str | None = None
    not_permuted: str | None = None
    refuses_order: str | None = None


_OWN_LABELS = "its labels are the student's own"
_TOKENS = "columns are tokens, which tokenizers name"
_LISTED = {"of": "CachedTeacher", "heads": (LANGUAGE,), "not_permuted": _TOKENS}

STORES_WITHOUT_ROWS = {
    "nothing": "it keeps no predictions, and the laws here are of predictions",
}

TEACHER_ROWS: dict[str, TeacherRow] = {
    "model": TeacherRow("ModelTeacher", a_model),
    "cached, dense": TeacherRow("CachedTeacher", cached(Dense("float32")), store="dense"),
    "cached, top k": TeacherRow(
        make=cached(TopK(VOCABULARY, temperatures=(2.0,), dtype="float32")), store="top_k", **_LISTED
    ),
    "cached, sampled": TeacherRow(
        make=cached(Sampled(4096, temperature=2.0)),
        store="sampled",
        tolerance=0.02,
        inexact="right on average; 4,096 stratified draws are off by less than 1 / 4096 a column",
        **_LISTED,
    ),
    "cached, hybrid": TeacherRow(
        make=cached(Hybrid(VOCABULARY, 1, temperature=2.0, dtype="float32")), store="hybrid", **_LISTED
    ),
    "ensemble": TeacherRow("Ensemble", ensemble),
    "cache of an ensemble": TeacherRow("CachedTeacher", cache_of(ensemble, store=Dense("float32")), store="dense"),
    "cache of a served": TeacherRow(
        make=cache_of(served),
        store="top_k_from_server",
        tolerance=0.01,
        inexact="log-probabilities are kept in fp16",
        **_LISTED,
    ),
    "ensemble of caches": TeacherRow("Ensemble", ensemble_of_caches),
    "specialists": TeacherRow("Specialists", specialists, temperature=1.0),
    "moving average": TeacherRow(
        "MovingAverage",
        copy_of_student(lambda: MovingAverage(decay=0.5)),
        trained_along="it follows the student, by its formula",
        keeps_state=True,
        not_permuted=_OWN_LABELS,
    ),
    "snapshot": TeacherRow(
        "Snapshot",
        copy_of_student(lambda: Snapshot(every=2)),
        trained_along="it is the student as it was",
        keeps_state=True,
        not_permuted=_OWN_LABELS,
    ),
    "adapters off": TeacherRow("BaseModelTeacher", adapters_off, heads=(SENTENCES, LANGUAGE), not_permuted=_OWN_LABELS),
    "second pass": TeacherRow(
        "RDropTeacher",
        second_pass,
        nothing_fixed="it is the student with other dropout",
        trained_along="it is the student",
        own_mode="in training mode, for its dropout",
        keeps_state=True,
        batch_matters="what is dropped differs from one micro-batch to the next",
        not_permuted=_OWN_LABELS,
    ),
    "temporal ensemble": TeacherRow(
        "TemporalEnsemble",
        temporal,
        nothing_fixed="it says nothing before the second epoch, then what the student said in training",
        trained_along="it has no weights, and remembers what the student says",
        keeps_state=True,
        not_permuted=_OWN_LABELS,
    ),
    "peer": TeacherRow(
        "Peer",
        peer,
        trained_along="it learns from the student, by an optimizer of its own",
        own_mode="in training mode, as it is trained",
        keeps_state=True,
        refuses_order="Peer: its labels or tokens have other ids than the student's",
    ),
    "quantised": TeacherRow(
        "QuantisedTeacher",
        quantised,
        tolerance=0.3,
        inexact="weights and activations of eight bits",
        batch_matters="activations are rounded by the range of the whole batch",
    ),
    "served": TeacherRow("ServedTeacher", served, heads=(LANGUAGE,), not_permuted=_TOKENS),
}
