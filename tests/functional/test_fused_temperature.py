"""L5 for the fused path, fp32 and bf16, in chunks and blocks that do not divide: T^p is in the gradient at every
temperature, and at high temperatures the gradient does not depend on it.

The references share no code with the library: the papers' formulas in numpy, their slopes by central differences, and
limits by hand. Every logit is a multiple of 1/16 below 16, which bf16 holds exactly, so that the only error in
16 bits is the rounding of the gradient. Heads that scale or cap their logits are tested elsewhere.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from hf_distill.functional.fused import chunks
from hf_distill.functional.fused.inputs import Head, Labels, TeacherHidden, TeacherLogits, TeacherSparse, Terms, fusable
from hf_distill.functional.sparse import OUTCOME_DIVERGENCES, SAMPLE_DIVERGENCES
from tests.functional import references
from tests.functional.test_fused_linear import SETTINGS, Setting

N, V = 13, 31
POWER = {"total_variation": 1, "dist": 0, "mean_squared_error": 0, "hard": 0}  # 2 for all others
AS_THEY_ARE = ("mean_squared_error", "hard")
OF_LABELS, OF_DIVERGENCE = 0.3, 0.7
NEXT_ORDER = 4  # over T: about the logits' spread, which is 2 to 3 in every row
PRECISIONS = (torch.float32, torch.bfloat16)
ROUNDING = 4e-6  # of a row's value in fp32, a difference of numbers like log v, eight times one in DKD
EVERY = [pytest.param(name, settings, id=f"{name}{list(settings.values())}") for name, settings in SETTINGS]
SOFTENED = [case for case in EVERY if case.values[0] not in AS_THEY_ARE]


@functools.cache
def drawn() -> dict[str, Tensor]:
    """Rows of −1, 0 and 1; heads in sixteenths up to 2, so no logit is above 12."""
    g = torch.Generator().manual_seed(4)

    def sixteenths(*shape: int) -> Tensor:
        return torch.randint(-32, 33, shape, generator=g).double() / 16

    def signs(*shape: int) -> Tensor:
        return torch.randint(-1, 2, shape, generator=g).double()

    given = {"hidden": signs(N, 5), "weight": sixteenths(V, 5), "bias": sixteenths(V)}
    given |= {"their_hidden": signs(N, 6), "their_weight": sixteenths(V, 6)}
    given["student"] = given["hidden"] @ given["weight"].T + given["bias"]
    given["teacher"] = given["their_hidden"] @ given["their_weight"].T
    given["labels"] = torch.randint(0, V, (N,), generator=g)
    given["labels"][::4] = -100
    given["row_weights"] = torch.rand(N, generator=g).double()
    given["row_weights"][5] = 0.0
    return given


def case_of(
    name: str, settings: dict[str, Any], temperature: float, dtype: torch.dtype, *, labels: bool = False
) -> Setting:
    x, weights = drawn(), drawn()["row_weights"].float()
    hidden, weight, bias = (x[leaf].to(dtype).requires_grad_() for leaf in ("hidden", "weight", "bias"))
    return Setting(
        hidden,
        Head(weight, bias),
        TeacherHidden(x["their_hidden"].to(dtype), Head(x["their_weight"].to(dtype))),
        Terms(name, settings, temperature=temperature, labels_factor=OF_LABELS, divergence_factor=OF_DIVERGENCE),
        Labels(x["labels"], weights.flip(0)) if labels else None,
        weights,
    )


def at_the_leaves(at_logits: Tensor) -> list[Tensor]:
    x = drawn()
    return [at_logits @ x["weight"], at_logits.T @ x["hidden"], at_logits.sum(0)]


def apart(found: list[Tensor], expected: list[Tensor]) -> float:
    """The worst leaf, relative to its norm."""
    return max(
        (x.double() - right).norm().item() / right.norm().item() for x, right in zip(found, expected, strict=True)
    )


def close(dtype: torch.dtype, temperature: float) -> float:
    """bf16 rounds three times, by up to 2⁻⁹: at the logits, each chunk's product with the rows, and the result.

    In fp32 q − p is about p / T, so that the probabilities' rounding is up to T times as large beside it.
    """
    return (3 * 2**-9 if dtype == torch.bfloat16 else 2e-6) + temperature * 2**-23


@functools.cache
def row_of(name: str, settings: tuple[tuple[str, Any], ...]) -> Callable[..., float]:
    """A row's divergence in numpy; at β = 0 and 1, where the formula is 0, the KL that is its limit."""
    options = {k: v for k, v in settings if k != "intra_weight"}
    at_the_end = {0.0: references.forward_kl, 1.0: references.reverse_kl}.get(options.get("beta", 0.5))
    return at_the_end or functools.partial(references.A_ROW[name], **options)


