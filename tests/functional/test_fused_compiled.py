"""The compiled block equals the eager one: as traced by torch.compile, and (slow) as compiled for the CPU. No CUDA."""

from __future__ import annotations

import logging
import math
import shutil
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from hf_distill.functional.fused import chunks, compiled
from hf_distill.functional.fused.inputs import Head, TeacherHidden, TeacherLogits, Terms
from hf_distill.functional.fused.loss import fused_linear_distillation
from hf_distill.functional.fused.rows import BlockSpec, Workspace
from tests.functional.test_fused_linear import logits_of, no_further_than_the_plain_path, setting

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # torch's compiler loads its own


@pytest.fixture
def functions(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[Any, Any]]:
    """The functions that are compiled in the test."""
    monkeypatch.setattr(compiled, "_functions", {})
    torch.compiler.reset()
    yield compiled._functions
    torch.compiler.reset()


needs_a_compiler = pytest.mark.skipif(
    all(shutil.which(name) is None for name in ("g++", "clang++", "c++")),
    reason="torch.compile needs a C++ compiler on a CPU, and none is on the path",
)


def test_compiled_if_requested_or_on_cuda_with_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    """By default on CUDA with Triton only."""
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    for there in (True, False):
        monkeypatch.setattr(
            compiled, "find_spec", lambda name, there=there: name if there and name == "triton" else None
        )
        assert compiled.use_compiled(None, cuda) is there
        assert compiled.use_compiled(None, cpu) is False
        for device in (cpu, cuda):
            assert compiled.use_compiled(True, device) is True
            assert compiled.use_compiled(False, device) is False


CASES: list[tuple[str, dict[str, Any]]] = [
    ("forward_kl", {}),
    ("forward_kl", {"temperature": 3.0, "smoothing": 0.1, "row_weights": True, "dtype": torch.float32}),
    ("reverse_kl", {"temperature": 1.0, "row_weights": True, "smoothing": 0.1, "bias": True}),
    ("jeffreys", {"temperature": 2.0, "row_weights": True, "dtype": torch.float32}),
    ("jensen_shannon", {"temperature": 1.5, "padding": (4, 3), "row_weights": True, "logit_scale": 0.3}),
    ("skewed_forward_kl", {"temperature": 1.5, "settings": {"skew": 0.3}, "bias": True}),
    ("skewed_reverse_kl", {"temperature": 3.0, "labels": False, "softcap": 3.0}),
    ("total_variation", {"temperature": 4.0, "dtype": torch.float32}),
]


