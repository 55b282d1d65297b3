"""What a cache keeps of a teacher's activations, and how objectives find it again."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from torch import Tensor, nn

from hf_distill._types import Batch
from hf_distill.errors import SettingError, TeacherError, did_you_mean
from hf_distill.models.blocks import SIDES, Blocks, Features
from hf_distill.models.capture import ActivationCapture
from hf_distill.objectives import Objective, ObjectiveSetup
from hf_distill.signals import (
    ATTENTION,
    EMBEDDINGS,
    HIDDEN,
    LAST_HIDDEN,
    RELATED,
    ActivationKey,
    LossSum,
    Needs,
    Side,
    Signals,
)
from hf_distill.tasks import Task
from hf_distill.teachers.cache.files import Dtype, to_disk
from hf_distill.teachers.shards import Json

_KEPT = (HIDDEN, LAST_HIDDEN, *RELATED)
_POOLED = {
    "first": "first position of each example",
    "last": "last position of each example",
    "mean": "mean over each example",
}
_NO_ATTENTION = (
    "a cache keeps no attention maps: they take length² numbers for each head and layer. Use RelationMatch or "
    "HiddenMatch, or the live teacher."
)
_NOT_FOR_TRAINING = "KeepActivations is for TeacherCache.build. Train with an objective such as HiddenMatch."
_REBUILD = "Build a cache with the objectives of this training (objectives=, student=), or use the live teacher."


@dataclass(frozen=True)
class WantedActivations:
    """The activations that a cache is to keep.

    Attributes:
        keys: key → "first", "last" or "mean" if only this vector of each example is kept, None for every position.
    """

    keys: Mapping[ActivationKey, str | None]
    capture: ActivationCapture
    dtype: Dtype

    def blocks(self, key: ActivationKey) -> Blocks:
        return self.capture.blocks(key.side, key.stack)


@dataclass(frozen=True)
class StoredActivation:
    """An activation as the manifest describes it; the names are those of `ActivationKey` and `WantedActivations`.

    Attributes:
        field: its column in the shards.
        path: the path of the list of blocks.
        axis: what its positions run along: "input", "decoder", "frames", or "all" (equally many in each example).
        width: numbers for each position.
    """

    field: str
    what: str
    layer: int
    path: str
    pooling: str | None
    axis: str
    width: int

    @property
    def along(self) -> str:
        """Its axis, or "vectors" if only one vector of each example is kept."""
        return "vectors" if self.pooling else self.axis

    @property
    def counts(self) -> str:
        """The column that holds how many positions each example has."""
        return f"positions_{self.along}"

    def __str__(self) -> str:
        where = "the embeddings" if self.layer == EMBEDDINGS else f"block {self.layer}"
        what = self.what if self.what == LAST_HIDDEN else f"{self.what} of {where}"
        return what + (f" ({_POOLED[self.pooling]})" if self.pooling else "")


class KeepActivations(Objective):
    """Keeps activations of the teacher by name, for students that are not known yet. It is not for training.

    Args:
        *keys: such as ("hidden", 3), ("hidden", -1) for the embeddings, "last_hidden", or an `ActivationKey`.

    >>> KeepActivations(("hidden", 3), "last_hidden").keys[0].layer
    3
    """

    def __init__(self, *keys: ActivationKey | tuple[str, int] | str) -> None:
        self.keys = tuple(ActivationKey(*((key,) if isinstance(key, str) else key)) for key in keys)

    def __repr__(self) -> str:
        return f"KeepActivations({', '.join(map(repr, self.keys))})"

    def bind(self, setup: ObjectiveSetup) -> None:
        """Raise SettingError unless the teacher has these activations."""
        assert setup.teacher is not None  # it was checked before
        for key in self.keys:
            if key.what not in _KEPT:
                hint = did_you_mean(key.what, _KEPT)
                raise SettingError(f"{key.what!r} cannot be kept. Allowed: {', '.join(_KEPT)}.{hint}")
            blocks = setup.teacher.blocks(key.side, key.stack)
            lowest = EMBEDDINGS if key.what == HIDDEN else 0
            if not lowest <= key.layer < blocks.length:
                raise SettingError(
                    f"{tuple(key)!r}: the teacher has blocks 0 to {blocks.length - 1}"
                    f"{' (-1: the embeddings)' if key.what == HIDDEN else ''} at {blocks.path!r}."
                )
        self.teacher_needs = Needs(activations=frozenset(self.keys))

    def __call__(
        self, student: Signals, teacher: Signals, task: Task, batch: Batch, *, progress: float = 0.0
    ) -> LossSum:
        raise SettingError(_NOT_FOR_TRAINING)

    def count(self, task: Task, batch: Batch) -> Tensor:
        raise SettingError(_NOT_FOR_TRAINING)


Objectives = Objective | Sequence[Objective] | Mapping[str, Objective]


def wanted_activations(
    capture: ActivationCapture | None, *, objectives: Objectives | None, student: Any, task: Task, dtype: Dtype
) -> WantedActivations | None:
    """Return what objectives read of this teacher, or None if they read nothing; raise if it cannot be kept."""
    match objectives:
        case None:
            given: list[Objective] = []
        case Objective():
            given = [objectives]
        case Mapping():
            given = list(objectives.values())
        case _:
            given = list(objectives)
    if not given:
        return None
    if capture is None:
        raise TeacherError("objectives= keeps activations, and this teacher shows none. Build the cache of one model.")
    if student is None and not all(isinstance(objective, KeepActivations) for objective in given):
        raise SettingError(
            "objectives=: the blocks that they read depend on the student. Pass student=, or name them: "
            'KeepActivations(("hidden", 3), ("hidden", 7)).'
        )
    of_student = capture if student is None else ActivationCapture(student, "student")
    keys: dict[tuple[str, int, str], ActivationKey] = {}  # an activation may have several keys: the first is used
    poolings: dict[ActivationKey, set[str | None]] = {}
    for objective in given:
        bound = copy.copy(objective)  # the user's objective stays unbound
        bound.bind(ObjectiveSetup(of_student, capture, task, student))
        for key in sorted(bound.teacher_needs.activations, key=str):
            if key.what == ATTENTION:
                raise SettingError(_NO_ATTENTION)
            kept = key._replace(layer=_layer(key))
            place = (kept.what, kept.layer, capture.blocks(kept.side, kept.stack).path)
            poolings.setdefault(keys.setdefault(place, kept), set()).add(objective.pools)
    in_order = sorted(poolings, key=lambda key: (key.side or "", key.stack or "", key.what, key.layer))
    one_way = {key: next(iter(poolings[key])) if len(poolings[key]) == 1 else None for key in in_order}
    return WantedActivations(one_way, capture, dtype)


def _layer(key: ActivationKey) -> int:
    """Return the layer of a key; what the head reads belongs to no block."""
    return 0 if key.what == LAST_HIDDEN else key.layer


def field_names(wanted: WantedActivations) -> list[str]:
    """Return a name for each activation: `hidden_3`, `hidden_embeddings`, `values_11`, `encoder_hidden_0`, …"""
    paths = list(dict.fromkeys(wanted.blocks(key).path for key in wanted.keys))
    names: list[str] = []
    for key in wanted.keys:
        blocks = wanted.blocks(key)
        layer = "embeddings" if key.layer == EMBEDDINGS else str(key.layer)
        name = key.what if key.what == LAST_HIDDEN else f"{key.what}_{layer}"
        side = "decoder" if blocks.of_decoder else next((s for s in SIDES if s in blocks.path), "stack")
        prefix = f"{side}_" if len(paths) > 1 else ""
        taken = f"{prefix}{name}" in names
        names.append(f"{prefix}{name}" + (f"_{paths.index(blocks.path)}" if taken else ""))
    return names


def describe_activations(
    wanted: WantedActivations, first: Mapping[StoredActivation, tuple[Tensor, np.ndarray]]
) -> Json:
    """Return the manifest's part on activations, from those of the first batch and the counts of its examples."""
    places = {*((key.side, key.stack) for key in wanted.keys), *((side, None) for side in (None, *SIDES))}
    stacks = []
    for side, stack in sorted(places, key=str):
        with contextlib.suppress(SettingError):  # the model has no such side
            blocks = vars(wanted.capture.blocks(side, stack))
            facts = {name: blocks[name] for name in ("path", "length", "width", "heads", "of_decoder")}
            stacks.append({"side": side, "stack": stack, **facts})
    return {
        "dtype": wanted.dtype,
        "kept": [asdict(activation) for activation in first],
        "positions": {activation.along: float(counts.mean()) for activation, (_, counts) in first.items()},
        "stacks": stacks,
    }


