"""Everything that depends on a library's version, or for which Accelerate and transformers have no public call."""

from __future__ import annotations

import contextlib
import copy
import json
import os
from collections.abc import Callable, Iterator
from typing import Any, TypeAlias

import datasets
import pyarrow as pa
import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import DistributedType
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel, Trainer
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

Attention: TypeAlias = Callable[..., tuple[Tensor, Tensor | None]]  # an attention function of transformers


def prepare_for_evaluation(model: nn.Module, accelerator: Accelerator) -> nn.Module:
    """Prepare a frozen second model on the device of the batches, without registering it with the accelerator.

    (`Accelerator.prepare_model(evaluation_mode=True)` would put it into `accelerator._models`, and so into
    `save_state`, and refuses FSDP2.) ZeRO-3 and FSDP2 shard it; everywhere else it is replicated.
    """
    if getattr(model, "hf_device_map", None) or getattr(model, "is_quantized", False):
        return model  # placed when it was loaded
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        return _with_deepspeed(model, accelerator)
    if getattr(accelerator, "is_fsdp2", False):
        return _with_fsdp2(model, accelerator)
    return model.to(accelerator.device)


def _with_fsdp2(model: nn.Module, accelerator: Accelerator) -> nn.Module:
    from accelerate.utils import fsdp2_prepare_model

    plugin = accelerator.state.fsdp_plugin
    policy = plugin.auto_wrap_policy  # is set by model class, and must still fit the student afterwards
    try:
        return fsdp2_prepare_model(accelerator, model).eval()
    finally:
        plugin.auto_wrap_policy = policy


def _with_deepspeed(model: nn.Module, accelerator: Accelerator) -> nn.Module:
    """Shard the teacher's parameters under ZeRO-3; lower stages shard only optimizer state, which a teacher lacks."""
    import deepspeed

    config = copy.deepcopy(accelerator.state.deepspeed_plugin.deepspeed_config)
    if config["zero_optimization"]["stage"] != 3:
        return model.to(accelerator.device)
    # It has no optimizer to configure, and the sizes that are "auto" follow from the student.
    for section in ("optimizer", "scheduler"):
        config.pop(section, None)
    sizes: Any = model.config
    width = getattr(sizes, "hidden_size", None) or max(sizes.hidden_sizes)
    config["zero_optimization"].update(
        reduce_bucket_size=width * width,
        stage3_param_persistence_threshold=10 * width,
        stage3_prefetch_bucket_size=0,
    )
    engine, *_ = deepspeed.initialize(model=model, config=config)
    engine.eval()
    return engine


def compiler_error() -> type[Exception]:
    """Return the error of `torch.compile` if it cannot compile (no Triton, an old GPU); its import is slow."""
    from torch._dynamo.exc import TorchDynamoException

    return TorchDynamoException


def processes() -> PartialState:
    """Return the state of this process among those it was launched with.

    Accelerate joins CPU processes only if it is told to use the CPU; otherwise each believes to be the only one.
    """
    return PartialState(cpu=not torch.accelerator.is_available())


def renamed_state(model: nn.Module, checkpoint: str) -> dict[str, torch.Tensor] | None:
    """Return the state of `model` as its `from_pretrained` reads it from `checkpoint`, or None if the names agree.

    It is for unsharded models; adapters, FSDP and DeepSpeed load in their own ways.
    """
    if not isinstance(model, PreTrainedModel) or hasattr(model, "get_base_model"):
        return None
    saved = _saved_names(checkpoint)
    state = model.state_dict()
    if saved is None:
        return None
    held = {state[name].data_ptr() for name in saved if name in state}  # a tied tensor is saved under one name
    if all(name in saved or tensor.data_ptr() in held for name, tensor in state.items()):
        return None
    return type(model).from_pretrained(checkpoint, dtype=model.dtype).state_dict()


def _saved_names(checkpoint: str) -> set[str] | None:
    index = os.path.join(checkpoint, SAFE_WEIGHTS_INDEX_NAME)
    if os.path.isfile(index):
        with open(index, encoding="utf-8") as file:
            return set(json.load(file)["weight_map"])
    whole = os.path.join(checkpoint, SAFE_WEIGHTS_NAME)
    if not os.path.isfile(whole):
        return None
    with safe_open(whole, framework="pt") as tensors:
        return set(tensors.keys())


# Before transformers 5.19 a trainer cannot say that its loss is divided already.
TRAINER_MAY_DIVIDE = not hasattr(Trainer, "loss_is_scaled_for_ga")


def divides_the_loss(trainer: Trainer, num_items_in_batch: torch.Tensor | int | None) -> bool:
    """Return whether `Trainer.training_step` divides by the accumulation steps, if `TRAINER_MAY_DIVIDE`."""
    passes_on = trainer.model_accepts_loss_kwargs and num_items_in_batch is not None
    return not passes_on and trainer.compute_loss_func is None


@contextlib.contextmanager
def observing_attention(listen: Callable[..., None]) -> Iterator[None]:
    """Inside this context `listen` is called with the inputs of every attention function, whichever is chosen.

    transformers has no public call for this. Functions are looked up in `AttentionInterface` at each call, so the
    lookup is replaced; the results are not changed. `listen(module, query, key, mask, settings)`.
    """
    original = AttentionInterface.get_interface

    def get_interface(self: AttentionInterface, name: str, default: Attention) -> Attention:
        function = original(self, name, default)

        def observed(
            module: nn.Module, query: Tensor, key: Tensor, *rest: Any, **settings: Any
        ) -> tuple[Tensor, Tensor | None]:
            mask = rest[1] if len(rest) > 1 else settings.get("attention_mask")  # after the values
            listen(module, query, key, mask, settings)
            return function(module, query, key, *rest, **settings)

        return observed

    AttentionInterface.get_interface = get_interface  # type: ignore[assignment, method-assign]  # and put back below
    try:
        yield
    finally:
        AttentionInterface.get_interface = original  # type: ignore[method-assign]  # as it was


def forget_preparation(model: nn.Module) -> None:
    """Let another Accelerator prepare an unwrapped model, which it would otherwise use as it is, without autocast."""
    vars(model).pop("_is_accelerate_prepared", None)


def arrow_blocks(dataset: datasets.Dataset, column: str, *, rows: int = 100_000) -> Iterator[pa.Array]:
    """Yield a column in the dataset's order, in blocks of rows, without the dataset's format and transform.

    `datasets` has no public call that is fast after a shuffle: 4 s for a million rows, here 0.05 s.
    """
    held, indices = dataset.data.column(column), dataset._indices
    for start in range(0, len(dataset), rows):
        block = held.slice(start, rows) if indices is None else held.take(indices.column(0).slice(start, rows))
        yield pa.concat_arrays(block.chunks) if block.num_chunks != 1 else block.chunk(0)
