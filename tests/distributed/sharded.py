"""A teacher sharded by FSDP2 over all processes, compared with the unsharded teacher."""

from __future__ import annotations

from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import FullyShardedDataParallelPlugin
from torch.distributed.tensor import DTensor
from transformers import BertConfig, BertForSequenceClassification

from hf_distill._compat import _with_fsdp2


def sharded_teacher() -> dict[str, Any]:
    """Call this last: the plugin stays in Accelerate's state."""
    accelerator = Accelerator(cpu=True)
    # On a CPU Accelerate's plugin silently becomes DDP, so it is set by hand; Accelerate does the sharding itself.
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=["BertLayer"],
        cpu_ram_efficient_loading=False,
    )
    accelerator.state.fsdp_plugin = plugin
    policy = plugin.auto_wrap_policy
    torch.manual_seed(0)
    shape = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    teacher = BertForSequenceClassification(BertConfig(intermediate_size=32, **shape)).eval().requires_grad_(False)
    batch = {"input_ids": torch.randint(1, 40, (4, 6))}
    with torch.no_grad():
        whole = teacher(**batch).logits
        teacher = _with_fsdp2(teacher, accelerator)
        sharded = all(
            isinstance(p, DTensor) for p in teacher.parameters()
        )  # after a forward the outermost are gathered
        found = torch.stack([teacher(**batch).logits for _ in range(3)])
    return {
        "difference": (found - whole).abs().max().item(),
        "sharded": sharded,
        "policy kept": plugin.auto_wrap_policy is policy,
        "training": teacher.training,
        "models": len(accelerator._models),
    }
