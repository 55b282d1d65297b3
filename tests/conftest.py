"""For every test: no network, one thread, a fixed seed. Warnings are errors by pyproject.toml."""

from __future__ import annotations

import os

# Before anything imports torch or huggingface_hub, which read these once.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["OMP_NUM_THREADS"] = "1"
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")  # set it to run on an accelerator
os.environ["MPLBACKEND"] = "Agg"

import random

import numpy as np
import pytest
import torch
from transformers.utils import logging

torch.set_num_threads(1)
logging.set_verbosity_error()


@pytest.fixture(autouse=True)
def _fixed_seed() -> None:
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
