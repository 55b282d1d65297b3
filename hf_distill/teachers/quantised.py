"""A teacher held in fewer bits, whose agreement with its full precision is measured once, on the first batch.

Loading one from a checkpoint is elsewhere; here is dynamic int8 for a CPU, which needs no other library.
"""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import psutil
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from transformers.quantizers.auto import AutoQuantizationConfig
from transformers.utils.quantization_config import QuantizationConfigMixin

from hf_distill.errors import SettingError, did_you_mean
from hf_distill.functional import forward_kl
from hf_distill.signals import Needs, Signals
from hf_distill.tasks import Batch, Task
from hf_distill.tasks.infer import unwrapped
from hf_distill.teachers.load import load_teacher
from hf_distill.teachers.model import ModelTeacher

logger = logging.getLogger(__name__)
INT8_DYNAMIC = "int8_dynamic"


@dataclass(frozen=True)
class Agreement:
    """How a quantised teacher's predictions differ from its full precision's.

    Attributes:
        rows: so many were compared.
        kl: mean KL(full precision ‖ quantised) of a row in nats, at temperature 1; None for values.
        same_choice: share of the rows with the same likeliest column; None for values.
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

    The first batch that is asked for predictions goes through both, the full precision on the CPU; the figures are
    logged and stand in `agreement`. Where the full precision does not fit into the free memory, or cannot be loaded,
    there are none, and `not_measured` says why.

    Args:
        model: quantised.
        how: in words, for the log.
        full: loads the model in full precision; None: there is none.
        full_bytes: of its weights. Others: as `ModelTeacher`.

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
        processing_class: Any = None,
        label_matching: str = "by_name",
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
            raise SettingError(
                f"teacher_quantization={INT8_DYNAMIC!r} computes on a CPU, and this training is on "
                f"{accelerator.device.type}. Pass a BitsAndBytesConfig or a TorchAoConfig instead."
            )
        super().to(accelerator)

    def _measure(self, said: Tensor, task: Task, batch: Batch) -> None:
        if self._accelerator is not None and not self._accelerator.is_main_process:
            self.not_measured = "it is measured on the main process"
            return
        found, self.not_measured = self._compared(said, task, batch)
        self.agreement, self._full = found, None  # its memory is free again
        if found is None:
            logger.warning(f"Teacher, {self._how}: not compared with its full precision: {self.not_measured}.")
        else:
            logger.warning(f"Teacher, {self._how}, against its full precision: {found}.")

    def _compared(self, said: Tensor, task: Task, batch: Batch) -> tuple[Agreement | None, str | None]:
        """The figures, or why there are none."""
        assert self._full is not None  # else it is said already why not
        free = psutil.virtual_memory().available
        if self._full_bytes is not None and self._full_bytes > 0.8 * free:
            return None, f"its {self._full_bytes / 1e9:.1f} GB do not fit into {free / 1e9:.1f} GB of free memory"
        kept = task.kept_rows(batch)
        rows = task.select(said, batch)
        ours = (rows if kept is None else rows[kept]).float().cpu()
        if not len(ours):
            return None, "no row of the first batch counts"
        try:
            with torch.random.fork_rng(devices=[]):  # the training's random numbers stay as they are
                full = self._full()
        except (OSError, RuntimeError, ValueError) as error:
            return None, f"it cannot be loaded ({type(error).__name__})"
        full.eval()
        inputs = {name: _on_cpu(value) for name, value in self._inputs(batch).items()}
        if self._padding is not None:
            padding = self._padding.of(full)
            with torch.no_grad(), padding.in_config():
                outputs = full(**padding.written(inputs, self._main))
        else:
            with torch.no_grad():
                outputs = full(**inputs)
        there = {name: _on_cpu(value) for name, value in batch.items()}
        theirs = task.select(task.read(outputs, there, self.alignment, teacher=True), there)
        theirs = (theirs if kept is None else theirs[kept.cpu()]).float()
        if task.on_values:
            return Agreement(len(ours), difference=(ours - theirs).abs().mean().item()), None
        same = (ours.argmax(-1) == theirs.argmax(-1)).float().mean().item()
        return Agreement(len(ours), kl=forward_kl(ours, theirs).mean().item(), same_choice=same), None


def quantise_dynamically(
    model: nn.Module, *, processing_class: Any = None, label_matching: str = "by_name"
) -> QuantisedTeacher:
    """A teacher in dynamic int8: weights in int8 a channel, activations in int8 as they come. For a CPU.

    The model itself is left as it is. Its body's linear layers are quantised; its head, embeddings and norms stay.

    Raises:
        SettingError: no linear layer in its body, weights in half precision, or a torch that cannot.
    """
    quantised = _int8_dynamic(model)
    return QuantisedTeacher(
        quantised,
        how=INT8_DYNAMIC,
        full=lambda: model,
        processing_class=processing_class,
        label_matching=label_matching,
    )


def is_dynamic(model: nn.Module) -> bool:
    """Whether some of its layers are in dynamic int8."""
    return any(type(module).__module__.startswith("torch.ao.nn.quantized.dynamic") for module in model.modules())


def _int8_dynamic(model: nn.Module) -> nn.Module:
    ao = getattr(torch, "ao", None)
    convert = getattr(getattr(ao, "quantization", None), "quantize_dynamic", None)
    engines = [name for name in torch.backends.quantized.supported_engines if name != "none"]
    if convert is None or not engines:
        raise SettingError(
            f"{INT8_DYNAMIC}: torch {torch.__version__} has no dynamic int8 on this machine. Install torchao and pass "
            "a TorchAoConfig."
        )
    inner = unwrapped(model)
    body = getattr(inner, getattr(inner, "base_model_prefix", ""), inner)
    find = getattr(inner, "get_output_embeddings", None)
    head = None if find is None else find()
    chosen = {id(module) for module in body.modules() if type(module) is nn.Linear and module is not head}
    names = [name for name, module in model.named_modules() if id(module) in chosen]
    if not names:
        raise SettingError(
            f"{INT8_DYNAMIC}: the body of {type(inner).__name__} has no torch.nn.Linear that could be quantised "
            "(GPT-2, for one, has layers of its own). Use teacher_dtype, or another quantisation."
        )
    dtypes = {module.weight.dtype for module in model.modules() if id(module) in chosen}
    if dtypes != {torch.float32}:
        shown = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes))
        raise SettingError(f"{INT8_DYNAMIC} starts from float32 weights, and these are {shown}. Load it as float32.")
    per_channel = torch.ao.quantization.per_channel_dynamic_qconfig
    with warnings.catch_warnings():  # torch announces the end of this function; torchao is to succeed it
        warnings.simplefilter("ignore")
        return convert(copy.deepcopy(model).eval(), dict.fromkeys(names, per_channel), inplace=True)


def _on_cpu(value: Any) -> Any:
    return value.cpu() if isinstance(value, Tensor) else value


def quantised_teacher(
    teacher_model: Any,
    kind: str,
    *,
    quantization: Any,
    device_map: str | dict[str, Any] | None = None,
    dtype: str | None = None,
    processing_class: Any = None,
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
        return quantise_dynamically(teacher_model, processing_class=processing_class, label_matching=label_matching)
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
        processing_class=processing_class,
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


def check_quantization(teacher_model: Any, *, from_path: bool, quantization: Any, device_map: Any) -> None:
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
