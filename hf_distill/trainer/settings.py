"""The settings that decide what a training makes of a student, as JSON, and how two of them differ."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from transformers import Trainer

from hf_distill._utils import random_state_kept
from hf_distill.blend import compares_nothing, uses_teacher
from hf_distill.errors import SettingError
from hf_distill.tasks.unknown import UnknownTask
from hf_distill.trainer.arguments import blend_of, picklable, setting
from hf_distill.trainer.columns import columns_of

# Of the arguments, what decides about the student. Where it is saved and what is logged may change.
DECIDING = (
    *("temperature", "temperature_schedule", "temperature_end", "alpha", "alpha_schedule", "alpha_end"),
    *("divergence", "divergence_kwargs", "projection_learning_rate", "teacher_dtype", "teacher_quantization"),
    *("label_matching", "learning_rate", "num_train_epochs", "max_steps", "weight_decay", "optim", "optim_args"),
    *("adam_beta1", "adam_beta2", "adam_epsilon", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps"),
    *("max_grad_norm", "seed", "data_seed", "label_smoothing_factor", "neftune_noise_alpha", "bf16", "fp16"),
    *("per_device_train_batch_size", "gradient_accumulation_steps", "train_sampling_strategy"),
)
# Those that a resumed run reads from the checkpoint, with the state of optimizer and scheduler.
FROM_CHECKPOINT = (
    "learning_rate",
    "projection_learning_rate",
    "weight_decay",
    "adam_beta1",
    "adam_beta2",
    "adam_epsilon",
)


def deciding_arguments(args: Any) -> dict[str, Any]:
    """The values of those of `DECIDING` that these arguments have."""
    return {name: plain(getattr(args, name)) for name in DECIDING if hasattr(args, name)}


def plain(value: Any) -> Any:
    """As JSON gives it back."""
    return json.loads(json.dumps(value, default=str))


def without_address(text: str) -> str:
    """A repr without what differs from process to process."""
    return re.sub(r" at 0x[0-9a-f]+", "", text)


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[str]:
    """`name was a, is b` for each setting that differs; one that is missing is None."""
    for name in dict.fromkeys([*before, *now]):
        old, new = before.get(name), now.get(name)
        if old != new:
            yield f"{name} was {old!r}, is {new!r}"


if TYPE_CHECKING:
    _Trainer = Trainer
else:
    _Trainer = object

_OF_THE_BLEND = ("temperature", "alpha", "divergence", "divergence_kwargs")
_OF_SCHEDULES = ("temperature_schedule", "temperature_end", "alpha_schedule", "alpha_end")
_READ_ONCE = ("teacher_dtype", "teacher_quantization", "teacher_device_map", "label_matching", "materialize_logits")
_NAMES = (*_OF_THE_BLEND, *_OF_SCHEDULES, "evaluate_with_teacher", *_READ_ONCE)


class SettingsMixin(_Trainer):
    """Compares the settings with those that are in use: a few comparisons an optimizer step."""

    args: Any
    distiller: Any
    _signature_columns: Any
    _blend_is_ours: bool
    _objectives_setting: Any
    _view_fits: Any
    _has_teacher_columns: Any
    _make_distiller: Any
    _collate_for_teacher: Any
    _collate_answer_masks: Any
    _datasets: Any
    _settings_in_use: dict[str, Any] | None = None  # None: the trainer is being made
    _batches_are_made = False  # whether the training's data loader exists, and with it the columns that it keeps
    _blend_at_start: dict[str, float]  # of knobs that were changed while the training ran

    def _use_settings(self) -> None:
        """Take the settings as they are now for those that are in use."""
        self._settings_in_use, self._blend_at_start = _settings_of(self.args), {}

    def _inner_training_loop(self, *positional: Any, **keywords: Any) -> Any:
        self._follow_settings()
        self._blend_at_start = {}
        try:
            return super()._inner_training_loop(*positional, **keywords)
        finally:
            self._batches_are_made = False

    def get_train_dataloader(self) -> Any:
        """As `Trainer`'s."""
        loader = super().get_train_dataloader()
        self._batches_are_made = self.is_in_train
        return loader

    def _save(self, *positional: Any, **keywords: Any) -> None:
        """As `Trainer`'s: it pickles `args`."""
        with picklable(self.args):
            super()._save(*positional, **keywords)

    def _follow_settings(self) -> None:
        """Let the distiller follow what has changed in `args`.

        Raises:
            SettingError: a value that cannot be, or a change that cannot be followed; the distiller is as it was.
            TeacherError: a teacher that is needed from now on cannot teach this student.
        """
        now, before = _settings_of(self.args), self._settings_in_use
        if before is None or now == before:
            return
        changed = [name for name in _NAMES if now[name] != before[name]]
        self._check_changed(changed, now, before)
        if self._blend_is_ours:
            self._follow_blend()
        elif self.distiller.teacher is None:
            raise SettingError("evaluate_with_teacher=True needs a teacher, and the given distiller has none.")
        self._settings_in_use = now
        self._view_fits = None  # what a view allows depends on alpha

    def _check_changed(self, changed: list[str], now: dict[str, Any], before: dict[str, Any]) -> None:
        for name in changed:
            what = f"args.{name} was {before[name]!r} and is now {now[name]!r}"
            if name in _READ_ONCE:
                raise SettingError(f"{what}. It is read once, when the trainer is made. Make a new trainer.")
            if not self._blend_is_ours and name != "evaluate_with_teacher":
                raise SettingError(
                    f"{what}. This trainer was given a distiller, whose blend does not follow args. Call "
                    "trainer.distiller.set_blend(...), or pass teacher_model= instead of distiller=."
                )

    def _follow_blend(self) -> None:
        blend = blend_of(self.args)
        evaluates = setting(self.args, "evaluate_with_teacher")
        asks_teacher = evaluates or uses_teacher(blend["alpha"], self._objectives_setting)
        needs_task = evaluates or not compares_nothing(blend["alpha"], self._objectives_setting)
        blending = self.distiller.blending
        knobs = blending.knobs()
        is_unknown = isinstance(self.distiller.task, UnknownTask)
        if (asks_teacher and self.distiller.teacher is None) or (needs_task and is_unknown):
            self._remake_distiller()
        else:
            self.distiller.set_blend(**blend)
        if evaluates and not self.distiller.pairs_predictions:
            self.distiller.blending = blending
            raise SettingError(
                "evaluate_with_teacher=True was set after the trainer was made, and its blend compares no predictions. "
                "Set it in args before."
            )
        if self._batches_are_made:
            for name in ("alpha", "temperature"):
                new = self.distiller.blending.knobs().get(name)
                if name in knobs and new is not None and (new(0.0), new(1.0)) != (knobs[name](0.0), knobs[name](1.0)):
                    self._blend_at_start.setdefault(name, knobs[name](0.0))

    def _remake_distiller(self) -> None:
        """Replace the distiller by one with the teacher, which no setting needed until now."""
        with random_state_kept():
            made = self._make_distiller(self.model, self.args, self.processing_class)
        if self._batches_are_made:
            self._refuse_dropped_columns(made.teacher)
            if self.distiller.learned:  # the optimizer holds these parameters, and not the new ones
                raise SettingError(
                    "args now need the teacher, and objectives that learn are being trained without it. Let alpha "
                    "rise by a schedule (alpha_schedule='linear', alpha_end=...), or change it before train()."
                )
        made.place(self.accelerator)
        self.distiller = made
        self._signature_columns = None  # the teacher's inputs belong to them from now on
        self._collate_answer_masks(*self._datasets())
        self._collate_for_teacher()

    def _refuse_dropped_columns(self, teacher: Any) -> None:
        """Raise SettingError where the running training's batches lack something that the teacher would read."""
        if not self.args.remove_unused_columns:
            return
        known = set(columns_of(self.train_dataset))
        read = set(teacher.inputs) - set(self._signature_columns or ())
        lacking = sorted(read & known if known else read)
        if lacking or self._has_teacher_columns():
            what = ", ".join(lacking) or "teacher_* columns"
            raise SettingError(
                "args now need the teacher, and the batches of the running training were made without what it "
                f"reads ({what}). Let alpha rise by a schedule (alpha_schedule='linear', alpha_end=...), or change it "
                "before train()."
            )


def _settings_of(args: Any) -> dict[str, Any]:
    found = {name: setting(args, name) for name in _NAMES}
    return {name: copy.copy(value) if isinstance(value, dict) else value for name, value in found.items()}
