"""DistillationArguments: the settings that distillation adds to `TrainingArguments`."""

from __future__ import annotations

import contextlib
import json
import pickle
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from transformers import Seq2SeqTrainingArguments, TrainingArguments

from hf_distill._types import Keywords
from hf_distill.blend import SETTING_ALIASES
from hf_distill.errors import SettingError, check_keywords, did_you_mean, is_whole
from hf_distill.functional.properties import DivergenceName
from hf_distill.objectives import LogitsMatch
from hf_distill.objectives.logits import divergence_name
from hf_distill.schedules import Schedule, ScheduleName, checked_schedule, make_schedule
from hf_distill.teachers.load import DtypeName, as_dtype
from hf_distill.teachers.quantised import as_setting
from hf_distill.vocabulary import LABEL_MATCHING, LabelMatching

_OF_THE_TRAINER = {
    name: f"It is a keyword of the trainer: DistillationTrainer({name}=...)."
    for name in ("teacher_model", "teacher_processing_class", "task", "objectives", "on_policy", "distiller")
}
_NUMBERS = ("temperature", "alpha", "temperature_end", "alpha_end", "projection_learning_rate")
_DICTS = ("divergence_kwargs", "teacher_quantization", "teacher_device_map")  # given as JSON on the command line


@dataclass
class DistillationSettings:
    """The settings of a distillation, to mix into any dataclass of training arguments; they are validated on creation.

    `@dataclass class Args(DistillationSettings, SFTConfig)` makes arguments for TRL's `SFTTrainer`.
    """

    temperature: float = field(
        default=2.0,
        metadata={"help": "Divides the logits of both models before the divergence. Above 0; higher is softer."},
    )
    alpha: float | None = field(
        default=0.5,
        metadata={
            "help": "Weight of the teacher's term, in [0, 1]; the labels' term weighs 1 - alpha. 0 is plain Trainer; "
            "None (in Python): the objectives alone."
        },
    )
    divergence: DivergenceName | None = field(
        default=None,
        metadata={
            "help": "forward_kl, reverse_kl, jensen_shannon, … Default: forward_kl on logits, mean_squared_error on "
            "values."
        },
    )
    divergence_kwargs: dict[str, Any] | str | None = field(
        default=None, metadata={"help": 'Settings of the divergence, as JSON: {"beta": 0.3}.'}
    )
    temperature_schedule: ScheduleName = field(
        default="constant",
        metadata={"help": "constant, linear or cosine, from temperature to temperature_end."},
    )
    temperature_end: float | None = field(
        default=None, metadata={"help": "Temperature at the end of training, for a schedule."}
    )
    alpha_schedule: ScheduleName = field(
        default="constant",
        metadata={"help": "constant, linear or cosine, from alpha to alpha_end."},
    )
    alpha_end: float | None = field(default=None, metadata={"help": "alpha at the end of training, for a schedule."})
    teacher_dtype: DtypeName | None = field(
        default=None,
        metadata={
            "help": "float32, bfloat16, float16 or auto (the checkpoint's). Default: auto, under the student's mixed "
            "precision."
        },
    )
    teacher_quantization: dict[str, Any] | str | None = field(
        default=None,
        metadata={
            "help": "int8_dynamic (on a CPU), or a quantization_config of transformers, as JSON: "
            '{"quant_method": "bitsandbytes", "load_in_4bit": true}. Compared once with full precision.'
        },
    )
    teacher_device_map: dict[str, Any] | str | None = field(
        default=None,
        metadata={"help": "Where the teacher's parts go, as from_pretrained takes it: auto, or JSON."},
    )
    fused_loss: bool | None = field(
        default=None,
        metadata={
            "help": "Whether loss and gradients are computed from hidden states, chunk by chunk, without whole logits "
            "over the vocabulary. True: always; False: never; default: where the vocabulary is large."
        },
    )
    evaluate_with_teacher: bool = field(
        default=False,
        metadata={
            "help": "Evaluation also runs the teacher: agreement with it, the divergence at the final temperature, and "
            "a teacher_<metric> beside each metric of compute_metrics."
        },
    )
    projection_learning_rate: float | None = field(
        default=None,
        metadata={"help": "Learning rate of the projections that objectives learn. Default: learning_rate."},
    )
    label_matching: LabelMatching = field(
        default="by_name",
        metadata={"help": "How the labels of two classification heads are paired: by_name (label2id) or by_index."},
    )

    if not TYPE_CHECKING:  # type checkers and editors need to see the signature of __init__

        def __new__(cls, *positional: Any, **keywords: Any) -> Any:
            """Raise TypeError for an unknown keyword, naming the closest field."""
            check_keywords(cls.__init__, keywords, called=cls.__name__, also=SETTING_ALIASES, elsewhere=_OF_THE_TRAINER)
            return super().__new__(cls)

    def __post_init__(self) -> None:
        args: Any = self  # always mixed into a TrainingArguments
        metric = args.metric_for_best_model
        if args.greater_is_better is None and metric is not None and metric.endswith("divergence"):
            args.greater_is_better = False  # transformers maximizes every metric not named "...loss"
        super().__post_init__()  # type: ignore[misc]  # TrainingArguments', next in the order of bases
        for name in _NUMBERS:  # a hyperparameter search casts its choice to the type of the old value
            value = getattr(self, name)
            if is_whole(value):
                setattr(self, name, float(value))
        if isinstance(self.divergence_kwargs, str):
            raise SettingError(
                f"divergence_kwargs={self.divergence_kwargs!r}: must be a dict, or JSON that starts with {{."
            )
        if self.label_matching not in LABEL_MATCHING:
            allowed, hint = " and ".join(LABEL_MATCHING), did_you_mean(self.label_matching, LABEL_MATCHING)
            raise SettingError(f"label_matching={self.label_matching!r}: allowed are {allowed}.{hint}")
        if isinstance(as_dtype(self.teacher_dtype), torch.dtype):  # by name, so that it can be written as JSON
            self.teacher_dtype = str(as_dtype(self.teacher_dtype)).removeprefix("torch.")
        self.teacher_quantization = as_setting(self.teacher_quantization)
        blend = blend_of(self)
        if blend["alpha"] is not None:
            checked_schedule("alpha", blend["alpha"])
        if self.projection_learning_rate is not None and not self.projection_learning_rate >= 0:
            raise SettingError(f"projection_learning_rate={self.projection_learning_rate!r}: must be at least 0.")
        temperature = checked_schedule("temperature", blend["temperature"])
        LogitsMatch(blend["divergence"], divergence_kwargs=blend["divergence_kwargs"], temperature=temperature)

    def to_json_string(self) -> str:
        """Return the arguments as JSON; a divergence that is a function is written as its name."""
        args: Any = self
        named = None if self.divergence is None else divergence_name(self.divergence)
        return json.dumps({**args.to_dict(), "divergence": named}, indent=2)


