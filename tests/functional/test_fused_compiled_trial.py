"""A compiled block that another loss than eager mode is noticed before it is used. Needs no compiler."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from torch import Tensor

from hf_distill.functional.fused import compiled as fused_compiled
from hf_distill.functional.fused.inputs import Head, TeacherHidden, Terms
from hf_distill.functional.fused.loss import fused_linear_distillation
from hf_distill.functional.fused.rows import BlockSpec, Workspace

N, V, D = 11, 29, 4


def gradients(*, compiled: bool) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden, weight, other = (torch.randn(k, D, generator=generator) for k in (N, V, V))
    hidden.requires_grad_(), weight.requires_grad_()
    found = fused_linear_distillation(
        hidden,
        Head(weight),
        teacher=TeacherHidden(hidden.detach(), Head(other)),
        terms=Terms(temperature=2.0),
        labels=torch.arange(N),
        compiled=compiled,
    )
    found.loss.backward()
    assert hidden.grad is not None and weight.grad is not None
    return [found.loss.detach(), hidden.grad, weight.grad]


def fake(calls: list[int], *, wrong: float, of_value: bool) -> Any:
    """In place of the compiler: the eager block, its gradient or its value times 1 + wrong."""

    def make(spec: BlockSpec, *, over_teacher: bool) -> Any:
        def block(student: Tensor, teacher: Tensor, *vectors: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
            calls.append(len(student))
            into = teacher if over_teacher else student
            here = spec.with_row_vectors(*vectors)
            label, value = fused_compiled.blend_block(student, teacher, here, Workspace(), into=into)
            if of_value and value is not None:
                return label, value * (1 + wrong)
            into.mul_(1 + wrong)
            return label, value

        return block

    return make


@pytest.mark.parametrize("of_value", [False, True])
@pytest.mark.parametrize("wrong", [0.0, 1e-2])
def test_a_wrong_function_is_not_used(monkeypatch, caplog, wrong: float, of_value: bool) -> None:
    calls: list[int] = []
    monkeypatch.setattr(fused_compiled, "_functions", {})
    monkeypatch.setattr(fused_compiled, "_compiled", fake(calls, wrong=wrong, of_value=of_value))
    with caplog.at_level(logging.WARNING):
        found = [gradients(compiled=True) for _ in range(2)]
    expected = gradients(compiled=False)
    for one in found:
        for x, y in zip(one, expected, strict=True):
            torch.testing.assert_close(x, y, rtol=1e-6, atol=1e-7)
    assert calls == ([fused_compiled.TRIAL_ROWS] if wrong else [fused_compiled.TRIAL_ROWS, N, N])  # tried once
    assert ["another loss than eager mode" in record.message for record in caplog.records] == [True] * bool(wrong)


def test_when_there_are_too_many_kinds_it_has_warned_once(monkeypatch, caplog) -> None:
    monkeypatch.setattr(fused_compiled, "_functions", dict.fromkeys(range(fused_compiled.MAX_FUNCTIONS)))
    monkeypatch.setattr(fused_compiled, "_has_warned", False)
    with caplog.at_level(logging.WARNING):
        found = [gradients(compiled=True) for _ in range(2)]
    assert torch.equal(found[0][0], gradients(compiled=False)[0])
    assert ["without torch.compile for any other" in record.message for record in caplog.records] == [True]
