"""One micro-batch with whole logits and fused: the models, the batch, the comparison; chunks of few rows."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hf_distill import Distiller
from hf_distill.functional.fused import chunks as fused_chunks
from tests.heads import HEADS, IGNORED, VOCABULARY, Head
from tests.trainer.steps import in_double

LARGE = [name for name, head in HEADS.items() if head.kind in ("masked_lm", "causal_lm", "seq2seq")]
KNOBS = {"jensen_shannon": {"beta": 0.3}}  # divergence settings
WHOLE, PART, BLOCK = 5, 3, 2  # rows of `few_rows_at_once`


def few_rows_at_once(monkeypatch: pytest.MonkeyPatch, columns: int = VOCABULARY) -> None:
    """Make the fused loss process the teacher's logits 5 rows at a time, the student's 3, in blocks of 2."""
    for name, size in {"ENOUGH_ROWS": WHOLE, "MOST_ROWS": PART, "BLOCK_CPU": BLOCK * 4 * columns}.items():
        monkeypatch.setattr(fused_chunks, name, size)


def counted_rows(head: Head, labels: Tensor) -> int:
    """Return the number of labelled rows. A causal model's first token is not predicted."""
    return int((labels[:, 1:] if head.kind == "causal_lm" else labels).ne(IGNORED).sum())


@functools.cache
def pair(name: str) -> tuple[nn.Module, nn.Module, dict[str, Tensor]]:
    """Return the head's student, teacher and a ragged batch in fp64. They are shared: do not change them."""
    head = HEADS[name]
    return head.make(1).double().train(), head.make(2).double(), in_double(head, head.examples(5))


def adapted(model: nn.Module, **settings: Any) -> Any:
    """Add nonzero LoRA adapters to the blocks, in the model's dtype."""
    import peft

    dtype = next(model.parameters()).dtype
    chosen = {"r": 2, "target_modules": ["q_proj", "v_proj"], **settings}
    made = peft.get_peft_model(model, peft.LoraConfig(**chosen)).to(dtype)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in made.named_parameters():
        if "lora_" in name:
            parameter.data.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return made


def both(student: Any, teacher: Any, batch: dict[str, Tensor], **knobs: Any) -> list[tuple[Any, dict[str, Tensor]]]:
    """Return loss, terms and gradients with whole logits and fused."""
    found = []
    for fused in (False, True):
        student.zero_grad()
        distiller = Distiller(student, teacher, fused_loss=fused, seed=0, **knobs)
        output = distiller(student, batch)
        output.loss.backward()
        gradients = {name: p.grad.clone() for name, p in student.named_parameters() if p.grad is not None}
        assert (output.outputs.get("logits") is None) == (fused is True)
        found.append((output, gradients))
    return found


def assert_same(found: list[tuple[Any, dict[str, Tensor]]], *, rtol: float = 1e-5, atol: float = 1e-7) -> None:
    (plain, expected), (fused, gradients) = found
    assert list(fused.terms) == list(plain.terms) and set(gradients) == set(expected)
    close = {"rtol": rtol, "atol": atol, "check_dtype": False}  # causal heads compute their own loss in fp32
    torch.testing.assert_close(fused.loss, plain.loss, **close)
    for term, value in plain.terms.items():
        torch.testing.assert_close(fused.terms[term], value, **close)
    for name, gradient in expected.items():
        torch.testing.assert_close(gradients[name], gradient, **close, msg=lambda message, n=name: f"{n} {message}")