@functools.cache
def slopes(name: str, settings: tuple[tuple[str, Any], ...], temperature: float) -> tuple[Tensor, Tensor]:
    """Values `[n]` of a row's divergence, and slopes `[n v]` at its logits, less T^p."""
    x, step = drawn(), 1e-4
    t = 1.0 if name in AS_THEY_ARE else temperature
    values, found = torch.zeros(N).double(), torch.zeros(N, V).double()
    for i in range(N):
        student, teacher = x["student"][i].numpy(), x["teacher"][i].numpy()
        row = row_of(name, settings)
        if name == "decoupled":
            row = functools.partial(row, target=int(x["labels"][i]))
        values[i] = row(student / t, teacher / t)
        for j in range(V):
            ends = []
            for sign in (1, -1):
                moved = student.copy()
                moved[j] += sign * step
                ends.append(row(moved / t, teacher / t))
            found[i, j] = (ends[0] - ends[1]) / (2 * step)
    return values, found


@pytest.fixture(params=["both sides", "over the teacher's"])
def layout(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Chunks of 5, 5 and 3 rows; or 8 and 5 of the teacher's, the student's by threes. Blocks of 2.

    A 16-bit head's gradient is summed in pieces of 12, 12 and 7 columns, by fours.
    """
    over = request.param == "over the teacher's"
    for name, value in (
        ("MOST_ROWS", 5),
        ("FEW_ROWS", 3),
        ("ENOUGH_ROWS", 8 if over else 5),
        ("TILE", 4),
        ("PIECE", 12),
    ):
        monkeypatch.setattr(chunks, name, value)
    monkeypatch.setattr(chunks, "BLOCK_CPU", 2 * 4 * V)
    expected = chunks.ChunkRows(8, 3) if over else chunks.ChunkRows(5, 5)
    assert chunks.rows_a_chunk(N, V, V, 10**6, over_teacher=True) == expected
    return str(request.param)


def test_random_inputs_meet_the_assumptions_of_the_tolerances() -> None:
    x = drawn()
    for side in ("student", "teacher"):
        assert x[side].bfloat16().double().equal(x[side])
    best = x["teacher"].topk(2).values
    assert (best[:, 0] > best[:, 1]).all()
    assert {name for name, _ in SETTINGS} == {*fusable(), "dist"}


@pytest.mark.parametrize("temperature", [1.0, 1.5, 2.0, pytest.param(3.0, marks=pytest.mark.slow), 512.0])
@pytest.mark.parametrize(("name", "settings"), EVERY)
def test_gradient_is_the_slope_times_the_power_of_the_temperature(
    name: str, settings: dict[str, Any], temperature: float, layout: str
) -> None:
    """Together with labels, to which the temperature does not apply: their slope is softmax minus one-hot."""
    x = drawn()
    power = temperature ** POWER.get(name, 2)
    values, slope = slopes(name, tuple(settings.items()), temperature)
    known = x["labels"] >= 0
    of_labels = x["student"].softmax(-1) - torch.nn.functional.one_hot(x["labels"].clamp(min=0), V)
    label_weights = x["row_weights"].flip(0) * known
    at_logits = OF_DIVERGENCE * power * x["row_weights"][:, None] * slope
    expected = at_the_leaves(at_logits + OF_LABELS * label_weights[:, None] * of_labels)
    for dtype in PRECISIONS:
        case = case_of(name, settings, temperature, dtype, labels=True)
        found = case.run()
        assert apart(case.gradients(found.loss), expected) < close(dtype, temperature)
        torch.testing.assert_close(found.divergence_rows.double(), values, rtol=1e-5, atol=ROUNDING)
        own = found.loss.item() - OF_LABELS * found.labels_total.item()
        total = (values @ x["row_weights"]).item()
        assert own == pytest.approx(OF_DIVERGENCE * power * total, rel=1e-5, abs=OF_DIVERGENCE * power * N * ROUNDING)


def limit(name: str, settings: dict[str, Any], target: Tensor | None = None) -> Tensor:
    """The gradient `[n v]` at the logits of T^p times the divergence for T → ∞, by hand.

    With s and t centred logits and d = s − t: q = (1 + s/T)/v and p = (1 + t/T)/v to first order, so that every
    f-divergence is c/2 · Σ (q − p)²/(1/v) = c/2 · Σ d²/(v T²), whose gradient times T² is c · d/v. c is 1 for either
    KL, 2 for their sum; β (1 − β) for Jensen–Shannon, as p − m = (1 − β)(p − q) and q − m = β (q − p); (1 − skew)² for
    a mixture, as p − m = (1 − skew)(p − q).
    """
    student, teacher = (drawn()[side] - drawn()[side].mean(-1, keepdim=True) for side in ("student", "teacher"))
    d = student - teacher
    if name == "total_variation":  # T/2 · Σ |d|/(v T), and d is centred
        return 0.5 * (d.sign() - d.sign().mean(-1, keepdim=True)) / V
    if name == "dist":  # 1 − cos(s, t)
        a, b = (x / x.norm(dim=-1, keepdim=True) for x in (student, teacher))
        return ((a * b).sum(-1, keepdim=True) * a - b) / student.norm(dim=-1, keepdim=True)
    if name == "decoupled":
        return limit_of_decoupled(d)
    beta = settings.get("beta", 0.5)
    c = {
        "forward_kl": 1.0,
        "reverse_kl": 1.0,
        "jeffreys": 2.0,
        "jensen_shannon": beta * (1 - beta) if 0 < beta < 1 else 1.0,
        "skewed_forward_kl": (1 - settings.get("skew", 0.1)) ** 2,
        "skewed_reverse_kl": (1 - settings.get("skew", 0.1)) ** 2,
    }[name]
    return c * d / V


def limit_of_decoupled(d: Tensor) -> Tensor:
    """Of the target's d_y against the rest, ½ (d_y/(v T))² (v + v/(v − 1)) = ½ d_y²/(T² (v − 1)); its d_y is centred.

    Among the v − 1 others, as a KL of so many columns. Weights 1 and 8, as in the paper; the target is the teacher's
    likeliest column, as there are no labels.
    """
    target = torch.nn.functional.one_hot(drawn()["teacher"].argmax(-1), V).double()
    d_y = (d * target).sum(-1, keepdim=True)
    others = (d + d_y / (V - 1)) * (1 - target)  # the others' mean is −d_y/(v − 1)
    return d_y / (V - 1) * (target - 1 / V) + 8 * others / (V - 1)


@pytest.mark.parametrize("temperature", [1024.0, 3000.0])
@pytest.mark.parametrize(("name", "settings"), SOFTENED)
def test_gradient_does_not_depend_on_high_temperatures(
    name: str, settings: dict[str, Any], temperature: float, layout: str
) -> None:
    expected = at_the_leaves(OF_DIVERGENCE * drawn()["row_weights"][:, None] * limit(name, settings))
    for dtype in PRECISIONS:
        case = case_of(name, settings, temperature, dtype)
        assert apart(case.gradients(case.run().loss), expected) < close(dtype, temperature) + NEXT_ORDER / temperature


@pytest.mark.parametrize("name", AS_THEY_ARE)
def test_divergences_without_softening_ignore_the_temperature(name: str, layout: str) -> None:
    for dtype in PRECISIONS:
        cold, hot = (case_of(name, {}, t, dtype, labels=True) for t in (1.0, 7.0))
        for one, other in zip(cold.gradients(cold.run().loss), hot.gradients(hot.run().loss), strict=True):
            assert one.equal(other) and one.any()


def merged(d: Tensor, ids: Tensor) -> Tensor:
    """Columns that are not listed get their mean: to first order, this is the bucket's logit."""
    listed = torch.zeros(N, V).scatter(1, ids, 1.0).bool()
    mean = (d * ~listed).sum(-1, keepdim=True) / (~listed).sum(-1, keepdim=True)
    return torch.where(listed, d, mean)


@pytest.mark.parametrize("temperature", [1024.0, 3000.0])
@pytest.mark.parametrize(
    ("kind", "name"),
    [("logits", name) for name in OUTCOME_DIVERGENCES]
    + [("sparse", name) for name in OUTCOME_DIVERGENCES]
    + [("samples", name) for name in SAMPLE_DIVERGENCES],
)
def test_high_temperature_limit_for_each_kind_of_teacher(kind: str, name: str, temperature: float, layout: str) -> None:
    """Logits; four columns and a bucket; every column as a sample whose weight is its probability."""
    x = drawn()
    log_p = (x["teacher"] / temperature).log_softmax(-1)
    ids = x["teacher"].topk(4 if kind == "sparse" else V).indices
    listed = log_p.gather(1, ids)
    at_logits = limit(name, {})
    if kind == "sparse" and name == "total_variation":
        d = x["student"] - x["teacher"]
        sign = merged(d - d.mean(-1, keepdim=True), ids).sign()
        at_logits = 0.5 * (sign - sign.mean(-1, keepdim=True)) / V
    elif kind == "sparse":
        at_logits = merged(at_logits, ids)
    expected = at_the_leaves(OF_DIVERGENCE * x["row_weights"][:, None] * at_logits)
    for dtype in PRECISIONS:
        case = case_of(name, {}, temperature, dtype)
        if kind == "logits":
            case.teacher = TeacherLogits(x["teacher"].to(dtype))
        else:
            weights = listed.exp().float() if kind == "samples" else None
            tail = torch.log1p(-listed.exp().sum(-1)).float() if weights is None else None
            case.teacher = TeacherSparse(ids, (listed * temperature).float(), tail, weights)
        assert apart(case.gradients(case.run().loss), expected) < close(dtype, temperature) + NEXT_ORDER / temperature
