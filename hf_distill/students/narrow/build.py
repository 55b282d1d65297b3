"""Building the narrow student: its config, its tensors, and the report on them."""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from hf_distill.errors import TeacherError
from hf_distill.students.building import all_tensors, check_weight_tying, copy_generation_config, empty_student
from hf_distill.students.narrow.importance import Importance
from hf_distill.students.narrow.layout import Kind, Layout, Setting, changed, followers
from hf_distill.students.narrow.projection import Projection
from hf_distill.students.narrow.units import Cut, cut
from hf_distill.students.report import NarrowReport, SizeReport, count_parameters
from hf_distill.students.trimming import TrimmedVocabulary, renumber


def build_student(
    teacher: PreTrainedModel,
    layout: Layout,
    cuts: list[Cut],
    values: Mapping[Kind, int],
    vocabulary: TrimmedVocabulary | None,
    importance: Importance | None,
    projection: Projection | None,
) -> tuple[PreTrainedModel, NarrowReport]:
    """Return the student and the report on it.

    Args:
        teacher: the model that is cut.
        layout: its sizes.
        cuts: the units to keep.
        values: the new sizes.
        vocabulary: the tokens to keep, or None for all.
        importance: how the units were chosen, for the report.
        projection: projects the residual stream; None if channels are kept or not cut.

    Raises:
        TeacherError: if a tensor has no place in the student, or the student would not survive saving.
    """
    _check_saved(teacher, cuts)
    config, sizes = _new_config(layout, values)
    notes = [] if vocabulary is None else renumber(config, vocabulary.new_ids, "config")
    student = empty_student(teacher, config, "narrow", projection.untied if projection else ())
    new = projection.tensors() if projection else {}
    tensors = all_tensors(teacher) | new
    check_weight_tying(student, tensors, "narrow")
    done = new | cut({name: tensor.detach() for name, tensor in tensors.items()}, cuts)
    copied = _fill(student, teacher, done)
    notes += projection.notes(student) if projection else _other_scales(student, teacher)
    notes += _generation_notes(student, teacher, cuts, vocabulary)
    student.eval()
    names = dict(student.named_parameters()).keys() | student.state_dict().keys()
    report = NarrowReport(
        architecture=type(teacher).__name__,
        sizes=sizes,
        kept={group.name: tuple(kept.tolist()) for group, kept in cuts},
        cut=tuple(name for name in done if name in names),
        copied=tuple(copied),
        importance=importance,
        projected=projection.share() if projection else None,
        student_parameters=count_parameters(student),
        teacher_parameters=count_parameters(teacher),
        notes=tuple(notes),
    )
    return student, report


def _check_saved(teacher: PreTrainedModel, cuts: list[Cut]) -> None:
    """Raise TeacherError if units lie in a tensor that is computed when the model is loaded, such as sinusoids."""
    saved, ignored = set(teacher.state_dict()), teacher._keys_to_ignore_on_save or ()
    for group, kept in cuts:
        for axis in group.axes:
            is_lost = axis.name not in saved or any(re.search(pattern, axis.name) for pattern in ignored)
            if is_lost and len(kept) < group.units:
                raise TeacherError(
                    f"narrow: {axis.name} is computed from the config, not saved: {group.kind}= cannot be cut."
                )


def _new_config(layout: Layout, values: Mapping[Kind, int]) -> tuple[PreTrainedConfig, tuple[SizeReport, ...]]:
    new: dict[Setting, int] = {}
    reports = []
    for kind, value in values.items():
        for main, before in layout.sizes[kind].values.items():
            for setting in (main, *followers(kind, main, layout.config)):
                new[setting] = value
                if value != before:
                    reports.append(SizeReport(str(setting), value, before))
    return changed(layout.config, new), tuple(reports)


def _fill(student: nn.Module, teacher: nn.Module, done: Mapping[str, Tensor]) -> list[str]:
    """Give the student its tensors; return the names of those that equal the teacher's."""
    sources = all_tensors(teacher)
    saved = student.state_dict().keys()
    copied, missing = [], []
    # A buffer that is not saved is computed from the config, here as after loading (Gemma's scale of its embeddings).
    buffers = [(name, buffer) for name, buffer in student.named_buffers() if name in saved]
    for name, tensor in [*student.named_parameters(), *buffers]:
        source = done.get(name, sources.get(name))
        if source is not None and source.shape == tensor.shape:
            tensor.data = source.detach().contiguous() if name in done else source.detach().clone()
            if name not in done:
                copied.append(name)
        elif name in saved:
            missing.append(f"{name} {tuple(tensor.shape)}")
    missing = missing or sorted(teacher.state_dict().keys() - saved)
    if missing:
        raise TeacherError(
            f"narrow: the teacher does not fill the student: {', '.join(missing[:4])}. Was it changed by hand?"
        )
    return copied


def _other_scales(student: nn.Module, teacher: nn.Module) -> list[str]:
    """Return a note for each factor that the model derives from its width."""
    modules = dict(teacher.named_modules())
    notes = []
    for name, module in student.named_modules():
        theirs = vars(modules[name]) if name in modules else {}
        for key, value in vars(module).items():
            before = theirs.get(key)
            if isinstance(value, float) and isinstance(before, float) and value != before:
                notes.append(f"{name}.{key} is {value:g}, in the teacher {before:g}: it follows the width.")
    return notes


def _generation_notes(
    student: PreTrainedModel, teacher: PreTrainedModel, cuts: list[Cut], vocabulary: TrimmedVocabulary | None
) -> list[str]:
    """Copy the generation config, with its token ids and alignment heads where they are in the student."""
    kept = {group.name: units.tolist() for group, units in cuts if group.kind == "heads"}

    def move(layer: int, head: int) -> list[int] | None:
        attention = f"decoder.layers.{layer}.encoder_attn."
        units: list[int] = next((units for name, units in kept.items() if attention in f"{name}."), [])
        return [layer, units.index(head)] if head in units else None

    notes = copy_generation_config(student, teacher, move if kept else None)
    if vocabulary is not None and getattr(teacher, "generation_config", None) is not None:
        notes += renumber(student.generation_config, vocabulary.new_ids, "generation_config")
    return notes
