"""What a cache keeps of the inside of its teacher: which reads, of which blocks, and how objectives find them again.

How hidden states are laid down stands in `inside_layout.py`.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from hf_distill.errors import SettingError, TeacherError, did_you_mean
from hf_distill.models.blocks import SIDES, Blocks, Features
from hf_distill.models.capture import ActivationCapture
from hf_distill.objectives import Objective, ObjectiveSetup
from hf_distill.signals import ATTENTION, EMBEDDINGS, HIDDEN, LAST_HIDDEN, RELATED, ActivationKey
from hf_distill.tasks import Task
from hf_distill.teachers.load import DTYPE_ALIASES

KEPT = (HIDDEN, LAST_HIDDEN, *RELATED)
_POOLED = {
    "first": "first position of each example",
    "last": "last position of each example",
    "mean": "mean over each example",
}
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


@dataclass(frozen=True)
class WantedActivations:
    """What is to be read of the teacher.

    Attributes:
        reads: what → "first", "last", "mean" (of each example this vector alone), or None (every position).
        inside: the teacher's.
        dtype: on the disk.
    """

    reads: Mapping[ActivationKey, str | None]
    inside: ActivationCapture
    dtype: str

    def blocks(self, read: ActivationKey) -> Blocks:
        return self.inside.blocks(read.side, read.stack)


@dataclass(frozen=True)
class StoredActivation:
    """A read as the manifest describes it.

    Attributes:
        field: its column in the shards. what, layer: as `ActivationKey` has them.
        path: of the list of blocks.
        pools: see `WantedActivations`.
        axis: what its positions run along.
        width: numbers a position.
    """

    field: str
    what: str
    layer: int
    path: str
    pools: str | None
    axis: str
    width: int

    @property
    def along(self) -> str:
        """Its axis; "vectors" where one an example is kept."""
        return "vectors" if self.pools else self.axis

    @property
    def counts(self) -> str:
        """The column that says how many positions each example has."""
        return f"positions_{self.along}"

    def __str__(self) -> str:
        where = "the embeddings" if self.layer == EMBEDDINGS else f"block {self.layer}"
        what = self.what if self.what == LAST_HIDDEN else f"{self.what} of {where}"
        return what + (f" ({_POOLED[self.pools]})" if self.pools else "")


def wanted(
    inside: Any, *, objectives: Any, reads: Iterable[Any] | None, student: Any, task: Task, dtype: str
) -> WantedActivations | None:
    """What objectives will ask of this teacher, and what is named beside; None: nothing.

    Raises:
        SettingError: no student for the objectives; no such dtype or layer; attention maps.
        TeacherError: a teacher that shows nothing of its inside.
    """
    if dtype not in DTYPES:
        hint = did_you_mean(dtype, DTYPES, DTYPE_ALIASES)
        raise SettingError(f"inside_dtype={dtype!r}: allowed are {', '.join(DTYPES)}.{hint}")
    if not _listed(objectives) and not reads:
        return None
    if not isinstance(inside, ActivationCapture):
        raise TeacherError(
            "objectives= and reads= keep what blocks of a model compute, and this teacher shows nothing of its inside. "
            "Build the cache of one model, or leave them out."
        )
    found: dict[ActivationKey, set[str | None]] = {}
    for objective in _listed(objectives):
        for read in sorted(_asked_by(objective, inside, student, task), key=str):
            found.setdefault(read, set()).add(objective.pools)
    for read in reads or ():
        found.setdefault(ActivationKey(*((read,) if isinstance(read, str) else read)), set()).add(None)
    merged: dict[tuple[str, int, str], tuple[ActivationKey, set[str | None]]] = {}
    for read, pools in found.items():
        path = _checked(read, inside).path
        merged.setdefault((read.what, _layer(read), path), (read, set()))[1].update(pools)
    one_way = {
        read._replace(layer=_layer(read)): next(iter(pools)) if len(pools) == 1 else None
        for read, pools in merged.values()
    }
    return WantedActivations({read: one_way[read] for read in sorted(one_way, key=_in_order)}, inside, dtype)


def _listed(objectives: Any) -> list[Any]:
    """As `Blend` takes them: one, several, or by name."""
    if objectives is None:
        return []
    if isinstance(objectives, Mapping):
        return list(objectives.values())
    return list(objectives) if isinstance(objectives, Sequence) else [objectives]


def _asked_by(objective: Objective, inside: ActivationCapture, student: Any, task: Task) -> frozenset[ActivationKey]:
    if student is None:
        raise SettingError(
            "objectives=: which blocks of the teacher they match depends on the student. Pass student=, or name what "
            'is to be kept: reads=[("hidden", 3), ("hidden", 7)].'
        )
    bound = copy.copy(objective)  # what it learns of a build is no part of the user's
    bound.bind(ObjectiveSetup(ActivationCapture(student, "student"), inside, task, student))
    return bound.teacher_needs.activations


def _checked(read: ActivationKey, inside: ActivationCapture) -> Blocks:
    if read.what == ATTENTION:
        raise SettingError(
            "a cache keeps no attention maps: they take length² numbers a head of each layer, far more than all else. "
            "Use RelationMatch (queries, keys and values are kept) or HiddenMatch, or the live teacher."
        )
    if read.what not in KEPT:
        hint = did_you_mean(read.what, KEPT)
        raise SettingError(f"reads: {read.what!r} cannot be kept. Allowed: {', '.join(KEPT)}.{hint}")
    blocks = inside.blocks(read.side, read.stack)
    lowest = EMBEDDINGS if read.what == HIDDEN else 0
    if not lowest <= read.layer < blocks.length:
        raise SettingError(
            f"reads: {tuple(read)!r}: the teacher has blocks 0 to {blocks.length - 1}"
            f"{' (-1: the embeddings)' if read.what == HIDDEN else ''} at {blocks.path!r}."
        )
    return blocks


def _layer(read: ActivationKey) -> int:
    """What the head reads is of no block: whichever an objective names there."""
    return 0 if read.what == LAST_HIDDEN else read.layer


def _in_order(read: ActivationKey) -> tuple[str, str, str, int]:
    return (read.side or "", read.stack or "", read.what, read.layer)


def of_inside(wanted: WantedActivations, kept: Mapping[StoredActivation, Any]) -> dict[str, Any]:
    """What the manifest says: the reads, and of the blocks as much as objectives ask for.

    Args:
        kept: each read of the first batch, and the positions of its examples `[b]`.
    """
    named = {(read.side, read.stack) for read in wanted.reads}
    places = sorted({*named, *((side, None) for side in (None, *SIDES))}, key=str)
    stacks = [{"side": side, "stack": stack, **_plain(wanted.inside, side, stack)} for side, stack in places]
    return {
        "dtype": wanted.dtype,
        "kept": [asdict(one) for one in kept],
        "positions": {one.along: float(counts.mean()) for one, (_, counts) in kept.items()},
        "stacks": [one for one in stacks if "path" in one],
    }


def kept_reads(manifest: Mapping[str, Any] | None) -> list[StoredActivation]:
    """Of a manifest's part on the inside."""
    return [] if manifest is None else [StoredActivation(**one) for one in manifest["kept"]]


