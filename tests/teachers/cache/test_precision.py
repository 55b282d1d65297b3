"""Rounding in a cache: values stay exact, logits keep their differences, and large errors give a warning."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from hf_distill import Distiller, HiddenMatch
from hf_distill.teachers import CachedTeacher, Dense, TeacherCache
from hf_distill.teachers.cache.measure import rounding_error
from tests.heads import HEADS
from tests.teachers.cache.built import build
from tests.trainer.tiny import bert, examples, padded

OFFSET = 2000.3


def shifted(head: Any, seed: int, by: float, **settings: Any) -> Any:
    """Return a model whose predictions are all larger by `by`."""
    model = head.make(seed, **settings)
    last = [module for module in model.modules() if isinstance(module, torch.nn.Linear)][-1]
    with torch.no_grad():
        last.bias.add_(by)
    return model


def losses(
    folder: Path, head: Any, student: Any, teacher: Any, store: Any = None, **settings: Any
) -> tuple[float, float]:
    """Return the losses with the live teacher and with its cache."""
    some = head.examples(8)
    cached = CachedTeacher(build(folder, head, teacher, some, student=student, store=store))
    batch = head.collate(some)
    live, stored = (
        Distiller(student, one, alpha=1.0, temperature=1.0, **settings)(student, batch).loss.item()
        for one in (teacher, cached)
    )
    return live, stored


@pytest.mark.parametrize("several", [False, True])
def test_values_are_not_rounded(tmp_path: Path, several: bool) -> None:
    """Half precision holds numbers such as years and prices only to the nearest even one."""
    head, shape = HEADS["bert_regression"], {"num_labels": 3 if several else 1, "problem_type": "regression"}
    student, teacher = shifted(head, 1, 2000.0, **shape), shifted(head, 2, OFFSET, **shape)
    live, stored = losses(tmp_path, head, student, teacher)
    assert stored == pytest.approx(live, rel=1e-5)
    batch = head.batch(8)
    with torch.no_grad():
        ours, theirs = (
            model.eval()(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits.double()
            for model in (student, teacher)
        )
    assert stored == pytest.approx((ours - theirs).square().mean().item(), rel=1e-3)
    _, half = losses(tmp_path / "float16", head, student, teacher, Dense("float16"))
    assert abs(half - live) > 0.05 * live


def test_embeddings_are_not_rounded(tmp_path: Path) -> None:
    head = HEADS["bert_embedding"]
    student, teacher = head.make(1), head.make(2)
    for model in (student, teacher):
        with torch.no_grad():
            model.encoder.layer[-1].output.LayerNorm.bias.add_(OFFSET)
    live, stored = losses(tmp_path, head, student, teacher)
    assert stored == pytest.approx(live, rel=1e-5) and live > 0.01


SOFTMAX = ["bert_single_label", "bert_tokens", "bert_multiple_choice", "wav2vec2_ctc_mean"]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("name", SOFTMAX)
def test_a_shift_of_all_logits_does_not_cost_precision(tmp_path: Path, name: str, dtype: str) -> None:
    """As precise around 2,000 as around 0, for a divergence that ignores the shift and one that
    does not; earlier stores lost most of the precision."""
    head, student = HEADS[name], HEADS[name].make(1)
    there = head.make(2)
    last = [module for module in there.modules() if isinstance(module, torch.nn.Linear)][-1]
    with torch.no_grad():
        last.weight.mul_(3)
        last.bias.add_(OFFSET)
    tolerance = {"float16": 2e-3, "bfloat16": 2e-2}[dtype]
    for divergence in ("forward_kl", "mean_squared_error"):
        given = {"divergence": divergence}
        live, stored = losses(tmp_path / divergence, head, student, there, Dense(dtype), **given)
        assert stored == pytest.approx(live, rel=tolerance) and live > 1e-2
    live, stored = losses(tmp_path / "before", head, student, there, Dense(dtype, keeps_largest=False))
    assert stored != pytest.approx(live, rel=5 * tolerance)


def test_blocked_columns_are_stored() -> None:
    store, inf = Dense("float16", keeps_largest=True), float("inf")
    rows = torch.tensor([[-inf, 2000.0, 1999.0], [-inf, -inf, -inf], [0.1, 0.2, 0.3]])
    kept = store.encode(rows, None, None)  # type: ignore[arg-type]  # for what is drawn
    laid = {name: store.decode(name, values) for name, values in kept.items()}
    assert torch.equal(store.logits(laid)[:2], rows[:2])
    assert torch.allclose(store.logits(laid)[2], rows[2], atol=1e-4)
    assert {name: field.bytes for name, field in store.fields(3).items()} == {"logits": 6, "largest": 4}


@pytest.mark.parametrize(
    ("name", "kept"),
    [
        *(
            (name, ("float16", True))
            for name in ("bert_single_label", "bert_tokens", "bert_masked_lm", "hubert_ctc_sum")
        ),
        ("bert_multi_label", ("float16", False)),
        ("bert_span", ("float16", False)),
        ("bert_regression", ("float32", False)),
        ("bert_embedding", ("float32", False)),
    ],
)
def test_default_store_of_each_head(tmp_path: Path, name: str, kept: tuple[str, bool]) -> None:
    """Multi-label heads and spans have no largest column to measure the others from."""
    head = HEADS[name]
    cache = build(tmp_path, head, head.make(2), head.examples(4), store=None)
    assert cache.manifest["store"] == {"name": "dense", "dtype": kept[0], "keeps_largest": kept[1]}


def test_the_rounding_error_is_relative_to_the_differences() -> None:
    rows = torch.randn(200, 8, dtype=torch.float64)
    for dtype, bits in (("float16", 11), ("bfloat16", 8)):
        error = (rows.to(getattr(torch, dtype)).double() - rows).square().mean().sqrt()
        expected = float(error / (rows - rows.mean(0)).square().mean().sqrt())
        assert rounding_error(rows, dtype) == pytest.approx(expected) and expected < 2.0**-bits
    assert rounding_error(rows + 2000, "float16") > 0.2
    assert rounding_error(torch.ones(4, 3), "float16") == 0


@pytest.mark.parametrize("large", [False, True])
def test_a_large_rounding_error_of_hidden_states_gives_a_warning(
    tmp_path: Path, large: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """Measured on the first batch and stored in the manifest; warns above one hundredth."""
    teacher, student = bert(seed=1, num_hidden_layers=2), bert()
    if large:
        with torch.no_grad():
            teacher.bert.encoder.layer[1].output.LayerNorm.bias.add_(OFFSET)
    given = {"data_collator": padded, "student": student, "objectives": HiddenMatch("last"), "progress": False}
    with caplog.at_level(logging.WARNING, "hf_distill"):
        cache = TeacherCache.build(teacher, examples(8), tmp_path, **given)
    measured = cache.manifest["measured"]["rounding"]
    assert set(measured) == {"hidden_1"} and (measured["hidden_1"] > 0.1 if large else measured["hidden_1"] < 1e-3)
    assert ("rounding to float16 changes hidden_1 by" in caplog.text) == large
    assert ('Pass BuildOptions(activation_dtype="float32")' in caplog.text) == large


def test_values_rounded_by_the_user_give_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    head = HEADS["bert_regression"]
    with caplog.at_level(logging.WARNING, "hf_distill"):
        cache = build(tmp_path, head, shifted(head, 2, OFFSET), head.examples(8), store=Dense("float16"))
    assert cache.manifest["measured"]["rounding"]["predictions"] > 0.01
    assert "changes predictions by" in caplog.text and 'Pass store=Dense("float32")' in caplog.text
