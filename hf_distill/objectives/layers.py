"""LayerObjective: the base class of objectives that compare the blocks of the models, layer by layer."""

from __future__ import annotations

import functools
from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hf_distill.errors import DataError, SettingError, TeacherError, is_number
from hf_distill.functional.rows import in_full_precision
from hf_distill.layer_map import LayerMap, Link, MapName, resolved_map
from hf_distill.models.blocks import Blocks
from hf_distill.models.capture import AttentionRecord, layerdrop_of
from hf_distill.models.positions import PositionRule, check_positions
from hf_distill.objectives.base import Objective, ObjectiveSetup
from hf_distill.schedules import PROGRESS, Schedule, constant
from hf_distill.signals import EMBEDDINGS, HIDDEN, LAST_HIDDEN, ActivationKey, LossSum, Needs, Side, Signals
from hf_distill.tasks import Batch, Task
from hf_distill.tasks.base import batch_size

Layers = MapName | LayerMap | Sequence[tuple[int, int] | tuple[int, int, float]]


class LayerObjective(Objective):
    """An objective that compares what blocks compute; a subclass says which activations, and how.

    Its term is a mean over positions (of the whole optimizer step), except with a CTC head whose own loss is a sum
    over utterances (`ctc_loss_reduction="sum"`): there all terms are sums, so that their ratio does not depend on the
    batch size. The trainer works on a copy; it is `trainer.distiller.objectives[name]`.

    Args:
        layers: "even", "first", "last", "first_last" or "skip" (a `LayerMap` of all student blocks), a `LayerMap`, or
            pairs (student, teacher) or (student, teacher, weight); negative ones count from the end.
        weight: weight of the term in the loss, a number of at least 0 or a schedule.
        side: "encoder" or "decoder" of an encoder-decoder; None means its decoder.
        name: name of the term; None means that of the class.
        student_stack: path of the student's list of blocks, if it is not found automatically.
        teacher_stack: the same for the teacher.
    """

    default_name = "inside"
    reads: tuple[str, ...] = ()
    shown: tuple[str, ...] = ()
    needs_same_inputs = True

    def __init__(
        self,
        layers: Layers,
        *,
        weight: float | Schedule,
        side: Side | None,
        name: str | None,
        student_stack: str | None = None,
        teacher_stack: str | None = None,
    ) -> None:
        self.layers = layers
        self.weight = checked_weight(type(self).__name__, weight)
        self.side = side
        self.name = name or self.default_name
        self.stacks = student_stack, teacher_stack
        self.layer_map: LayerMap | None = None
        self.needs = self.teacher_needs = Needs()
        self.learned: nn.Module | None = None

    def bind(self, setup: ObjectiveSetup) -> None:
        """Find and pair the blocks of both models, and check that they can be compared.

        Raises:
            SettingError: if this student cannot be compared in this way.
            TeacherError: if this teacher cannot.
        """
        if setup.teacher is None:
            raise TeacherError(
                f"{type(self).__name__} needs the activations of the teacher. Use a model, or a cache of them."
            )
        ours = setup.student.blocks(self.side, self.stacks[0])
        theirs = setup.teacher.blocks(self.side, self.stacks[1])
        try:
            self.layer_map = resolved_map(self.layers, ours.length, theirs.length)
        except SettingError as error:
            raise SettingError(f"{type(self).__name__}: layers: {error}") from error
        _check_no_layerdrop(self, ours)
        _check_whole_heads(self, ours, theirs)
        self._positions = PositionRule(setup.model, setup.task, of_decoder=ours.of_decoder)
        self.needs = Needs(activations=frozenset(self._read(what, link.student, 0) for what, link in self._wanted()))
        self.teacher_needs = Needs(
            activations=frozenset(self._read(what, link.teacher, 1) for what, link in self._wanted())
        )
        self.check(ours, theirs, setup)

    def check(self, student: Blocks, teacher: Blocks, setup: ObjectiveSetup) -> None:
        """Check that the blocks can be compared, and make the learned parameters."""

    def count(self, task: Task, batch: Batch) -> Tensor:
        return self._positions.count(batch)

    def __call__(
        self, student: Signals, teacher: Signals, task: Task, batch: Batch, *, progress: float = 0.0
    ) -> LossSum:
        kept = ValidPositions(self._positions.keep(batch), self._positions.segments(batch), batch_size(batch))
        first = next(iter(student.activations.values()))
        device = (first.queries if isinstance(first, AttentionRecord) else first).device
        with torch.autocast(device.type, enabled=False):  # autocast would multiply in half precision
            parts = [link.weight * self.of_link(student, teacher, link, kept) for link in self._links()]
        total = torch.stack(parts).sum()
        return LossSum(total, self.count(task, batch).to(total.device))

    @abstractmethod
    def of_link(self, student: Signals, teacher: Signals, link: Link, kept: ValidPositions) -> Tensor:
        """Return the term of one pair of blocks, summed over the valid positions, a scalar."""

    def _links(self) -> tuple[Link, ...]:
        assert self.layer_map is not None  # `bind` comes first
        return self.layer_map.links

    def _activations(self, what: str, student: Signals, teacher: Signals, link: Link) -> tuple[Any, Any]:
        """Return one activation of a pair of blocks: a tensor, or an `AttentionRecord`."""
        ours, theirs = self._read(what, link.student, 0), self._read(what, link.teacher, 1)
        return student.activations[ours], teacher.activations[theirs]

    def _wanted(self) -> list[tuple[str, Link]]:
        return [(what, link) for what in self.reads for link in self._links()]

    def _read(self, what: str, layer: int, whose: int) -> ActivationKey:
        return ActivationKey(what, layer, self.side, self.stacks[whose])

    def __repr__(self) -> str:
        knobs = [f"{knob}={getattr(self, knob)!r}" for knob in self.shown if getattr(self, knob) not in (None, {})]
        layers = repr(self.layers) if self.layer_map is None else str(self.layer_map)
        inner = ", ".join([f"layers {layers}", *knobs])
        return f"{type(self).__name__}({inner})"


