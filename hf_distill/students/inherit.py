"""Whether a layer of the student would compute what the teacher's did: same modules, same settings. No tensors."""

from __future__ import annotations

import copy
import logging
import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_distill.errors import SettingError, TeacherError
from hf_distill.layer_map import LayerMap
from hf_distill.models.stacks import (
    NOTE,
    Stack,
    blocks,
    candidates,
    check_groups,
    check_it_can_be_read_back,
    depth_of,
    empty_like,
    find_stacks,
    module_lists,
    named_stack,
    shares_layers,
    with_layers,
)
from hf_distill.students.checks import check_teacher, own_heads, set_apart
from hf_distill.students.report import InheritReport, StackReport, with_report
from hf_distill.vocabulary import read_the_same_ids

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


logger = logging.getLogger(__name__)
Layers = int | Sequence[int] | LayerMap


def inherit(
    teacher: PreTrainedModel,
    *,
    layers: Layers | None = None,
    encoder_layers: Layers | None = None,
    decoder_layers: Layers | None = None,
    stack: str | None = None,
) -> PreTrainedModel:
    """A new model of the teacher's class that holds copies of some of its layers, and of everything around them.

    The config says so (layer count, lists with one entry a layer), heads, poolers and tied weights come along, and
    dtype and device are the teacher's. The student is in evaluation mode, as after `from_pretrained`, and can be
    trained even where the teacher is frozen. The teacher and the random generators are left as they were.

    Args:
        layers: how many, evenly spaced with the first and the last among them; or which, as a list (negative ones count
            from the end); or a LayerMap.
        encoder_layers, decoder_layers: the same for one side of an encoder-decoder. A side not named stays whole.
        stack: the path of the layer stack in the model, where it is not found by itself.

    Raises:
        SettingError: for layers that the teacher does not have, or an argument that does not fit it.
        TeacherError: for a teacher whose layers cannot be told, or cannot be moved without computing something else.

    >>> from hf_distill.students import report_of
    >>> from transformers import BertConfig, BertForMaskedLM
    >>> sizes = dict(vocab_size=40, hidden_size=8, num_attention_heads=2, intermediate_size=16)
    >>> teacher = BertForMaskedLM(BertConfig(num_hidden_layers=12, **sizes))
    >>> student = inherit(teacher, layers=3)
    >>> print(report_of(student).stacks[0].layer_map)
    3 of 12 layers: 0←0 1←6 2←11
    """
    check_teacher(teacher, "inherit")
    wanted = {"layers": layers, "encoder_layers": encoder_layers, "decoder_layers": decoder_layers}
    given = {name: value for name, value in wanted.items() if value is not None}
    if not given:
        raise SettingError(
            "inherit: say which layers: layers=6 or layers=[0, 2, -1]; of an encoder-decoder encoder_layers= and "
            "decoder_layers=."
        )
    if shares_layers(teacher) and stack is None:
        student, report = _inherit_shared(teacher, given)
    else:
        maps = {one: _layer_map(name, given[name], one.length) for one, name in _chosen(teacher, given, stack).items()}
        student, report = _inherit(teacher, maps)
    read_the_same_ids(student, teacher)
    logger.info("%s", report)
    return with_report(student, report)


def _chosen(teacher: PreTrainedModel, given: dict[str, Layers], named: str | None) -> dict[Stack, str]:
    """Layer stack → the argument that speaks of it."""
    if "layers" in given and len(given) > 1:
        raise SettingError(f"inherit: {', '.join(given)} together. Say layers= for the only stack, or a side's layers.")
    if named is not None:
        if "layers" not in given:
            raise SettingError(f"inherit: stack={named!r} goes with layers=, not with {', '.join(given)}.")
        return {named_stack(teacher, named): "layers"}
    stacks = find_stacks(teacher)
    if not stacks:
        raise TeacherError(
            f"inherit: no layer stack found in {type(teacher).__name__}: no usual setting of "
            f"{type(teacher.config).__name__} (num_hidden_layers, ...) makes one of its lists of modules longer. "
            f"{candidates(teacher)}"
        )
    return {_stack_for(name, stacks): name for name in given}


def _stack_for(argument: str, stacks: list[Stack]) -> Stack:
    found = stacks if argument == "layers" else [one for one in stacks if one.side == argument.removesuffix("_layers")]
    if len(found) == 1:
        return found[0]
    listed = ", ".join(f"{one.name!r} ({one.length} layers)" for one in stacks)
    if argument == "layers" and [one.side for one in stacks] == ["encoder", "decoder"]:
        raise SettingError(
            f"inherit: layers= for an encoder-decoder: {listed}. Say encoder_layers= and/or decoder_layers=."
        )
    raise SettingError(
        f"inherit: {argument}= fits {len(found)} of the teacher's layer stacks, which are {listed}. Say layers= and "
        f"name one: stack={stacks[0].name!r}."
    )


