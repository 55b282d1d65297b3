"""LayerMap: which student layer goes with which teacher layer, to start a student and to supervise it.

Layers are the blocks, counted from 0; the embeddings are not a layer. The map that starts a student and the
map that supervises it may differ (Distil-Whisper starts from the teacher's first and last layer, and matches others).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, TypeAlias, get_args

from hf_distill.errors import SettingError, did_you_mean, is_number, is_whole


class Link(NamedTuple):
    """A student layer, a teacher layer, and the weight of this link."""

    student: int
    teacher: int
    weight: float = 1.0


@dataclass(frozen=True)
class LayerMap:
    """Links between the layers of a student and those of a teacher.

    A student layer may have several links (many teacher layers to one), or none (it is then not supervised). `inherit`
    needs exactly one for each student layer, see `sources`.

    >>> print(LayerMap.even(6, 24))
    6 of 24 layers: 0←0 1←5 2←9 3←14 4←18 5←23
    """

    student_layers: int
    teacher_layers: int
    links: tuple[Link, ...]

    def __post_init__(self) -> None:
        _check_count("student_layers", self.student_layers)
        _check_count("teacher_layers", self.teacher_layers)
        if not self.links:
            raise SettingError("LayerMap: the map is empty. Give at least one (student layer, teacher layer).")
        links: dict[tuple[int, int], Link] = {}
        for link in self.links:
            if not isinstance(link, Sequence) or len(link) not in (2, 3):
                raise SettingError(f"LayerMap: {link!r} is no link. Give (student layer, teacher layer[, weight]).")
            student, teacher, weight = Link(*link)
            student = _resolved("student", student, self.student_layers)
            teacher = _resolved("teacher", teacher, self.teacher_layers)
            if not is_number(weight) or not 0 < weight < math.inf:
                raise SettingError(f"LayerMap: link {student}←{teacher} has weight {weight!r}. Give a number above 0.")
            if (student, teacher) in links:
                raise SettingError(f"LayerMap: student layer {student} is linked to teacher layer {teacher} twice.")
            links[student, teacher] = Link(student, teacher, float(weight))
        object.__setattr__(self, "links", tuple(sorted(links.values())))

    @classmethod
    def even(cls, student_layers: int, teacher_layers: int) -> LayerMap:
        """Return evenly spaced layers, including the first and the last.

        Student layer i of m goes with teacher layer i·(n-1)/(m-1), rounded to the nearest, or to the higher of two. A
        single student layer goes with the first, which reads the embeddings.

        >>> LayerMap.even(3, 12).sources(), LayerMap.even(1, 6).sources()
        ((0, 6, 11), (0,))
        """
        _check_sizes("even", student_layers, teacher_layers)
        steps = max(student_layers - 1, 1)
        chosen = [(2 * i * (teacher_layers - 1) + steps) // (2 * steps) for i in range(student_layers)]
        return cls.of(chosen, teacher_layers)

    @classmethod
    def first(cls, student_layers: int, teacher_layers: int) -> LayerMap:
        """Return the teacher's first layers: 3 of 12 are 0, 1, 2."""
        _check_sizes("first", student_layers, teacher_layers)
        return cls.of(range(student_layers), teacher_layers)

    @classmethod
    def last(cls, student_layers: int, teacher_layers: int) -> LayerMap:
        """Return the teacher's last layers: 3 of 12 are 9, 10, 11."""
        _check_sizes("last", student_layers, teacher_layers)
        return cls.of(range(teacher_layers - student_layers, teacher_layers), teacher_layers)

    @classmethod
    def first_last(cls, student_layers: int, teacher_layers: int) -> LayerMap:
        """Return half from the teacher's beginning (one more of an odd number) and half from its end.

        >>> LayerMap.first_last(2, 32).sources(), LayerMap.first_last(3, 12).sources()
        ((0, 31), (0, 1, 11))
        """
        _check_sizes("first_last", student_layers, teacher_layers)
        from_end = student_layers // 2
        chosen = [*range(student_layers - from_end), *range(teacher_layers - from_end, teacher_layers)]
        return cls.of(chosen, teacher_layers)

    @classmethod
    def skip(cls, student_layers: int, teacher_layers: int, *, every: int | None = None) -> LayerMap:
        """Return the last layer of every k: student layer i goes with teacher layer (i+1)·k - 1 (TinyBERT, PKD-skip).

        `every` is k; the default is the largest that fits, teacher_layers // student_layers.

        >>> LayerMap.skip(4, 12).sources(), LayerMap.skip(4, 12, every=2).sources()
        ((2, 5, 8, 11), (1, 3, 5, 7))
        """
        _check_sizes("skip", student_layers, teacher_layers)
        largest = teacher_layers // student_layers
        every = largest if every is None else every
        if not is_whole(every) or not 1 <= every <= largest:
            sizes = f"{student_layers} student layers and {teacher_layers} teacher layers"
            raise SettingError(f"LayerMap.skip: every={every!r}. {sizes} allow whole numbers from 1 to {largest}.")
        return cls.of([(i + 1) * every - 1 for i in range(student_layers)], teacher_layers)

    @classmethod
    def of(cls, layers: Iterable[int], teacher_layers: int) -> LayerMap:
        """Return the map of these teacher layers to the student's in order; negative ones count from the end.

        A repeated teacher layer raises, since it is mostly a mistake (of 4 layers, 3 and -1 are the same). `pairs`
        allows it.

        >>> LayerMap.of([0, -2, -1], 12).sources()
        (0, 10, 11)
        """
        _check_count("teacher_layers", teacher_layers)
        given = list(layers)
        seen: dict[int, int] = {}
        for layer in given:
            teacher = _resolved("teacher", layer, teacher_layers)
            if teacher in seen:
                twice = f"teacher layer {teacher} is named twice (as {seen[teacher]} and {layer})"
                raise SettingError(f"layers={given}: {twice}. To repeat one, use LayerMap.pairs.")
            seen[teacher] = layer
        links = tuple(Link(student, teacher) for student, teacher in enumerate(given))
        return cls(len(given) or 1, teacher_layers, links)

    @classmethod
    def pairs(
        cls, links: Sequence[tuple[int, int] | tuple[int, int, float]], student_layers: int, teacher_layers: int
    ) -> LayerMap:
        """Return the map with these links: (student, teacher) or (student, teacher, weight), negative from the end.

        >>> LayerMap.pairs([(0, 5), (1, 10, 0.5), (1, -1, 0.5)], 2, 12).of_student(1)
        (Link(student=1, teacher=10, weight=0.5), Link(student=1, teacher=11, weight=0.5))
        """
        return cls(student_layers, teacher_layers, tuple(links))  # type: ignore[arg-type]  # made into Links there

    def of_student(self, layer: int) -> tuple[Link, ...]:
        """Return the links of one student layer, possibly none."""
        layer = _resolved("student", layer, self.student_layers)
        return tuple(link for link in self.links if link.student == layer)

    def sources(self) -> tuple[int, ...]:
        """Return the teacher layer of each student layer, in order; raise SettingError if one has none or several."""
        for layer in range(self.student_layers):
            found = ", ".join(str(link.teacher) for link in self.of_student(layer))
            if not found.isdecimal():
                layers = f"layers {found}" if found else "no layer"
                problem = (
                    f"student layer {layer} goes with {layers} of the teacher; to copy layers it needs exactly one"
                )
                raise SettingError(f"{problem}. The map is: {self}")
        return tuple(link.teacher for link in self.links)

    def table(self) -> str:
        """Return a table with a row for each student layer.

        >>> print(LayerMap.pairs([(0, 1), (1, 2, 0.5), (1, 3, 0.5)], 3, 4).table())
        student  teacher
              0  1
              1  2 (×0.5), 3 (×0.5)
              2  -
        """
        teachers = {layer: ", ".join(map(_teacher, self.of_student(layer))) for layer in range(self.student_layers)}
        return "\n".join(["student  teacher", *(f"{layer:>7}  {found or '-'}" for layer, found in teachers.items())])

    def __str__(self) -> str:
        links = " ".join(f"{link.student}←{_teacher(link).replace(' ', '')}" for link in self.links)
        return f"{self.student_layers} of {self.teacher_layers} layers: {links}"