def where(what: str, link: Link, whose: str) -> str:
    """Return the words that name a pair of layers in messages."""
    layer = link.student if whose == "student" else link.teacher
    return f"{what} of {'the embeddings' if layer == EMBEDDINGS else f'block {layer}'}"


def _check_no_layerdrop(objective: LayerObjective, student: Blocks) -> None:
    """Raise if LayerDrop may skip a block whose attention is compared; a skipped block has no attention."""
    if set(objective.reads) <= {HIDDEN, LAST_HIDDEN}:
        return
    rate = layerdrop_of(student.holder)
    if rate:
        raise SettingError(
            f"{type(objective).__name__}: the student skips blocks at random (layerdrop={rate}), and a skipped block "
            f"has no {objective.reads[0]}. Load it with layerdrop=0 (or encoder_layerdrop=0, decoder_layerdrop=0), or "
            "use HiddenMatch."
        )


def _check_whole_heads(objective: LayerObjective, student: Blocks, teacher: Blocks) -> None:
    if set(objective.reads) <= {HIDDEN, LAST_HIDDEN}:
        return
    for blocks, whose in ((student, "student"), (teacher, "teacher")):
        if blocks.split_heads:
            raise SettingError(
                f"{type(objective).__name__}: tensor parallelism splits the {whose}'s heads over processes. Use "
                "HiddenMatch, or data parallelism."
            )


def checked_weight(what: str, weight: float | Schedule) -> Schedule:
    """Return a weight as a schedule; raise SettingError if it is below 0."""
    if not callable(weight) and not is_number(weight):
        raise SettingError(f"{what}: weight={weight!r}. Give a number of at least 0, or a function of progress 0 → 1.")
    schedule = weight if callable(weight) else constant(float(weight))
    for found in map(schedule, PROGRESS):
        if not 0 <= found < float("inf"):
            raise SettingError(f"{what}: weight={found!r}. It must be at least 0 and finite, at every moment.")
    return schedule


class ValidPositions:
    """The valid positions of a batch, as a mask and as indices; each is computed once, as it waits for the device."""

    def __init__(self, mask: Tensor | None, segments: Tensor | None, examples: int) -> None:
        self.mask = mask
        self.segments = segments
        self.examples = examples

    def check(
        self, ours: tuple[int, ...], theirs: tuple[int, ...], what: str, link: Link, *, paired: bool = True
    ) -> None:
        """Raise DataError if the positions of the activations differ from the batch's, or between the models.

        Args:
            ours: the shape of the student's activation, up to its positions.
            theirs: that of the teacher's.
            what: the name of the activation, for the message.
            link: the pair of blocks.
            paired: whether positions are compared one with one.
        """
        for shape, whose in ((ours, "student"), (theirs, "teacher")):
            check_positions(self.mask, shape, examples=self.examples, whose=whose, what=where(what, link, whose))
        if paired and tuple(ours) != tuple(theirs):  # no mask: images, or recordings of equal length
            raise DataError(
                f"{where(what, link, 'student')} of the student have {ours[1]} positions, "
                f"{where(what, link, 'teacher')} of the teacher {theirs[1]}. Pair blocks of one resolution "
                "(layers=[(student, teacher), ...]), use images of one size, or SimilarityMatch."
            )

    @functools.cached_property
    def _positions(self) -> Tensor:
        assert self.mask is not None
        return self.mask.flatten().nonzero().squeeze(-1)

    @functools.cached_property
    def _examples(self) -> Tensor:
        assert self.mask is not None
        return self.mask.any(-1).nonzero().squeeze(-1)

    def share(self, positions: int) -> float:
        """Return the weight of a position (see `PositionRule.count`): without a mask each example counts as one."""
        return 1.0 if self.mask is not None else 1 / positions

    def vectors(self, x: Tensor) -> Tensor:
        """Return the vectors `[n d]` at the valid positions of `[b t d]`."""
        return x.flatten(0, 1) if self.mask is None else x.flatten(0, 1).index_select(0, self._positions)

    def pooled(self, x: Tensor, how: str) -> Tensor:
        """Return the mean, first or last vector `[m d]` of the valid positions of each example in `[b t d]`."""
        x = in_full_precision(x)
        if self.mask is None:
            return x.mean(1) if how == "mean" else x[:, 0] if how == "first" else x[:, -1]
        x, keep = x.index_select(0, self._examples), self.mask.index_select(0, self._examples)
        if how == "mean":
            return x.masked_fill(~keep[..., None], 0).sum(1) / keep.sum(1, keepdim=True)
        positions = torch.arange(keep.shape[1], device=x.device)
        chosen = torch.where(keep, positions, keep.shape[1]).amin(1) if how == "first" else (keep * positions).amax(1)
        return x[torch.arange(x.shape[0], device=x.device), chosen]
