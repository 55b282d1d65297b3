"""A quantised teacher, compared once with its full precision, on the first batch; and dynamic int8 for a CPU."""

from __future__ import annotations

import copy
import logging
import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace

import psutil
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from transformers.quantizers.auto import AutoQuantizationConfig
from transformers.utils.quantization_config import QuantizationConfigMixin

from hf_distill._types import Keywords, ProcessingClass
from hf_distill._utils import random_state_kept
from hf_distill.errors import SettingError, did_you_mean
from hf_distill.functional import forward_kl
from hf_distill.signals import Needs, Signals
from hf_distill.tasks import Batch, Task
from hf_distill.tasks.infer import config_of, unwrapped
from hf_distill.teachers.base import output_head_of
from hf_distill.teachers.load import load_teacher
from hf_distill.teachers.model import ModelTeacher
from hf_distill.vocabulary import LabelMatching

logger = logging.getLogger(__name__)
INT8_DYNAMIC = "int8_dynamic"


@dataclass(frozen=True)
class Agreement:
    """How a quantised teacher's predictions differ from its full precision's.

    Attributes:
        rows: the number of compared rows.
        kl: mean KL(full precision ‖ quantised) of a row in nats, at temperature 1; None for values.
        same_choice: share of the rows with the same most likely column; None for values.
        difference: mean absolute difference of values; None for logits.
    """

    rows: int
    kl: float | None = None
    same_choice: float | None = None
    difference: float | None = None

    def __str__(self) -> str:
        rows = f"over {self.rows} rows"
        if self.difference is not None:
            return f"mean absolute difference {self.difference:.3g} {rows}"
        return f"KL {self.kl:.3g} nats a row, the same choice in {self.same_choice:.1%}, {rows}"


