"""L6: the fused loss equals the plain one, in value and gradient, for sizes that do not divide, in every precision."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from hf_distill.functional import DIVERGENCES, PROPERTIES
from hf_distill.functional.fused import chunks
from hf_distill.functional.fused import loss as fused
from hf_distill.functional.fused.inputs import Head, Labels, TeacherHidden, TeacherLogits, Terms, fusable

SETTINGS: list[tuple[str, dict[str, Any]]] = [
    *((name, {}) for name in fusable()),
    ("dist", {"intra_weight": 0.0}),
    ("jensen_shannon", {"beta": 0.0}),
    ("jensen_shannon", {"beta": 0.9}),
    ("jensen_shannon", {"beta": 1.0}),
    ("skewed_forward_kl", {"skew": 0.0}),
    ("skewed_forward_kl", {"skew": 0.7}),
    ("skewed_reverse_kl", {"skew": 0.0}),
    ("skewed_reverse_kl", {"skew": 0.7}),
]
EVERY = [pytest.param(name, settings, id=f"{name}{list(settings.values())}") for name, settings in SETTINGS]
FAMILY = [case for case in EVERY if case.values[0] not in ("mean_squared_error", "hard", "decoupled", "dist")]


@dataclass
class Setting:
    """Everything one call takes, and the leaves whose gradients are compared."""

    hidden: Tensor
    head: Head
    teacher: TeacherHidden | TeacherLogits | None
    terms: Terms
    labels: Labels | None
    row_weights: Tensor | None

    def run(self, **options: Any) -> fused.FusedOutput:
        given: dict[str, Any] = {"labels": self.labels, "row_weights": self.row_weights, **options}
        return fused.fused_linear_distillation(self.hidden, self.head, teacher=self.teacher, terms=self.terms, **given)

    def leaves(self) -> list[Tensor]:
        return [x for x in (self.hidden, self.head.weight, self.head.bias) if x is not None and x.requires_grad]

    def gradients(self, loss: Tensor) -> list[Tensor]:
        return list(torch.autograd.grad(loss, self.leaves()))


def setting(
    name: str = "forward_kl",
    settings: dict[str, Any] | None = None,
    *,
    n: int = 7,
    v: int = 11,
    padding: tuple[int, int] | None = None,
    temperature: float = 2.0,
    bias: bool = False,
    labels: bool = True,
    row_weights: bool = False,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    smoothing: float = 0.0,
    frozen: tuple[str, ...] = (),
    dtype: torch.dtype = torch.float64,
    spread: float = 1.0,
) -> Setting:
    """Widths 5 and 6; `padding`: extra columns of the student's and the teacher's head."""
    g = torch.Generator().manual_seed(n * 1000 + v)

    def drawn(*shape: int, scale: float = 1.0) -> Tensor:
        return (scale * torch.randn(*shape, generator=g, dtype=torch.float64)).to(dtype)

    def head(width: int, d: int, *, trained: bool) -> Head:
        weight = drawn(width, d, scale=spread).requires_grad_(trained and "weight" not in frozen)
        b = drawn(width).requires_grad_(trained and "bias" not in frozen) if bias else None
        return Head(weight, b, logit_scale=logit_scale, softcap=softcap)

    extra = padding or (0, 0)
    ids = torch.randint(0, v + extra[0], (n,), generator=g)
    ids[::3] = -100
    full = torch.float64 if dtype == torch.float64 else torch.float32
    weights = torch.rand(n, generator=g, dtype=torch.float64).to(full)
    factors = {"labels_factor": 0.3, "divergence_factor": 0.7}
    return Setting(
        drawn(n, 5).requires_grad_("hidden" not in frozen),
        head(v + extra[0], 5, trained=True),
        TeacherHidden(drawn(n, 6), head(v + extra[1], 6, trained=False)),
        Terms(name, settings or {}, temperature=temperature, columns=v if padding else None, **factors),
        Labels(ids, weights.flip(0) if row_weights else None, smoothing) if labels else None,
        weights if row_weights else None,
    )


def logits_of(hidden: Tensor, head: Head) -> Tensor:
    logits = F.linear(hidden, head.weight, head.bias) * head.logit_scale
    return logits if head.softcap is None else head.softcap * torch.tanh(logits / head.softcap)


def plainly(case: Setting, *, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, labels' total and divergence's total with whole logits, by the library's plain functions and F."""
    student = logits_of(case.hidden, case.head)
    student = student if dtype is None else student.to(dtype)
    zero = student.new_zeros(())
    of_labels = of_divergence = zero
    if case.labels is not None:
        ids = case.labels.ids
        rows = F.cross_entropy(
            student.float() if student.dtype != torch.float64 else student,
            ids,
            reduction="none",
            label_smoothing=case.labels.smoothing,
        )
        of_labels = (rows if case.labels.weights is None else rows * case.labels.weights).sum()
    terms, stated = case.terms, PROPERTIES[case.terms.divergence]
    t = terms.temperature if stated.softens else 1.0
    if case.teacher is not None:
        with torch.no_grad():
            teacher = (
                case.teacher.logits
                if isinstance(case.teacher, TeacherLogits)
                else logits_of(case.teacher.hidden, case.teacher.head)
            )
        options = dict(terms.settings)
        w = terms.columns or student.shape[1]
        if stated.wants_target and case.labels is not None:
            options["target"] = case.labels.ids.masked_fill(case.labels.ids >= w, -100)
        full = torch.float64 if student.dtype == torch.float64 else torch.float32
        rows = DIVERGENCES[terms.divergence](student[:, :w].to(full) / t, teacher[:, :w].to(full) / t, **options)
        of_divergence = (rows if case.row_weights is None else rows * case.row_weights).sum()
    loss = terms.labels_factor * of_labels + terms.divergence_factor * t**stated.temperature_power * of_divergence
    return loss, of_labels, of_divergence


