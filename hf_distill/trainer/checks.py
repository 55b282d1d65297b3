"""Checks of a trainer's settings; each error says what to do instead."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING

from accelerate.utils import DistributedType
from torch import nn
from transformers import PreTrainedModel, TrainingArguments

from hf_distill._types import Collator
from hf_distill.augment.collator import OTHER_TOKENS
from hf_distill.augment.on_policy import OnPolicy
from hf_distill.blend import Objectives
from hf_distill.distiller import Distiller
from hf_distill.errors import SettingError
from hf_distill.students.adapters import check_adapters
from hf_distill.trainer.columns import VALUES_AS_TEACHER, columns_with_values

if TYPE_CHECKING:
    from hf_distill.trainer.mixin import DistillationMixin

logger = logging.getLogger(__name__)
_SHARDED = {DistributedType.FSDP: "FSDP", DistributedType.DEEPSPEED: "DeepSpeed"}


def check_one_gpu_a_process(args: TrainingArguments | None, model: nn.Module | None) -> None:
    """Raise if one process has several GPUs, unless one model is spread over all of them."""
    if args is None or args.n_gpu <= 1 or getattr(model, "hf_device_map", None):
        return
    raise SettingError(
        f"{args.n_gpu} GPUs in one process: that is DataParallel, which splits a batch behind the loss's back, and is "
        f"refused. Start one process a GPU: accelerate launch --num_processes {args.n_gpu} your_script.py. For one "
        "GPU, set CUDA_VISIBLE_DEVICES=0."
    )


def warn_of_adapters(student: nn.Module) -> None:
    """Log the mistake that `check_adapters` finds in a `PeftModel`; the training goes on, as the user may mean it."""
    peft = sys.modules.get("peft")  # whoever made a PeftModel has imported it
    student = getattr(student, "_orig_mod", student)
    if peft is None or not isinstance(student, peft.PeftModel):
        return
    if isinstance(student.get_base_model(), PreTrainedModel):
        try:
            check_adapters(student)
        except SettingError as error:
            logger.warning(f"{error} The training goes on with the student as it is.")


def check_no_sequence_parallelism(trainer: DistillationMixin) -> None:
    """Raise if the positions of a sequence are split over processes."""
    if trainer.get_cp_size() > 1 or trainer.get_sp_size() > 1:
        raise SettingError(
            "context or sequence parallelism: the rows of a sequence are then on different processes, which is not "
            "supported. Use data parallelism, FSDP or tensor parallelism."
        )


def check_no_teacher_values(columns: Iterable[str]) -> None:
    """Raise if a dataset holds a teacher's predictions and no teacher would read them."""
    values = sorted(columns_with_values(columns))
    if values:
        raise SettingError(
            f"there is no teacher, and the dataset's {', '.join(values)} is not read as one. {VALUES_AS_TEACHER}"
        )


def check_given_distiller(
    distiller: Distiller, student: nn.Module, *, objectives: Objectives, has_model_init: bool
) -> None:
    """Check a distiller that the user made, and bind it to the student if `model_init` made that."""
    if objectives is not None:
        raise SettingError("objectives= and distiller= together: give the objectives to the Distiller.")
    if distiller.is_bound_to(student):
        return
    if not has_model_init:
        raise SettingError(
            "the distiller was made for another student than model=. Make it with this one, or call "
            "distiller.bind(model) first."
        )
    distiller.bind(student)


def check_augmentation(collator: Collator, distiller: Distiller, *, has_teacher_columns: bool) -> None:
    """Raise if an augmentation would give student and teacher inputs whose outputs must not be compared."""
    if has_teacher_columns and getattr(collator, "student_only", None) is False:
        raise SettingError(
            "the dataset has columns of the teacher's own (teacher_text, ...), which the augmentation does not change: "
            "the teacher would be shown another example than the student. Pass student_only=True if that is meant, or "
            "augment before tokenizing twice (hf_distill.augment.augment_dataset)."
        )
    compares_positions = distiller.task.needs_same_inputs or distiller.blending.compares_positions()
    if getattr(collator, "sentence_rows_only", False) and compares_positions:
        raise SettingError(OTHER_TOKENS.format(names="an augmentation of words"))


def check_on_policy(trainer: DistillationMixin) -> None:
    """Check that the student may continue batches in this training, once for each student and alpha.

    Raises:
        SettingError: if `on_policy` is no `OnPolicy`, labels have a weight, the teacher's answers come with the data,
            or the student is sharded.
    """
    on_policy = trainer._on_policy
    if on_policy is None or trainer._on_policy_checked is trainer.model:
        return
    if not isinstance(on_policy, OnPolicy):
        raise SettingError(
            f"on_policy={on_policy!r}: must be an object such as hf_distill.augment.OnPolicy(student_share=0.5). "
            "Augmentations go into the collator: data_collator=hf_distill.augment.AugmentingCollator(...)."
        )
    teacher = trainer.distiller.teacher
    on_policy.bind(trainer.model, trainer.distiller.task, teacher=teacher, processing_class=trainer.processing_class)
    if trainer.distiller.uses_labels:
        raise SettingError(
            f"{on_policy!r}: batches that the student continued have no gold labels; alpha < 1 would train on the "
            "student's own text. Pass alpha=1.0, or alpha=None with objectives."
        )
    if teacher is not None and any(member.fetches_with_collator for member in teacher.members()):
        raise SettingError(
            f"{on_policy!r}: the student writes texts while it trains, and a cached teacher has no answers for them. "
            "Use a model as teacher."
        )
    sharded = _SHARDED.get(trainer.accelerator.distributed_type)
    how = "tensor parallelism" if trainer.get_tp_size() > 1 else sharded
    if how is not None:
        raise SettingError(
            f"{on_policy!r}: the student writes in each process by itself, and with {how} no process holds all of it. "
            "Use data parallelism (DDP), or let the teacher write before the training: "
            "hf_distill.generate_completions."
        )
    trainer._on_policy_checked = trainer.model