def _layer_map(argument: str, value: Layers, length: int) -> LayerMap:
    try:
        if isinstance(value, LayerMap):
            if value.teacher_layers != length:
                raise SettingError(
                    f"the map is for {value.teacher_layers} teacher layers, and there are {length}. It is: {value}"
                )
            value.sources()
            return value
        if isinstance(value, int) and not isinstance(value, bool):
            return LayerMap.even(value, length)
        if isinstance(value, (list, tuple, range)):
            return LayerMap.of(value, length)
    except SettingError as error:
        raise SettingError(f"inherit: {argument}: {error}") from error
    raise SettingError(f"inherit: {argument}={value!r}: give a number, a list of layers, or a LayerMap.")


def _inherit(teacher: PreTrainedModel, maps: dict[Stack, LayerMap]) -> tuple[PreTrainedModel, InheritReport]:
    sources = {stack: layer_map.sources() for stack, layer_map in maps.items()}
    config = teacher.config
    for stack, kept in sources.items():
        config = with_layers(config, stack.setting, kept)
    student = _built(teacher, config)
    for stack, kept in sources.items():
        check_layers_alike(student, teacher, stack, kept)
    check_the_rest_alike(student, teacher, sources)
    done = copy_tensors(student, teacher, sources)
    stacks = tuple(StackReport(one.name, str(one.setting), layer_map) for one, layer_map in maps.items())
    return student, _report(student, teacher, stacks, done, _finish(student, teacher, sources))


def _inherit_shared(teacher: PreTrainedModel, given: dict[str, Layers]) -> tuple[PreTrainedModel, InheritReport]:
    if list(given) != ["layers"]:
        raise SettingError(f"inherit: {', '.join(given)}: this model has one stack. Say layers=.")
    setting = depth_of(teacher.config)
    layer_map = _layer_map("layers", given["layers"], setting.value(teacher.config))
    check_groups(teacher.config, layer_map.sources())
    student = _built(teacher, with_layers(teacher.config, setting, layer_map.sources()))
    done = copy_tensors(student, teacher, {})
    stacks = (StackReport("(shared layers)", str(setting), layer_map),)
    return student, _report(student, teacher, stacks, done, (NOTE, *_finish(student, teacher, {})))


def _built(teacher: PreTrainedModel, config: Any) -> PreTrainedModel:
    check_it_can_be_read_back(config)
    try:
        student: PreTrainedModel = empty_like(teacher, config, "cpu")
    except (ValueError, IndexError, KeyError) as error:
        raise TeacherError(f"inherit: {type(teacher).__name__} cannot be built with these layers: {error}") from error
    drop_absent_modules(student, teacher)
    set_apart(student, own_heads(student, teacher))
    return student


def _finish(student: Any, teacher: Any, sources: dict[Stack, tuple[int, ...]]) -> tuple[str, ...]:
    """What is no tensor: the mode, and how to generate. Returns notes."""
    student.eval()
    out, before = (getattr(model.config, "out_indices", None) for model in (student, teacher))
    notes = () if out == before else (f"config.out_indices: {out}; the teacher's: {before}.",)
    if getattr(teacher, "generation_config", None) is None:
        return notes
    student.generation_config = copy.deepcopy(teacher.generation_config)
    heads = getattr(student.generation_config, "alignment_heads", None)
    kept = next((kept for stack, kept in sources.items() if stack.side == "decoder"), None)
    if not heads or kept is None:
        return notes
    moved = [[kept.index(layer), head] for layer, head in heads if layer in kept]
    if moved:
        student.generation_config.alignment_heads = moved
        return (
            *notes,
            f"generation_config.alignment_heads: {len(moved)} of {len(heads)} are in layers that were kept.",
        )
    del student.generation_config.alignment_heads
    return (
        *notes,
        "generation_config.alignment_heads: none is in a layer that was kept; no word timestamps.",
    )


def _report(
    student: nn.Module, teacher: nn.Module, stacks: tuple[StackReport, ...], done: Copied, notes: tuple[str, ...]
) -> InheritReport:
    return InheritReport(
        architecture=type(teacher).__name__,
        stacks=stacks,
        copied=done.names,
        carried=tuple(done.carried),
        recut=tuple(done.recut),
        fresh=(),
        left=tuple(done.left),
        student_parameters=sum(parameter.numel() for parameter in student.parameters()),
        teacher_parameters=sum(parameter.numel() for parameter in teacher.parameters()),
        notes=notes,
    )