class QuantisedTeacher(ModelTeacher):
    """A quantised model as teacher, compared once with its full precision.

    The first batch that needs predictions goes through both models, with the full precision on the CPU. The figures are
    logged and kept in `agreement`. If the full precision does not fit into the free memory or cannot be loaded, there
    are no figures, and `not_measured` says why.

    Args:
        model: the quantised model.
        how: the quantisation in words, for the log.
        full: loads the model in full precision; None if that is not possible.
        full_bytes: the size of the full precision's weights, if known.
        processing_class: as for `ModelTeacher`.
        label_matching: as for `ModelTeacher`.

    >>> from transformers import BertConfig, BertForSequenceClassification as Bert
    >>> from hf_distill import Distiller
    >>> config = BertConfig(vocab_size=9, hidden_size=4, num_hidden_layers=1, num_attention_heads=1)
    >>> student, teacher = Bert(config), Bert(config)
    >>> distiller = Distiller(student, quantise_dynamically(teacher))
    >>> _ = distiller(student, {"input_ids": torch.tensor([[1, 2]]), "labels": torch.tensor([0])})
    >>> distiller.teacher.agreement.rows
    1
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        how: str,
        full: Callable[[], nn.Module] | None = None,
        full_bytes: int | None = None,
        processing_class: ProcessingClass | None = None,
        label_matching: LabelMatching = "by_name",
    ) -> None:
        super().__init__(model, processing_class=processing_class, label_matching=label_matching, dtype="auto")
        self.agreement: Agreement | None = None
        self.not_measured: str | None = None if full is not None else "its full precision is not known"
        self._how, self._full, self._full_bytes = how, full, full_bytes

    def __call__(self, task: Task, batch: Batch, needs: Needs) -> Signals:
        measures = needs.logits and self.agreement is None and self.not_measured is None
        signals = super().__call__(task, batch, replace(needs, deferred=False) if measures else needs)
        if measures:
            self._measure(signals.predictions(), task, batch)
        return signals

    def to(self, accelerator: Accelerator) -> None:
        if is_dynamic(self.model) and accelerator.device.type != "cpu":
            device = accelerator.device.type
            raise SettingError(f"{INT8_DYNAMIC!r} needs a CPU, and this training is on {device}. Use a TorchAoConfig.")
        super().to(accelerator)

    def _measure(self, predictions: Tensor, task: Task, batch: Batch) -> None:
        if self._accelerator is not None and not self._accelerator.is_main_process:
            self.not_measured = "it is measured on the main process"
            return
        result = self._compare(predictions, task, batch)
        self._full = None  # frees the memory of the model that it may hold
        if isinstance(result, str):
            self.not_measured = result
            logger.warning(f"Teacher, {self._how}: not compared with its full precision: {result}.")
        else:
            self.agreement = result
            logger.warning(f"Teacher, {self._how}, against its full precision: {result}.")

    def _compare(self, predictions: Tensor, task: Task, batch: Batch) -> Agreement | str:
        """Return the figures, or why there are none."""
        assert self._full is not None  # else `not_measured` is set
        free = psutil.virtual_memory().available
        if self._full_bytes is not None and self._full_bytes > 0.8 * free:
            return f"its {self._full_bytes / 1e9:.1f} GB do not fit into {free / 1e9:.1f} GB of free memory"
        kept = task.kept_rows(batch)
        rows = task.select(predictions, batch)
        ours = (rows if kept is None else rows[kept]).float().cpu()
        if not len(ours):
            return "no row of the first batch counts"
        try:
            with random_state_kept():
                full = self._full()
        except (OSError, RuntimeError, ValueError) as error:
            return f"it cannot be loaded ({type(error).__name__})"
        full.eval()
        inputs = _on_cpu(self._inputs(batch))
        with torch.no_grad():
            if self._padding is None:
                outputs = full(**inputs)
            else:
                padding = self._padding.for_copy(full)
                with padding.in_config():
                    outputs = full(**padding.apply(inputs, self._main))
        batch = _on_cpu(batch)
        theirs = task.select(task.read(outputs, batch, self.alignment, teacher=True), batch)
        theirs = (theirs if kept is None else theirs[kept.cpu()]).float()
        if task.on_values:
            return Agreement(len(ours), difference=(ours - theirs).abs().mean().item())
        same = (ours.argmax(-1) == theirs.argmax(-1)).float().mean().item()
        return Agreement(len(ours), kl=forward_kl(ours, theirs).mean().item(), same_choice=same)


def _on_cpu(batch: Batch) -> Keywords:
    return {name: value.cpu() if isinstance(value, Tensor) else value for name, value in batch.items()}


# Dynamic int8.


def quantise_dynamically(
    model: nn.Module,
    *,
    processing_class: ProcessingClass | None = None,
    label_matching: LabelMatching = "by_name",
) -> QuantisedTeacher:
    """Return a teacher in dynamic int8, for a CPU: int8 weights, and activations quantised as they are computed.

    The model itself does not change. Only the linear layers of its body are quantised, not head, embeddings and norms.

    Args:
        model: the model, in float32.
        processing_class: as for `ModelTeacher`.
        label_matching: as for `ModelTeacher`.

    Raises:
        SettingError: if its body has no linear layer, its weights are not float32, or this torch has no dynamic int8.
    """
    return QuantisedTeacher(
        _int8_dynamic(model),
        how=INT8_DYNAMIC,
        full=lambda: model,
        processing_class=processing_class,
        label_matching=label_matching,
    )


def is_dynamic(model: nn.Module) -> bool:
    """Return whether some of a model's layers are in dynamic int8."""
    return any(type(module).__module__.startswith("torch.ao.nn.quantized.dynamic") for module in model.modules())


def _int8_dynamic(model: nn.Module) -> nn.Module:
    ao = getattr(torch, "ao", None)
    convert = getattr(getattr(ao, "quantization", None), "quantize_dynamic", None)
    engines = [name for name in torch.backends.quantized.supported_engines if name != "none"]
    if convert is None or not engines:
        raise SettingError(f"{INT8_DYNAMIC}: torch {torch.__version__} has no dynamic int8 here. Use a TorchAoConfig.")
    inner = unwrapped(model)
    body = getattr(inner, getattr(inner, "base_model_prefix", ""), inner)
    head = output_head_of(inner)
    chosen = {id(module) for module in body.modules() if type(module) is nn.Linear and module is not head}
    names = [name for name, module in model.named_modules() if id(module) in chosen]
    if not names:
        name = type(inner).__name__
        raise SettingError(f"{INT8_DYNAMIC}: the body of {name} has no torch.nn.Linear. Use another quantisation.")
    dtypes = {model.get_submodule(name).weight.dtype for name in names}
    if dtypes != {torch.float32}:
        shown = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes))
        raise SettingError(f"{INT8_DYNAMIC} starts from float32 weights, and these are {shown}. Load it as float32.")
    per_channel = torch.ao.quantization.per_channel_dynamic_qconfig
    with warnings.catch_warnings():  # torch warns that torchao will replace this function
        warnings.simplefilter("ignore")
        return convert(copy.deepcopy(model).eval(), dict.fromkeys(names, per_channel), inplace=True)