def by_axis(manifest: Mapping[str, Any] | None) -> dict[str, list[StoredActivation]]:
    """What each is kept along → the reads."""
    found: dict[str, list[StoredActivation]] = {}
    for one in kept_reads(manifest):
        found.setdefault(one.along, []).append(one)
    return found


def itemsize(dtype: str) -> int:
    return DTYPES[dtype].itemsize


def _plain(inside: ActivationCapture, side: str | None, stack: str | None) -> dict[str, Any]:
    try:
        blocks = inside.blocks(side, stack)
    except SettingError:
        return {}  # it has no such side
    return {name: getattr(blocks, name) for name in ("path", "length", "width", "heads", "of_decoder")}


def field_names(wanted: WantedActivations) -> list[str]:
    """A name for each read: `hidden_3`, `hidden_embeddings`, `values_11`, `encoder_hidden_0`, …"""
    paths = list(dict.fromkeys(wanted.blocks(read).path for read in wanted.reads))
    names = []
    for read in wanted.reads:
        blocks = wanted.blocks(read)
        layer = "embeddings" if read.layer == EMBEDDINGS else str(read.layer)
        name = read.what if read.what == LAST_HIDDEN else f"{read.what}_{layer}"
        side = "decoder" if blocks.of_decoder else next((s for s in SIDES if s in blocks.path), "stack")
        prefix = f"{side}_" if len(paths) > 1 else ""
        taken = f"{prefix}{name}" in names
        names.append(f"{prefix}{name}" + (f"_{paths.index(blocks.path)}" if taken else ""))
    return names


