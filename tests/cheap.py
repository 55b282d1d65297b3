"""What trainings do at a cost and to no end where they are tiny and there is no accelerator."""

from __future__ import annotations

import gc
from types import SimpleNamespace

import torch
from accelerate.utils import memory


def make_trainings_cheap() -> None:
    """Seeding and the start of a training cost a tenth of what they do else. The numbers are the same.

    `torch.manual_seed` keeps a call, with its formatted stack, for each kind of accelerator that may still come: half a
    millisecond, and the tests seed twenty thousand times. Accelerate collects garbage twice in every training: ten
    milliseconds, and a second with all of transformers to look at, which is put out of the collector's sight here.
    """
    for accelerator in (torch.cuda, torch.xpu, torch.mtia):
        if not accelerator.is_available():
            accelerator.manual_seed_all = lambda seed: None
    memory.gc = SimpleNamespace(collect=lambda: 0)
    gc.freeze()
