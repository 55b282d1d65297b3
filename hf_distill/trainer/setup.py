"""Making a trainer's distiller from its arguments."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn
from transformers import TrainingArguments

from hf_distill._types import ProcessingClass
from hf_distill.blend import compares_nothing, uses_teacher
from hf_distill.distiller import Distiller
from hf_distill.errors import SettingError
from hf_distill.tasks import make_task
from hf_distill.tasks.infer import task_or_unknown
from hf_distill.teachers import as_teacher
from hf_distill.trainer.arguments import blend_of, setting
from hf_distill.trainer.checks import check_given_distiller, check_no_teacher_values

if TYPE_CHECKING:
    from hf_distill.trainer.mixin import DistillationMixin


def make_distiller(
    trainer: DistillationMixin,
    student: nn.Module,
    args: TrainingArguments | None,
    processing_class: ProcessingClass | None,
    given: Distiller | None = None,
) -> Distiller:
    """Return the distiller of a trainer.

    Args:
        trainer: holds teacher, task and objectives.
        student: the model to train.
        args: the training's arguments, or None for transformers' defaults.
        processing_class: the student's tokenizer or processor.
        given: the user's own distiller, or None to make one from `args`.

    Raises:
        SettingError: if a setting is not allowed.
        TeacherError: if the teacher cannot teach this student.
    """
    evaluates = setting(args, "evaluate_with_teacher")
    if evaluates and (trainer._teacher_setting if given is None else given.teacher) is None:
        raise SettingError("evaluate_with_teacher=True needs a teacher: pass teacher_model=.")
    if given is not None:
        check_given_distiller(
            given,
            student,
            objectives=trainer._objectives_setting,
            has_model_init=getattr(trainer, "model_init", None) is not None,
        )
        return given
    blend, teacher = blend_of(args), None
    if evaluates and blend["alpha"] is None:
        raise SettingError("evaluate_with_teacher=True compares predictions, and alpha=None has none compared.")
    needs_teacher = uses_teacher(blend["alpha"], trainer._objectives_setting)
    if needs_teacher and trainer._teacher_setting is None:
        check_no_teacher_values(trainer._columns_given)
    task = trainer._task_setting
    if task is None and not evaluates and compares_nothing(blend["alpha"], trainer._objectives_setting):
        task = task_or_unknown(student)
    if trainer._teacher_setting is not None and (evaluates or needs_teacher):
        teacher = as_teacher(
            trainer._teacher_setting,
            str(make_task(student, task)),
            processing_class=trainer._teacher_processing_class,
            dtype=setting(args, "teacher_dtype"),
            label_matching=setting(args, "label_matching"),
            quantization=setting(args, "teacher_quantization"),
            device_map=setting(args, "teacher_device_map"),
        )
    return Distiller(
        student,
        teacher,
        task=task,
        processing_class=processing_class,
        objectives=trainer._objectives_setting,
        seed=None if args is None else args.seed,
        compare_predictions=evaluates,
        fused_loss=setting(args, "fused_loss"),
        label_names=None if args is None else args.label_names,
        **blend,
    )
