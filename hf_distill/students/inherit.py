"""A student of the teacher's architecture with fewer layers, filled from chosen ones of the teacher. Trains nothing."""

from __future__ import annotations

import copy
import logging
from collections.abc import Sequence
from typing import Any, Literal, overload

from torch import nn
from transformers import PreTrainedModel

from hf_distill.errors import SettingError, TeacherError
from hf_distill.inside.depth import check_it_can_be_read_back, with_layers
from hf_distill.inside.shared import NOTE, check_groups, depth_of, shares_layers
from hf_distill.inside.stacks import Stack, candidates, empty_like, find_stacks, named_stack
from hf_distill.layer_map import LayerMap
from hf_distill.students.checks import check_teacher
from hf_distill.students.copying import Copied, copy_tensors, drop_absent_modules
from hf_distill.students.likeness import check_layers_alike, check_the_rest_alike
from hf_distill.students.report import InheritReport, StackReport
from hf_distill.students.ties import own_heads, set_apart
from hf_distill.vocabulary import read_the_same_ids

logger = logging.getLogger(__name__)
Layers = int | Sequence[int] | LayerMap


@overload
def inherit(
    teacher: PreTrainedModel, *, layers: Layers | None = ..., encoder_layers: Layers | None = ...,
    decoder_layers: Layers | None = ..., stack: str | None = ..., return_report: Literal[False] = ...,
) -> PreTrainedModel: ...  # fmt: skip
@overload
def inherit(
    teacher: PreTrainedModel, *, layers: Layers | None = ..., encoder_layers: Layers | None = ...,
    decoder_layers: Layers | None = ..., stack: str | None = ..., return_report: Literal[True],
) -> tuple[PreTrainedModel, InheritReport]: ...  # fmt: skip


def inherit(
    teacher: PreTrainedModel,
    *,
    layers: Layers | None = None,
    encoder_layers: Layers | None = None,
    decoder_layers: Layers | None = None,
    stack: str | None = None,
    return_report: bool = False,
) -> PreTrainedModel | tuple[PreTrainedModel, InheritReport]:
    """A new model of the teacher's class that holds copies of some of its layers, and of everything around them.

    The config says so (layer count, lists with one entry a layer), heads, poolers and tied weights come along, and
    dtype and device are the teacher's. The student is in evaluation mode, as after `from_pretrained`, and can be
    trained even where the teacher is frozen. The teacher and the random generators are left as they were.

    Args:
        layers: how many, evenly spaced with the first and the last among them; or which, as a list (negative ones count
            from the end); or a LayerMap.
        encoder_layers, decoder_layers: the same for one side of an encoder-decoder. A side not named stays whole.
        stack: the path of the layer stack in the model, where it is not found by itself.
        return_report: also return an InheritReport: what was copied, from where, and what starts fresh.

    Raises:
        SettingError: for layers that the teacher does not have, or an argument that does not fit it.
        TeacherError: for a teacher whose layers cannot be told, or cannot be moved without computing something else.

    >>> from transformers import BertConfig, BertForMaskedLM
    >>> sizes = dict(vocab_size=40, hidden_size=8, num_attention_heads=2, intermediate_size=16)
    >>> teacher = BertForMaskedLM(BertConfig(num_hidden_layers=12, **sizes))
    >>> student, report = inherit(teacher, layers=3, return_report=True)
    >>> print(report.stacks[0].layer_map)
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
    return (student, report) if return_report else student


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