# Quantised by transformers.


def quantised_teacher(
    teacher_model: nn.Module | str | os.PathLike[str],
    kind: str,
    *,
    quantization: str | Keywords | QuantizationConfigMixin,
    device_map: str | Keywords | None = None,
    dtype: str | None = None,
    processing_class: ProcessingClass | None = None,
    label_matching: LabelMatching = "by_name",
) -> QuantisedTeacher:
    """Return a quantised teacher; see `as_teacher` for the arguments. A model can only become "int8_dynamic".

    Raises:
        TeacherError: if it cannot be loaded so, or a library that the quantisation needs is not installed.
        SettingError: if there is no such quantisation.
    """
    setting = as_setting(quantization)
    if isinstance(setting, str):
        if not isinstance(teacher_model, nn.Module):
            teacher_model = load_teacher(teacher_model, kind, dtype=dtype or "float32")
        return quantise_dynamically(teacher_model, processing_class=processing_class, label_matching=label_matching)
    assert not isinstance(teacher_model, nn.Module) and setting is not None  # `check_quantization` comes first
    path = teacher_model
    try:
        config = AutoQuantizationConfig.from_dict(dict(setting))
    except (ValueError, TypeError, ImportError) as error:
        raise SettingError(f"teacher_quantization={setting}: {error}") from error
    model = load_teacher(path, kind, dtype=dtype, quantization_config=config, device_map=device_map)
    return QuantisedTeacher(
        model,
        how=str(setting["quant_method"]),
        full=lambda: load_teacher(path, kind),
        full_bytes=_full_bytes(model),
        processing_class=processing_class,
        label_matching=label_matching,
    )


def as_setting(quantization: str | Keywords | QuantizationConfigMixin | None) -> str | Keywords | None:
    """Return a quantisation as plain data, from a name, a dict or a config of transformers.

    Raises:
        SettingError: if it is none of these.

    >>> as_setting({"quant_method": "bitsandbytes", "load_in_8bit": True})["load_in_8bit"]
    True
    """
    if quantization is None or quantization == INT8_DYNAMIC:
        return quantization
    settings = quantization.to_dict() if isinstance(quantization, QuantizationConfigMixin) else quantization
    if not isinstance(settings, dict) or "quant_method" not in settings:
        hint = did_you_mean(quantization, (INT8_DYNAMIC,), {"int8": INT8_DYNAMIC, "dynamic": INT8_DYNAMIC})
        raise SettingError(
            f"teacher_quantization={quantization!r}: allowed are {INT8_DYNAMIC!r}, a quantization config of "
            f'transformers (BitsAndBytesConfig, TorchAoConfig, …), or that as a dict with "quant_method".{hint}'
        )
    return {name: getattr(value, "value", value) for name, value in settings.items()}


def check_quantization(
    loaded: object | None,
    quantization: str | Keywords | QuantizationConfigMixin | None,
    device_map: str | Keywords | None,
) -> None:
    """Check settings of the loading.

    Args:
        loaded: the user's teacher if it is loaded already, or None if it is loaded from a folder or Hub id.
        quantization: as for `as_teacher`.
        device_map: as for `as_teacher`.

    Raises:
        SettingError: if a setting would have no effect.
    """
    if loaded is None:
        if quantization == INT8_DYNAMIC and device_map is not None:
            raise SettingError(
                f"teacher_device_map={device_map!r} with {INT8_DYNAMIC!r}, which stays on the CPU. Leave it out."
            )
        return
    name = type(loaded).__name__
    if device_map is not None:
        raise SettingError(f"teacher_device_map={device_map!r} is for a teacher that is loaded here, not for a {name}.")
    if quantization is not None and not (quantization == INT8_DYNAMIC and isinstance(loaded, nn.Module)):
        raise SettingError(
            f"teacher_quantization is for a teacher that is loaded here, and teacher_model is a {name}. Pass its "
            f"folder or Hub id, or load it with quantization_config= yourself; a model can become {INT8_DYNAMIC!r}."
        )


def _full_bytes(model: nn.Module) -> int | None:
    """Return the size of the full precision's weights, found without loading them; None if it is not known."""
    config = copy.deepcopy(config_of(model))
    if config is None:
        return None
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with torch.device("meta"):
        full = type(model)(config)
    size = config.dtype.itemsize if isinstance(config.dtype, torch.dtype) else 4
    return sum(parameter.numel() for parameter in full.parameters()) * size
