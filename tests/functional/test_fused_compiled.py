"""The compiled block is the eager one: on a CPU, by the C++ compiler. No CUDA here."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from hf_distill.functional import fused_chunks as chunks
from hf_distill.functional import fused_compiled as compiled
from hf_distill.functional.fused_inputs import TeacherHidden, TeacherLogits
from tests.functional.test_fused_linear import logits_of, no_further_than_the_plain_path, setting

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # torch's compiler loads its own


@pytest.fixture
def functions(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[Any, Any]]:
    """What is compiled in the test."""
    monkeypatch.setattr(compiled, "_functions", {})
    torch.compiler.reset()
    yield compiled._functions
    torch.compiler.reset()


def test_compiled_where_asked_and_on_cuda_alone() -> None:
    cpu = torch.device("cpu")
    assert compiled.goes_compiled(True, cpu) and not compiled.goes_compiled(None, cpu)
    assert not compiled.goes_compiled(False, torch.device("cuda"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "knobs"),
    [
        ("forward_kl", {}),
        ("reverse_kl", {"temperature": 1.0, "row_weights": True, "smoothing": 0.1, "bias": True}),
        ("jensen_shannon", {"temperature": 1.5, "padding": (4, 3), "row_weights": True, "logit_scale": 0.3}),
        ("skewed_reverse_kl", {"temperature": 3.0, "labels": False, "softcap": 3.0}),
        ("total_variation", {"temperature": 4.0, "dtype": torch.float32}),
    ],
)
def test_compiled_is_eager(
    name: str, knobs: dict[str, Any], functions: dict[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Blocks of 3 rows, chunks of 7 and a last one of 2: one function carries them all."""
    monkeypatch.setattr(chunks, "BLOCK_CPU", 3 * 4 * 301)
    case = setting(name, n=16, v=301, **knobs)
    budget = 7 * 2 * 305 * case.hidden.element_size()
    found, expected = case.run(compiled=True, budget_bytes=budget), case.run(compiled=False, budget_bytes=budget)
    close = {"rtol": 1e-9, "atol": 1e-12} if case.hidden.dtype == torch.float64 else {"rtol": 1e-4, "atol": 2e-5}
    torch.testing.assert_close(found.loss, expected.loss, **close)
    torch.testing.assert_close(found.divergence_rows, expected.divergence_rows, **close)
    for ours, eager in zip(case.gradients(found.loss), case.gradients(expected.loss), strict=True):
        torch.testing.assert_close(ours, eager, **close)
    assert len(functions) == 1


@pytest.mark.slow
def test_compiled_in_16_bits_over_the_teachers_logits(
    functions: dict[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chunks, "FEW_ROWS", 3)
    monkeypatch.setattr(chunks, "ENOUGH_ROWS", 11)
    case = setting("forward_kl", n=29, v=149, dtype=torch.bfloat16, row_weights=True)
    plain, run = case.run(), type(case).run
    monkeypatch.setattr(type(case), "run", lambda self, **knobs: run(self, compiled=True, **knobs))
    no_further_than_the_plain_path(case, slack=torch.finfo(torch.bfloat16).eps / 2, budget=149 * 2 * 14)
    torch.testing.assert_close(case.run().loss, plain.loss, rtol=1e-4, atol=0.0)
    assert len(functions) >= 1


@pytest.mark.slow
def test_what_cannot_be_compiled_stays_eager(functions: dict[Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """−inf, other divergences, and one kind of function more than torch.compile would bear."""
    case = setting("forward_kl", bias=True)
    assert isinstance(case.teacher, TeacherHidden)
    case.teacher = TeacherLogits(logits_of(case.teacher.hidden, case.teacher.head).detach())
    case.teacher.logits[2, 0] = -math.inf
    other = setting("mean_squared_error")
    for one in (case, other):
        torch.testing.assert_close(one.run(compiled=True).loss, one.run(compiled=False).loss, rtol=0.0, atol=0.0)
    assert not functions
    monkeypatch.setattr(compiled, "MOST_FUNCTIONS", 1)
    for temperature in (1.0, 2.0):
        one = setting(temperature=temperature)
        torch.testing.assert_close(one.run(compiled=True).loss, one.run(compiled=False).loss)
    assert len(functions) == 1


def test_where_the_compiler_cannot_the_loss_is_the_eager_one_and_says_so(functions, monkeypatch, caplog) -> None:
    def fails(block: Any, **settings: Any) -> Any:
        def called(*tensors: Any) -> Any:
            raise torch._dynamo.exc.BackendCompilerFailed("inductor", RuntimeError("no Triton for this card"), None)

        return called

    monkeypatch.setattr(torch, "compile", fails)
    case = setting("forward_kl", n=6, v=11)
    found = [case.run(compiled=True).loss for _ in range(2)]
    expected = case.run(compiled=False).loss
    assert all(torch.equal(one, expected) for one in found)
    assert len(caplog.records) == 1 and "no Triton for this card" in caplog.text
