"""Loading a teacher in fewer bits: what may be asked for, as plain data or as a config of transformers."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn
from transformers.quantizers.auto import AutoQuantizationConfig
from transformers.utils.quantization_config import QuantizationConfigMixin

from hf_distill.errors import SettingError, did_you_mean
from hf_distill.teachers.load import load_teacher
from hf_distill.teachers.quantised import INT8_DYNAMIC, QuantisedTeacher, quantise_dynamically


def quantised_teacher(
    teacher_model: Any,
    kind: str,
    *,
    quantization: Any,
    device_map: str | dict[str, Any] | None = None,
    dtype: str | None = None,
    processor: Any = None,
    label_matching: str = "by_name",
) -> QuantisedTeacher:
    """A quantised teacher, from a folder or Hub id; a model that is given can only become "int8_dynamic".

    Args:
        As `as_teacher`.

    Raises:
        TeacherError: it cannot be loaded so, or what the quantisation needs is not installed.
        SettingError: no such quantisation.
    """
    setting = as_setting(quantization)
    if not isinstance(setting, dict):
        if not isinstance(teacher_model, nn.Module):
            teacher_model = load_teacher(teacher_model, kind, dtype=dtype or "float32")
        return quantise_dynamically(teacher_model, processor=processor, label_matching=label_matching)
    try:
        config = AutoQuantizationConfig.from_dict(dict(setting))
    except (ValueError, TypeError, ImportError) as error:
        raise SettingError(f"teacher_quantization={setting}: {error}") from error
    model = load_teacher(teacher_model, kind, dtype=dtype, quantization_config=config, device_map=device_map)
    return QuantisedTeacher(
        model,
        how=str(setting["quant_method"]),
        full=lambda: load_teacher(teacher_model, kind),
        full_bytes=_checkpoint_bytes(model),
        processor=processor,
        label_matching=label_matching,
    )


def as_setting(quantization: Any) -> str | dict[str, Any] | None:
    """What a quantisation is as plain data, from a name, a dict or a config of transformers.

    Raises:
        SettingError: none of these.

    >>> as_setting({"quant_method": "bitsandbytes", "load_in_8bit": True})["load_in_8bit"]
    True
    """
    if quantization is None or quantization == INT8_DYNAMIC:
        return quantization
    found = quantization.to_dict() if isinstance(quantization, QuantizationConfigMixin) else quantization
    if not isinstance(found, dict) or "quant_method" not in found:
        raise SettingError(
            f"teacher_quantization={quantization!r}: allowed are {INT8_DYNAMIC!r}, a quantization config of "
            'transformers (BitsAndBytesConfig, TorchAoConfig, …), or that as a dict with "quant_method".'
            f"{did_you_mean(quantization, (INT8_DYNAMIC,), {'int8': INT8_DYNAMIC, 'dynamic': INT8_DYNAMIC})}"
        )
    return {name: getattr(value, "value", value) for name, value in found.items()}


def refuse_quantization(teacher_model: Any, *, from_path: bool, quantization: Any, device_map: Any) -> None:
    """Raise SettingError where the teacher is there already, and so is held as it is held."""
    if from_path:
        if quantization == INT8_DYNAMIC and device_map is not None:
            raise SettingError(
                f"teacher_device_map={device_map!r} with {INT8_DYNAMIC!r}, which stays on the CPU. Leave it out."
            )
        return
    what = type(teacher_model).__name__
    if device_map is not None:
        raise SettingError(
            f"teacher_device_map={device_map!r} is for a teacher that is loaded here, and teacher_model is a {what}. "
            "Pass its folder or Hub id, or load it with device_map= yourself."
        )
    if quantization is not None and not (quantization == INT8_DYNAMIC and isinstance(teacher_model, nn.Module)):
        raise SettingError(
            f"teacher_quantization is for a teacher that is loaded here, and teacher_model is a {what}. Pass its "
            f"folder or Hub id, or load it with quantization_config= yourself; a model can become {INT8_DYNAMIC!r}."
        )


def _checkpoint_bytes(model: nn.Module) -> int | None:
    """Of the full precision's weights, found without loading them."""
    config = copy.deepcopy(getattr(model, "config", None))
    if config is None:
        return None
    dtype = getattr(config, "dtype", None)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with torch.device("meta"):
        full = type(model)(config)
    size = dtype.itemsize if isinstance(dtype, torch.dtype) else 4
    return sum(parameter.numel() for parameter in full.parameters()) * size
