"""Sampled and Hybrid: unbiased targets, by a test of many draws; stored fields; errors.

Caches and trainings with them are in `test_sampled_caches.py`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from hf_distill import SettingError
from hf_distill.functional.sparse import sampled_forward_kl
from hf_distill.teachers.cache import Hybrid, Sampled
from hf_distill.teachers.cache.stores import store_from, uniforms

DRAWS, ROWS, COLUMNS = 3000, 3, 24
STORES = [
    Sampled(8),
    Sampled(8, temperature=2.0, proposal_power=0.5),
    Hybrid(3, 4, dtype="float32"),
    Hybrid(3, 4, temperature=2.0, dtype="float32"),
]


def keys(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 1 << 63, (count, 2)).astype(np.uint64)


def encoded(store: Any, rows: Tensor, examples: int, seed: int = 0) -> dict[str, Tensor]:
    """Return the fields of `examples` examples with equally many rows each."""
    counts = np.full(examples, len(rows) // examples)
    found = store.encode(rows, keys(examples, seed), counts)
    assert {name: field.width for name, field in store.fields(rows.shape[1]).items()} == {
        name: values.shape[1] for name, values in found.items()
    }
    return {name: store.decode(name, values) for name, values in found.items()}


def rows_of(seed: int, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(seed))


def dense(q: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Return KL(p ‖ q) `[n]` and its gradient q - p `[n v]`, from the definition in float64."""
    p = teacher.double().softmax(-1)
    log_q = q.double().log_softmax(-1)
    return (p * (p.log() - log_q)).sum(-1), log_q.exp() - p


