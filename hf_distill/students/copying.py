"""Copying a teacher's tensors into a student of fewer layers, by name, each accounted for. It chooses no layers."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from hf_distill.errors import TeacherError
from hf_distill.inside.stacks import Stack


@dataclass
class Copied:
    """Name in the student → name in the teacher; and what was special. See `InheritReport`."""

    names: dict[str, str] = field(default_factory=dict)
    carried: list[str] = field(default_factory=list)
    recut: list[str] = field(default_factory=list)
    left: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Place:
    """Where a tensor's name lies: in layer `layer` of `stack` under `rest`; outside of all stacks: `stack` is None."""

    stack: Stack | None
    path: str
    layer: int
    rest: str

    def at(self, layer: int) -> str:
        """The same tensor's name in another layer."""
        return f"{self.path}.{layer}.{self.rest}"


def place_of(name: str, stacks: Iterable[Stack]) -> Place:
    """Take a tensor's name apart."""
    for stack in stacks:
        for path in stack.paths:
            if name.startswith(f"{path}."):
                layer, _, rest = name[len(path) + 1 :].partition(".")
                return Place(stack, path, int(layer), rest)
    return Place(None, "", -1, name)


def drop_absent_modules(student: nn.Module, teacher: nn.Module) -> list[str]:
    """Set to None in the student what is None in the teacher: a head built without its pooler stays without."""
    dropped: list[str] = []
    for name, _ in list(student.named_modules()):
        path, _, last = name.rpartition(".")
        if not name or any(name.startswith(f"{other}.") for other in dropped):
            continue
        try:
            parent = teacher.get_submodule(path)
        except AttributeError:
            continue  # a layer is compared with its source elsewhere
        if not isinstance(parent, nn.ModuleList) and getattr(parent, last, parent) is None:
            setattr(student.get_submodule(path), last, None)
            dropped.append(name)
    return dropped


def copy_tensors(student: Any, teacher: Any, sources: dict[Stack, tuple[int, ...]]) -> Copied:
    """Fill every parameter and buffer of the student. Values, dtype and device are the teacher's, the storage is not.

    Raises TeacherError, naming the tensors, when one of the student has no source or one of the teacher no place.
    """
    done = Copied()
    of_teacher = dict(teacher.named_parameters(remove_duplicate=False))
    check_tied(student, of_teacher, sources)
    missing = []
    for name, parameter in student.named_parameters():
        source = _source(name, of_teacher, student, teacher, sources)
        if source is None:
            missing.append(name)
            continue
        if place_of(source, sources).layer != _mapped_layer(name, sources):
            done.carried.append(name)
        parameter.data = _cut(name, parameter, source, of_teacher[source], sources, done)
        done.names[name] = source
    missing += _copy_buffers(student, teacher, sources, done)
    if missing:
        raise TeacherError(
            f"inherit: the teacher has nothing to fill {_shown(missing)} of the student with. Either this architecture "
            "builds some of its layers unlike others, or the teacher was changed after it was built from its config."
        )
    _account_for_the_rest(student, teacher, sources, done)
    return done


def _mapped_layer(name: str, sources: dict[Stack, tuple[int, ...]]) -> int:
    place = place_of(name, sources)
    return -1 if place.stack is None else sources[place.stack][place.layer]


def _source(
    name: str, of_teacher: dict[str, Any], student: nn.Module, teacher: nn.Module, sources: dict[Stack, tuple[int, ...]]
) -> str | None:
    place = place_of(name, sources)
    if place.stack is None:
        return name if name in of_teacher else None
    mapped = place.at(sources[place.stack][place.layer])
    if mapped in of_teacher:
        return mapped
    return place.at(0) if serves_all_layers(teacher, place) else None


def serves_all_layers(model: nn.Module, place: Place) -> bool:
    """True for a table that only layer 0 holds, because what it gives is handed on to the layers behind (T5, WavLM)."""
    if place.stack is None or place.stack.length == 1:
        return False
    names = dict(model.named_parameters(remove_duplicate=False))
    holders = [layer for layer in range(place.stack.length) if place.at(layer) in names]
    return holders == [0] and isinstance(model.get_submodule(place.at(0).rpartition(".")[0]), nn.Embedding)


def _cut(
    name: str,
    parameter: Tensor,
    source: str,
    given: Tensor,
    sources: dict[Stack, tuple[int, ...]],
    done: Copied,
) -> Tensor:
    """The teacher's values; of a vector with one entry a layer, the entries of the kept layers."""
    given = given.detach()
    if given.shape == parameter.shape:
        return given.clone()
    for stack, kept in sources.items():
        for before in (0, 1):  # 1: the embeddings come first, as in `hidden_states`
            if given.shape == (stack.length + before,) and parameter.shape == (len(kept) + before,):
                done.recut.append(name)
                return given[[*range(before), *(layer + before for layer in kept)]]
    raise TeacherError(
        f"inherit: {name} of the student has shape {tuple(parameter.shape)}, and {source} of the teacher has "
        f"{tuple(given.shape)}. The teacher no longer fits its config: was a layer of it replaced?"
    )


def _copy_buffers(student: Any, teacher: Any, sources: dict[Stack, tuple[int, ...]], done: Copied) -> list[str]:
    """Copy the buffers; return the names of those that are saved and have no source."""
    of_teacher = dict(teacher.named_buffers(remove_duplicate=False))
    saved = set(student.state_dict())
    missing = []
    for name, buffer in student.named_buffers():
        place = place_of(name, sources)
        source = name if place.stack is None else place.at(sources[place.stack][place.layer])
        given = of_teacher.get(source)
        if given is not None and given.shape == buffer.shape:
            buffer.data = given.detach().clone()
            done.names[name] = source
        elif name in saved:
            missing.append(name)
    return missing


def check_tied(
    student: Any, of_teacher: dict[str, Tensor], sources: dict[Stack, tuple[int, ...]], call: str = "inherit"
) -> None:
    """What is one tensor in the student must be equal in the teacher, or one of the two would be lost."""
    together: defaultdict[int, list[str]] = defaultdict(list)
    for name, parameter in student.named_parameters(remove_duplicate=False):
        together[id(parameter)].append(name)
    for names in together.values():
        found = [name for name in names if place_of(name, sources).stack is None and name in of_teacher]
        for other in found[1:]:
            one, two = of_teacher[found[0]], of_teacher[other]
            if one is not two and not (one.shape == two.shape and torch.equal(one, two)):
                raise TeacherError(
                    f"{call}: {found[0]} and {other} are tied by the config, and differ in the teacher. Tie them "
                    "(teacher.tie_weights()), or set teacher.config.tie_word_embeddings=False if they shall differ."
                )


def _account_for_the_rest(student: Any, teacher: Any, sources: dict[Stack, tuple[int, ...]], done: Copied) -> None:
    """Every saved tensor of the teacher was copied, or is of a layer that was left behind."""
    used = set(done.names.values())
    tensors = teacher.state_dict(keep_vars=True)
    used_tensors = {id(tensors[name]) for name in used if name in tensors}
    lost = []
    for name, tensor in tensors.items():
        if name in used or id(tensor) in used_tensors:
            continue
        place = place_of(name, sources)
        if place.stack is not None and place.layer not in sources[place.stack]:
            done.left.append(name)
        else:
            lost.append(name)
    if lost:
        raise TeacherError(
            f"inherit: the student has no place for {_shown(lost)} of the teacher. Either this architecture builds "
            "some of its layers unlike others, or the teacher was changed after it was built from its config."
        )


def _shown(names: list[str]) -> str:
    return ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")
