"""The compiled block is the eager one: as torch.compile traces it, and (slow) as the C++ compiler makes it of that.

No CUDA here.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from hf_distill.functional.fused import chunks, compiled
from hf_distill.functional.fused.inputs import TeacherHidden, TeacherLogits
from tests.functional.test_fused_linear import logits_of, no_further_than_the_plain_path, setting

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # torch's compiler loads its own


@pytest.fixture
def functions(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[Any, Any]]:
    """What is compiled in the test."""
    monkeypatch.setattr(compiled, "_functions", {})
    torch.compiler.reset()
    yield compiled._functions
    torch.compiler.reset()


needs_a_compiler = pytest.mark.skipif(
    all(shutil.which(name) is None for name in ("g++", "clang++", "c++")),
    reason="torch.compile needs a C++ compiler on a CPU, and none is on the path",
)


def test_compiled_where_asked_and_on_cuda_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """On CUDA only where Triton is, and wherever it is asked for."""
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


def compiled_beside_eager(name: str, knobs: dict[str, Any], v: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """16 rows in blocks of 3, chunks of 7 and a last one of 2."""
    monkeypatch.setattr(chunks, "BLOCK_CPU", 3 * 4 * v)
    case = setting(name, n=16, v=v, **knobs)
    budget = 7 * 2 * (v + 4) * case.hidden.element_size()
    found, expected = case.run(compiled=True, budget_bytes=budget), case.run(compiled=False, budget_bytes=budget)
    close = {"rtol": 1e-9, "atol": 1e-12} if case.hidden.dtype == torch.float64 else {"rtol": 1e-4, "atol": 2e-5}
    torch.testing.assert_close(found.loss, expected.loss, **close)
    torch.testing.assert_close(found.divergence_rows, expected.divergence_rows, **close)
    for ours, eager in zip(case.gradients(found.loss), case.gradients(expected.loss), strict=True):
        torch.testing.assert_close(ours, eager, **close)


def compiled_over_the_teachers_logits(
    name: str, dtype: torch.dtype, knobs: dict[str, Any], v: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Eleven rows of the teacher's at a time, the student's by threes."""
    monkeypatch.setattr(chunks, "FEW_ROWS", 3)
    monkeypatch.setattr(chunks, "ENOUGH_ROWS", 11)
    case = setting(name, n=29, v=v, dtype=dtype, row_weights=True, **knobs)
    budget = v * dtype.itemsize * 14
    plain, run = case.run(budget_bytes=budget), type(case).run
    monkeypatch.setattr(type(case), "run", lambda self, **knobs: run(self, compiled=True, **knobs))
    no_further_than_the_plain_path(case, slack=torch.finfo(dtype).eps / 2, budget=budget)
    torch.testing.assert_close(case.run(budget_bytes=budget).loss, plain.loss, rtol=1e-4, atol=0.0)


def traced_only(monkeypatch: pytest.MonkeyPatch, backend: str = "eager") -> None:
    """torch.compile without its code generator: the graph is run as it is; "aot_eager": with nothing in place in it."""
    real = torch.compile
    monkeypatch.setattr(torch, "compile", lambda block, **settings: real(block, backend=backend, **settings))


@pytest.mark.parametrize(("name", "knobs"), CASES[1:])
def test_what_is_traced_is_eager(
    name: str, knobs: dict[str, Any], functions: dict[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """All that torch.compile is told, without a C++ compiler: every kernel as one graph."""
    traced_only(monkeypatch)
    compiled_beside_eager(name, knobs, 31, monkeypatch)
    assert [one is not None for one in functions.values()] == [True]


@pytest.mark.parametrize(("name", "dtype"), [("forward_kl", torch.bfloat16), ("skewed_forward_kl", torch.float16)])
def test_what_is_traced_in_16_bits_over_the_teachers_logits(
    name: str, dtype: torch.dtype, functions: dict[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    traced_only(monkeypatch, "aot_eager")
    compiled_over_the_teachers_logits(name, dtype, {}, 37, monkeypatch)
    assert [one is not None for one in functions.values()] == [True]


@needs_a_compiler
@pytest.mark.slow
@pytest.mark.parametrize(("name", "knobs"), CASES)
def test_compiled_is_eager(
    name: str, knobs: dict[str, Any], functions: dict[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One function carries all blocks."""
    compiled_beside_eager(name, knobs, 301, monkeypatch)
    assert [one is not None for one in functions.values()] == [True]


@needs_a_compiler
@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "dtype", "knobs"),
    [
        ("forward_kl", torch.bfloat16, {}),
        ("jeffreys", torch.bfloat16, {"bias": True, "temperature": 1.0}),
        ("jensen_shannon", torch.bfloat16, {"settings": {"beta": 0.3}, "smoothing": 0.1}),
        ("skewed_forward_kl", torch.bfloat16, {"temperature": 1.5}),
        ("reverse_kl", torch.float16, {}),
        ("total_variation", torch.float16, {"softcap": 3.0}),
    ],
)
def test_compiled_in_16_bits_over_the_teachers_logits(
    name: str, dtype: torch.dtype, knobs: dict[str, Any], functions: dict[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled_over_the_teachers_logits(name, dtype, knobs, 149, monkeypatch)
    assert [one is not None for one in functions.values()] == [True]


@needs_a_compiler
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
    monkeypatch.setattr(compiled, "MAX_FUNCTIONS", 1)
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