def draws_of(store: Any, q: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Return `[draws n]` values and `[draws n v]` gradients of the same rows, as examples with different keys."""
    laid = encoded(store, teacher.repeat(DRAWS, 1), DRAWS)
    sparse = store.sparse_rows(laid, store.temperature)
    many = q.double().repeat(DRAWS, 1).requires_grad_()
    values = sampled_forward_kl(many, sparse.ids, sparse.log_probabilities, sparse.weights)
    (gradient,) = torch.autograd.grad(values.sum(), many)
    return values.detach().view(DRAWS, ROWS), gradient.view(DRAWS, ROWS, COLUMNS)


def z_scores(draws: Tensor, expected: Tensor) -> Tensor:
    """Return (mean - expected) / standard error of the mean; for a constant entry, 0 if it is as expected."""
    error = draws.std(0) / DRAWS**0.5
    apart = draws.mean(0) - expected
    never = torch.where(apart.abs() < 1e-6, 0.0, torch.inf)
    return torch.where(error < 1e-9, never, apart / error).flatten()


@pytest.mark.parametrize("store", STORES, ids=repr)
def test_the_mean_gradient_over_draws_is_the_dense_gradient(store: Any) -> None:
    """3000 draws of 72 entries. The mean is nearly normal (the rarest column is drawn about 130 times),
    and one of 75 normal numbers exceeds 4.5 with probability 75 · 6.8e-6 = 5e-4; the seed is fixed."""
    q, teacher = rows_of(1, 0.5), rows_of(2)
    value, gradient = dense(q, teacher / store.temperature)
    values, gradients = draws_of(store, q, teacher)
    scores = torch.cat([z_scores(values, value), z_scores(gradients, gradient)])
    assert scores.abs().max() < 4.5
    # The mean square is near 1 (entries of a row are correlated): a much too large error would hide a bias.
    assert 0.5 < (scores[scores != 0] ** 2).mean() < 1.7 and (scores != 0).sum() > 60
    # The test detects a bias: that of the gradient for a sharper teacher.
    other = dense(q, 1.3 * teacher / store.temperature)[1]
    assert z_scores(gradients, other).abs().max() > 4.5


def test_weights_sum_to_1_on_average() -> None:
    """With a power below 1 the sum varies; its mean over 9000 rows is 1 within 4.5 standard errors, at most 2 %."""
    store, teacher = Sampled(8, proposal_power=0.5), rows_of(2)
    total = store.sparse_rows(encoded(store, teacher.repeat(DRAWS, 1), DRAWS), 1.0).weights.double().sum(-1)
    error = (total.std() / len(total) ** 0.5).item()
    assert 0 < error < 0.02 / 4.5 and abs(total.mean().item() - 1) < 4.5 * error


def test_the_bias_of_renormalized_topk_is_detected() -> None:
    """The k largest, renormalized, in the same statistic: without draws, the whole difference is bias."""
    q, teacher = rows_of(1, 0.5), rows_of(2)
    kept, ids = teacher.log_softmax(-1).topk(8)
    renormalised = torch.full_like(teacher, -torch.inf).scatter(-1, ids, kept).softmax(-1)
    bias = (renormalised - teacher.softmax(-1)).double()
    error = draws_of(Sampled(8), q, teacher)[1].std(0) / DRAWS**0.5
    assert (bias / error).abs().max() > 20


def test_stratified_draws_vary_less_than_independent_draws() -> None:
    q, teacher = rows_of(1, 0.5), rows_of(2, 2.0)
    spread = draws_of(Sampled(16), q, teacher)[1].var(0).sum().item()
    p = teacher.double().softmax(-1)
    assert spread < 0.5 * (p * (1 - p)).sum().item() / 16  # the variance of independent draws


def test_draws_depend_only_on_key_and_seed() -> None:
    """The same bits in one batch, in other batches, or in another order; another seed, key or position differs."""
    counts, width = np.array([2, 0, 3, 1]), 5
    some = keys(4)
    whole = uniforms(some, counts, width, seed=7)
    assert whole.shape == (6, width) and whole.min() >= 0 and whole.max() < 1
    order = [3, 0, 2]
    parts = [uniforms(some[i : i + 1], counts[i : i + 1], width, seed=7) for i in order]
    assert torch.equal(torch.cat(parts), whole[[5, 0, 1, 2, 3, 4]])
    assert torch.equal(uniforms(some[order], counts[order], width, seed=7), torch.cat(parts))
    others = [uniforms(some, counts, width, seed=8), uniforms(keys(4, 1), counts, width, seed=7), whole.roll(1, 0)]
    assert all((one != whole).all() for one in others)
    assert uniforms(some, np.full(4, 500), width, seed=0).mean().item() == pytest.approx(0.5, abs=4.5 / (12e4) ** 0.5)


@pytest.mark.parametrize("store", [Sampled(8), Sampled(5, proposal_power=0.5), Hybrid(4, 5)], ids=repr)
def test_encoding_in_pieces_equals_encoding_at_once(store: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = torch.randn(10, COLUMNS, generator=torch.Generator().manual_seed(3))
    whole = encoded(store, rows, 5)
    monkeypatch.setattr("hf_distill.teachers.cache.stores._DRAWN_AT_ONCE", 3 * 8 * 128)
    pieces = encoded(store, rows, 5)
    torch.testing.assert_close(pieces, whole)  # equal columns, and values up to rounding


def test_fields_of_a_row() -> None:
    """Each column once; weights sum to 1; no impossible columns; -1 and 0 in place of repeated draws."""
    rows = torch.randn(40, COLUMNS, generator=torch.Generator().manual_seed(3)) * 3
    rows[:, 5:8] = -torch.inf
    for store in (Sampled(16), Sampled(16, proposal_power=0.5), Hybrid(4, 12), Hybrid(COLUMNS - 1, 2)):
        sparse = store.sparse_rows(encoded(store, rows, 40), 1.0)
        for ids, weights in zip(sparse.ids.tolist(), sparse.weights.tolist(), strict=True):
            listed = [one for one in ids if one >= 0]
            assert len(set(listed)) == len(listed) and not {5, 6, 7} & set(listed)
            assert all((weight > 0) == (one >= 0) for one, weight in zip(ids, weights, strict=True))
        assert torch.isfinite(sparse.log_probabilities).all() and (sparse.log_tail == -torch.inf).all()
        total = sparse.weights.sum(-1)
        if store != Sampled(16, proposal_power=0.5):
            assert torch.allclose(total, torch.ones(40), atol=1e-6)
        assert total.mean().item() == pytest.approx(1, abs=0.2)


def test_hybrid_stores_the_likeliest_and_samples_the_others() -> None:
    rows = torch.randn(30, COLUMNS, generator=torch.Generator().manual_seed(4))
    log_p = rows.double().log_softmax(-1)
    store = Hybrid(4, 6, dtype="float32")
    sparse = store.sparse_rows(encoded(store, rows, 30), 1.0)
    assert torch.equal(sparse.ids[:, :4], log_p.topk(4).indices)
    assert torch.allclose(sparse.weights[:, :4].double(), log_p.topk(4).values.exp(), rtol=1e-5)
    others = 1 - log_p.topk(4).values.exp().sum(-1)
    for row in range(30):
        drawn = [one for one in sparse.ids[row, 4:].tolist() if one >= 0]
        assert drawn and not set(drawn) & set(sparse.ids[row, :4].tolist())
        shares = sparse.weights[row, 4:] / (others[row] / 6)  # whole numbers of draws
        assert torch.allclose(shares, shares.round(), atol=1e-4) and shares.sum().round() == 6


@pytest.mark.parametrize("k", [COLUMNS, COLUMNS + 3])
def test_hybrid_of_all_columns_is_exact(k: int) -> None:
    q, teacher = rows_of(1), rows_of(2)
    teacher[0, 3] = -torch.inf  # one impossible column, so that none is left to draw from
    values, gradients = draws_of(Hybrid(k, 4, dtype="float32"), q, teacher)
    p = teacher.double().softmax(-1)
    log_q = q.double().log_softmax(-1)
    expected = torch.special.xlogy(p, p).sum(-1) - (p * log_q).sum(-1)
    torch.testing.assert_close(values, expected.expand(DRAWS, -1), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradients, (log_q.exp() - p).expand(DRAWS, -1, -1), rtol=1e-5, atol=1e-6)


def test_value_is_0_at_equality() -> None:
    teacher = rows_of(2)
    for store in (Sampled(8), Sampled(8, proposal_power=0.5), Hybrid(3, 4, dtype="float32")):
        assert draws_of(store, teacher, teacher)[0].abs().max() < 1e-6


def test_bytes_of_a_position() -> None:
    """ids of 2 bytes (4 beyond 65,536 columns), 4 for the mean; weights of 4 with a power; k log-probabilities of 2."""

    def size(store: Any, columns: int) -> int:
        return sum(field.bytes for field in store.fields(columns).values())

    assert size(Sampled(32), 32_000) == 32 * 2 + 4 and size(Sampled(32), 128_256) == 32 * 4 + 4
    assert size(Sampled(32, proposal_power=0.5), 32_000) == 32 * (2 + 4) + 4
    assert size(Hybrid(16, 12), 32_000) == 16 * (2 + 2) + 12 * 2 + 8


def test_invalid_settings_raise_and_stores_round_trip() -> None:
    for wrong, message in (
        (lambda: Sampled(0), r"Sampled\(samples=0, .*: samples is at least 1"),
        (lambda: Sampled(temperature=0.0), "temperature is above 0"),
        (lambda: Sampled(proposal_power=1.5), "has no bound"),
        (lambda: Sampled(proposal_power=0.0), "proposal_power is above 0 and at most 1"),
        (lambda: Sampled(seed=-1), r"seed=-1\): .* seed is from 0"),
        (lambda: Hybrid(0), r"Hybrid\(k=0, .*: k is at least 1. For samples alone use Sampled"),
        (lambda: Hybrid(samples=0), r"Hybrid\(k=16, samples=0, .*: samples is at least 1"),
        (lambda: Hybrid(dtype="bfloat16"), "allowed are float16, float32"),
    ):
        with pytest.raises(SettingError, match=message):
            wrong()
    for store in STORES:
        assert store_from(store.describe()) == store  # the description in a manifest
