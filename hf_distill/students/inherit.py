"""`inherit`: a student of the teacher's architecture, made of chosen layers of the teacher."""

from __future__ import annotations

import re
from collections.abc import Sequence

from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_distill.errors import SettingError, TeacherError
from hf_distill.layer_map import LayerMap
from hf_distill.models.stacks import (
    SHARED_NOTE,
    Stack,
    check_layer_groups,
    depth_setting,
    describe_lists,
    find_stacks,
    layers_of,
    module_lists,
    named_stack,
    shares_layers,
    with_layers,
)
from hf_distill.students.building import (
    all_parameters,
    check_teacher,
    check_weight_tying,
    copy_generation_config,
    empty_student,
)
from hf_distill.students.report import InheritReport, StackReport, count_parameters, with_report
from hf_distill.vocabulary import read_the_same_ids

Layers = int | Sequence[int] | LayerMap
KeptLayers = dict[Stack, tuple[int, ...]]  # for each stack that is cut, the teacher's layer of each student layer
# Attributes of modules that may differ between layers: their position, and settings of training only.
_MAY_DIFFER = re.compile(r"idx|index|layer_id|layer_number|drop|^training$|checkpointing$|^_")


def inherit(
    teacher: PreTrainedModel,
    *,
    layers: Layers | None = None,
    encoder_layers: Layers | None = None,
    decoder_layers: Layers | None = None,
    stack: str | None = None,
) -> PreTrainedModel:
    """Return a new model of the teacher's class with copies of chosen layers, and of all weights around them.

    Its config has the new number of layers, and lists with one entry for each layer are cut to match. Heads, poolers,
    weight tying, dtype and device are the teacher's. The student is in evaluation mode, as after `from_pretrained`, and
    all its parameters can be trained, even if the teacher is frozen. The teacher and the random state do not change.
    `report_of(student)` lists the source of each tensor.

    Args:
        layers: how many layers, evenly spaced and including the first and the last; or which layers, as a list in which
            negative numbers count from the end; or a LayerMap.
        encoder_layers: the same for the encoder of an encoder-decoder. None keeps all its layers.
        decoder_layers: the same for the decoder of an encoder-decoder. None keeps all its layers.
        stack: the path of the layer stack in the model, if it is not found automatically.

    Raises:
        SettingError: if the teacher does not have these layers, or the arguments do not fit the teacher.
        TeacherError: if the layers cannot be found, or would compute something else in the student.

    >>> from hf_distill.students import report_of
    >>> from transformers import BertConfig, BertForMaskedLM
    >>> sizes = dict(vocab_size=40, hidden_size=8, num_attention_heads=2, intermediate_size=16)
    >>> teacher = BertForMaskedLM(BertConfig(num_hidden_layers=12, **sizes))
    >>> student = inherit(teacher, layers=3)
    >>> print(report_of(student).stacks[0].layer_map)
    3 of 12 layers: 0←0 1←6 2←11
    """
    check_teacher(teacher, "inherit")
    every = {"layers": layers, "encoder_layers": encoder_layers, "decoder_layers": decoder_layers}
    given = {name: value for name, value in every.items() if value is not None}
    if not given:
        raise SettingError("inherit: pass layers=, or encoder_layers= and decoder_layers= of an encoder-decoder.")
    if shares_layers(teacher) and stack is None:
        student, report = _inherit_shared(teacher, given)
    else:
        student, report = _inherit_stacks(teacher, _layer_maps(teacher, given, stack))
    read_the_same_ids(student, teacher)
    return with_report(student, report)


def _layer_maps(teacher: PreTrainedModel, given: dict[str, Layers], path: str | None) -> dict[Stack, LayerMap]:
    if "layers" in given and len(given) > 1:
        raise SettingError(f"inherit: pass layers= or a side's layers, not {', '.join(given)} together.")
    if path is not None:
        if "layers" not in given:
            raise SettingError(f"inherit: stack={path!r} goes with layers=, not with {', '.join(given)}=.")
        stacks = {"layers": named_stack(teacher, path)}
    else:
        found = find_stacks(teacher)
        if not found:
            raise TeacherError(f"inherit: no layer stack found in {type(teacher).__name__}. {describe_lists(teacher)}")
        stacks = {name: _stack_for(name, found) for name in given}
    return {stack: _layer_map(name, given[name], stack.length) for name, stack in stacks.items()}