def compare(case: Setting, *, rtol: float = 1e-9, atol: float = 1e-11, budget: int | None = None) -> None:
    found = case.run(budget_bytes=budget)
    expected, labels_total, divergence_total = plainly(case)
    for ours, plain in (
        (found.loss, expected),
        (found.labels_total, labels_total),
        (found.divergence_total, divergence_total),
    ):
        torch.testing.assert_close(ours.detach(), plain.detach(), rtol=rtol, atol=atol)
    assert not found.labels_total.requires_grad and not found.divergence_total.requires_grad
    if not case.leaves():
        assert not found.loss.requires_grad
        return
    for ours, plain in zip(case.gradients(3 * found.loss), case.gradients(3 * expected), strict=True):
        assert ours.dtype == plain.dtype
        torch.testing.assert_close(ours, plain, rtol=rtol, atol=atol)


def rows_to_bytes(case: Setting, rows: int) -> int:
    """The budget that gives chunks of so many rows."""
    width = case.head.weight.shape[0] + (case.terms.columns or case.head.weight.shape[0])
    return rows * width * case.hidden.element_size()


@pytest.mark.parametrize("temperature", [1.0, 2.0, 3.0, 4.0, 1.5])
@pytest.mark.parametrize(("name", "settings"), EVERY)
def test_matches_the_plain_path(name: str, settings: dict[str, Any], temperature: float) -> None:
    compare(setting(name, settings, temperature=temperature))


@pytest.mark.parametrize(
    "options",
    [
        {"labels": False},
        {"bias": True},
        {"row_weights": True},
        {"smoothing": 0.1, "row_weights": True, "temperature": 1.5},
        {"smoothing": 0.1},
        {"logit_scale": 0.0625},
        {"logit_scale": 0.3, "bias": True},
        {"softcap": 3.0},
        {"softcap": 3.0, "logit_scale": 0.3, "bias": True, "row_weights": True},
        {"padding": (0, 3)},
        {"padding": (4, 0), "bias": True},
        {"padding": (4, 3), "row_weights": True, "smoothing": 0.1},
        {"padding": (4, 3), "labels": False, "softcap": 2.0},
        {"frozen": ("weight",)},
        {"frozen": ("hidden",), "bias": True},
        {"frozen": ("weight", "bias"), "bias": True},
        {"frozen": ("hidden", "weight"), "bias": True},
        {"frozen": ("hidden", "weight", "bias"), "bias": True},
    ],
    ids=lambda options: ",".join(f"{option}={value}" for option, value in options.items()),
)
@pytest.mark.parametrize(("name", "settings"), FAMILY)
def test_matches_the_plain_path_with_options(name: str, settings: dict[str, Any], options: dict[str, Any]) -> None:
    compare(setting(name, settings, **options))


