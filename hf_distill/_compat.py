"""Every fork on a library's version, and what Accelerate has no public call for. Nothing else."""

from __future__ import annotations

import copy
from typing import Any

import torch
from accelerate.utils import DistributedType


def prepare_for_evaluation(model: Any, accelerator: Any) -> Any:
    """A frozen second model, where the batches are. It enters none of the accelerator's own lists.

    (`Accelerator.prepare_model(evaluation_mode=True)` would put it into `accelerator._models`, and so into
    `save_state`, and refuses FSDP2.) ZeRO-3 and FSDP2 shard it; everywhere else it is replicated.
    """
    if getattr(model, "hf_device_map", None) or getattr(model, "is_quantized", False):
        return model  # placed when it was loaded
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        return _with_deepspeed(model, accelerator)
    if getattr(accelerator, "is_fsdp2", False) and accelerator.device.type != "cpu":
        return _with_fsdp2(model, accelerator)
    return model.to(accelerator.device)


def _with_fsdp2(model: Any, accelerator: Any) -> Any:
    from accelerate.utils import fsdp2_prepare_model

    plugin = accelerator.state.fsdp_plugin
    policy = plugin.auto_wrap_policy  # is set by model class, and must still fit the student afterwards
    try:
        return fsdp2_prepare_model(accelerator, model).eval()
    finally:
        plugin.auto_wrap_policy = policy


def _with_deepspeed(model: Any, accelerator: Any) -> Any:
    """ZeRO-3 shards the teacher's parameters too; lower stages shard optimizer state, and a teacher has none."""
    import deepspeed

    config = copy.deepcopy(accelerator.state.deepspeed_plugin.deepspeed_config)
    if config["zero_optimization"]["stage"] != 3:
        return model.to(accelerator.device)
    # It has no optimizer to configure, and the sizes that are "auto" follow from the student.
    for section in ("optimizer", "scheduler"):
        config.pop(section, None)
    width = getattr(model.config, "hidden_size", None) or max(model.config.hidden_sizes)
    config["zero_optimization"].update(
        reduce_bucket_size=width * width,
        stage3_param_persistence_threshold=10 * width,
        stage3_prefetch_bucket_size=0,
    )
    engine, *_ = deepspeed.initialize(model=model, config=config)
    engine.eval()
    return engine


def gathered_sum(vector: torch.Tensor, accelerator: Any) -> torch.Tensor:
    """Sum over the processes that saw different batches."""
    if accelerator is None or accelerator.num_processes == 1:
        return vector
    return accelerator.reduce(vector, reduction="sum")