def _stack_for(argument: str, stacks: list[Stack]) -> Stack:
    fitting = [stack for stack in stacks if argument in ("layers", f"{stack.side}_layers")]
    if len(fitting) == 1:
        return fitting[0]
    hint = f"Use layers= and name one: stack={stacks[0].name!r}"
    if argument == "layers" and [stack.side for stack in stacks] == ["encoder", "decoder"]:
        hint = "Use encoder_layers= and/or decoder_layers="
    listed = ", ".join(f"{stack.name!r} ({stack.length} layers)" for stack in stacks)
    raise SettingError(f"inherit: {argument}= fits {len(fitting)} of the teacher's layer stacks ({listed}). {hint}.")


def _layer_map(argument: str, value: Layers, length: int) -> LayerMap:
    try:
        if isinstance(value, LayerMap):
            if value.teacher_layers != length:
                raise SettingError(f"the map is for {value.teacher_layers} teacher layers; the teacher has {length}.")
            value.sources()
            return value
        if isinstance(value, (list, tuple, range)):
            return LayerMap.of(value, length)
        if type(value) is not int:
            raise SettingError(f"{value!r} is not a number, a list of layers or a LayerMap.")
        return LayerMap.even(value, length)
    except SettingError as error:
        raise SettingError(f"inherit: {argument}: {error}") from error


def _inherit_stacks(teacher: PreTrainedModel, maps: dict[Stack, LayerMap]) -> tuple[PreTrainedModel, InheritReport]:
    kept = {stack: layer_map.sources() for stack, layer_map in maps.items()}
    config = teacher.config
    for stack, layers in kept.items():
        config = with_layers(config, stack.setting, layers)
    student = empty_student(teacher, config, "inherit")
    for stack, layers in kept.items():
        _check_layers(student, teacher, stack, layers)
    _check_other_lists(student, teacher, kept)
    reports = tuple(StackReport(stack.name, str(stack.setting), layer_map) for stack, layer_map in maps.items())
    return student, _fill(student, teacher, kept, reports)


def _inherit_shared(teacher: PreTrainedModel, given: dict[str, Layers]) -> tuple[PreTrainedModel, InheritReport]:
    """Return the student and its report if layers share their weights (ALBERT)."""
    if list(given) != ["layers"]:
        raise SettingError(f"inherit: this model has one stack. Pass layers= instead of {', '.join(given)}=.")
    setting = depth_setting(teacher.config)
    layer_map = _layer_map("layers", given["layers"], setting.value(teacher.config))
    check_layer_groups(teacher.config, layer_map.sources())
    config = with_layers(teacher.config, setting, layer_map.sources())
    student = empty_student(teacher, config, "inherit")
    report = StackReport("(shared layers)", str(setting), layer_map)
    return student, _fill(student, teacher, {}, (report,), (SHARED_NOTE,))


def _fill(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    kept: KeptLayers,
    stacks: tuple[StackReport, ...],
    notes: tuple[str, ...] = (),
) -> InheritReport:
    copier = _TensorCopier(student, teacher, kept)
    copier.copy()
    student.eval()
    out, before = (getattr(model.config, "out_indices", None) for model in (student, teacher))
    if out != before:
        notes += (f"config.out_indices: {out}; the teacher's: {before}.",)
    decoder = next((layers for stack, layers in kept.items() if stack.side == "decoder"), None)

    def move(layer: int, head: int) -> list[int] | None:
        return [decoder.index(layer), head] if decoder is not None and layer in decoder else None

    return InheritReport(
        architecture=type(teacher).__name__,
        stacks=stacks,
        copied=copier.copied,
        carried=tuple(copier.carried),
        recut=tuple(copier.recut),
        left=tuple(copier.left),
        student_parameters=count_parameters(student),
        teacher_parameters=count_parameters(teacher),
        notes=(*notes, *copy_generation_config(student, teacher, move if decoder is not None else None)),
    )


