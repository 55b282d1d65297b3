"""Whether a layer of the student would compute what the teacher's did: same modules, same settings. No tensors."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from torch import nn

from hf_distill.errors import TeacherError
from hf_distill.inside.stacks import Stack, blocks, module_lists
from hf_distill.students.copying import Place, serves_all_layers

# Which layer it is; what only training does; what is switched on and off.
_MAY_DIFFER = re.compile(r"idx|index|layer_id|layer_number|drop|^training$|checkpointing$|^_")


def check_layers_alike(student: nn.Module, teacher: nn.Module, stack: Stack, kept: tuple[int, ...]) -> None:
    """Raise TeacherError, saying what differs, where a layer is built unlike the one whose weights it is to hold."""
    of_teacher = dict(blocks(teacher, stack))
    short = Stack(stack.paths, len(kept), stack.setting)
    for layer, parts in blocks(student, short):
        for path, part, source in zip(stack.paths, parts, of_teacher[kept[layer]], strict=True):
            shared = _shared_tables(teacher, stack, path)
            difference = _difference(part, source, shared)
            if difference:
                raise TeacherError(
                    f"inherit: teacher layer {kept[layer]} cannot become student layer {layer} of {stack.name}: in the "
                    f"student's, {difference}. {_advice(layer, kept[layer])}"
                )


def check_the_rest_alike(student: nn.Module, teacher: nn.Module, cut: Iterable[Stack]) -> None:
    """Raise TeacherError where another list of modules changed along with the stacks that were to be cut."""
    paths = {path for stack in cut for path in stack.paths}
    for path, length in module_lists(student).items():
        if path in paths:
            continue
        pairs = zip(student.get_submodule(path).children(), teacher.get_submodule(path).children(), strict=False)
        differences = [_difference(one, two, set()) for one, two in pairs]
        if module_lists(teacher).get(path) != length or any(differences):
            raise TeacherError(
                f"inherit: cutting {', '.join(sorted(paths))} changes {path} of the model too "
                f"({next(filter(None, differences), 'its length')}): one setting of the config speaks of both."
            )


def _advice(layer: int, source: int) -> str:
    if layer == 0:
        return "This architecture builds its layer 0 unlike the others: take teacher layer 0 for it."
    if source == 0:
        return "This architecture builds its layer 0 unlike the others: it can only be the student's layer 0."
    return "This architecture makes a layer depend on where it stands, so it cannot be moved there unchanged."


def _shared_tables(teacher: nn.Module, stack: Stack, path: str) -> set[str]:
    """Paths, inside a layer, of tables that layer 0 holds for all."""
    first = teacher.get_submodule(f"{path}.0")
    tables = {name for name, module in first.named_modules() if isinstance(module, nn.Embedding)}
    return {name for name in tables if serves_all_layers(teacher, Place(stack, path, 0, f"{name}.weight"))}


def _difference(student: nn.Module, teacher: nn.Module, shared: set[str]) -> str | None:
    ours, theirs = (
        {name: module for name, module in block.named_modules() if name not in shared} for block in (student, teacher)
    )
    owners = {name.rpartition(".")[0] for name in shared}
    for name in sorted({*ours, *theirs}):
        one, two = ours.get(name), theirs.get(name)
        if _is_drop_path(one) or _is_drop_path(two):
            continue
        if one is None or two is None or type(one).__name__ != type(two).__name__:
            return f"{name} is {_class(one)}, in the teacher's {_class(two)}"
        for key in sorted({*_settings(one), *_settings(two)}):
            ours_is, theirs_is = _settings(one).get(key), _settings(two).get(key)
            if ours_is != theirs_is and not (name in owners and isinstance(ours_is, bool)):
                return f"{name}.{key}".lstrip(".") + f" is {ours_is!r}, in the teacher's {theirs_is!r}"
    return None


def _settings(module: nn.Module) -> dict[str, Any]:
    return {
        key: value
        for key, value in vars(module).items()
        if (value is None or isinstance(value, (bool, int, float, str))) and not _MAY_DIFFER.search(key)
    }


def _class(module: nn.Module | None) -> str:
    return "missing" if module is None else type(module).__name__


def _is_drop_path(module: nn.Module | None) -> bool:
    return module is not None and "DropPath" in type(module).__name__
