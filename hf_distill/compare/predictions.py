"""The most probable label of each example, by name. Covers heads with one row of class logits."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from transformers import PreTrainedModel

from hf_distill.errors import SettingError


def predicted_labels(
    model: PreTrainedModel, batches: Iterable[Mapping[str, Any]], *, label_column: str = "labels"
) -> list[str]:
    """Label names in the order of the batches, in evaluation mode and without gradient.

    Names rather than indices, so that a student and a teacher that order their labels differently
    can be compared. The model keeps the mode that it came with.

    Raises `SettingError` when the head gives something other than one row of logits an example.
    """
    names: list[str] = []
    mode = model.training
    model.eval()
    id2label = model.config.id2label or {}
    try:
        with torch.inference_mode():
            for batch in batches:
                inputs = {name: value for name, value in batch.items() if name != label_column}
                logits = model(**inputs).logits
                if logits.dim() != 2:
                    raise SettingError(
                        f"{type(model).__name__} gives logits of shape {tuple(logits.shape)}: "
                        "labels are read from one row an example, [b v]."
                    )
                names += [id2label[index] for index in logits.argmax(-1).tolist()]
    finally:
        model.train(mode)
    return names