def _serves_all_layers(model: nn.Module, stack: Stack | None, pattern: str) -> bool:
    """Return whether only layer 0 holds this table, and passes its values to the next layers (T5, WavLM)."""
    if stack is None or stack.length == 1:
        return False
    names = all_parameters(model)
    holders = [layer for layer in range(stack.length) if pattern.format(layer) in names]
    return holders == [0] and isinstance(model.get_submodule(pattern.format(0).rpartition(".")[0]), nn.Embedding)


class _TensorCopier:
    """Fills every parameter and buffer of a student with copies of the teacher's values, dtype and device.

    Its public lists are those of `InheritReport`.
    """

    def __init__(self, student: PreTrainedModel, teacher: PreTrainedModel, kept: KeptLayers) -> None:
        self.student, self.teacher, self.kept = student, teacher, kept
        self.copied: dict[str, str] = {}
        self.carried: list[str] = []
        self.recut: list[str] = []
        self.left: list[str] = []

    def copy(self) -> None:
        """Copy all tensors; raise TeacherError if a tensor of either model has no counterpart in the other."""
        theirs = all_parameters(self.teacher)
        outside = {name: tensor for name, tensor in theirs.items() if self._locate(name)[0] is None}
        check_weight_tying(self.student, outside, "inherit")
        missing = []
        for name, parameter in self.student.named_parameters():
            source = self._source(name)
            if source not in theirs:
                stack, _, pattern = self._locate(name)
                if not _serves_all_layers(self.teacher, stack, pattern):
                    missing.append(name)
                    continue
                source = pattern.format(0)
                self.carried.append(name)
            parameter.data = self._values(name, parameter, source, theirs[source].detach())
            self.copied[name] = source
        self._check_counterparts("the teacher has no tensors for", missing + self._copy_buffers(), "student")
        self._check_counterparts("the student has no place for", self._leave_the_rest(), "teacher")

    def _locate(self, name: str) -> tuple[Stack | None, int, str]:
        """Return the stack that holds a tensor, its layer, and its name as a pattern of the layer."""
        for stack in self.kept:
            for path in stack.paths:
                if name.startswith(f"{path}."):
                    layer, _, rest = name[len(path) + 1 :].partition(".")
                    return stack, int(layer), f"{path}.{{}}.{rest}"
        return None, -1, name

    def _source(self, name: str) -> str:
        """Return the name in the teacher of a tensor of the student."""
        stack, layer, pattern = self._locate(name)
        return name if stack is None else pattern.format(self.kept[stack][layer])

    def _values(self, name: str, parameter: Tensor, source: str, values: Tensor) -> Tensor:
        """Return the teacher's values, cut to the kept layers if there is one value for each layer."""
        if values.shape == parameter.shape:
            return values.clone()
        for stack, layers in self.kept.items():
            for before in (0, 1):  # 1: the embeddings come first, as in `hidden_states`
                if values.shape == (stack.length + before,) and parameter.shape == (len(layers) + before,):
                    self.recut.append(name)
                    return values[[*range(before), *(layer + before for layer in layers)]]
        raise TeacherError(
            f"inherit: {name} has shape {tuple(parameter.shape)}, but {source} of the teacher has "
            f"{tuple(values.shape)}. Was one of its modules replaced?"
        )

    def _copy_buffers(self) -> list[str]:
        """Copy the buffers; return the names of saved buffers without a source."""
        theirs = dict(self.teacher.named_buffers(remove_duplicate=False))
        saved = self.student.state_dict().keys()
        missing = []
        for name, buffer in self.student.named_buffers():
            source = self._source(name)
            values = theirs.get(source)
            if values is not None and values.shape == buffer.shape:
                buffer.data = values.detach().clone()
                self.copied[name] = source
            elif name in saved:
                missing.append(name)
        return missing

    def _leave_the_rest(self) -> list[str]:
        """Note the tensors of layers that are left behind; return the names of all others that were not copied."""
        tensors = self.teacher.state_dict(keep_vars=True)
        used = set(self.copied.values())
        used_tensors = {id(tensors[name]) for name in used if name in tensors}
        lost: list[str] = []
        for name, tensor in tensors.items():
            if name not in used and id(tensor) not in used_tensors:
                stack, layer, _ = self._locate(name)
                is_left = stack is not None and layer not in self.kept[stack]
                (self.left if is_left else lost).append(name)
        return lost

    def _check_counterparts(self, problem: str, names: list[str], whose: str) -> None:
        if names:
            more = f" and {len(names) - 6} more" if len(names) > 6 else ""
            shown = ", ".join(names[:6])
            raise TeacherError(f"inherit: {problem} {shown}{more} of the {whose}. Was the teacher changed by hand?")