@dataclass
class DistillationArguments(DistillationSettings, TrainingArguments):
    """`TrainingArguments` and the settings of a distillation.

    Each field's help describes it; `HfArgumentParser` turns the fields into command-line options.

    Raises:
        SettingError: if a value is not allowed; raised on creation.

    >>> DistillationArguments(output_dir="out", temperature=4.0, report_to="none").alpha
    0.5
    """

    _VALID_DICT_FIELDS = [*TrainingArguments._VALID_DICT_FIELDS, *_DICTS]  # noqa: RUF012 as in TrainingArguments


@dataclass
class Seq2SeqDistillationArguments(DistillationSettings, Seq2SeqTrainingArguments):
    """`Seq2SeqTrainingArguments` and the settings of a distillation; see `DistillationArguments`."""

    _VALID_DICT_FIELDS = [*TrainingArguments._VALID_DICT_FIELDS, *_DICTS]  # noqa: RUF012 as in TrainingArguments


def setting(args: DistillationSettings | TrainingArguments | None, name: str) -> Any:
    """Return a setting of the distillation, or its default if `args` is a plain `TrainingArguments`."""
    return getattr(args, name, DistillationSettings.__dataclass_fields__[name].default)


@contextlib.contextmanager
def picklable(args: Any) -> Iterator[None]:
    """Inside this context `args` can be pickled: a divergence that cannot be (a lambda) is replaced by its name."""
    given = setting(args, "divergence")
    try:
        pickle.dumps(given)
    except (pickle.PicklingError, AttributeError, TypeError):  # raised by pickle for local functions
        args.divergence = divergence_name(given)
    try:
        yield
    finally:
        if given is not None:
            args.divergence = given


def blend_of(args: DistillationSettings | TrainingArguments | None) -> Keywords:
    """Return the keyword arguments of `Distiller.set_blend`, read from any training arguments.

    Raises:
        SettingError: if a schedule is not valid.
    """
    blend = {knob: _schedule_of(args, knob) for knob in ("temperature", "alpha")}
    names = ("divergence", "divergence_kwargs")
    return {**blend, **{name: setting(args, name) for name in names}}


def _schedule_of(args: DistillationSettings | TrainingArguments | None, knob: str) -> Schedule | None:
    kind, start, end = (setting(args, name) for name in (f"{knob}_schedule", knob, f"{knob}_end"))
    if knob == "alpha" and start is None:
        if kind != "constant" or end is not None:
            raise SettingError(f"alpha=None (the objectives alone) has no schedule: alpha_schedule={kind!r}, {end!r}.")
        return None
    return make_schedule(knob, kind, start, end)
