"""The settings that determine the trained student, as JSON, and applying changed settings to the distiller."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from transformers import TrainingArguments

from hf_distill._types import State
from hf_distill._utils import random_state_kept
from hf_distill.blend import compares_nothing, uses_teacher
from hf_distill.errors import SettingError
from hf_distill.trainer.arguments import blend_of, setting
from hf_distill.trainer.columns import collate_answer_masks, columns_of, datasets_of, has_teacher_columns
from hf_distill.trainer.setup import make_distiller

if TYPE_CHECKING:
    from hf_distill.teachers import Teacher
    from hf_distill.trainer.mixin import DistillationMixin

# The arguments that determine the student; output folders and logging may change.
DECIDING = (
    *("temperature", "temperature_schedule", "temperature_end", "alpha", "alpha_schedule", "alpha_end"),
    *("divergence", "divergence_kwargs", "projection_learning_rate", "teacher_dtype", "teacher_quantization"),
    *("label_matching", "learning_rate", "num_train_epochs", "max_steps", "weight_decay", "optim", "optim_args"),
    *("adam_beta1", "adam_beta2", "adam_epsilon", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps"),
    *("max_grad_norm", "seed", "data_seed", "label_smoothing_factor", "neftune_noise_alpha", "bf16", "fp16"),
    *("per_device_train_batch_size", "gradient_accumulation_steps", "train_sampling_strategy"),
)
# Those that a resumed run reads from the checkpoint, with the state of the optimizer and scheduler.
FROM_CHECKPOINT = (
    "learning_rate",
    "projection_learning_rate",
    "weight_decay",
    "adam_beta1",
    "adam_beta2",
    "adam_epsilon",
)


def deciding_arguments(args: TrainingArguments) -> State:
    """Return the values of the arguments named in `DECIDING`."""
    return {name: plain(getattr(args, name)) for name in DECIDING if hasattr(args, name)}


def plain(value: object) -> Any:
    """Return the value as it reads back from JSON."""
    return json.loads(json.dumps(value, default=str))


def without_address(text: str) -> str:
    """Remove memory addresses, which differ between processes, from a repr."""
    return re.sub(r" at 0x[0-9a-f]+", "", text)


def differences(before: State, now: State) -> Iterator[str]:
    """Return `name was a, is b` for each setting that differs; a missing one counts as None."""
    for name in dict.fromkeys([*before, *now]):
        old, new = before.get(name), now.get(name)
        if old != new:
            yield f"{name} was {old!r}, is {new!r}"


_OF_THE_BLEND = ("temperature", "alpha", "divergence", "divergence_kwargs")
_OF_SCHEDULES = ("temperature_schedule", "temperature_end", "alpha_schedule", "alpha_end")
_READ_ONCE = ("teacher_dtype", "teacher_quantization", "teacher_device_map", "label_matching", "fused_loss")
_NAMES = (*_OF_THE_BLEND, *_OF_SCHEDULES, "evaluate_with_teacher", *_READ_ONCE)
_DEFAULTS = {name: setting(None, name) for name in _NAMES}


def follow_settings(trainer: DistillationMixin) -> None:
    """Apply changes of `args` to the distiller.

    Raises:
        SettingError: if a value is not allowed, or a change cannot be applied; the distiller is then unchanged.
        TeacherError: if a teacher is needed from now on and cannot teach this student.
    """
    args, before = trainer.args, trainer._settings_in_use
    if before is None:
        return
    changed = [name for name, default in _DEFAULTS.items() if getattr(args, name, default) != before[name]]
    if not changed:
        return
    now = settings_of(args)
    _check_changed(trainer, changed, now, before)
    if trainer._blend_is_ours:
        _follow_blend(trainer)
    elif trainer.distiller.teacher is None:
        raise SettingError("evaluate_with_teacher=True needs a teacher, and the given distiller has none.")
    trainer._settings_in_use = now
    trainer._on_policy_checked = None  # the check depends on alpha


def _check_changed(trainer: DistillationMixin, changed: list[str], now: State, before: State) -> None:
    for name in changed:
        what = f"args.{name} was {before[name]!r} and is now {now[name]!r}"
        if name in _READ_ONCE:
            raise SettingError(f"{what}. It is read once, when the trainer is made. Make a new trainer.")
        if not trainer._blend_is_ours and name != "evaluate_with_teacher":
            raise SettingError(
                f"{what}. This trainer was given a distiller, whose blend does not follow args. Call "
                "trainer.distiller.set_blend(...), or pass teacher_model= instead of distiller=."
            )


def _follow_blend(trainer: DistillationMixin) -> None:
    blend = blend_of(trainer.args)
    evaluates = setting(trainer.args, "evaluate_with_teacher")
    asks_teacher = evaluates or uses_teacher(blend["alpha"], trainer._objectives_setting)
    needs_task = evaluates or not compares_nothing(blend["alpha"], trainer._objectives_setting)
    blending = trainer.distiller.blending
    scheduled = blending.scheduled_values()
    if (asks_teacher and trainer.distiller.teacher is None) or (needs_task and not trainer.distiller.task.is_known):
        _remake_distiller(trainer)
    else:
        trainer.distiller.set_blend(**blend)
    if evaluates and not trainer.distiller.compares_heads:
        trainer.distiller.blending = blending
        raise SettingError(
            "evaluate_with_teacher=True was set after the trainer was made, and its blend compares no predictions. "
            "Set it in args before."
        )
    if trainer._batches_are_made:
        for name in ("alpha", "temperature"):
            old, new = scheduled.get(name), trainer.distiller.blending.scheduled_values().get(name)
            if old is not None and new is not None and (new(0.0), new(1.0)) != (old(0.0), old(1.0)):
                trainer._blend_at_start.setdefault(name, old(0.0))


def _remake_distiller(trainer: DistillationMixin) -> None:
    """Replace the distiller by one with the teacher, which no setting needed before."""
    with random_state_kept():
        made = make_distiller(trainer, trainer.model, trainer.args, trainer.processing_class)
    if trainer._batches_are_made:
        _check_dropped_columns(trainer, made.teacher)
        if trainer.distiller.learned:  # the optimizer holds these parameters, not the new ones
            raise SettingError(
                "args now need the teacher, and objectives that learn are being trained without it. Let alpha "
                "rise by a schedule (alpha_schedule='linear', alpha_end=...), or change it before train()."
            )
    made.to(trainer.accelerator)
    trainer.distiller = made
    trainer._signature_columns = None  # they now include the teacher's inputs
    collate_answer_masks(trainer, *datasets_of(trainer))
    if made.teacher is not None:
        trainer.data_collator = made.teacher.wrap_collator(trainer.data_collator)


def _check_dropped_columns(trainer: DistillationMixin, teacher: Teacher | None) -> None:
    """Raise SettingError if the batches of the running training lack inputs of the teacher."""
    if not trainer.args.remove_unused_columns:
        return
    known = set(columns_of(trainer.train_dataset))
    read = set(() if teacher is None else teacher.inputs) - set(trainer._signature_columns or ())
    lacking = sorted(read & known if known else read)
    if lacking or has_teacher_columns(trainer):
        what = ", ".join(lacking) or "teacher_* columns"
        raise SettingError(
            "args now need the teacher, and the batches of the running training were made without what it "
            f"reads ({what}). Let alpha rise by a schedule (alpha_schedule='linear', alpha_end=...), or change it "
            "before train()."
        )


def settings_of(args: TrainingArguments) -> State:
    """Return the current settings of a trainer's distillation."""
    found = {name: getattr(args, name, default) for name, default in _DEFAULTS.items()}
    return {name: copy.copy(value) if isinstance(value, dict) else value for name, value in found.items()}