def _check_layers(student: nn.Module, teacher: nn.Module, stack: Stack, kept: tuple[int, ...]) -> None:
    """Raise TeacherError if a student layer is not equivalent to the layer whose weights it gets."""
    of_teacher = layers_of(teacher, stack)
    for layer, parts in enumerate(layers_of(student, stack)):
        for path, part, source in zip(stack.paths, parts, of_teacher[kept[layer]], strict=True):
            difference = _difference(part, source, _tables_for_all_layers(teacher, stack, path))
            if difference:
                advice = "A layer of this architecture depends on its position, so it cannot move"
                if layer == 0:
                    advice = "Layer 0 of this architecture differs from the others: take teacher layer 0 for it"
                elif kept[layer] == 0:
                    advice = "Layer 0 of this architecture differs from the others: it can only be student layer 0"
                move = f"teacher layer {kept[layer]} of {stack.name} cannot become student layer {layer}"
                raise TeacherError(f"inherit: {move}: the student's {difference}. {advice}.")


def _check_other_lists(student: nn.Module, teacher: nn.Module, kept: KeptLayers) -> None:
    """Raise TeacherError if a module list outside of the cut stacks changed with them."""
    cut = sorted({path for stack in kept for path in stack.paths})
    for path, length in module_lists(student).items():
        if path in cut:
            continue
        pairs = zip(student.get_submodule(path).children(), teacher.get_submodule(path).children(), strict=False)
        differences = [_difference(ours, theirs, set()) for ours, theirs in pairs]
        if module_lists(teacher).get(path) != length or any(differences):
            change = next(filter(None, differences), "its length")
            raise TeacherError(
                f"inherit: cutting {', '.join(cut)} changes {path} too ({change}): they share a setting."
            )


def _tables_for_all_layers(teacher: nn.Module, stack: Stack, path: str) -> set[str]:
    """Return the paths, within a layer, of tables that only layer 0 holds, for all layers."""
    modules = teacher.get_submodule(f"{path}.0").named_modules()
    tables = [name for name, module in modules if isinstance(module, nn.Embedding)]
    return {name for name in tables if _serves_all_layers(teacher, stack, f"{path}.{{}}.{name}.weight")}


def _difference(student: nn.Module, teacher: nn.Module, shared: set[str]) -> str | None:
    """Return the first difference in modules or attributes of two layers, or None if they are equivalent.

    Args:
        student: the student's layer.
        teacher: the teacher's layer.
        shared: paths of tables that only layer 0 holds.
    """
    ours, theirs = ({n: m for n, m in layer.named_modules() if n not in shared} for layer in (student, teacher))
    owners = {name.rpartition(".")[0] for name in shared}
    for name in sorted({*ours, *theirs}):
        kinds = [type(modules[name]).__name__ if name in modules else "missing" for modules in (ours, theirs)]
        if any("DropPath" in kind for kind in kinds):
            continue  # only in training
        if kinds[0] != kinds[1]:
            return f"{name} is {kinds[0]}, the teacher's is {kinds[1]}"
        new, old = _attributes(ours[name]), _attributes(theirs[name])
        for key in sorted({*new, *old}):
            if new.get(key) != old.get(key) and not (name in owners and isinstance(new.get(key), bool)):
                path = f"{name}.{key}".lstrip(".")
                return f"{path} is {new.get(key)!r}, the teacher's is {old.get(key)!r}"
    return None


def _attributes(module: nn.Module) -> dict[str, bool | int | float | str | None]:
    return {
        key: value
        for key, value in vars(module).items()
        if (value is None or isinstance(value, (bool, int, float, str))) and not _MAY_DIFFER.search(key)
    }
