"""HiddenMatch and CosineEmbedding, and the learned projections from the student's width to the teacher's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import Tensor, nn

from hf_distill.errors import SettingError, check_choice
from hf_distill.functional.features import DISTANCE_ALIASES, DISTANCES, Distance, DistanceName
from hf_distill.functional.properties import check_settings
from hf_distill.layer_map import Link
from hf_distill.models.blocks import Blocks
from hf_distill.objectives.base import ObjectiveSetup, like_student
from hf_distill.objectives.layers import LayerObjective, Layers, ValidPositions
from hf_distill.schedules import Schedule
from hf_distill.signals import EMBEDDINGS, HIDDEN, LAST_HIDDEN, ActivationKey, Side, Signals
from hf_distill.tasks import Batch, Task
from hf_distill.tasks.regression import POOLING_ALIASES

Projection: TypeAlias = Literal["auto", "linear", "shared", "none"]
PROJECTIONS: tuple[Projection, ...] = get_args(Projection)


class Projections(nn.Module):
    """Learned projections `[n d_student]` → `[n d_teacher]`, one for each key or one for all.

    FitNets (Romero et al. 2015, section 2.2) learn one for each pair of layers; the code of TinyBERT (Jiao et al. 2020)
    shares one. They have no bias, and are trained with the student without being part of it.

    Args:
        widths: the widths of student and teacher for each key; None if a width is not known.
        kind: "auto" (one for each key whose widths differ), "linear" (one for each key), "shared" (one for all keys, if
            widths differ), "none".
        seed: for the initial values; the global random generators are not used.

    Raises:
        SettingError: if widths differ with "none", differ between keys with "shared", or are not known.
    """

    def __init__(self, widths: Mapping[str, tuple[int | None, int | None]], *, kind: str, seed: int) -> None:
        super().__init__()
        check_choice("projection", kind, PROJECTIONS)
        self._kind = kind
        self.matrices = nn.ModuleDict()
        wanted = {key: pair for key, pair in widths.items() if kind == "linear" or pair[0] != pair[1]}
        for ours, theirs in wanted.values():
            _check_widths(ours, theirs, kind)
        if kind == "shared" and wanted:
            pairs = sorted(set(widths.values()), key=str)
            if len(pairs) > 1:
                raise SettingError(
                    f"projection='shared' needs one pair of widths for all layers, and there are {pairs} (student, "
                    "teacher). Use projection='auto'."
                )
            wanted = {"all": pairs[0]}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            for key, (ours, theirs) in wanted.items():
                assert ours is not None and theirs is not None  # checked above
                self.matrices[key] = nn.Linear(ours, theirs, bias=False)

    def forward(self, rows: Tensor, key: str) -> Tensor:
        name = "all" if self._kind == "shared" else key
        if name not in self.matrices:
            return rows
        matrix = self.matrices[name]
        assert isinstance(matrix, nn.Linear)
        return matrix(rows.to(matrix.weight.dtype))


def _check_widths(ours: int | None, theirs: int | None, kind: str) -> None:
    if kind == "none":
        raise SettingError(
            f"the student's hidden states are {ours} wide, the teacher's {theirs}, and projection='none'. Use "
            "projection='auto' (learned), or RelationMatch."
        )
    if ours is None or theirs is None:
        raise SettingError(
            f"a projection needs the widths of the hidden states (student: {ours}, teacher: {theirs}). Set hidden_size "
            "in the config, or pass projection='none'."
        )


Position: TypeAlias = Literal["first", "last"]
POSITIONS: tuple[Position, ...] = get_args(Position)


class HiddenMatch(LayerObjective):
    """A distance between the hidden states of student and teacher, at every position except padding.

    Layer k is the output of block k. This is transformers' `hidden_states[k + 1]`, except that models with a norm after
    their last block (GPT-2, Llama, T5, Whisper) report the last one after that norm; here it is taken before. Only the
    matched layers are kept. The loss is the sum over pairs of layers of weight · mean over positions. In the feature
    maps of convolutional image models every pixel is a position and the channels are its features.

    FitNets (Romero et al. 2015, section 2.2), PKD (Sun et al. 2019, section 3: `distance="normalized_squared",
    pooling="first"`), TinyBERT (Jiao et al. 2020, section 3.1, equations 8 and 9), DistilHuBERT (Chang et al. 2022).
    The papers average over padding too; here padding is left out.

    Args:
        layers: see `LayerObjective`; None, with `embeddings=True`, matches only the embeddings.
        distance: a name in `hf_distill.functional.features.DISTANCES`.
        distance_kwargs: keyword arguments of the distance.
        projection: "auto" (a learned one for each pair whose widths differ), "linear" (for each pair), "shared" (one
            for all pairs), "none".
        pooling: "first" ([CLS]) or "last" to compare one position of each example; None compares all valid ones.
        embeddings: whether to match the inputs of the first blocks too.

    Raises:
        SettingError: for an unknown distance, setting or layer, or widths that differ without a projection.

    >>> from transformers import BertConfig, BertForSequenceClassification as Bert
    >>> from hf_distill import Distiller
    >>> def make(width):
    ...     return Bert(BertConfig(hidden_size=width, num_hidden_layers=2, num_attention_heads=1, vocab_size=9))
    >>> student, teacher = make(4), make(8)
    >>> distiller = Distiller(student, teacher, objectives=HiddenMatch("even", weight=10.0))
    >>> batch = {"input_ids": torch.tensor([[1, 2]]), "labels": torch.tensor([0])}
    >>> sorted(distiller(student, batch).terms)
    ['hidden', 'labels', 'logits']
    """

    paper = "romero2015fitnets"
    default_name = "hidden"
    reads = (HIDDEN,)
    shown: tuple[str, ...] = ("distance", "distance_kwargs", "projection", "pooling", "embeddings", "side")

    def __init__(
        self,
        layers: Layers | None = "even",
        *,
        distance: DistanceName = "mean_squared",
        distance_kwargs: Mapping[str, float] | None = None,
        projection: Projection = "auto",
        pooling: Position | None = None,
        embeddings: bool = False,
        weight: float | Schedule = 1.0,
        side: Side | None = None,
        name: str | None = None,
        student_stack: str | None = None,
        teacher_stack: str | None = None,
    ) -> None:
        if layers is None and not embeddings:
            raise SettingError("HiddenMatch: layers=None matches nothing; it is for embeddings=True alone.")
        super().__init__(
            layers if layers is not None else [(0, 0)],
            weight=weight,
            side=side,
            name=name,
            student_stack=student_stack,
            teacher_stack=teacher_stack,
        )
        if pooling is not None:
            check_choice("HiddenMatch: pooling", pooling, POSITIONS, POOLING_ALIASES)
        self.distance = distance
        self.distance_kwargs = dict(distance_kwargs or {})
        self.projection = projection
        self.pooling = self.pools = pooling
        self.embeddings = embeddings
        self._blocks_too = layers is not None
        self._function = _checked_distance(distance, self.distance_kwargs)

    def check(self, student: Blocks, teacher: Blocks, setup: ObjectiveSetup) -> None:
        what = self.reads[0]
        widths = {
            _key(link): (student.width_of(link.student, what), teacher.width_of(link.teacher, what))
            for link in self._links()
        }
        projections = Projections(widths, kind=self.projection, seed=setup.seed)
        self.learned = like_student(projections, setup.model) if len(projections.matrices) else None

    def count(self, task: Task, batch: Batch) -> Tensor:
        if self.pooling is None:
            return self._positions.count(batch)
        self._positions.check_not_packed(batch, f"pooling={self.pooling!r}")
        return self._positions.count_examples(batch)

    def of_link(self, student: Signals, teacher: Signals, link: Link, kept: ValidPositions) -> Tensor:
        ours, theirs = self._activations(self.reads[0], student, teacher, link)
        paired = self.pooling is None
        kept.check(ours.shape[:2], theirs.shape[:2], "hidden states", link, paired=paired)
        if paired:
            share, q, p = kept.share(ours.shape[1]), kept.vectors(ours), kept.vectors(theirs)
        else:
            share, q, p = 1.0, kept.pooled(ours, self.pooling or ""), kept.pooled(theirs, self.pooling or "")
        if self.learned is not None:
            q = self.learned(q, _key(link))
        values = self._function(q, p.to(q.dtype) if p.dtype == torch.float64 else p, **self.distance_kwargs)
        return values.sum() * share

    def _links(self) -> tuple[Link, ...]:
        links = super()._links() if self._blocks_too else ()
        return (Link(EMBEDDINGS, EMBEDDINGS), *links) if self.embeddings else links


class CosineEmbedding(HiddenMatch):
    """1 − cosine of the last hidden states (the input of the head), at every position except padding.

    DistilBERT (Sanh et al. 2019, section 2: the cosine embedding loss, "to align the directions of the student and
    teacher hidden states vectors"). Their code takes the mean over attended positions as well.

    Args:
        projection: as in `HiddenMatch`; the paper has equal widths and "none".
    """

    paper = "sanh2019distilbert"
    default_name = "cosine"
    reads = (LAST_HIDDEN,)
    shown = ("projection", "side")

    def __init__(
        self,
        *,
        projection: Projection = "auto",
        weight: float | Schedule = 1.0,
        side: Side | None = None,
        name: str | None = None,
        student_stack: str | None = None,
        teacher_stack: str | None = None,
    ) -> None:
        super().__init__(
            [(-1, -1)],
            distance="cosine",
            projection=projection,
            weight=weight,
            side=side,
            name=name,
            student_stack=student_stack,
            teacher_stack=teacher_stack,
        )

    def _read(self, what: str, layer: int, whose: int) -> ActivationKey:
        return ActivationKey(what, 0, self.side, self.stacks[whose])


def _key(link: Link) -> str:
    return "embeddings" if link.student == EMBEDDINGS else f"{link.student}_{link.teacher}"


def _checked_distance(name: str, settings: Mapping[str, Any]) -> Distance:
    check_choice("HiddenMatch: distance", name, DISTANCES, DISTANCE_ALIASES)
    function = DISTANCES[name]
    check_settings(f"HiddenMatch: {name}", function, settings)
    function(torch.zeros(1, 2), torch.zeros(1, 2), **settings)  # raises now if a value is not allowed
    return function
