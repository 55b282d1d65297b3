"""A model with LoRA adapters, as a user makes it with PEFT."""

from __future__ import annotations

from typing import Any

import pytest


def with_lora(model: Any, *targets: str, rank: int = 8, **settings: Any) -> Any:
    """Add LoRA to these modules, and train all of the classifier if there is one. Skips the test without PEFT."""
    peft = pytest.importorskip("peft", reason="an optional extra")
    if hasattr(model, "classifier"):
        settings.setdefault("modules_to_save", ["classifier"])
    config = peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=list(targets), **settings)
    return peft.get_peft_model(model, config)