MapName: TypeAlias = Literal["even", "first", "last", "first_last", "skip"]
NAMED: tuple[MapName, ...] = get_args(MapName)


def resolved_map(layers: object, student_layers: int, teacher_layers: int) -> LayerMap:
    """Return the map that is given as the name of a constructor, as pairs, or as a `LayerMap`.

    Raises:
        SettingError: if the name is unknown, the map is for other numbers of layers, or the pairs are not valid.

    >>> print(resolved_map([(-1, -1)], 2, 12))
    2 of 12 layers: 1←11
    """
    if isinstance(layers, LayerMap):
        if (layers.student_layers, layers.teacher_layers) != (student_layers, teacher_layers):
            sizes = f"{layers.student_layers} student and {layers.teacher_layers} teacher layers"
            raise SettingError(f"the map is for {sizes}; there are {student_layers} and {teacher_layers}: {layers}")
        return layers
    if isinstance(layers, str):
        if layers not in NAMED:
            hint = did_you_mean(layers, NAMED)
            raise SettingError(f"{layers!r}: no such map. Allowed: {', '.join(NAMED)}, a LayerMap, or pairs.{hint}")
        made: LayerMap = getattr(LayerMap, layers)(student_layers, teacher_layers)
        return made
    if isinstance(layers, Sequence):
        return LayerMap.pairs(layers, student_layers, teacher_layers)
    raise SettingError(f"{layers!r}: give {', '.join(NAMED)}, a LayerMap, or pairs (student layer, teacher layer).")


def _teacher(link: Link) -> str:
    return str(link.teacher) if link.weight == 1 else f"{link.teacher} (×{link.weight:g})"


def _check_count(name: str, count: int) -> None:
    if not is_whole(count) or count < 1:
        raise SettingError(f"{name}={count!r}: give a whole number of layers, at least 1.")


def _check_sizes(constructor: str, student_layers: int, teacher_layers: int) -> None:
    _check_count("student_layers", student_layers)
    _check_count("teacher_layers", teacher_layers)
    if student_layers > teacher_layers:
        raise SettingError(
            f"LayerMap.{constructor}: {student_layers} student layers cannot be taken from {teacher_layers} teacher "
            "layers, each once. Take fewer, or repeat layers with LayerMap.pairs."
        )


def _resolved(whose: str, layer: int, count: int) -> int:
    """Return a layer's index from the front; raise SettingError if there is no such layer."""
    if not is_whole(layer):
        raise SettingError(f"{whose} layer {layer!r}: give a whole number.")
    if not -count <= layer < count:
        allowed = f"0 to {count - 1}, or -{count} to -1 counted from the end"
        raise SettingError(f"{whose} layer {layer}: out of range. The {whose} has {count} layers: {allowed}.")
    return layer % count
