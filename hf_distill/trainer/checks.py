"""Set-ups that a distilling trainer refuses, each with the way out."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from hf_distill.augment.collator import OTHER_TOKENS
from hf_distill.distiller import Distiller
from hf_distill.errors import SettingError
from hf_distill.trainer.columns import VALUES_AS_TEACHER, columns_with_values


def refuse_data_parallel(args: Any, model: Any) -> None:
    """One process with several GPUs, unless one model lies over all of them."""
    if args is None or args.n_gpu <= 1 or getattr(model, "hf_device_map", None):
        return
    raise SettingError(
        f"{args.n_gpu} GPUs in one process: that is DataParallel, which splits a batch behind the loss's back, and is "
        f"refused. Start one process a GPU: accelerate launch --num_processes {args.n_gpu} your_script.py. For one "
        "GPU, set CUDA_VISIBLE_DEVICES=0."
    )


def refuse_sequence_parallel(trainer: Any) -> None:
    if trainer.get_cp_size() > 1 or trainer.get_sp_size() > 1:
        raise SettingError(
            "context or sequence parallelism: the rows of a sequence are then on different processes, which is not "
            "supported. Use data parallelism, FSDP or tensor parallelism."
        )


def refuse_values_without_teacher(columns: Iterable[str]) -> None:
    """A teacher's predictions in the dataset, and no teacher that would read them."""
    values = sorted(columns_with_values(columns))
    if values:
        raise SettingError(
            f"there is no teacher, and the dataset's {', '.join(values)} is not read as one. {VALUES_AS_TEACHER}"
        )


def refuse_two_blends(objectives: Any) -> None:
    if objectives is not None:
        raise SettingError("objectives= and distiller= together: give the objectives to the Distiller.")


def refuse_other_views(collator: Any, distiller: Distiller, *, has_teacher_columns: bool) -> None:
    """An augmentation after which student and teacher would be shown what must not be compared."""
    if has_teacher_columns and getattr(collator, "student_only", None) is False:
        raise SettingError(
            "the dataset has columns of the teacher's own (teacher_text, ...), which the augmentation does not change: "
            "the teacher would be shown another example than the student. Pass student_only=True if that is meant, or "
            "augment before tokenizing twice (hf_distill.augment.augment_dataset)."
        )
    compares_positions = distiller.task.needs_same_inputs or distiller.blending.compares_positions()
    if getattr(collator, "sentence_rows_only", False) and compares_positions:
        raise SettingError(OTHER_TOKENS.format(names="an augmentation of words"))


def refuse_other_student(*, has_model_init: bool) -> None:
    """A distiller of another student; one that `model_init` made may be learned of."""
    if not has_model_init:
        raise SettingError(
            "the distiller was made for another student than model=. Make it with this one, or call "
            "distiller.fit(model) first."
        )
