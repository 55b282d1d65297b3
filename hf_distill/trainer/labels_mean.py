"""Asking a head for its own mean over a micro-batch, whatever `Trainer` would have it divide by."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any


def own_num_items(batch: Any, num_items_in_batch: Any, *, shifts: bool) -> Any:
    """This micro-batch's number of items, by `Trainer`'s rule: the head's loss then is its own mean."""
    if num_items_in_batch is None:
        return None
    labels = batch.get("shift_labels")
    if labels is None:
        labels = batch["labels"][..., 1:] if shifts else batch["labels"]
    return labels.ne(-100).sum().clamp(min=1)


@contextlib.contextmanager
def unscaled(args: Any) -> Iterator[None]:
    """Without `Trainer.compute_loss`'s own factor, the number of processes, which not every head accounts for."""
    asked, args.average_tokens_across_devices = args.average_tokens_across_devices, False
    try:
        yield
    finally:
        args.average_tokens_across_devices = asked