class CachedInside:
    """The stored activations of a teacher: what `ActivationCapture` knows of blocks, without modules.

    Args:
        manifest: its part on activations, or None if there are none.
        start_token: as `ActivationCapture.start_token`.
    """

    def __init__(self, manifest: Mapping[str, Any] | None, *, start_token: int | None = None) -> None:
        self._manifest = manifest
        self.start_token = start_token
        self.kept = kept_reads(manifest)

    def blocks(self, side: str | None = None, stack: str | None = None) -> Blocks:
        """As `ActivationCapture.blocks`.

        Raises:
            TeacherError: nothing of the inside is kept, or nothing of this side.
        """
        one = self._stack(side, stack)
        hidden = [kept for kept in self.kept if kept.path == one["path"] and kept.what in (HIDDEN, LAST_HIDDEN)]
        return Blocks(
            one["path"],
            (),
            one["length"],
            nn.Identity(),
            one["width"],
            one["heads"],
            of_decoder=one["of_decoder"],
            features={(kept.what, kept.layer): Features(2, kept.width) for kept in hidden},
        )

    def find(self, read: ActivationKey) -> StoredActivation:
        """Where a read is kept.

        Raises:
            TeacherError: it is not.
        """
        path = self._stack(read.side, read.stack)["path"]
        for one in self.kept:
            if (one.what, one.layer, one.path) == (read.what, _layer(read), path):
                return one
        if read.what == ATTENTION:
            raise TeacherError(
                "a cached teacher shows no attention maps: they take length² numbers a head of each layer. Use "
                "RelationMatch or HiddenMatch, or the live teacher."
            )
        asked = StoredActivation("", read.what, read.layer, path, None, "", 0)
        raise TeacherError(
            f"the cache holds no {asked} of its teacher; of {path!r} it holds {self._there(path)}. {_WAY}"
        )

    def check(self, read: ActivationKey, pools: str | None) -> StoredActivation:
        """Where a read is kept for this use of it.

        Raises:
            TeacherError: of each example another vector is kept than is asked for.
        """
        found = self.find(read)
        if found.pools is not None and found.pools != pools:
            asked = f"the {_POOLED[pools]}" if pools else "every position"
            raise TeacherError(f"the cache holds {found}, and an objective compares {asked}. {_WAY}")
        return found

    def _there(self, path: str) -> str:
        return ", ".join(str(one) for one in self.kept if one.path == path) or "nothing"

    def _stack(self, side: str | None, stack: str | None) -> Mapping[str, Any]:
        if self._manifest is None:
            raise TeacherError(
                "an objective reads the inside of the teacher, and the cache holds its predictions alone. "
                "Build it with what is to be kept, TeacherCache.build(..., student=student, objectives=[...]), or use "
                "the live teacher."
            )
        stacks: list[Mapping[str, Any]] = self._manifest["stacks"]
        for one in stacks:
            if (one["side"], one["stack"]) == (side, stack) or (stack is not None and one["path"] == stack):
                return one
        known = ", ".join(sorted({repr(one["path"]) for one in stacks}))
        raise TeacherError(
            f"the cache knows nothing of the teacher's blocks side={side!r}, stack={stack!r}, only {known}. {_WAY}"
        )


_WAY = "Build a cache with the objectives of this training (objectives=, student=), or use the live teacher."