def compiled_beside_eager(name: str, options: dict[str, Any], v: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """16 rows in blocks of 3, chunks of 7 and a last one of 2."""
    monkeypatch.setattr(chunks, "BLOCK_CPU", 3 * 4 * v)
    case = setting(name, n=16, v=v, **options)
    budget = 7 * 2 * (v + 4) * case.hidden.element_size()
    found, expected = case.run(compiled=True, budget_bytes=budget), case.run(compiled=False, budget_bytes=budget)
    close = {"rtol": 1e-9, "atol": 1e-12} if case.hidden.dtype == torch.float64 else {"rtol": 1e-4, "atol": 2e-5}
    torch.testing.assert_close(found.loss, expected.loss, **close)
    torch.testing.assert_close(found.divergence_rows, expected.divergence_rows, **close)
    for ours, eager in zip(case.gradients(found.loss), case.gradients(expected.loss), strict=True):
        torch.testing.assert_close(ours, eager, **close)


def compiled_over_the_teachers_logits(
    name: str, dtype: torch.dtype, options: dict[str, Any], v: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Eleven rows of the teacher's logits at a time, three of the student's."""
    monkeypatch.setattr(chunks, "FEW_ROWS", 3)
    monkeypatch.setattr(chunks, "ENOUGH_ROWS", 11)
    case = setting(name, n=29, v=v, dtype=dtype, row_weights=True, **options)
    budget = v * dtype.itemsize * 14
    plain, run = case.run(budget_bytes=budget), type(case).run
    monkeypatch.setattr(type(case), "run", lambda self, **options: run(self, compiled=True, **options))
    no_further_than_the_plain_path(case, slack=torch.finfo(dtype).eps / 2, budget=budget)
    torch.testing.assert_close(case.run(budget_bytes=budget).loss, plain.loss, rtol=1e-4, atol=0.0)


def traced_only(monkeypatch: pytest.MonkeyPatch, backend: str = "eager") -> None:
    """Replace the code generator by a backend that runs the traced graph; "aot_eager" removes in-place operations."""
    real = torch.compile
    monkeypatch.setattr(torch, "compile", lambda block, **settings: real(block, backend=backend, **settings))


@pytest.mark.parametrize(("name", "options"), CASES[1:])
def test_traced_block_matches_eager(
    name: str, options: dict[str, Any], functions: dict[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Everything but the code generator: every kernel is traced as one graph. Needs no C++ compiler."""
    traced_only(monkeypatch)
    compiled_beside_eager(name, options, 31, monkeypatch)
    assert [one is not None for one in functions.values()] == [True]


@pytest.mark.parametrize(
    ("name", "dtype"),
    [("forward_kl", torch.bfloat16), pytest.param("skewed_forward_kl", torch.float16, marks=pytest.mark.slow)],
)
def test_traced_block_in_16_bits_over_the_teachers_logits(
    name: str, dtype: torch.dtype, functions: dict[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    traced_only(monkeypatch, "aot_eager")
    compiled_over_the_teachers_logits(name, dtype, {}, 37, monkeypatch)
    assert [one is not None for one in functions.values()] == [True]


@needs_a_compiler
@pytest.mark.slow
@pytest.mark.parametrize(("name", "options"), CASES)
def test_compiled_block_matches_eager(
    name: str, options: dict[str, Any], functions: dict[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One function is used for all blocks."""
    compiled_beside_eager(name, options, 301, monkeypatch)
    assert [one is not None for one in functions.values()] == [True]


@needs_a_compiler
@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "dtype", "options"),
    [
        ("forward_kl", torch.bfloat16, {}),
        ("jeffreys", torch.bfloat16, {"bias": True, "temperature": 1.0}),
        ("jensen_shannon", torch.bfloat16, {"settings": {"beta": 0.3}, "smoothing": 0.1}),
        ("skewed_forward_kl", torch.bfloat16, {"temperature": 1.5}),
        ("reverse_kl", torch.float16, {}),
        ("total_variation", torch.float16, {"softcap": 3.0}),
    ],
)
def test_compiled_block_in_16_bits_over_the_teachers_logits(
    name: str, dtype: torch.dtype, options: dict[str, Any], functions: dict[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled_over_the_teachers_logits(name, dtype, options, 149, monkeypatch)
    assert [one is not None for one in functions.values()] == [True]


@needs_a_compiler
@pytest.mark.slow
def test_unsupported_blocks_stay_eager(functions: dict[Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """−inf, other divergences, and one variant more than the maximum."""
    case = setting("forward_kl", bias=True)
    assert isinstance(case.teacher, TeacherHidden)
    case.teacher = TeacherLogits(logits_of(case.teacher.hidden, case.teacher.head).detach())
    case.teacher.logits[2, 0] = -math.inf
    other = setting("mean_squared_error")
    for one in (case, other):
        torch.testing.assert_close(one.run(compiled=True).loss, one.run(compiled=False).loss, rtol=0.0, atol=0.0)
    assert not functions
    monkeypatch.setattr(compiled, "MAX_FUNCTIONS", 1)
    for temperature in (1.0, 2.0):
        one = setting(temperature=temperature)
        torch.testing.assert_close(one.run(compiled=True).loss, one.run(compiled=False).loss)
    assert len(functions) == 1


def test_falls_back_to_eager_with_a_warning_if_compiling_fails(functions, monkeypatch, caplog) -> None:
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


# A wrong compiled block is noticed before it is used. Needs no compiler.

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
    """Replaces the compiler: the eager block with its gradient or its value multiplied by 1 + wrong."""

    def make(spec: BlockSpec, *, over_teacher: bool) -> Any:
        def block(student: Tensor, teacher: Tensor, *vectors: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
            calls.append(len(student))
            into = teacher if over_teacher else student
            here = spec.with_row_vectors(*vectors)
            label, value = compiled.blend_block(student, teacher, here, Workspace(), into=into)
            if of_value and value is not None:
                return label, value * (1 + wrong)
            into.mul_(1 + wrong)
            return label, value

        return block

    return make


@pytest.mark.parametrize("of_value", [False, True])
@pytest.mark.parametrize("wrong", [0.0, 1e-2])
def test_a_wrong_compiled_function_is_not_used(monkeypatch, caplog, wrong: float, of_value: bool) -> None:
    calls: list[int] = []
    monkeypatch.setattr(compiled, "_functions", {})
    monkeypatch.setattr(compiled, "_compiled", fake(calls, wrong=wrong, of_value=of_value))
    with caplog.at_level(logging.WARNING):
        found = [gradients(compiled=True) for _ in range(2)]
    expected = gradients(compiled=False)
    for one in found:
        for x, y in zip(one, expected, strict=True):
            torch.testing.assert_close(x, y, rtol=1e-6, atol=1e-7)
    assert calls == ([compiled.TRIAL_ROWS] if wrong else [compiled.TRIAL_ROWS, N, N])  # tried once
    assert ["another loss than eager mode" in record.message for record in caplog.records] == [True] * bool(wrong)


def test_warns_once_when_there_are_too_many_kinds(monkeypatch, caplog) -> None:
    monkeypatch.setattr(compiled, "_functions", dict.fromkeys(range(compiled.MAX_FUNCTIONS)))
    monkeypatch.setattr(compiled, "_has_warned", False)
    with caplog.at_level(logging.WARNING):
        found = [gradients(compiled=True) for _ in range(2)]
    assert torch.equal(found[0][0], gradients(compiled=False)[0])
    assert ["without torch.compile for any other" in record.message for record in caplog.records] == [True]
