"""The settings that decide what a training makes of a student, as JSON, and how two of them differ."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

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