@pytest.mark.parametrize(("n", "v"), [(0, 5), (1, 2), (7, 11), (10, 8), (33, 65)])
@pytest.mark.parametrize(("name", "settings"), EVERY)
def test_sizes_that_do_not_divide(
    name: str, settings: dict[str, Any], n: int, v: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chunks, "BLOCK_CPU", 2 * 4 * v)  # blocks of two rows
    for rows in (1, 2, 3, 7, 100):
        monkeypatch.setattr(chunks, "MOST_ROWS", rows)
        case = setting(name, settings, n=n, v=v, bias=True, row_weights=True)
        compare(case, budget=rows_to_bytes(case, rows))


@pytest.mark.parametrize("part", [1, 2, 5])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("name", "settings"), EVERY)
def test_gradients_written_over_the_teachers_logits(
    name: str, settings: dict[str, Any], dtype: torch.dtype, part: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Seven rows of the teacher's at a time, and fewer of the student's."""
    monkeypatch.setattr(chunks, "FEW_ROWS", part)
    monkeypatch.setattr(chunks, "ENOUGH_ROWS", 7)
    monkeypatch.setattr(chunks, "BLOCK_CPU", 2 * 4 * 31)
    case = setting(name, settings, n=17, v=31, dtype=dtype, row_weights=True)
    budget = 31 * case.hidden.element_size() * (7 + part)
    assert chunks.rows_a_chunk(17, 31, 31, 31 * (7 + part), over_teacher=True) == chunks.ChunkRows(7, part)
    if dtype == torch.bfloat16:
        no_further_than_the_plain_path(case, slack=torch.finfo(dtype).eps / 2, budget=budget)
        return
    close = {"rtol": 1e-9, "atol": 1e-11} if dtype == torch.float64 else {"rtol": 1e-4, "atol": 2e-5}
    compare(case, **close, budget=budget)


@pytest.mark.parametrize("threads", [2, 3])
def test_threads_share_the_blocks(threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunks, "BLOCK_CPU", 3 * 4 * 11)
    torch.set_num_threads(threads)
    try:
        for name in ("forward_kl", "jensen_shannon", "mean_squared_error"):
            compare(setting(name, n=29, row_weights=True))
        assert torch.get_num_threads() == threads
        with torch.inference_mode():
            found = setting(n=29).run()
        assert torch.isfinite(found.loss)
    finally:
        torch.set_num_threads(1)


@pytest.mark.parametrize("spread", [0.01, 10.0, 60.0])
@pytest.mark.parametrize(("name", "settings"), FAMILY)
def test_flat_and_peaked_rows(name: str, settings: dict[str, Any], spread: float) -> None:
    """At 60 the two sides' probabilities differ by factors beyond what fp32 can hold."""
    compare(setting(name, settings, spread=spread), rtol=1e-8)
    no_further_than_the_plain_path(setting(name, settings, spread=spread, dtype=torch.float32), slack=1e-6)


@pytest.mark.parametrize("temperature", [1.0, 2.0, 3.3])
@pytest.mark.parametrize(("name", "settings"), EVERY)
def test_fp32(name: str, settings: dict[str, Any], temperature: float) -> None:
    compare(setting(name, settings, n=13, v=301, temperature=temperature, dtype=torch.float32), rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("n", [13, 600])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("name", "settings"), EVERY)
def test_16_bits_are_no_further_from_float64_than_the_plain_path(
    name: str, settings: dict[str, Any], dtype: torch.dtype, n: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chunks, "TILE", 32)
    monkeypatch.setattr(chunks, "PIECE", 64)
    case = setting(name, settings, n=n, v=149, dtype=dtype, bias=True)
    no_further_than_the_plain_path(case, slack=torch.finfo(dtype).eps / 2, budget=rows_to_bytes(case, 32))


def no_further_than_the_plain_path(case: Setting, *, slack: float, budget: int | None = None) -> None:
    """From the same numbers in float64, by 1.5 times at most."""
    found, (plain, *_) = case.run(budget_bytes=budget), plainly(case)
    exact_case = in_float64(case)
    exact, *_ = plainly(exact_case)
    assert found.loss.dtype == torch.float32
    assert abs(found.loss.item() - exact.item()) <= 1.5 * abs(plain.item() - exact.item()) + slack * abs(exact.item())
    expected = exact_case.gradients(exact)
    for ours, theirs, right in zip(case.gradients(found.loss), case.gradients(plain), expected, strict=True):
        assert ours.dtype == theirs.dtype
        apart, plainly_apart = ((x.double() - right).norm() / right.norm() for x in (ours, theirs))
        assert apart <= 1.5 * plainly_apart + slack


def in_float64(case: Setting) -> Setting:
    def leaf(x: Tensor | None) -> Tensor | None:
        return None if x is None else x.detach().double().requires_grad_(x.requires_grad)

    def head(h: Head) -> Head:
        return replace(h, weight=leaf(h.weight), bias=leaf(h.bias))

    assert isinstance(case.teacher, TeacherHidden)
    teacher = TeacherHidden(case.teacher.hidden.double(), head(case.teacher.head))
    return replace(case, hidden=leaf(case.hidden), head=head(case.head), teacher=teacher)


def test_small_factors_do_not_underflow_in_fp16() -> None:
    """1e-7 · (q − p) of a row is below fp16's smallest number; a scaled loss brings it back."""
    case = setting(dtype=torch.float16, v=149, labels=False)
    case.terms = replace(case.terms, divergence_factor=1e-7)
    scaled = case.gradients(2.0**16 * case.run().loss)
    case.terms = replace(case.terms, divergence_factor=1e-7 * 2.0**16)
    for small, large in zip(scaled, case.gradients(case.run().loss), strict=True):
        assert large.abs().sum() > 0
        torch.testing.assert_close(small, large)


def test_head_gradient_is_summed_in_fp32() -> None:
    """1,024 equal rows in chunks of one: a running sum in bf16 stands still at 256 times one row's gradient."""
    row = torch.randn(1, 5, generator=torch.Generator().manual_seed(1)).bfloat16()
    weight = torch.randn(8, 5, generator=torch.Generator().manual_seed(2)).bfloat16().requires_grad_()
    labels, found = torch.zeros(1024, dtype=torch.long), []
    for n in (1, 1024):
        loss = fused.fused_linear_distillation(
            row.repeat(n, 1), Head(weight), teacher=None, terms=Terms(), labels=labels[:n], budget_bytes=16
        ).loss
        found.append(torch.autograd.grad(loss, weight)[0].float())
    torch.testing.assert_close(found[1], 1024 * found[0], rtol=1e-2, atol=0.0)


@pytest.mark.parametrize(("name", "settings"), EVERY)
def test_hidden_gradient_is_rounded_no_more_often_than_with_whole_logits(name: str, settings: dict[str, Any]) -> None:
    """Twice: at the logits, and the product. Once more would be a tenth to a quarter further from float64.

    Without labels, whose gradient at the logits the plain path rounds by itself.
    """
    case = setting(name, settings, n=201, v=149, temperature=3.0, dtype=torch.bfloat16, labels=False)
    exact = in_float64(case)
    (right, *_), (plain, *_) = (one.gradients(plainly(one)[0]) for one in (exact, case))
    ours, *_ = case.gradients(case.run(budget_bytes=rows_to_bytes(case, 32)).loss)
    errors = [(x.double() - right).norm() for x in (ours, plain)]
    assert errors[0] < 1.05 * errors[1]


@pytest.mark.parametrize(("name", "settings"), EVERY)
def test_gradient_by_finite_differences(name: str, settings: dict[str, Any]) -> None:
    """Central differences of the loss itself, along random directions through all three leaves."""
    case = setting(name, settings, n=3, v=4, bias=True, row_weights=True, softcap=4.0)
    leaves, gradients = case.leaves(), case.gradients(case.run().loss)
    for seed in range(3):
        g = torch.Generator().manual_seed(seed)
        steps = [1e-5 * torch.randn(x.shape, generator=g, dtype=torch.float64) for x in leaves]
        ends = []
        for sign in (1, -1):
            with torch.no_grad():
                for leaf, step in zip(leaves, steps, strict=True):
                    leaf.add_(sign * step)
                ends.append(case.run().loss.item())
                for leaf, step in zip(leaves, steps, strict=True):
                    leaf.sub_(sign * step)
        slope = sum((gradient * step).sum().item() for gradient, step in zip(gradients, steps, strict=True))
        assert (ends[0] - ends[1]) / 2 == pytest.approx(slope, rel=1e-5, abs=1e-12)
