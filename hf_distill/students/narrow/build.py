"""Building the thinner student: its config, its tensors, each accounted for. It chooses no units."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from hf_distill.errors import TeacherError
from hf_distill.models.stacks import empty_like
from hf_distill.students.checks import check_config, own_heads, set_apart
from hf_distill.students.inherit import check_tied, drop_absent_modules
from hf_distill.students.narrow.axes import Layout, Setting, along, changed
from hf_distill.students.narrow.projection import Projected
from hf_distill.students.narrow.units import Cut, cut
from hf_distill.students.report import NarrowReport, SizeReport
from hf_distill.students.trimming import TrimmedVocabulary, renumber


def thinner(
    teacher: Any,
    layout: Layout,
    cuts: list[Cut],
    values: dict[str, int],
    vocabulary: TrimmedVocabulary | None,
    importance: str | None,
    projection: Projected | None = None,
) -> tuple[PreTrainedModel, NarrowReport]:
    """The student with the kept units (and the projected hidden states), and what was done."""
    _check_kept_by_saving(teacher, cuts)
    config, sizes = _config(teacher, layout, values)
    notes = [] if vocabulary is None else renumber(config, vocabulary.places, "config")
    check_config(config)
    student = built(teacher, config, projection.apart if projection else ())
    new = projection.tensors if projection else {}
    tensors = _tensors(teacher) | new
    check_tied(student, tensors, {}, "narrow")
    done = new | cut(tensors, cuts)
    whole = _fill(student, teacher, done)
    notes += projection.notes(student) if projection else _other_scales(student, teacher)
    notes += _generation(student, teacher, cuts, vocabulary)
    student.eval()
    report = NarrowReport(
        architecture=type(teacher).__name__,
        sizes=sizes,
        kept={group.name: tuple(kept.tolist()) for group, kept in cuts},
        cut=tuple(name for name in done if name in dict(student.named_parameters()) or name in student.state_dict()),
        copied=tuple(whole),
        fresh=(),
        importance=importance,
        projected=projection.share if projection else None,
        student_parameters=sum(parameter.numel() for parameter in student.parameters()),
        teacher_parameters=sum(parameter.numel() for parameter in teacher.parameters()),
        notes=tuple(notes),
    )
    return student, report


def _tensors(model: Any) -> dict[str, Tensor]:
    named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    return {name: tensor.detach() for name, tensor in named}


def _config(teacher: Any, layout: Layout, values: dict[str, int]) -> tuple[Any, tuple[SizeReport, ...]]:
    new: dict[Setting, int] = {}
    reports = []
    for kind, value in values.items():
        for setting, before in layout.sizes[kind].values.items():
            for one in (setting, *along(kind, setting, layout.config)):
                new[one] = value
                if value != before:
                    reports.append(SizeReport(str(one), value, before))
    return changed(layout.config, new), tuple(reports)


def built(teacher: Any, config: Any, apart: Iterable[str] = ()) -> Any:
    """An empty student of the teacher's class. `apart`: heads that shall have weights of their own."""
    try:
        student = empty_like(teacher, config, "cpu")
    except (ValueError, IndexError, KeyError, RuntimeError) as error:
        raise TeacherError(f"narrow: {type(teacher).__name__} cannot be built with these sizes: {error}") from error
    drop_absent_modules(student, teacher)
    own = {name for name in apart if name in student.all_tied_weights_keys}
    set_apart(student, sorted(own.union(own_heads(student, teacher))))
    return student


def _check_kept_by_saving(teacher: Any, cuts: list[Cut]) -> None:
    """A tensor that is worked out anew at loading (sinusoids) would not be the cut one then."""
    saved = set(teacher.state_dict())
    ignored = [*(getattr(teacher, "_keys_to_ignore_on_save", None) or ())]
    for group, kept in cuts:
        for axis in group.axes:
            lost = axis.name not in saved or any(re.search(pattern, axis.name) for pattern in ignored)
            if lost and len(kept) < group.units:
                raise TeacherError(
                    f"narrow: {axis.name} is not saved with {type(teacher).__name__} but worked out from the config, "
                    f"so a student could not keep some of its {group.kind} units. {group.kind}= cannot be cut here."
                )


def _fill(student: Any, teacher: Any, done: dict[str, Tensor]) -> list[str]:
    """Give the student its tensors; returns the names of those that are the teacher's as they are."""
    sources = _tensors(teacher)
    saved = set(student.state_dict())
    whole, missing = [], []
    # A buffer that is not saved is worked out from the config, now as at loading (Gemma's scale of its embeddings).
    buffers = [(name, buffer) for name, buffer in student.named_buffers() if name in saved]
    for name, tensor in [*student.named_parameters(), *buffers]:
        source = done.get(name, sources.get(name))
        if source is not None and source.shape == tensor.shape:
            tensor.data = source.clone() if name not in done else source.contiguous()
            whole += [] if name in done else [name]
        elif name in saved:
            missing.append(f"{name} {tuple(tensor.shape)}")
    lost = sorted(set(teacher.state_dict()) - saved)
    if missing or lost:
        raise TeacherError(
            f"narrow: the teacher does not fill the student: {', '.join((missing or lost)[:4])}. Its tensors do not "
            "follow its config as the experiments on it say, or it was changed after it was built from its config."
        )
    return whole


def _other_scales(student: Any, teacher: Any) -> list[str]:
    """Factors that the model works out from its width: the student multiplies by another one."""
    modules = dict(teacher.named_modules())
    notes = []
    for name, module in student.named_modules():
        for key, value in vars(module).items():
            before = vars(modules[name]).get(key) if name in modules else None
            if isinstance(value, float) and isinstance(before, float) and value != before:
                notes.append(
                    f"{name}.{key} is {value:g}, in the teacher {before:g}: it follows the sizes of the model."
                )
    return notes


def _generation(student: Any, teacher: Any, cuts: list[Cut], vocabulary: TrimmedVocabulary | None) -> list[str]:
    """The generation config: ids of tokens, and the heads that align (Whisper)."""
    if getattr(teacher, "generation_config", None) is None:
        return []
    student.generation_config = copy.deepcopy(teacher.generation_config)
    notes = []
    if vocabulary is not None:
        notes = renumber(student.generation_config, vocabulary.places, "generation_config")
    heads = getattr(student.generation_config, "alignment_heads", None)
    kept = [(group.name, units.tolist()) for group, units in cuts if group.kind == "heads"]
    if not heads or not kept:
        return notes
    moved = []
    for layer, head in heads:
        units = next((units for name, units in kept if f"decoder.layers.{layer}.encoder_attn." in f"{name}."), [])
        moved += [[layer, units.index(head)]] if head in units else []
    notes.append(f"generation_config.alignment_heads: {len(moved)} of {len(heads)} were kept.")
    if moved:
        student.generation_config.alignment_heads = moved
    else:
        del student.generation_config.alignment_heads
    return notes
