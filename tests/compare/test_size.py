"""Parameters and stored bytes: tied tensors once, buffers only where a checkpoint holds them."""

import torch
from safetensors.torch import save_model
from torch import nn

from hf_distill.compare import parameter_count, size_mb


class Tied(nn.Module):
    """An embedding whose weight is also the output head's, and both kinds of buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(1000, 32)
        self.head = nn.Linear(32, 1000, bias=False)
        self.head.weight = self.embedding.weight
        self.register_buffer("scale", torch.ones(500, dtype=torch.float64))
        self.register_buffer("positions", torch.arange(900), persistent=False)


def test_tied_weights_count_once():
    assert parameter_count(Tied()) == 32_000
    assert size_mb(Tied()) == (32_000 * 4 + 500 * 8) / 1e6


def test_half_precision_is_half_the_size():
    assert size_mb(nn.Linear(100, 100, bias=False).bfloat16()) == 0.02


def test_the_size_equals_that_of_a_checkpoint(tmp_path):
    save_model(Tied(), str(tmp_path / "model.safetensors"))
    written = (tmp_path / "model.safetensors").stat().st_size / 1e6
    assert 0 <= written - size_mb(Tied()) < 0.001  # the header's names