def stored_activations(description: Json | None) -> list[StoredActivation]:
    """Return the activations of a manifest's part on activations."""
    return [] if description is None else [StoredActivation(**kept) for kept in description["kept"]]


def encode_activation(rows: Tensor, kept: StoredActivation, dtype: Dtype) -> np.ndarray:
    """Return `[p d]` as it is written to the disk; raise if it is not finite, or not in the dtype."""
    if not bool(rows.isfinite().all()):
        raise TeacherError(
            f"the teacher's {kept} hold NaN or infinity. Check the input; a half-precision teacher may overflow: try "
            "teacher_dtype='float32' or 'bfloat16'."
        )
    instead = "Pass BuildOptions(activation_dtype='bfloat16') or 'float32'."
    return to_disk(rows, dtype, overflow=f"the teacher's {kept} reach {{}}. {instead}")


class CachedActivations:
    """What `ActivationCapture` knows of a teacher's blocks, from the manifest's part on activations."""

    def __init__(self, description: Json | None, *, start_token: int | None = None) -> None:
        self._description = description
        self.start_token = start_token
        self.kept = stored_activations(description)

    def blocks(self, side: Side | None = None, stack: str | None = None) -> Blocks:
        """Return what is known of a list of blocks, as `ActivationCapture.blocks`; raise TeacherError if nothing."""
        found = self._stack(side, stack)
        hidden = [kept for kept in self.kept if kept.path == found["path"] and kept.what in (HIDDEN, LAST_HIDDEN)]
        return Blocks(
            found["path"],
            (),
            found["length"],
            nn.Identity(),
            found["width"],
            found["heads"],
            of_decoder=found["of_decoder"],
            features={(kept.what, kept.layer): Features(2, kept.width) for kept in hidden},
        )

    def find(self, key: ActivationKey) -> StoredActivation:
        """Return where an activation is kept; raise TeacherError if it is not."""
        path = self._stack(key.side, key.stack)["path"]
        for kept in self.kept:
            if (kept.what, kept.layer, kept.path) == (key.what, _layer(key), path):
                return kept
        if key.what == ATTENTION:
            raise TeacherError(_NO_ATTENTION)
        missing = StoredActivation("", key.what, key.layer, path, None, "", 0)
        there = ", ".join(str(kept) for kept in self.kept if kept.path == path) or "nothing"
        raise TeacherError(f"the cache does not hold {missing} of {path!r}, only {there}. {_REBUILD}")

    def check(self, key: ActivationKey, pooling: str | None) -> StoredActivation:
        """Return where an activation is kept; raise TeacherError if it is not, or if it is pooled otherwise."""
        found = self.find(key)
        if found.pooling is not None and found.pooling != pooling:
            compared = f"the {_POOLED[pooling]}" if pooling else "every position"
            raise TeacherError(f"the cache holds {found}, and an objective compares {compared}. {_REBUILD}")
        return found

    def _stack(self, side: Side | None, stack: str | None) -> Mapping[str, Any]:
        if self._description is None:
            raise TeacherError(
                "an objective reads activations of the teacher, and the cache holds predictions only. Build it with "
                "TeacherCache.build(..., student=student, objectives=[...]), or use the live teacher."
            )
        stacks: list[Mapping[str, Any]] = self._description["stacks"]
        for known in stacks:
            if (known["side"], known["stack"]) == (side, stack) or (stack is not None and known["path"] == stack):
                return known
        paths = ", ".join(sorted({repr(known["path"]) for known in stacks}))
        raise TeacherError(
            f"the cache knows nothing of the teacher's blocks side={side!r}, stack={stack!r}, only {paths}. {_REBUILD}"
        )
